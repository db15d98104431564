"""``meansparse measure``, and evaluations that have a name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.reporting.console import console, is_wide
from meansparse_cli.reporting.sweep_tables import measurement_table, show_sweep
from meansparse_cli.runs.folder import run_folder_lock
from meansparse_cli.selection.choice import SweepPoint
from tests.conftest import said

FACTORY = '''
import torch
from torch import nn

def three():
    """Three sites; learnt from nothing, and torn between its classes."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 6, 3, stride=2), nn.GELU(), nn.Conv2d(6, 6, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )
    with torch.no_grad():
        net[-1].bias -= net(torch.rand(500, 3, 8, 8)).mean(0)
    return net
'''
COMMON = ["--eps", "1/255", "--attack", "pgd-8", "--n-examples", "20"]


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> tuple[Path, str]:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Path(result.stdout.strip().splitlines()[-1]), said(result)


def results(report: Path) -> dict[str, Any]:
    return yaml.safe_load(report.read_text())["results"]  # type: ignore[no-any-return]


def arrays(report: Path) -> dict[str, np.ndarray]:
    with np.load(report.with_name("outcomes.npz")) as stored:
        return dict(stored)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 10)
    Path("three.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (300, 8, 8, 3)).astype(np.uint8)
    module: dict[str, Any] = {}
    exec(FACTORY, module)
    with torch.no_grad():
        y = module["three"]()(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()
    y[::10] = (y[::10] + 1) % 3  # what the network says, and some of it wrong
    np.savez("data.npz", x=x, y=y)
    done("calibrate", "--model", "three.py:three", "--dataset", "data.npz", "--run", "run")
    return "run"


def test_rows_are_the_base_then_every_rule_and_alpha(run: str) -> None:
    path, _ = done("measure", "--run", run, *COMMON, "--alphas", "2,0,1", "--sites", "single:*", "--sites", "first:*")
    assert path == Path("run/measurements/grid/measure.yaml")
    found = results(path)
    rows = [(row["sites"], row["alpha"]) for row in found["rows"]]
    rules = ["single:0", "single:1", "single:2", "first:1", "first:2", "first:3"]
    assert rows == [("all", 0.0), *((rule, alpha) for rule in rules for alpha in (1.0, 2.0))]
    assert found["attacks"] == ["pgd-8"] and found["bpda_attacks"] == ["bpda-apgd-ce"] and found["split"] == "test"
    assert found["precision"] == ("tf32" if torch.cuda.is_available() else "fp32")
    outcomes = arrays(path)
    assert outcomes["worst"].shape == (13, 20)
    for name in ("clean", "plain", "bpda", "worst"):
        measured = [row[name]["accuracy"] for row in found["rows"]]
        assert measured == pytest.approx(outcomes[name].mean(1).tolist())
        place = {row: i for i, row in enumerate(rows)}
        assert (outcomes[name][place["single:0", 2.0]] == outcomes[name][place["first:1", 2.0]]).all()
    assert not (outcomes["worst"] & ~outcomes["plain"]).any() and not (outcomes["plain"] & ~outcomes["clean"]).any()
    assert len({tuple(row) for name in ("clean", "plain", "worst") for row in outcomes[name][1:]}) > 3, [
        outcomes[n].sum(-1) for n in outcomes
    ]


def test_without_an_attack_there_is_clean_accuracy_and_nothing_else(run: str) -> None:
    attacked, _ = done("measure", "--run", run, *COMMON, "--alphas", "0.6")
    n = results(attacked)["n_examples"]
    path, words = done("measure", "--run", run, "--name", "clean", "--attack", "none", "--alphas", "0.6")
    found, outcomes = results(path), arrays(path)
    assert [row["eps"] for row in found["rows"]] == ["0", "0"]
    assert found["n_examples"] == 30 > n and found["attacks"] == found["bpda_attacks"] == []
    assert set(outcomes) == {"index", "label", "clean"}
    assert (outcomes["clean"][:, :n] == arrays(attacked)["clean"]).all()
    assert found["rows"][1]["plain"] == {"n_examples": 0} and found["backward_passes"] == 0
    assert found["forward_passes"] == 2 * 30
    assert "clean - base" in words and "worst" not in words
    text = said(meansparse("report", str(path.parent)).stdout)
    assert "30 test images, none of them attacked" in text and "worst" not in text
    refused = meansparse("measure", "--run", run, "--attack", "none", "--attack", "pgd-8")
    assert refused.exit_code == 3 and "unknown attack 'none'" in said(refused)


def test_it_agrees_with_evaluate(run: str) -> None:
    measured, _ = done("measure", "--run", run, *COMMON, "--alphas", "0.6")
    evaluated, _ = done(
        "evaluate", "--run", run, *COMMON, "--no-doubts", "--alpha", "0.6", "--individual", "--name", "six"
    )
    assert evaluated == Path("run/evaluations/six/evaluate.yaml")
    theirs, ours = arrays(evaluated), arrays(measured)
    column = list(theirs["name"]).index("pgd-8")
    assert (theirs["index"] == ours["index"]).all()
    for row, model in enumerate(("base", "sparsified")):
        outcome = theirs[f"{model}_outcome"]
        assert (ours["clean"][row] == (outcome[:, 0] == 0)).all()
        assert (ours["plain"][row] == ((outcome[:, 0] == 0) & (outcome[:, column] == 0))).all()


def test_done_is_done_and_more_images_add_to_it(run: str) -> None:
    one = ["--alphas", "0.4", "--block-size", "5"]
    first, _ = done("measure", "--run", run, *COMMON, *one)
    before, written = arrays(first), first.read_bytes()
    again, words = done("measure", "--run", run, *COMMON, *one)
    assert "already done" in words and again.read_bytes() == written
    blocks = {p: p.stat().st_mtime_ns for p in Path(run).rglob("block-*.pt")}
    assert len(blocks) == 4
    done("measure", "--run", run, *COMMON[:-1], "30", *one)
    after = arrays(first)
    assert (after["plain"][:, :20] == before["plain"]).all() and after["plain"].shape == (2, 30)
    assert {p: p.stat().st_mtime_ns for p in blocks} == blocks


def test_every_eps_has_its_base(run: str) -> None:
    path, _ = done(
        "measure",
        "--run",
        run,
        "--attack",
        "pgd-8",
        "--n-examples",
        "20",
        "--eps",
        "1/255:3/255:1/255",
        "--alphas",
        "0.4",
    )
    rows = [(row["eps"], row["alpha"]) for row in results(path)["rows"]]
    assert rows == [(eps, alpha) for eps in ("1/255", "2/255", "3/255") for alpha in (0.0, 0.4)]
    plain = arrays(path)["plain"].sum(1)
    assert plain[0] >= plain[2] >= plain[4]


def test_other_splits_are_said_loudly(run: str) -> None:
    path, words = done("measure", "--run", run, *COMMON, "--alphas", "0.4", "--split", "calibration", "--name", "train")
    assert "NOT TEST IMAGES" in words and "20 calibration images" in words and results(path)["split"] == "calibration"
    _, words = done(
        "evaluate", "--run", run, *COMMON, "--no-doubts", "--alpha", "0.4", "--split", "held-out", "--name", "h"
    )
    assert "NOT TEST IMAGES" in words and "20 held-out images" in words
    _, words = done("evaluate", "--run", run, *COMMON, "--no-doubts", "--alpha", "0.4")
    assert "NOT TEST IMAGES" not in words


def test_named_evaluations_stand_side_by_side(run: str) -> None:
    paths = [
        done("evaluate", "--run", run, *COMMON, "--no-doubts", "--alpha", a, "--name", f"alpha-{a}")[0]
        for a in ("0.2", "0.4")
    ]
    unnamed, _ = done("evaluate", "--run", run, *COMMON, "--no-doubts", "--alpha", "0.6")
    assert [results(path)["alpha"] for path in (*paths, unnamed)] == [0.2, 0.4, 0.6]
    for path in paths:
        assert (
            "already done"
            in done(
                "evaluate",
                "--run",
                run,
                *COMMON,
                "--no-doubts",
                "--alpha",
                path.parent.name[6:],
                "--name",
                path.parent.name,
            )[1]
        )


def test_measurements_may_run_at_the_same_time_but_not_the_same_one_twice(run: str) -> None:
    with run_folder_lock(Path(run)), run_folder_lock(Path(run) / "measurements" / "other"):
        done("measure", "--run", run, *COMMON, "--alphas", "0.4")
        refused = meansparse("measure", "--run", run, *COMMON, "--alphas", "0.4", "--name", "other")
    assert refused.exit_code == 10 and "another command is at work" in said(refused)


@pytest.mark.parametrize("width", [80, 100])
def test_its_table_and_the_sweeps_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", width)
    generator = torch.Generator().manual_seed(0)
    right = torch.ones(1000, dtype=torch.bool)
    weaker = torch.rand(1000, generator=generator) < 0.99
    base, point = SweepPoint(0.0, right, right, right, right), SweepPoint(0.35, weaker, weaker, weaker, weaker)
    name = "first:14 of a long name"
    rows = [{"eps": "8/255", "sites": sites} | p.to_report(base) for sites, p in (("all", base), (name, point))]
    rows.append(rows[1] | {"sites": "all"})
    results = {"rows": rows, "n_examples": 1000, "split": "test", "attacks": ["apgd-ce", "apgd-dlr"]}
    tables = [
        measurement_table(results, with_errors=is_wide()).to_rich(),
        show_sweep([base, point], ["apgd-ce", "apgd-dlr"], 0.35),
    ]
    for table, n_lines in zip(tables, (9, 8), strict=True):
        with console.capture() as capture:
            console.print(table)
        text = capture.get()
        assert "…" not in text and max(len(line.rstrip()) for line in text.splitlines()) <= width
        lost = 100 * (1 - weaker.double().mean().item())
        assert f"-{lost:.2f} ± " in text and "100.00" in text
        assert text.count("\n") <= n_lines  # no cell is folded


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--name", "../elsewhere"], 3, "name"),
        (["--sites", "first:9"], 8, "only 3 sites"),
        (["--sites", "first:none"], 3, "first:N needs a whole number"),
        (["--split", "validation"], 3, "split"),
        (["--attack", "pdg-50"], 3, "pgd-50"),
        (["--n-examples", "5000"], 7, "5000 examples were asked for"),
        (["--eps", "8"], 3, "8/255"),
    ],
)
def test_bad_input(run: str, options: list[str], code: int, words: str) -> None:
    refused = meansparse("measure", "--run", run, "--alphas", "0.4", "--n-examples", "5", "--eps", "2/255", *options)
    assert refused.exit_code == code and words in said(refused), refused.output

"""The make targets of the tables: the chains they print are commands that exist; one of them for real (slow)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.paper.tables import table_names
from tests.conftest import said

ROOT = Path(__file__).parent.parent
OPTIONS = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
MEANSPARSE = f"{sys.executable} -m meansparse_cli"
TARGETS = [f"table{n}" for n in range(1, 13)] + ["headline", "table-subset", "figure1", "summary", "tables"]


def make(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *words, "INSTALLED=", *(f"{key}={value}" for key, value in more.items())],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def reproduced(*words: str) -> list[list[str]]:
    """The commands that `meansparse reproduce` would run."""
    printed = CliRunner().invoke(app, ["reproduce", *words, "--dry-run"])
    assert printed.exit_code == 0, printed.output
    return [shlex.split(line) for line in printed.stdout.splitlines() if line.startswith("meansparse ")]


def chain(target: str, **more: str) -> list[list[str]]:
    """The commands behind a target: `make` types one, which stands for those that it would run."""
    printed = make("-n", target, MEANSPARSE="meansparse", **more)
    assert printed.returncode == 0, printed.stderr
    typed = [shlex.split(line) for line in printed.stdout.splitlines() if line.startswith("meansparse ")]
    assert len(typed) == 1
    _, name, *words = typed[0]
    return reproduced(*words) if name == "reproduce" else typed


@pytest.mark.parametrize(
    "more", [{}, {"MODEL": "digits", "N": "7", "QUICK": "1", "DEVICE": "cuda"}], ids=["plain", "options"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_every_command_of_every_chain_exists(target: str, more: dict[str, str]) -> None:
    commands = chain(target, **more)
    for _, name, *words in commands:
        assert name in OPTIONS
        unknown = {word for word in words if re.match(r"-[-a-z]", word)} - OPTIONS[name]
        assert not unknown, f"{name} has no {sorted(unknown)}"
    tables = [words[2] for words in commands if words[1] == "table"]
    if target.startswith("table") and target[5:].isdecimal():
        assert tables == [target[5:]]
    assert len(commands) == len({tuple(words) for words in commands}), (
        "a command that two tables need stands there once"
    )


def test_table_5_in_full() -> None:
    common = "--device auto --batch-size 250"
    attacks = "--attack adaptive-1-1:0 --attack adaptive --attack surrogate --individual"
    assert [" ".join(words) for words in chain("table5", DATA="DIR", N="100")] == [
        f"meansparse calibrate --run runs/tables/resnet18-w16 --model resnet18-w16 --data-dir DIR {common}",
        *(
            f"meansparse evaluate --run runs/tables/resnet18-w16 --name adaptive-{alpha} --norm Linf --eps 8/255 "
            f"--alpha {alpha} {attacks} --no-doubts --data-dir DIR --n-examples 100 {common}"
            for alpha in ("0.2", "0.35")
        ),
        "meansparse table 5 runs/tables/resnet18-w16 -o runs/tables/pages",
    ]


def test_headline_alphas_are_the_papers() -> None:
    from meansparse_cli.paper.tables import paper_table

    found = {w[w.index("--config") + 1]: w[w.index("--alpha") + 1] for w in chain("headline") if w[1] == "evaluate"}
    columns = {
        "WRN-94-16": "cifar10-linf-wrn-94-16",
        "RaWRN-70-16": "cifar10-linf-rawrn-70-16",
        "WRN-70-16": "cifar10-linf-wrn-70-16",
        "L2 WRN-70-16": "cifar10-l2-wrn-70-16",
        "CIFAR-100 WRN-70-16": "cifar100-linf-wrn-70-16",
        "ImageNet Swin-L": "imagenet-linf-swin-l",
        "ImageNet ConvNeXt-L": "imagenet-linf-convnext-l",
        "ImageNet RaWRN-101-2": "imagenet-linf-rawrn-101-2",
    }
    table = paper_table("headline")
    assert [column.name for column in table.columns] == list(columns)
    assert [column.config for column in table.columns] == list(columns.values())
    assert found == {
        f"configs/{columns[column.name]}.yaml": column.cells[-1].where["alpha"] for column in table.columns
    }


def test_a_model_that_is_there_is_not_trained(tmp_path: Path) -> None:
    assert sum(words[1] == "train" for words in chain("table2", MODELS=str(tmp_path))) == 6
    (tmp_path / "pgd-elu-w16").mkdir()
    (tmp_path / "pgd-elu-w16" / "model.safetensors").touch()
    trained = [
        words[words.index("--activation") + 1] for words in chain("table2", MODELS=str(tmp_path)) if words[1] == "train"
    ]
    assert trained == ["gelu", "relu", "silu", "psilu", "pssilu"]
    assert [w[w.index("--method") + 1] for w in chain("table7", MODELS=str(tmp_path)) if w[1] == "train"] == [
        "standard"
    ]


def test_models_stand_beside_one_of_the_same_recipe(tmp_path: Path) -> None:
    narrow = chain("table2", MODELS=str(tmp_path), WIDTH="8")
    assert sum(words[1] == "train" for words in narrow) == 6
    assert "gelu=runs/tables/pgd-gelu-w8" in narrow[-1]
    assert "pgd=runs/tables/pgd-gelu-w8" in chain("table6", MODELS=str(tmp_path), WIDTH="8")[-1]
    assert "pgd=runs/tables/pgd-gelu-w16" in chain("table6", MODELS=str(tmp_path))[-1], "not the embedded model"
    own = chain("table6", MODELS=str(tmp_path), MODEL="runs/mine/model.safetensors")
    assert "pgd=runs/tables/mine" in own[-1]
    assert [w[w.index("--method") + 1] for w in own if w[1] == "train"] == ["trades"]


def test_one_job_a_headline_model_fills_one_page(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("cifar10-linf-wrn-94-16", "cifar10-l2-wrn-70-16"):
        (runs / name).mkdir(parents=True)
        (runs / name / "calibrate.yaml").touch()
    more = {"RUNS": str(runs), "HEADLINE": "cifar10-linf-wrn-94-16"}
    for target, found in (("headline", ["l2-wrn-70-16", "wrn-94-16"]), ("table12", ["wrn-94-16"])):
        last = " ".join(chain(target, **more)[-1])
        assert re.findall(r"runs/cifar10-(?:linf-)?(\S+)", last) == found
    refused = make("table12", HEADLINE="cifar10-l2-wrn-70-16", RUNS=str(runs), MEANSPARSE=MEANSPARSE)
    assert refused.returncode and "no model of Table 12 in --only cifar10-l2-wrn-70-16" in said(refused)


def test_several_targets_are_one_call_and_what_they_share_stands_there_once() -> None:
    printed = make("-n", "-k", "-j2", "table3", "table8", "table-subset", MEANSPARSE="meansparse", DRY="1").stdout
    typed = [line for line in printed.splitlines() if line.startswith("meansparse ")]
    assert len(typed) == 1
    assert shlex.split(typed[0])[1:5] == ["reproduce", "3", "8", "subset"]
    assert {"--keep-going", "--dry-run"} <= set(shlex.split(typed[0])) and "--jobs 2" in typed[0]
    commands = reproduced("3", "8")
    named = [words[words.index("--name") + 1] for words in commands if "--name" in words]
    assert named.count("linf") == named.count("clean") == 1 and len(named) == 7
    tables = [words[1:3] for words in commands if words[1] == "table"]
    assert tables == [["table", "3"], ["table", "8"]]


def test_paths_with_spaces() -> None:
    assert chain("table3", DATA="my data", OUT="my pages")[-1][-2:] == ["-o", "my pages"]
    refused = make("-n", "table3", MODEL="my models/model.safetensors")
    assert refused.returncode and "a path without spaces" in said(refused)


def test_evaluations_begin_anew_on_demand() -> None:
    assert all(("--fresh" in words) == (words[1] == "evaluate") for words in chain("table5", FRESH="1"))
    assert not any("--fresh" in words for words in chain("table5"))


def test_a_model_of_ones_own_has_runs_of_its_own() -> None:
    commands = chain("table3", MODEL="/somewhere/pgd-gelu-w64/model.safetensors")
    assert commands[0][2:6] == [
        "--run",
        "runs/tables/pgd-gelu-w64",
        "--model",
        "/somewhere/pgd-gelu-w64/model.safetensors",
    ]


def test_help_lists_every_target() -> None:
    listed = {line.split()[0] for line in make("help").stdout.splitlines()}
    assert set(TARGETS) <= listed
    assert {t.removeprefix("table") for t in listed if re.fullmatch(r"table\d+", t)} | {"headline", "subset"} == set(
        table_names()
    )


@pytest.mark.slow
def test_a_table_from_beginning_to_end(tmp_path: Path) -> None:
    options = {
        "MODEL": "digits",
        "N": "8",
        "ATTACK": "apgd-ce",
        "TWO": "0.2",
        "ALPHAS": "0.2",
        "SITE_ALPHAS": "0.35",
        "RUNS": str(tmp_path),
        "OUT": str(tmp_path / "docs"),
        "MEANSPARSE": MEANSPARSE,
    }
    done = make("-j", "2", "table3", "table5", "table11", **options)
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load((tmp_path / "docs" / "table5.yaml").read_text())
    ours = {row["row"]: row["ours"] for row in data["columns"]["Adaptive-(1,1)"]["cells"]}
    assert ours["0.2"]["n_examples"] == 8 and 0 <= ours["0.2"]["worst"] <= ours["0.2"]["robust"] <= 1
    page = (tmp_path / "docs" / "table5.md").read_text()
    assert "`digits`" in page and str(tmp_path) not in page
    again = make("table3", "table5", "table11", **options)
    assert again.returncode == 0 and said(again).count("already done") >= 6

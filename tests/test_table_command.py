"""``meansparse table`` on reports of our own making, whose every number is known."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.files import sha256_of
from meansparse_cli.paper.results import without_machine_paths
from meansparse_cli.runs.report import RunPaths, write_report
from tests.conftest import said

N = 100
BASE_WHERE = {"norm": "Linf", "split": "test", "centre": "channel-mean"}


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def page_of(*arguments: str) -> tuple[str, dict[str, Any]]:
    result = meansparse("table", *arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    path = Path(result.stdout.strip())
    return path.read_text(), yaml.safe_load(path.with_suffix(".yaml").read_text())


def first(n: int) -> np.ndarray:
    """The first n of 100 examples are right."""
    return np.arange(N) < n


def a_run(
    folder: Path,
    *,
    model: str = "digits",
    dataset: str = "digits",
    kind: str = "embedded",
    rule: str = "all",
    threat: str = "Linf",
) -> Path:
    """fetch.yaml and calibrate.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    source = {"name": model, "kind": kind, "dataset": dataset, "threat": threat}
    report(folder, "fetch", {}, {"model": source, "files": [], "sha256": None, "size": 0})
    report(folder, "calibrate", {}, {"rule": rule, "n_images": 10, "estimator": "pooled", "sites": [{}] * 17})
    return folder


def report(
    folder: Path, stage: str, settings: dict[str, Any], results: dict[str, Any], outputs: tuple[str, ...] = ()
) -> None:
    write_report(
        RunPaths(folder).report(stage),
        stage=stage,
        config={"settings": settings},
        inputs={"calibrate.yaml": sha256_of(folder.parent.parent / "calibrate.yaml")} if outputs else {},
        outputs={name: sha256_of(folder / name) for name in outputs},
        results=results,
        device="cpu",
        seconds=1,
    )


def measured(
    run: Path, name: str, rows: list[tuple[dict[str, Any], int, int, int]], attacks: list[str], **settings: Any
) -> None:
    """A measurement; ``rows`` are (eps, sites and alpha; right clean, under plain attacks, at worst)."""
    folder = run / "measurements" / name
    folder.mkdir(parents=True)
    columns = {key: np.stack([first(row[i]) for row in rows]) for i, key in ((1, "clean"), (2, "plain"), (3, "worst"))}
    np.savez(folder / "outcomes.npz", index=np.arange(N), label=np.zeros(N), bpda=columns["worst"], **columns)
    results = {
        "attacks": attacks,
        "bpda_attacks": [f"bpda-{name}" for name in attacks],
        "rows": [{"eps": "8/255", "sites": "all"} | row[0] for row in rows],
    }
    report(folder, "measure", BASE_WHERE | settings, results, ("outcomes.npz",))


def evaluated(
    run: Path, name: str, alpha: float, attacks: dict[str, tuple[int, int]], settings: dict[str, Any]
) -> None:
    """An evaluation with an attack's (base, sparsified) survivors; everything is right when clean, all faced by all."""
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    tables = {
        f"{model}_outcome": np.stack(
            [np.zeros(N), *(~first(found[i]) for found in attacks.values()), np.zeros(N)], axis=1
        ).astype(np.int8)
        for i, model in enumerate(("base", "sparsified"))
    }
    np.savez(
        folder / "outcomes.npz",
        index=np.arange(N),
        label=np.zeros(N),
        name=np.array(["clean", *attacks, "transfer"]),
        **tables,
    )
    report(folder, "evaluate", BASE_WHERE | settings, {"alpha": alpha, "eps": "8/255"}, ("outcomes.npz",))


APGD = ["apgd-ce", "apgd-dlr"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = a_run(Path("runs/one"))
    rows = [({"alpha": 0.0}, 90, 40, 40), ({"alpha": 0.2}, 88, 55, 30), ({"alpha": 0.35}, 80, 43, 38)]
    measured(folder, "linf", rows, APGD)
    return folder


def cells(data: dict[str, Any], column: str) -> dict[str, dict[str, Any]]:
    return {cell["row"]: cell["ours"] for cell in data["columns"][column]["cells"]}


def test_our_cells_stand_beside_the_papers(run: Path) -> None:
    text, data = page_of("3", str(run))
    assert Path("runs/tables/pages/table3.md").read_text() == text
    ours = cells(data, "Linf")["0.2"]
    assert ours["clean"] == 0.88 and ours["robust"] == 0.55 and ours["worst"] == 0.30 and ours["n_examples"] == 100
    assert ours["robust_gain"] == pytest.approx(0.15) and ours["worst_gain"] == pytest.approx(-0.10)
    assert ours["robust_gain_standard_error"] == pytest.approx((0.15 * 0.85 / N) ** 0.5)
    assert ours["robust_minus_paper"] == pytest.approx(0.55 - 0.5037)
    row = next(line for line in text.splitlines() if line.startswith("| 0.2 |"))
    assert [part.strip() for part in row.strip("|").split("|")] == [
        "0.2", "84.32", "88.00 ± 3.25", "50.37", "55.00 ± 4.97", "+1.25", "+15.00 ± 3.57",
        "30.00 ± 4.58", "-10.00 ± 3.00", "100", "`digits`",
    ]  # fmt: skip


def test_an_accuracy_of_nought_says_how_little_its_error_means(run: Path) -> None:
    assert "3 / n" not in page_of("3", str(run))[0]
    other = a_run(Path("runs/fallen"))
    measured(other, "linf", [({"alpha": 0.0}, 90, 0, 0), ({"alpha": 0.2}, 88, 5, 0)], APGD)
    assert "3 / n away, 3 points at 100 images" in page_of("3", str(other))[0]


def test_what_was_not_run_is_empty_and_never_the_papers(run: Path) -> None:
    text, data = page_of("3", str(run))
    assert all(ours == {} for ours in cells(data, "L2").values())
    assert [row for row, ours in cells(data, "Linf").items() if ours] == ["0", "0.2", "0.35"]
    row = next(line for line in text.splitlines() if line.startswith("| 0.3 |"))
    assert [part.strip() for part in row.strip("|").split("|")] == [
        "0.3",
        "83.95",
        "",
        "51.13",
        "",
        "+2.01",
        "",
        "",
        "",
        "",
        "",
    ]
    text, data = page_of("3", "--output", "of-nothing")
    assert "Nothing of it was run." in text and not any(cells(data, "Linf").values())


def test_a_filled_page_is_not_emptied_by_leaving_out_the_runs(run: Path, tmp_path: Path) -> None:
    text, _ = page_of("3", str(run))
    refused = meansparse("table", "3")
    assert refused.exit_code == 3 and "would lose its cells" in said(refused)
    assert Path("runs/tables/pages/table3.md").read_text() == text
    empty, _ = page_of("3", "--output", str(tmp_path / "elsewhere"))
    assert empty != text


def test_claims_are_judged_under_the_papers_attack_and_at_worst(run: Path) -> None:
    text, data = page_of("3", str(run))
    linf, l2, clean, *_ = data["claims"]
    assert clean["measure"] == "clean" and clean["under_its_attack"]["answer"] == "inconclusive", "2 of 100 lost"
    assert clean["under_its_attack"]["paper"] == pytest.approx(-0.0027) and "worst_case" not in clean
    assert linf["under_its_attack"]["answer"] == "confirmed"
    assert linf["worst_case"]["answer"] == "contradicted" and linf["worst_case"]["ours"] == pytest.approx(-0.10)
    assert linf["under_its_attack"]["paper"] == pytest.approx(0.0125)
    assert l2["under_its_attack"]["answer"] == l2["worst_case"]["answer"] == "not run"
    assert "**contradicted**, -10.00 points ± 3.00 on 100 images" in text and "Rule: confirmed: the sum" in text


def test_claims_on_clean_accuracy_take_the_most_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 of 100 lost say nothing about half a point; 2 of 2,000 do, whichever attack these images did not face."""
    folder = run / "measurements" / "clean"
    folder.mkdir()
    clean = np.stack([np.arange(2000) < 1800, np.arange(2000) < 1798])
    np.savez(folder / "outcomes.npz", index=np.arange(2000), label=np.zeros(2000), clean=clean)
    rows = [{"eps": "8/255", "sites": "all", "alpha": alpha} for alpha in (0.0, 0.2)]
    with monkeypatch.context() as typed:
        typed.setattr("sys.argv", ["meansparse", "the-clean-one"])
        report(folder, "measure", BASE_WHERE, {"attacks": [], "bpda_attacks": [], "rows": rows}, ("outcomes.npz",))
    text, data = page_of("3", str(run))
    small, large = (claim["under_its_attack"] for claim in data["claims"] if claim["measure"] == "clean")
    assert (small["answer"], small["n_examples"], small["ours"]) == ("confirmed", 2000, pytest.approx(-0.001))
    assert large["n_examples"] == 100, "alpha 0.35 is in the measurement of 100 images alone"
    assert cells(data, "Linf")["0.2"]["n_examples"] == 100, "a cell has its own images"
    assert text.count("meansparse the-clean-one") == 1, "the command behind these images is on the page"


def test_a_clean_claim_of_a_model_that_was_not_run_is_not_judged_on_another(run: Path) -> None:
    _, data = page_of("headline", f"WRN-70-16={run}")
    clean = {claim["text"]: claim["under_its_attack"] for claim in data["claims"] if claim["measure"] == "clean"}
    judged = [text for text, found in clean.items() if found["answer"] != "not run"]
    assert len(clean) == 8 and [text.split("(")[1] for text in judged] == ["WRN-70-16)"]


def test_a_claim_across_models_takes_each_models_own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrn, rawrn = a_run(Path("runs/wrn")), a_run(Path("runs/rawrn"))
    both = {"apgd-ce": (60, 65), "apgd-t": (60, 65), "fab-t": (60, 65), "square": (60, 65)}
    evaluated(wrn, "a", 0.2, both, {})
    evaluated(rawrn, "a", 0.25, dict.fromkeys(both, (75, 80)), {})
    _, data = page_of("headline", f"WRN-70-16={wrn}", f"RaWRN-70-16={rawrn}")
    claim = next(c for c in data["claims"] if "is above RaWRN-70-16 without" in c["text"])["under_its_attack"]
    assert claim["ours"] == pytest.approx(0.65 - 0.75) and claim["answer"] == "contradicted"


def test_too_few_examples_are_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = a_run(Path("runs/one"))
    measured(folder, "linf", [({"alpha": 0.0}, 90, 40, 40), ({"alpha": 0.2}, 90, 45, 42)], APGD)
    _, data = page_of("3", str(folder))
    # 5 examples differ: 2 standard errors are passed, but 6 examples are needed
    assert data["claims"][0]["under_its_attack"]["answer"] == "inconclusive"


def test_heading_says_model_size_and_data(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["meansparse", "table", "3", str(run)])
    text, data = page_of("3", str(run), "--data-note", "CIFAR-10, JPEG copies", "-o", "pages")
    assert "**Another model than the paper's**: `digits`" in text
    assert "**Reduced size**: 100 images, where the paper has 10,000" in text
    assert "Ours: CIFAR-10, JPEG copies." in text
    machine = r"^Measured on cpu \(\w+ \w+, \d+ cores\), torch \d[^;,]*, attacks in fp32, judged in float32\.$"
    assert re.search(machine, text, re.MULTILINE)
    assert data["data"] == "CIFAR-10, JPEG copies" and data["columns"]["Linf"]["is_the_papers_model"] is False
    assert text.rstrip().endswith("meansparse table 3 runs/one\n```")


def test_the_papers_model_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = a_run(
        Path("runs/zoo"), model="Bartoldson2024Adversarial_WRN-94-16", dataset="cifar10", kind="zoo", rule="published"
    )
    evaluated(folder, "pgd-50", 0.15, {"pgd-50": (70, 80)}, {})
    text, data = page_of("12", str(folder))
    assert "Another model" not in text and data["columns"]["WRN-94-16"]["is_the_papers_model"]
    ours = cells(data, "WRN-94-16")["0.15"]
    assert ours["robust"] == 0.8 and "worst" not in ours, "without BPDA there is no worst case to show"
    assert data["claims"][0]["under_its_attack"]["answer"] == "confirmed"
    assert data["claims"][0]["worst_case"]["answer"] == "not run"


def test_each_attack_of_an_evaluation_has_its_own_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = a_run(Path("runs/one"))
    attacks = {"adaptive-1-1:0": (50, 60), "adaptive-1-1": (52, 58), "adaptive-2-2": (51, 57), "bpda-apgd-ce": (49, 30)}
    evaluated(folder, "a", 0.2, attacks, {})
    _, data = page_of("5", str(folder))
    assert cells(data, "PGD-50")["0.2"]["robust"] == 0.6
    assert cells(data, "Adaptive-(1,1)")["0.2"]["robust"] == 0.58
    assert cells(data, "Adaptive-(2,2)")["0"]["robust"] == 0.51
    assert {cells(data, name)["0.2"]["worst"] for name in data["columns"]} == {0.3}
    assert not any(cells(data, name)["0.35"] for name in data["columns"])


def test_an_attack_that_did_not_face_everything_fills_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = a_run(Path("runs/one"))
    evaluated(folder, "a", 0.2, {"adaptive-1-1:0": (50, 60), "adaptive-1-1": (40, 40)}, {})
    file = folder / "evaluations" / "a" / "outcomes.npz"
    arrays = dict(np.load(file))
    arrays["sparsified_outcome"][60:, 2] = -1  # what PGD-50 had broken was not given to it
    np.savez(file, **arrays)
    report(file.parent, "evaluate", BASE_WHERE, {"alpha": 0.2, "eps": "8/255"}, ("outcomes.npz",))
    _, data = page_of("5", str(folder))
    assert cells(data, "PGD-50")["0.2"] and not cells(data, "Adaptive-(1,1)")["0.2"]


def test_sites_centre_and_split_have_to_agree(run: Path) -> None:
    rows = [
        ({"alpha": 0.0}, 90, 40, 40),
        ({"alpha": 0.35, "sites": "first:9"}, 85, 50, 30),
        ({"alpha": 0.35, "sites": "first:17"}, 80, 52, 30),
    ]
    measured(run, "sites", rows, APGD)
    text, data = page_of("10", str(run))
    assert [row for row, ours in cells(data, "cumulative 0.35").items() if ours] == ["8", "16"]
    base, *rest = [line for line in text.splitlines() if line.startswith("| base | 84.59 |")]
    assert [part.strip() for part in base.split("|")][3:6] == ["", "49.12", ""] and len(rest) == 3
    assert "| base | 84.59 | 90.00 ± 3.00 | 49.12 | 40.00 ± 4.90 |  |" in rest[-1]
    row = next(line for line in text.splitlines() if line.startswith("| 8 | 83.05 |"))
    assert [part.strip() for part in row.split("|")][6:8] == ["+1.74", "+10.00 ± 3.00"]
    early = data["claims"][0]  # 2 * 50 - 40 - 52
    assert early["under_its_attack"]["ours"] == pytest.approx(0.08)
    measured(run, "zero", [({"alpha": 0.0}, 90, 40, 40), ({"alpha": 0.35}, 60, 70, 20)], APGD, centre="zero")
    _, data = page_of("8", str(run))
    assert cells(data, "zero")["0.35"]["robust"] == 0.7 and cells(data, "channel mean")["0.35"]["robust"] == 0.43
    assert not any(cells(data, "global mean")[row] for row in ("0.2", "0.35"))
    assert data["claims"][0]["under_its_attack"]["answer"] == "confirmed", "clean: 80 against 60"
    measured(
        run, "train", [({"alpha": 0.0}, 90, 80, 40), ({"alpha": 0.2}, 90, 85, 20)], ["apgd-ce"], split="calibration"
    )
    text, data = page_of("1", f"WRN-70-16 train={run}", f"WRN-70-16 test={run}")
    assert cells(data, "WRN-70-16 train")["0.2"]["robust"] == 0.85 and not cells(data, "WRN-70-16 test")["0.2"]
    assert "On `digits` in its place: The paper's attack: " in text
    assert "Worst case over apgd-ce, bpda-apgd-ce and transfer." in text
    assert "**Train columns**" in text and "in place of the paper's Wang2023Better_WRN-70-16" in text


def test_runs_find_their_columns_by_training_or_are_asked_for_one(run: Path) -> None:
    _, data = page_of("2", str(run))
    assert cells(data, "gelu")["0.2"] and not cells(data, "relu")["0.2"], "the header of the weights says GELU"
    _, data = page_of("2", f"relu={run}")
    assert cells(data, "relu")["0.2"] and not cells(data, "gelu")["0.2"]
    refused = meansparse("table", "12", str(run))
    assert refused.exit_code == 3 and "which column" in said(refused)
    refused = meansparse("table", "2", f"relu={run}", f"relu={run}")
    assert refused.exit_code == 3 and "two runs for column relu" in said(refused)


def test_the_measurement_with_more_examples_counts(run: Path) -> None:
    folder = run / "measurements" / "few"
    folder.mkdir()
    few = {name: np.ones((2, 10), bool) for name in ("clean", "plain", "bpda", "worst")}
    np.savez(folder / "outcomes.npz", index=np.arange(10), label=np.zeros(10), **few)
    rows = [{"eps": "8/255", "sites": "all", "alpha": alpha} for alpha in (0.0, 0.2)]
    report(folder, "measure", BASE_WHERE, {"attacks": APGD, "bpda_attacks": [], "rows": rows}, ("outcomes.npz",))
    _, data = page_of("3", str(run))
    assert cells(data, "Linf")["0.2"]["n_examples"] == 100


def test_rows_of_a_column_come_from_one_report(run: Path) -> None:
    # on as many images, younger, but of two of the rows only
    measured(run, "eps", [({"alpha": 0.0}, 90, 41, 41), ({"alpha": 0.2}, 88, 99, 98)], APGD)
    _, data = page_of("3", str(run))
    assert [cells(data, "Linf")[row]["robust"] for row in ("0", "0.2", "0.35")] == [0.40, 0.55, 0.43]
    claim = data["claims"][0]["under_its_attack"]
    assert claim["ours"] == pytest.approx(0.15), "the claim is judged on the cells that are shown"


def test_a_trained_model_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(
        "train --dataset digits --method trades --beta 0.6 --width 4 --epochs 1 --n-examples 64 --n-steps 1 "
        "--batch-size 32 --test-examples 16 --held-out-examples 16 --run runs/small"
    )
    monkeypatch.setattr("sys.argv", ["meansparse", *arguments])
    trained = meansparse(*arguments)
    monkeypatch.setattr("sys.argv", ["meansparse", "table", "6", str(Path("runs/one"))])
    assert trained.exit_code == 0, trained.output
    folder = a_run(Path("runs/one"), model="runs/small/model.safetensors")
    measured(folder, "linf", [({"alpha": 0.0}, 90, 40, 40), ({"alpha": 0.2}, 88, 55, 30)], APGD)
    text, data = page_of("6", str(folder))
    assert cells(data, "trades")["0.2"]["robust"] == 0.55, "the weights say TRADES"
    assert (
        "Training: trades with beta 0.6, gelu, width 4, 1 epochs of 64 images, 1 steps of 0.0078 within 0.1, batch 32, "
        "steps from 0.1, seed 0." in text
    )
    assert "**Left open**: the paper prints beta = 0.6" in text
    assert text.split("```console\n")[1].startswith(f"meansparse {' '.join(arguments)}\n")


def test_edited_reports_are_refused_and_other_statistics_left_out(run: Path) -> None:
    file = run / "measurements" / "linf" / "measure.yaml"
    whole = file.read_text()
    file.write_text(whole.replace("alpha: 0.2", "alpha: 0.3"))
    refused = meansparse("table", "3", str(run))
    assert refused.exit_code == 10 and "--name linf" in said(refused)
    file.write_text(whole)
    report(run, "calibrate", {}, {"rule": "all", "n_images": 11, "estimator": "pooled", "sites": [{}] * 17})
    left_out = meansparse("table", "3", str(run))
    assert "left out" in said(left_out) and "another calibrate.yaml" in said(left_out)
    assert cells(yaml.safe_load(Path("runs/tables/pages/table3.yaml").read_text()), "Linf")["0.2"] == {}
    assert meansparse("table", "3", "nowhere").exit_code == 3
    assert meansparse("table", "99", str(run)).exit_code == 3


def test_results_on_other_images_are_left_out(run: Path) -> None:
    """More examples of another data set must not take the place of the right ones."""
    rows = [({"alpha": 0.0}, 90, 40, 40), ({"alpha": 0.2}, 88, 100, 100), ({"alpha": 0.35}, 80, 43, 38)]
    measured(run, "other", rows, APGD, dataset="corrupted.npz")
    result = meansparse("table", "3", str(run))
    assert "left out" in said(result) and "--dataset corrupted.npz" in said(result)
    assert cells(yaml.safe_load(Path("runs/tables/pages/table3.yaml").read_text()), "Linf")["0.2"]["robust"] == 0.55
    measured(run, "same", rows, APGD, dataset="digits")
    words = meansparse("table", "3", str(run)).stderr
    assert "/other/" in words and "/same/" not in words, "the model's own, named, is no other"


def test_a_site_rule_within_a_part_of_the_sites_is_not_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sites after an addition are not the first of all; a single site is itself, whatever was calibrated."""
    monkeypatch.chdir(tmp_path)
    folder = a_run(Path("runs/part"), rule="after-addition")
    rows = [({"alpha": 0.0}, 90, 40, 40)] + [({"alpha": 0.35, "sites": s}, 80, 43, 38) for s in ("first:3", "single:2")]
    measured(folder, "sites", rows, APGD)
    _, data = page_of("10", str(folder))
    assert cells(data, "cumulative 0.35")["2"] == {}
    assert cells(data, "single 0.35")["2"]["robust"] == 0.43


def test_a_name_of_two_threats_goes_to_its_own_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of the L2 model is evaluated, and though the Linf one was attacked in L2 as well."""
    monkeypatch.chdir(tmp_path)
    zoo = {"model": "Wang2023Better_WRN-70-16", "dataset": "cifar10", "kind": "zoo"}
    linf, l2 = a_run(Path("runs/linf"), **zoo), a_run(Path("runs/l2"), **zoo, threat="L2")
    evaluated(linf, "aa", 0.2, {"apgd-ce": (70, 80)}, {})
    evaluated(linf, "l2", 0.25, {"apgd-ce": (70, 80)}, {"norm": "L2", "eps": "0.5"})
    _, data = page_of("headline", str(linf), str(l2))
    filled = {name: column["is_the_papers_model"] for name, column in data["columns"].items() if column["model"]}
    assert filled == {"WRN-70-16": True, "L2 WRN-70-16": True}
    assert cells(data, "L2 WRN-70-16")["0.25"] == {}


def test_a_sweep_that_is_gone_leaves_its_evaluation_out(run: Path) -> None:
    evaluated(run, "swept", 0.2, {"apgd-ce": (50, 60)}, {})
    file = run / "evaluations" / "swept" / "evaluate.yaml"
    outputs = {"outcomes.npz": sha256_of(file.with_name("outcomes.npz"))}
    write_report(
        file,
        stage="evaluate",
        config={"settings": BASE_WHERE},
        inputs={"sweep-alpha.yaml": "0" * 64},
        outputs=outputs,
        results={"alpha": 0.2, "eps": "8/255"},
        device="cpu",
        seconds=1,
    )
    result = meansparse("table", "3", str(run))
    assert result.exit_code == 0 and "another sweep-alpha.yaml" in said(result)


def test_notes_on_the_papers_cells_stand_there_whatever_was_run(run: Path) -> None:
    text, _ = page_of("12", "RaWRN-70-16=runs/one")
    assert "operators at 143 sites" in text and "Its Swin-L cell" in text
    assert "operators at 143 sites" in page_of("1", "WRN-70-16 test=runs/one")[0]


def test_no_machine_path_gets_into_a_page(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["meansparse", "table", "3", str(tmp_path / "runs" / "one"), "--data-dir", "/data/cifar"]
    )
    text, _ = page_of("3", str(tmp_path / "runs" / "one"))
    assert "meansparse table 3 runs/one --data-dir DIR" in text
    shown = without_machine_paths(
        f"meansparse table 3 'Linf={tmp_path}/my runs/one' --data-dir='{tmp_path}/my images' -o '{tmp_path}/a b/c'"
    )
    assert shown == "meansparse table 3 'Linf=my runs/one' --data-dir=DIR -o 'a b/c'"
    assert not re.search(r"(?<![\w.])/(?:tmp|home|data|root)\b", text)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Table 3 with one run, and Table 12 without any."""
    monkeypatch.chdir(tmp_path)
    folder = a_run(Path("runs/one"))
    rows = [({"alpha": 0.0}, 90, 40, 40), ({"alpha": 0.2}, 90, 55, 30), ({"alpha": 0.35}, 80, 43, 38)]
    measured(folder, "linf", rows, APGD)
    for arguments in (["3", str(folder)], ["12"]):
        assert meansparse("table", *arguments, "-o", "pages", "--data-note", "our images").exit_code == 0
    return Path("pages")


def rows_of(page: str) -> dict[str, list[str]]:
    """What a line of a table says after its first cell."""
    lines = [
        [part.strip() for part in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    return {line[1] if line[0].startswith("[") else line[0]: line for line in lines}


def test_every_claim_with_its_numbers(tables: Path) -> None:
    result = meansparse("table", "summary", "-o", "pages")
    assert result.exit_code == 0 and result.stdout.strip() == "pages/README.md"
    page = (tables / "README.md").read_text()
    rows = rows_of(page)
    gains = rows["At alpha 0.2 robustness rises under Linf"]
    assert gains == [
        "[3](table3.md)",
        "At alpha 0.2 robustness rises under Linf",
        "+1.25 points",
        "**confirmed**: +15.00 points ± 3.57",
        "**contradicted**: -10.00 points ± 3.00",
        "100",
    ]
    clean = rows["At alpha 0.2 clean accuracy falls by less than half a point"]
    assert clean[3:] == ["inconclusive: +0.00 points ± 0.00", "", "100"]
    # the L2 claim and the five of Table 12 were not run
    assert rows["under the paper's attack"][1:] == ["1", "0", "1", "6"]
    assert rows["in the worst case, BPDA included"][1:] == ["0", "2", "0", "6"]
    assert rows["clean accuracy"][1:] == ["0", "1", "1", "0"]
    assert "6 claims (1 of Table 3, 5 of Table 12)" in page
    assert (
        "Of the 1 claims here that MeanSparse is more robust than its base model, 1 are confirmed and 0 contradicted "
        "under the paper's attack, and in the worst case 0 and 1."
    ) in page
    assert "No page here, and so none of their claims: Table 1, Table 2, Table 4, " in page
    assert "`digits`" in page and "Data: our images." in page
    assert "under L2" not in page


def test_it_says_what_the_tables_say(tables: Path) -> None:
    meansparse("table", "summary", "-o", "pages")
    claims = yaml.safe_load((tables / "table3.yaml").read_text())["claims"]
    listed = re.findall(r"^\| \[3\]\(table3\.md\) \|", (tables / "README.md").read_text(), flags=re.MULTILINE)
    assert len(listed) == sum(claim["under_its_attack"]["answer"] != "not run" for claim in claims) == 4


def test_mistakes_of_a_summary(tables: Path, tmp_path: Path) -> None:
    def refusal(*arguments: str) -> tuple[int, str]:
        result = meansparse("table", "summary", *arguments)
        return result.exit_code, said(result)

    assert not list(tmp_path.glob("none*"))
    code, words = refusal("-o", "none")
    assert code == 3 and "no table lies in none" in words and not Path("none").exists()
    code, words = refusal("runs/one", "-o", "pages")
    assert code == 3 and "from tables, not from runs" in words
    content = yaml.safe_load((tables / "table3.yaml").read_text())
    content["claims"][0]["text"] = "an older claim"
    (tables / "table3.yaml").write_text(yaml.safe_dump(content))
    code, words = refusal("-o", "pages")
    assert code == 10 and "written by another version" in words
    code, words = refusal("-o", "pages", "--data-note", "ours")
    assert code == 3 and "leave --data-note out" in words
    (tables / "table3.yaml").write_text("claims: [{}]\n")
    code, words = refusal("-o", "pages")
    assert code == 10 and "meansparse table 3 RUN" in words
    (tables / "table3.yaml").write_text("[")
    code, words = refusal("-o", "pages")
    assert code == 10 and "is not YAML" in words
    (tables / "table3.yaml").write_text("[]")
    code, words = refusal("-o", "pages")
    assert code == 10 and "is not a table" in words

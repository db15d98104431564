"""``meansparse table subset`` on real runs of the digits model: statistics of a part of the images against all."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.operator.checkpoint import load_checkpoint
from tests.conftest import said

PARTS = ("0.1", "0.25", "1")


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> Path:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Path(result.stdout.strip().splitlines()[-1])


@pytest.fixture(autouse=True, scope="module")
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 10)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [str(tmp_path_factory.mktemp("subset") / f"part-{part}") for part in PARTS]
    for part, folder in zip(PARTS, folders, strict=True):
        done("calibrate", "--model", "digits", "--run", folder, "--fraction", part)
    for folder in folders[1:]:
        options = shlex.split("--name subset --attack apgd-ce --alphas 0.2 --n-examples 8 --eps 0.05")
        done("measure", "--run", folder, *options)
    return folders


def test_the_page(runs: list[str], tmp_path: Path) -> None:
    page = done("table", "subset", *runs, "-o", str(tmp_path))
    text, data = page.read_text(), yaml.safe_load(page.with_suffix(".yaml").read_text())
    assert "`digits`, **another model than the paper's**" in text
    assert [row["fraction"] for row in data["rows"]] == [0.1, 0.25, 1.0]

    def values(folder: str, name: str) -> np.ndarray:
        statistics = load_checkpoint(Path(folder) / "statistics.safetensors").statistics
        return np.concatenate([getattr(s, name).double().numpy() for s in statistics])

    for row, folder in zip(data["rows"], runs, strict=True):
        for name in ("mean", "std"):
            part, whole = values(folder, name), values(runs[-1], name)
            assert row[f"{name}_error"] == pytest.approx(np.mean(np.abs(part - whole) / np.abs(whole)))
            assert row[f"{name}_error_of_sums"] == pytest.approx(np.abs(part - whole).sum() / np.abs(whole).sum())
    tenth, quarter, whole = data["rows"]
    assert tenth["mean_error"] > quarter["mean_error"] > whole["mean_error"] == 0
    assert "clean" not in tenth and quarter["n_examples"] == 8 and "robust_minus_all" not in whole
    side = "below it" if quarter["mean_error"] < 0.1 else "not below it"
    assert f"Ours, one draw of images: {100 * quarter['mean_error']:.2f} %, {side}." in text
    assert data["is_the_papers_model"] is False
    assert "(paper: 1.19 to 9.30 %)" in text
    # 8 images cannot tell half a point
    assert [claim["under_its_attack"]["answer"] for claim in data["claims"]] == ["inconclusive"]


def test_what_cannot_be_compared_is_refused(runs: list[str], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    done("calibrate", "--model", "digits", "--run", other, "--fraction", "0.5")
    common = ["measure", "--run", other, "--attack", "apgd-ce", "--alphas", "0.2", "--n-examples", "8", "--eps", "0.05"]
    done(*common, "--name", "subset", "--seed", "1")  # another eight images
    refused = meansparse("table", "subset", other, runs[-1], "-o", str(tmp_path))
    assert refused.exit_code == 3 and "not measured on the same images" in said(refused)
    few = str(tmp_path / "few")
    done("calibrate", "--model", "digits", "--run", few, "--n-examples", "20")
    refused = meansparse("table", "subset", few, runs[-1], "-o", str(tmp_path))
    assert refused.exit_code == 3 and "--n-examples 20" in said(refused)


def test_all_of_the_images_have_to_be_among_the_runs(runs: list[str], tmp_path: Path) -> None:
    refused = meansparse("table", "subset", *runs[:-1], "-o", str(tmp_path))
    assert refused.exit_code == 3 and "all calibration images" in said(refused)
    twice = meansparse("table", "subset", runs[-1], runs[-1], "-o", str(tmp_path))
    assert twice.exit_code == 3 and "the same --fraction" in said(twice)

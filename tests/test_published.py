"""The figures of RobustBench's cards: complete, as published, and shown beside our own."""

import io
import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.models.names import EMBEDDED
from meansparse_cli.models.published import published_models, published_note, published_results
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.models.zoo import zoo_entries
from meansparse_cli.reporting.model_tables import models_tables
from meansparse_cli.stages.models import select_models
from tests.conftest import said

ROOT = Path(__file__).parent.parent
PEOPLE = {"COLUMNS": "200", "NO_COLOR": "1"}


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=PEOPLE)


def test_every_model_has_a_row() -> None:
    rows = [(m.name, m.dataset, m.threat) for m in published_models()]
    assert rows[:2] == [(name, dataset, "Linf") for name, dataset in EMBEDDED.items()]
    assert rows[2:] == [(e.name, e.dataset, e.threat) for e in zoo_entries()]


@pytest.mark.parametrize(
    ("name", "dataset", "threat", "accuracies"),
    [
        ("Bartoldson2024Adversarial_WRN-94-16", "cifar10", "Linf", (0.9368, 0.7371, None, None)),
        ("Amini2024MeanSparse_S-WRN-94-16", "cifar10", "Linf", (0.9360, 0.7528, 0.7310, None)),
        ("Amini2024MeanSparse_Ra_WRN_70_16", "cifar10", "Linf", (0.9324, 0.7208, 0.6894, None)),
        ("Amini2024MeanSparse_S-WRN-70-16", "cifar10", "L2", (0.9551, 0.8728, 0.8433, None)),
        ("Amini2024MeanSparse_S-WRN-70-16", "cifar100", "Linf", (0.7513, 0.4478, 0.4225, None)),
        ("Amini2024MeanSparse_Swin-L", "imagenet", "Linf", (0.7880, 0.6212, 0.5892, None)),
        ("Amini2024MeanSparse_ConvNeXt-L", "imagenet", "Linf", (0.7792, 0.5964, 0.5822, None)),
        ("Addepalli2021Towards_WRN34", "cifar10", "corruptions", (0.8532, None, None, 0.7678)),
    ],
)
def test_figures_are_those_of_the_cards(
    name: str, dataset: str, threat: str, accuracies: tuple[float | None, ...]
) -> None:
    (m,) = [m for m in published_models() if (m.name, m.dataset, m.threat) == (name, dataset, threat)]
    assert (m.clean_accuracy, m.autoattack_accuracy, m.external_accuracy, m.corruptions_accuracy) == accuracies


def test_every_card_is_whole() -> None:
    for m in published_models()[2:]:
        under_attack = m.corruptions_accuracy if m.threat == "corruptions" else m.autoattack_accuracy
        assert m.clean_accuracy is not None and under_attack is not None, m
        assert 0 <= (m.external_accuracy or 0) <= under_attack <= m.clean_accuracy <= 1, m
        assert (m.eps is None) == (m.threat == "corruptions")
    assert [m.name for m in published_models() if m.unreliable] == ["Kang2021Stable"]


def test_parameters_were_counted() -> None:
    counts = {(m.name, m.dataset): m.parameters for m in published_models()}
    assert all(counts.values())
    for name, dataset in (("digits", None), ("resnet18-w16", None)):
        source = resolve_model(name, dataset)
        assert counts[name, source.dataset] == sum(p.numel() for p in load_model(source).parameters())
    assert round(counts["Bartoldson2024Adversarial_WRN-94-16", "cifar10"] / 1e6) == 366  # type: ignore[operator]


def test_an_installation_ships_the_figures() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["meansparse_cli"]
    assert any(fnmatch("models/published.json", pattern) for pattern in patterns)


def test_names_for_a_loop_and_a_table_for_people() -> None:
    result = meansparse("models", "--dataset", "CIFAR10", "--threat", "linf", "--model", "BARTOLDSON")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["Bartoldson2024Adversarial_WRN-94-16", "Bartoldson2024Adversarial_WRN-82-8"]
    assert "cifar10, Linf: 2 models" in said(result) and "93.68" in said(result) and "73.71" in said(result)
    assert "2025-03" in result.stderr
    assert len(meansparse("models").stdout.split()) == 208
    assert meansparse("models", "--dataset", "digits").stdout == "digits\n"
    assert len(meansparse("models", "--model", "*_wrn-70-16*").stdout.split()) >= 3


@pytest.mark.parametrize("width", [80, 130])
def test_the_tables_fit_the_terminal(width: int) -> None:
    models = select_models()
    console = Console(width=width, file=io.StringIO())
    for table in models_tables(models, width=width):
        console.print(table.to_rich())
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in {m.name for m in models}] == [
        m.name for m in models
    ]  # in one piece, each on its line
    n_linf = sum((m.dataset, m.threat) == ("cifar10", "Linf") for m in models)
    assert f"cifar10, Linf: {n_linf} models" in lines
    header = next(line for line in lines if "clean %" in line)
    assert ("architecture" in header) == (width == 130)


def test_json() -> None:
    content = json.loads(meansparse("models", "--model", "amini*94*", "--json").stdout)
    assert content["date"] == "2025-03"
    (row,) = content["models"]
    assert row["external_accuracy"] == 0.731 and row["eps"] == "8/255" and "corruptions_accuracy" not in row


@pytest.mark.parametrize(
    ("option", "value", "code", "expected"),
    [
        ("--dataset", "mnist", 3, "digits, cifar10, cifar100, imagenet"),
        ("--threat", "L1", 3, "Linf, L2, corruptions"),
        ("--model", "nobody", 4, "meansparse models"),
        ("--model", "Wang2023Beter_WRN-70-16", 4, "did you mean Wang2023Better_WRN-70-16"),
    ],
)
def test_a_filter_that_fits_nothing(option: str, value: str, code: int, expected: str) -> None:
    result = meansparse("models", option, value)
    assert (result.exit_code, result.stdout) == (code, "")
    assert expected in said(result)


def test_what_evaluate_says_about_a_zoo_model() -> None:
    results = published_results(resolve_model("Amini2024MeanSparse_S-WRN-94-16"))
    assert results["published"] == {
        "of": "sparsified",
        "clean_accuracy": 0.936,
        "autoattack_accuracy": 0.7528,
        "external_accuracy": 0.731,
        "n_examples": 10_000,
        "date": "2025-03",
        "unreliable": False,
    }
    line = published_note(results)
    assert line is not None and "published for the sparsified model (Rob" in line
    assert "clean 93.60 %, AutoAttack 75.28 %, external 73.10 %" in line
    assert "10,000 images, so not like for like" in line
    on_imagenet = published_note(published_results(resolve_model("Peng2023Robust", "imagenet")))
    assert on_imagenet is not None and "5,000 images" in on_imagenet
    for own in ("digits", "nets:make"):
        assert published_results(resolve_model(own)) == {}
        assert published_note({}) is None


def test_evaluate_keeps_and_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {
        "of": "base",
        "clean_accuracy": 0.5,
        "n_examples": 10_000,
        "date": "2025-03",
        "unreliable": False,
    }
    monkeypatch.setattr("meansparse_cli.stages.evaluate.published_results", lambda source: {"published": figures})
    run = str(tmp_path / "r")
    assert meansparse("calibrate", "--model", "digits", "--run", run, "--n-examples", "40").exit_code == 0
    result = meansparse(
        "evaluate", "--run", run, "--alpha", "0.2", "--attack", "pgd-3", "--n-examples", "4", "--no-doubts"
    )
    assert result.exit_code == 0, result.output
    assert "clean 50.00 %" in said(result)
    report = yaml.safe_load((tmp_path / "r" / "evaluate.yaml").read_text())
    assert report["results"]["published"] == figures

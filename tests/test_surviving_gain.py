"""``benchmarks/surviving_gain.py`` from a calibrated run to rows of its page, at toy size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from meansparse_cli.cli import app

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import surviving_gain

    monkeypatch.setattr(surviving_gain, "ALPHAS", (0.2,))
    monkeypatch.setattr(surviving_gain, "FORMS", surviving_gain.FORMS[:1])
    monkeypatch.setattr(surviving_gain, "SHAPES", {"firm": None})
    monkeypatch.setattr(surviving_gain, "PARTS", ((10, ("apgd-margin-2",), None), (20, ("apgd-margin-2",), 3)))
    monkeypatch.setattr(surviving_gain, "N_REGISTERED", 2)
    return surviving_gain


@pytest.mark.slow
def test_a_search_ends_in_rows_of_what_was_registered(
    search: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for part, n in (("train", 400), ("test", 60)):
        x = generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{part}.npz", x=x, y=np.arange(n) % 10)
    torch.manual_seed(0)
    import small_nets

    save_file(small_nets.overfitted().state_dict(), "weights.safetensors")
    name = f"{BENCHMARKS / 'small_nets.py'}:overfitted"
    for command in (
        ("fetch", "--model", name, "--dataset", "cifar10", "--weights", "weights.safetensors"),
        ("calibrate", "--data-dir", "."),
    ):
        result = CliRunner().invoke(app, [*command, "--run", "runs/net"])
        assert result.exit_code == 0, result.output

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["surviving_gain.py", *arguments])
        capsys.readouterr()
        search.main()  # type: ignore[attr-defined]
        return capsys.readouterr().out

    run("explore", "runs/net", "--eps", "4/255", "--data-dir", ".", "-o", "out")
    rows = [json.loads(line) for line in Path("out/explored.jsonl").read_text().splitlines()]
    first, last = ([row for row in rows if row["part"] == part] for part in (1, 2))
    everything = search.candidates_of(Path("runs/net"))  # type: ignore[attr-defined]
    assert (len(first), len(last)) == (len(everything), 3)
    assert {row["run"] for row in first} == {"runs/net", "runs/net-adversarial"}
    assert all(row["worst_gain"]["n"] == 10 for row in rows), "each part looks at images of its own"
    assert "candidates.yaml" in run("register", "out")
    registered = yaml.safe_load(Path("out/candidates.yaml").read_text())
    assert 1 <= len(registered) <= 2, "those that did the same to every image are registered once"
    run("confirm", "out", "--data-dir", ".", "--attack", "apgd-margin-2", "--n-examples", "30")
    confirmed = yaml.safe_load(Path("out/confirmed-apgd-margin-2.yaml").read_text())
    assert [row["alpha"] for row in confirmed["results"]] == [0.2] * len(registered)
    assert [half["n"] for half in confirmed["results"][0]["halves"]] == [15, 15]
    assert run("page", "out").count("| net |") == len(registered)

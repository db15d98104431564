"""``--alpha-rule learned``: thresholds that find the channel an attack comes through, kept, resumed, judged."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from meansparse_cli import load_sparsified
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.cli import app
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine.in_python import calibrate
from meansparse_cli.ledger import Decisions
from meansparse_cli.operator.checkpoint import sparsify
from meansparse_cli.selection import learned
from meansparse_cli.selection.learned import Learned, Lesson, with_channel_alphas
from meansparse_cli.stats.paired import PairedDifference
from tests.conftest import write_quick_network

EPS = 0.05


class OneBadChannel(nn.Module):
    """Two pixels: the first tells the class apart from afar, the second is noise that a large weight listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(2, 2, 1)
        self.active = nn.ReLU()
        self.features.weight.data = torch.eye(2).view(2, 2, 1, 1)
        self.features.bias.data = torch.tensor([0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        f = self.active(self.features(x)).flatten(1)
        score = 10 * (f[:, 0] - 0.5) + 60 * (f[:, 1] - 0.5)
        return torch.stack([-score, score], dim=1)


def examples(n: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.empty(n, 2, 1, 1)
    x[:, 0, 0, 0] = 0.2 + 0.6 * y
    x[:, 1, 0, 0] = 0.5 + 0.04 * (2 * torch.rand(n, generator=generator) - 1)
    return Examples(x, y, torch.arange(n))


def lesson(model: nn.Module) -> Lesson:
    training = examples(400, 1)
    checkpoint = calibrate(model, [(training.x, training.y)])
    problem = Problem(sparsify(model, checkpoint, alpha=0.0), Budget("Linf", EPS), 2, 0, 64, "fp32")
    return Lesson(problem, checkpoint, training, examples(100, 2))


def nobody(_: int) -> None:
    pass


def test_the_threshold_rises_where_the_attack_comes_through_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "LEARNING_RATE", 0.5)
    monkeypatch.setattr(learned, "LARGEST", 4.0)
    model = OneBadChannel()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = lesson(model)
    found = one.learn(0.1, Decisions(tmp_path / "d.json", print), nobody)
    ((good, bad),) = found.alphas
    assert bad > 2 and bad > good
    assert found.kept > 0 and max(found.n_robust[1:]) >= found.n_robust[0] + 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)
    shares: Any = found.checkpoint.channel_weights
    torch.testing.assert_close(found.checkpoint.alpha * shares[0], torch.tensor([good, bad]).double())


def test_an_epoch_on_disk_is_not_learned_again_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lesson(OneBadChannel()).learn(0.1, Decisions(tmp_path / "whole.json", print), nobody)
    begun = Decisions(tmp_path / "begun.json", print)

    class Killed(Exception):
        pass

    def killed(n: int) -> None:
        if len(begun.entries) == 2:  # the start and an epoch
            raise Killed

    with pytest.raises(Killed):
        lesson(OneBadChannel()).learn(0.1, begun, killed)
    seen: list[int] = []
    again = lesson(OneBadChannel()).learn(0.1, Decisions(tmp_path / "begun.json", print), seen.append)
    assert sum(seen) == (learned.N_EPOCHS - 1) * 400
    assert (again.alphas, again.n_robust, again.kept) == (whole.alphas, whole.n_robust, whole.kept)


def test_thresholds_of_zero_everywhere_are_the_base_model() -> None:
    one = lesson(OneBadChannel())
    assert with_channel_alphas(one.checkpoint, [[0.0, 0.0]]).alpha == 0


COMMON = (
    "--alphas",
    "0.1,0.2",
    "--eps",
    "8/255",
    "--attack",
    "apgd-margin-5",
    "--n-examples",
    "60",
    "--block-size",
    "10",
)


def meansparse(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("meansparse_cli.selection.search.MIN_UNSEEN", 10)
    monkeypatch.setattr("meansparse_cli.stages.sweep_alpha.N_IMAGES", 30)
    folder = tmp_path / "run"
    for command in (("fetch", *write_quick_network(tmp_path)), ("calibrate", "--n-examples", "100")):
        assert meansparse(*command, "--run", folder).exit_code == 0
    return folder


def test_learned_thresholds_go_all_the_way_to_evaluate_where_they_gain(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(self: Lesson, start: float, *_: object) -> Learned:
        alphas = [[0.3 if i % 2 else 0.0 for i in range(site.channels)] for site in self.checkpoint.active]
        return Learned(with_channel_alphas(self.checkpoint, alphas), [5, 6], 1, alphas)

    monkeypatch.setattr(Lesson, "learn", learn)
    monkeypatch.setattr("meansparse_cli.selection.choice.ChoiceRule.is_enough", lambda *_: True)
    better = PairedDifference(0.1, 0.01, 2, 0, 20)
    monkeypatch.setattr("meansparse_cli.selection.rules.paired_difference", lambda *_: better)
    options = ("--alpha-rule", "learned", "--objective", "worst", "--max-clean-drop", "100")
    swept = meansparse("sweep-alpha", "--run", run, *COMMON, *options)
    assert swept.exit_code == 0, swept.output
    results = yaml.safe_load((run / "sweep-alpha.yaml").read_text())["results"]
    words = " ".join(results["in_words"])
    assert "epoch 1 of 1 was kept" in words
    assert results["alpha"] == 0.3 and results["search"]["is_carried"]
    model = load_sparsified(run, allow_code=True)
    band: Any = model.at(model.sites[0])
    assert band.threshold(band.std)[0] == 0 and band.threshold(band.std)[1] > 0
    evaluated = meansparse(
        "evaluate", "--run", run, "--attack", "apgd-margin-5", "--eps", "8/255", "--n-examples", "20"
    )
    assert evaluated.exit_code == 0, evaluated.output
    report = yaml.safe_load((run / "evaluate.yaml").read_text())["results"]
    assert report["operator"] == "alpha 0.3, learned for each channel"


def test_what_does_not_gain_leaves_the_shared_choice_and_the_same_command_goes_on(run: Path) -> None:
    options = ("--alpha-rule", "learned", "--objective", "worst")
    swept = meansparse("sweep-alpha", "--run", run, *COMMON, *options)
    assert swept.exit_code == 0, swept.output
    report = yaml.safe_load((run / "sweep-alpha.yaml").read_text())["results"]
    found = report["search"]
    assert len(found["n_robust"]) == learned.N_EPOCHS + 1 and found["unseen"]["n_examples"] == 20
    assert report["alpha"] == (report["choices"]["chosen"]["alpha"] if not found["is_carried"] else report["alpha"])
    assert "that no step looked at" in " ".join(report["in_words"])
    files = {file: file.stat().st_mtime_ns for file in run.rglob("block-*.pt")}
    (run / "sweep-alpha.yaml").unlink()
    assert meansparse("sweep-alpha", "--run", run, *COMMON, *options).exit_code == 0
    assert yaml.safe_load((run / "sweep-alpha.yaml").read_text())["results"] == report
    assert {file: file.stat().st_mtime_ns for file in files} == files


@pytest.mark.parametrize("options", [("--shape", "firm"), ("--norm", "L2")])
def test_what_cannot_be_learned_is_refused_before_any_work(run: Path, options: tuple[str, ...]) -> None:
    refused = meansparse("sweep-alpha", "--run", run, *COMMON, "--alpha-rule", "learned", *options)
    assert refused.exit_code == 3
    assert "thresholds are learned under Linf" in refused.output
    assert not list(run.rglob("block-*.pt"))

"""Training: known answers of its parts, and runs that are killed, limited, compiled or repeated."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_cli.attacks.judge import under_attack
from meansparse_cli.errors import ArtifactError, ConfigError
from meansparse_cli.models.networks import ACTIVATIONS, PSiLU, PSSiLU, ResNet18
from meansparse_cli.settings.training import TrainConfig
from meansparse_cli.sites.find import find_sites
from meansparse_cli.training import train as train_module
from meansparse_cli.training.attack import LinfAscent, cross_entropy, divergence, pgd_outcomes, uniform_start
from meansparse_cli.training.images import DeviceImages, TrainingData
from meansparse_cli.training.state import EpochResult, WeightAverage, best_epoch
from meansparse_cli.training.train import epoch_order, learning_rate, seed_of, train_model

TINY: dict[str, Any] = {
    "width": 2,
    "epochs": 2,
    "batch_size": 24,
    "n_steps": 2,
    "eps": "8/255",
    "crop_padding": 1,
    "schedule": "one-cycle",
}


def colours(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise images, brighter in the channel that is their class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.integers(0, 120, (n, 8, 8, 3)).astype(np.uint8)
    x[np.arange(n), :, :, y] += 100
    return torch.from_numpy(x), torch.from_numpy(y)


def run(folder: Path, **settings: Any) -> tuple[ResNet18, list[EpochResult]]:
    return train_model(TrainConfig(**TINY | settings), TrainingData(colours(60), colours(24, 1), 3), folder)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_paper_drops_at_100_and_150_of_200() -> None:
    rates = [learning_rate("steps", 0.1, epoch / 200) for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cycle = [learning_rate("one-cycle", 0.2, progress) for progress in (0.0, 0.3, 0.65, 0.999999)]
    assert cycle == pytest.approx([0.008, 0.2, 0.1, 0.0], abs=1e-9)


def test_seeds_and_orders_differ_by_position_and_repeat() -> None:
    seeds = {seed_of(*position) for position in [(0, 1), (0, 2), (1, 1), (0, 1, 0), (0, 1, 1), (0, 11), (0, 1, 10)]}
    assert len(seeds) == 7
    assert torch.equal(epoch_order(50, 3, 4), epoch_order(50, 3, 4))
    assert not torch.equal(epoch_order(50, 3, 4), epoch_order(50, 3, 5))
    assert torch.equal(epoch_order(50, 3, 4).sort().values, torch.arange(50))


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_crop_is_a_window_of_the_padded_image_flipped_or_not(channels_last: bool) -> None:
    pixels, labels = colours(40)
    images = DeviceImages(pixels, labels, device="cpu", padding=2, flip=True, channels_last=channels_last)
    chosen = torch.arange(39, -1, -1)
    x, y = images.batch(chosen, torch.Generator().manual_seed(1))
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(y, labels[chosen])
    padded = F.pad(pixels.permute(0, 3, 1, 2).float() / 255, (2, 2, 2, 2))
    found = set()
    for i, source in enumerate(chosen):
        windows = {
            (top, left, flipped): window.flip(2) if flipped else window
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            for window in [padded[source, :, top : top + 8, left : left + 8]]
        }
        matches = [key for key, window in windows.items() if torch.equal(window, x[i])]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 20
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))


def test_without_augmentation_the_images_are_themselves() -> None:
    pixels, labels = colours(6)
    images = DeviceImages(pixels, labels, device="cpu", padding=0, flip=False, channels_last=False)
    x, _ = images.batch(torch.arange(6), torch.Generator())
    assert torch.equal(x, pixels.permute(0, 3, 1, 2).float() / 255)


def test_ascent_on_a_linear_model_reaches_the_corner_of_the_ball() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 3.0, 0.25]])
    x = torch.tensor([[0.5, 0.5, 0.99], [0.02, 0.5, 0.5]])
    y = torch.tensor([0, 1])
    ascent = LinfAscent(lambda z: z @ weight.T, cross_entropy, eps=0.1, step_size=0.06, n_steps=4)
    adv = ascent(x, y, x)
    # the loss rises along w_other - w_true: (-2, 5, -0.25) for class 0, its negative for class 1
    assert torch.allclose(adv, torch.tensor([[0.4, 0.6, 0.89], [0.12, 0.4, 0.6]]))
    assert torch.equal(x, torch.tensor([[0.5, 0.5, 0.99], [0.02, 0.5, 0.5]]))


def test_trades_needs_a_start_beside_the_image() -> None:
    weight = torch.tensor([[1.0, -2.0], [-1.0, 3.0]])
    x = torch.full((1, 2), 0.5)
    target = F.softmax(x @ weight.T, 1)
    ascent = LinfAscent(lambda z: z @ weight.T, divergence, eps=0.1, step_size=0.02, n_steps=10)
    beside = ascent(x, target, x + torch.tensor([[0.001, -0.001]]))
    assert torch.allclose((beside - x).abs(), torch.full((1, 2), 0.1))


def test_random_starts_fill_the_ball_and_repeat() -> None:
    x = torch.full((50, 3, 8, 8), 0.5)
    start = uniform_start(x, 0.1, torch.Generator().manual_seed(5))
    assert torch.equal(start, uniform_start(x, 0.1, torch.Generator().manual_seed(5)))
    assert 0.099 < float((start - x).abs().max()) <= 0.1 + 1e-6
    assert abs(float((start - x).mean())) < 0.005


def test_an_attack_leaves_the_network_as_it_was() -> None:
    model = ResNet18(n_classes=3, width=2).train()
    model.fc.bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pgd_outcomes(model, *colours(12), eps=0.03, n_steps=2, device="cpu")
    with pytest.raises(ZeroDivisionError), under_attack(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert model.training and model.bn1.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.bias"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_outcomes_do_not_depend_on_luck() -> None:
    model = ResNet18(n_classes=3, width=2).eval()
    pixels, labels = colours(30)
    clean, robust = pgd_outcomes(model, pixels, labels, eps=0.1, n_steps=3, device="cpu")
    with torch.no_grad():
        assert torch.equal(clean, model(pixels.permute(0, 3, 1, 2).float() / 255).argmax(1) == labels)
    again = pgd_outcomes(model, pixels, labels, eps=0.1, n_steps=3, device="cpu")
    assert torch.equal(robust, again[1])


def test_average_of_weights() -> None:
    state = {"w": torch.zeros(2), "n": torch.tensor(0)}
    average = WeightAverage(state, decay=0.5)
    state["w"] += 1
    state["n"] += 7
    average.update(state)  # d = 1/10 in the first step
    assert torch.allclose(average.state["w"], torch.full((2,), 0.9))
    average.update({"w": torch.zeros(2), "n": torch.tensor(8)})  # d = 2/11
    assert torch.allclose(average.state["w"], torch.full((2,), 0.9 * 2 / 11))
    assert int(average.state["n"]) == 8
    average.step = 1000
    average.update({"w": torch.zeros(2), "n": torch.tensor(9)})
    assert torch.allclose(average.state["w"], torch.full((2,), 0.9 / 11))


def test_parametric_activations_begin_as_silu_and_follow_their_formula() -> None:
    x = torch.linspace(-4, 4, 101)
    psilu, pssilu = PSiLU(), PSSiLU()
    assert torch.allclose(psilu(x), F.silu(x), atol=1e-6)
    assert torch.allclose(pssilu(x), F.silu(x), atol=1e-6)
    with torch.no_grad():
        psilu.a.fill_(2.0), pssilu.a.fill_(2.0), pssilu.b.fill_(0.3)
    assert torch.allclose(psilu(x), F.silu(2 * x) / 2, atol=1e-6)
    assert torch.allclose(pssilu(x), x * (torch.sigmoid(2 * x) - 0.3) / 0.7, atol=1e-6)
    assert pssilu(torch.tensor(50.0)).item() == pytest.approx(50)  # the identity far out, as SiLU is


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_17_sites_whatever_the_activation(activation: str) -> None:
    model = ResNet18(n_classes=3, width=2, activation=activation).eval()
    assert len(find_sites(model, torch.rand(2, 3, 8, 8))) == 17


def test_no_weight_decay_on_the_parameters_of_activations() -> None:
    model = ResNet18(n_classes=3, width=2, activation="pssilu")
    decayed, free = train_module._parameter_groups(model, 5e-4)
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0.0)
    assert len(free["params"]) == 2 * 17  # type: ignore[arg-type]
    assert all(p.ndim == 0 for p in free["params"])  # type: ignore[attr-defined]
    assert len(train_module._parameter_groups(ResNet18(n_classes=3, width=2), 5e-4)) == 1


def test_loss_of_each_method() -> None:
    model, device = ResNet18(n_classes=3, width=2).train(), "cpu"
    pixels, y = colours(12)
    x = pixels.permute(0, 3, 1, 2).float() / 255

    def loss_of(**settings: Any) -> float:
        step = train_module._BatchLoss(TrainConfig(**TINY | settings), copy.deepcopy(model), device, 8 / 255)
        loss: float = step(x, y, torch.Generator().manual_seed(3)).item()
        return loss

    clean = F.cross_entropy(copy.deepcopy(model)(x), y).item()
    assert loss_of(method="standard") == pytest.approx(clean)
    assert loss_of(method="trades", beta=0) == pytest.approx(clean)
    at_1, at_6 = loss_of(method="trades", beta=1), loss_of(method="trades", beta=6)
    assert at_1 > clean
    assert at_6 - clean == pytest.approx(6 * (at_1 - clean), rel=1e-3)
    assert loss_of(method="pgd") > clean


def test_it_learns(tmp_path: Path) -> None:
    model, log = run(tmp_path, epochs=10, width=4)
    clean, robust = pgd_outcomes(model, *colours(60, 9), eps=8 / 255, n_steps=10, device="cpu")
    assert clean.float().mean() > 0.9  # three classes: chance is 0.33
    assert robust.float().mean() > 0.8
    assert log[-1].train_loss < log[0].train_loss


@pytest.mark.parametrize(
    "settings",
    [{"ema": 0.9, "activation": "pssilu"}, {"method": "trades", "schedule": "steps"}, {"method": "standard"}],
    ids=["pgd", "trades", "standard"],
)
def test_stopped_after_an_epoch_it_goes_on_to_the_same_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, log = run(tmp_path / "whole", epochs=3, **settings)

    class Stop(Exception):
        pass

    def stop(epoch: int, batch: int, n: int) -> None:
        if (epoch, batch) == (1, 1):
            raise Stop

    config = TrainConfig(**TINY | {"epochs": 3} | settings)
    sets = colours(60), colours(24, 1)
    with pytest.raises(Stop):
        train_model(config, TrainingData(*sets, 3), tmp_path / "parts", on_batch=stop)
    resumed, its_log = train_model(config, TrainingData(*sets, 3), tmp_path / "parts")
    assert same(whole, resumed)
    assert [row.train_loss for row in its_log] == [row.train_loss for row in log]


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    with pytest.raises(ArtifactError, match="lr: 0.1 -> 0.2"):
        run(tmp_path, epochs=1, lr=0.2)
    run(tmp_path, epochs=1, compile=True)  # only how fast; nothing is left to do


def test_compiled_and_plain_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile(model: nn.Module, **options: Any) -> Any:
        assert options == {"dynamic": False}
        compiled.append(model)
        return real(model, backend="eager", fullgraph=True)

    real = torch.compile
    plain, _ = run(tmp_path / "plain", epochs=1)
    monkeypatch.setattr(torch, "compile", compile)
    fused, _ = run(tmp_path / "fused", epochs=1, compile=True)
    assert len(compiled) == 1
    for a, b in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    model, log = run(tmp_path, precision="bf16", epochs=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain, _ = run(tmp_path / "plain", epochs=1)
    assert not same(model, plain)
    assert np.isfinite(log[0].train_loss)


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="diverged"):
        run(tmp_path, lr=1e30)
    assert not list(tmp_path.iterdir())


def test_best_epoch_is_the_last_of_the_most_robust() -> None:
    rows = [EpochResult(0, 1, 0.9, 0.2, 1), EpochResult(1, 1, 0.5, 0.4, 1), EpochResult(2, 1, 0.6, 0.4, 1)]
    assert best_epoch(rows, TrainConfig()).epoch == 2
    assert best_epoch(rows, TrainConfig(method="trades")).epoch == 2
    assert best_epoch(rows, TrainConfig(method="standard")).epoch == 0


def test_the_best_epoch_is_what_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_robust = iter([3, 9, 5])
    seen: list[Tensor] = []

    def outcomes(model: nn.Module, pixels: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        seen.append(model.state_dict()["fc.weight"].clone())
        return torch.ones(24, dtype=torch.bool), torch.arange(24) < next(n_robust)

    monkeypatch.setattr(train_module, "pgd_outcomes", outcomes)
    model, log = run(tmp_path, epochs=3)
    assert [row.selection_robust_accuracy for row in log] == [3 / 24, 9 / 24, 5 / 24]
    assert torch.equal(model.fc.weight, seen[1])
    assert not torch.equal(model.fc.weight, seen[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_attack_is_the_attack(precision: str) -> None:
    from meansparse_cli.training.attack import in_precision

    model = ResNet18(n_classes=3, width=8).cuda().eval()
    forward = in_precision(model, "cuda", precision)
    recorded, plain = (
        LinfAscent(forward, cross_entropy, eps=0.1, step_size=0.03, n_steps=5, cuda_graph=graph)
        for graph in (True, False)
    )
    pixels, labels = (t.cuda() for t in colours(64))
    x = pixels.permute(0, 3, 1, 2).float() / 255
    with under_attack(model):
        for shift in (0.0, 0.1):  # the second batch replays what the first one recorded, on changed weights
            with torch.no_grad():
                model.fc.bias += shift
            a, b = recorded(x + shift, labels, x), plain(x + shift, labels, x)
            assert (a - b).abs().gt(1e-4).float().mean() < 0.02  # signs of gradients near zero may flip

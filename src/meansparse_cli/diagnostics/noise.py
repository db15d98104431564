"""Does random noise inside the budget find what the attacks left?"""

import torch
from torch import Tensor

from ..attacks.budget import enforce_budget
from ..attacks.starts import example_generator, uniform_start
from ..stats.format import percent
from .check import CARLINI, Check, Diagnostic
from .subject import Subject

NOISE = Check("accuracy lost to random noise", 0.05, "points", f"{CARLINI}; the limit is ours")
NOISE_BREAKS = Check("noise breaks what attacks left", 0, "count", CARLINI)

N_DRAWS = 100


def check_noise(subject: Subject) -> list[Diagnostic]:
    """Uniform noise in the ball, ``N_DRAWS`` draws an example."""
    n_right, ever_wrong = 0, torch.zeros_like(subject.robust)
    for draw in range(N_DRAWS):
        images = _noisy(subject, draw)
        right = subject.is_right(images)
        n_right += int(right.sum())
        new = ~right & ~ever_wrong & subject.robust
        subject.keep(new.nonzero().flatten(), images[new])
        ever_wrong |= ~right
    n, n_robust = len(subject.y), int(subject.robust.sum())
    clean, noisy = float(subject.correct.double().mean()), n_right / (n * N_DRAWS)
    n_beaten = int((ever_wrong & subject.robust).sum())
    lost = (
        f"{percent(noisy, digits=1)} % under uniform noise ({N_DRAWS} draws an example), "
        f"{percent(clean, digits=1)} % without"
    )
    beaten = f"{n_beaten} of {n_robust} examples that survived every attack fall to noise"
    return [NOISE.judged(subject.name, clean - noisy, lost), NOISE_BREAKS.judged(subject.name, n_beaten, beaten)]


def _noisy(subject: Subject, draw: int) -> Tensor:
    """The images with one draw of noise each, (n, channels, height, width)."""
    budget, seed = subject.problem.budget, subject.problem.seed
    images = [
        uniform_start(image, example_generator(seed, "noise", draw, int(index)), budget)
        for image, index in zip(subject.x.cpu(), subject.examples.indices, strict=True)
    ]
    return enforce_budget(torch.stack(images).to(subject.x.device), subject.x, budget)

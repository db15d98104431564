r"""What the attacks of other packages break of what an evaluation left.

    echo 'setuptools<81' > old && PIP_CONSTRAINT=old pip install --no-deps adv-lib torchattacks visdom \
        jsonpatch jsonpointer tornado websocket-client  # adv-lib imports visdom, which newer setuptools cannot build
    python benchmarks/peers_on_what_is_left.py RUN --name fast --data-dir DIR --n 200

``RUN`` as for ``what_is_left.py``. Each attack faces the first N examples that are robust in the evaluation, whatever
the others broke, on the model as it is; on the sparsified one also with the gradients of a band with a soft edge
(0.05 std), which these packages do not know. What they return is brought into the budget and judged in float32.
"""

import itertools
import logging
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from meansparse_cli.attacks.budget import enforce_budget
from meansparse_cli.attacks.judge import judge, under_attack
from meansparse_cli.attacks.problem import Problem
from meansparse_cli.operator.active import backward_rule
from meansparse_cli.runs.device import keep_freed_memory
from what_is_left import arguments, say, survivors

Attack = Callable[[nn.Module, Tensor, Tensor, Problem], Tensor]
ORDER = {"Linf": float("inf"), "L2": 2.0}


def autoattack(model: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
    from pyautoattack import AutoAttack

    logging.getLogger("pyautoattack").setLevel(logging.ERROR)
    attack = AutoAttack(model, norm=problem.budget.norm, eps=problem.budget.eps, device=x.device, seed=problem.seed)
    points: Tensor = attack.run_standard_evaluation(x, y, batch_size=problem.batch_size)[0]
    return points


def adv_lib_apgd(model: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
    from adv_lib.attacks import apgd

    eps, norm = problem.budget.eps, ORDER[problem.budget.norm]
    return apgd(model, x, y, eps=eps, norm=norm, n_iter=100, n_restarts=5)  # type: ignore[no-any-return]


def adv_lib_fmn(model: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
    from adv_lib.attacks import fmn

    return fmn(model, x, y, norm=ORDER[problem.budget.norm], steps=500)  # type: ignore[no-any-return]


def torchattacks_jitter(model: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
    from torchattacks import Jitter

    eps = problem.budget.eps
    return Jitter(model, eps=eps, alpha=eps / 10, steps=100)(x, y)  # type: ignore[no-any-return]


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
    from torchattacks import PGD

    eps = problem.budget.eps
    return PGD(model, eps=eps, alpha=eps / 10, steps=200)(x, y)  # type: ignore[no-any-return]


PEERS: dict[str, Attack] = {
    "pyautoattack, standard": autoattack,
    "adv-lib, APGD on DLR, 5 x 100": adv_lib_apgd,
    "adv-lib, FMN, 500": adv_lib_fmn,
    "torchattacks, Jitter, 100": torchattacks_jitter,
    "torchattacks, PGD, 200": torchattacks_pgd,
}


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: all of them")
    options = parser.parse_args()
    keep_freed_memory()
    for name, problem, examples in survivors(options):
        examples = examples.at(torch.arange(min(options.n, len(examples))))
        x, y = examples.x.to(options.device), examples.y.to(options.device)
        rules = ("true",) if name == "base" else ("true", "soft:0.05")
        for peer, rule in itertools.product(options.peer or PEERS, rules):
            torch.manual_seed(problem.seed)
            try:
                with under_attack(problem.model), backward_rule(problem.model, rule):
                    points = PEERS[peer](problem.model, x, y, problem).detach()
            except ImportError as error:
                print(f"{peer}: {error}", file=sys.stderr)
                continue
            broken = judge(problem, enforce_budget(points.float(), x, problem.budget), y)
            say(model=name, peer=peer, gradients=rule, faced=len(x), broken=int(broken.sum()),
                indices=examples.indices[broken.cpu()].tolist())  # fmt: skip


if __name__ == "__main__":
    main()

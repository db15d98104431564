"""What is typed in the golden runs, as users type it (without ``meansparse``); every scene in a folder of its own."""

from dataclasses import dataclass

DIGITS = (
    "fetch --model digits --run run",
    "calibrate --run run --n-examples 200 --batch-size 64",
    "sweep-alpha --run run --alphas 0.2,0.4 --n-examples 8 --block-size 8 --eps 0.2 --min-gain 0 --max-clean-drop 20",
    "evaluate --run run --n-examples 16 --eps 0.2 --alpha 0.4 --attack pgd-20 --attack apgd-ce --attack bpda-apgd-ce "
    "--n-doubt-examples 4",
    "evaluate --run run --name grid --n-examples 12 --eps 0.1,0.2 --alpha 0.3 --attack pgd-10 --no-doubts",
    "measure --run run --name linf --alphas 0.35 --n-examples 8 --eps 8/255 --attack apgd-ce --block-size 8",
    "measure --run run --name sites --alphas 0.5 --sites all --sites first:2 --n-examples 16 --attack none",
    "export run card.json --card --alpha 0.4",
)
DIGITS_PAGES = (
    "report run",
    "report run --format markdown",
    "report run --format json -o report.json",
    "report run --format html -o page.html",
    "report run/evaluations/grid --format markdown",
    "report run/measurements/linf --format markdown",
    "table 1 'WRN-70-16 test=run' -o tables",
    "table summary -o tables",
)

TINY = "--model networks.py:tiny --dataset colours.npz --run run"
CALIBRATED = (f"fetch {TINY}", f"calibrate {TINY} --batch-size 64")
SWEEP = f"sweep-alpha {TINY} --eps 0.05 --n-examples 120 --block-size 40 --min-gain 0 --max-clean-drop 10"
EVALUATE = f"evaluate {TINY} --eps 0.07 --no-doubts"
FEW = "--model networks.py:tiny --dataset few.npz --run run"
SHARDED = (
    f"evaluate {FEW} --eps 0.05 --n-examples 15 --alpha 0.3 --attack pgd-10 --attack bpda-apgd-ce --no-doubts "
    "--save-witnesses"
)
TRAIN = (
    "train --width 2 --n-steps 1 --epochs 2 --n-examples 240 --batch-size 48 --crop-padding 1 --held-out-examples 24 "
    "--test-examples 48 --run run"
)


@dataclass(frozen=True)
class Scene:
    """``commands`` are run to their end; ``pages`` only read what they left."""

    name: str
    commands: tuple[str, ...]
    pages: tuple[str, ...] = ()


SCENES = (
    Scene("digits", DIGITS, DIGITS_PAGES),
    Scene(
        "tiny",
        (
            *CALIBRATED,
            f"{SWEEP} --alphas 0.2,0.6 --alpha-rule per-site",
            f"{EVALUATE} --n-examples 4 --alpha 0.4 --attack apgd-ce --attack fab-t --attack square --individual",
            "export run model.safetensors",
        ),
        ("report run --format markdown",),
    ),
    Scene(
        "shards",
        (
            f"calibrate {FEW}",
            f"{SHARDED} --shard 1/2",
            f"{SHARDED} --shard 2/2",
            SHARDED,
            f"verify run/witnesses.safetensors {FEW} --alpha 0.3",
        ),
        ("report run/shards/shard-1-of-2 --format markdown", "report run --format markdown"),
    ),
    Scene("train", (TRAIN,)),
)


@dataclass(frozen=True)
class HalfWay:
    """Some commands of ``scene`` (``before``), and Ctrl-C in the next one, number ``begun``, once it has put the
    ``count``-th file that matches ``pattern`` in its place; with no pattern it was not begun.
    """

    name: str
    scene: str
    before: tuple[int, ...]
    begun: int
    pattern: str | None = None
    count: int = 1

    @property
    def again(self) -> tuple[int, ...]:
        """What is typed then: the command that was begun; where none was, all from there on."""
        n = len(next(scene for scene in SCENES if scene.name == self.scene).commands)
        return (self.begun,) if self.pattern is not None else tuple(range(self.begun, n))


HALF_WAY = (
    HalfWay("calibrate", "tiny", (0,), 1, "calibrate.pt", 3),
    HalfWay("search", "tiny", (0, 1), 2, "search-*.json"),
    HalfWay("evaluate", "tiny", (0, 1, 2), 3, "000000.pt", 7),
    HalfWay("digits-sweep", "digits", (0, 1), 2, "block-*.pt", 2),
    HalfWay("digits-evaluate", "digits", (0, 1, 2), 3, "000000.pt", 5),
    HalfWay("measure", "digits", (0, 1), 5, "block-*.pt", 2),
    HalfWay("shards", "shards", (0, 1), 2),
    HalfWay("train", "train", (), 0, "train-state.pt"),
)

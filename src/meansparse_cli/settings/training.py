"""The settings of ``meansparse train``."""

from pathlib import Path
from typing import Annotated, Literal

from .options import DATASET, DataDir, Device, Eps, NExamples, Seed, Settings, Workers, of_run, of_training
from .values import EpsText


class TrainConfig(Settings):
    """The defaults are the paper's (section A.1), like ``--preset paper``; but for ``beta``, 0.6 in its section A.5."""

    preset: Literal["paper", "short"] = of_training(
        "paper (200 epochs, the defaults) or short (30, one-cycle; some points worse).", "paper"
    )
    dataset: Annotated[str, DATASET] = "digits"
    data_dir: DataDir = None
    run: Path | None = of_run(
        "Folder of the run; runs/train-<dataset>-<method>-<activation>-w<width> by default.", None
    )
    n_examples: NExamples = None
    held_out_examples: int | None = of_training(
        "Images that choose the best epoch: 1,000 held-out ones; with --paper-selection all test images.", None, ge=1
    )
    test_examples: int = of_training("Images of the final measurement.", 1000, ge=1)
    workers: Workers = 0

    method: Literal["pgd", "trades", "standard"] = of_training("pgd, trades or standard.", "pgd")
    beta: float = of_training("Weight of the TRADES term; 6 (the paper prints 0.6).", 6.0, ge=0)
    width: int = of_training("Base width of the ResNet-18.", 64, ge=1)
    activation: Literal["relu", "elu", "gelu", "silu", "psilu", "pssilu"] = of_training(
        "relu, elu, gelu, silu, psilu or pssilu.", "gelu"
    )
    eps: Eps = None
    """In Linf."""
    n_steps: int = of_training("Attack steps.", 10, ge=1)
    step_size: EpsText = of_training("Attack step, in [0, 1] pixel units.", "0.0078")

    epochs: int = of_training("Passes over the calibration split.", 200, ge=1)
    batch_size: int = of_training("Images a step.", 256, ge=1)
    schedule: Literal["steps", "one-cycle"] = of_training("steps (the paper's) or one-cycle.", "steps")
    lr: float = of_training("Highest learning rate.", 0.1, gt=0)
    momentum: float = of_training("Momentum of SGD.", 0.9, ge=0, lt=1)
    weight_decay: float = of_training("Weight decay; not of PSiLU's and PSSiLU's parameters.", 5e-4, ge=0)
    crop_padding: int = of_training("Zero padding of the random crop.", 4, ge=0)
    flip: bool = of_training("Random horizontal flips.", True)
    ema: float | None = of_training(
        "Decay a step of an average of the weights, which is then what is measured and kept.", None, gt=0, lt=1
    )
    paper_selection: bool = of_training(
        "As the paper does: train on the held-out images too, and choose the best epoch on test images.",
        False,
        has_no=True,
    )
    seed: Seed = 0
    mean_sparse_alpha: float | None = of_training(
        "Train with the operator in place, alpha growing up to this, mean and std an average over the training "
        "batches, adversarial ones; the paper advises against it.",
        None,
        gt=0,
    )
    mean_sparse_ramp: int | None = of_training("Epochs that alpha grows; half of them.", None, ge=1)

    precision: Literal["fp32", "bf16"] = of_training("fp32 or bf16 (autocast).", "fp32")
    channels_last: bool | None = of_training("Memory layout; where the width is a multiple of 8.", None)
    compile: bool = of_training("Through torch.compile.", False, has_no=True)
    cuda_graphs: bool = of_training(
        "Record an attack step and replay it: for networks too narrow to fill the GPU.", False, has_no=True
    )
    device: Device = "auto"
    time_limit: float | None = of_training(
        "Minutes: begin no epoch that would end later; exit code 75, the same command goes on.", None, gt=0
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = of_training(
        "float32, float16 or bfloat16: of the weights in the file.", "float32"
    )

"""The settings of ``meansparse train``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .arguments import Settings
from .values import Count, EpsText, Few, NotNegative, Positive, Seed, Width


class TrainConfig(Settings):
    """The defaults are the paper's (section A.1), like ``--preset paper``; but for ``beta``, 0.6 in its section A.5."""

    preset: Literal["paper", "short"] = "paper"
    dataset: str = "digits"
    data_dir: Path | None = None
    class_order: Literal["text", "number"] | None = None
    run: Path | None = None
    n_examples: Count | None = None
    held_out_examples: Count | None = None
    test_examples: Count = 1000
    workers: Few = 0

    method: Literal["pgd", "trades", "standard"] = "pgd"
    beta: NotNegative = 6.0
    width: Width = 64
    activation: Literal["relu", "elu", "gelu", "silu", "psilu", "pssilu"] = "gelu"
    eps: EpsText | None = None
    """In Linf."""
    n_steps: Count = 10
    step_size: EpsText = "0.0078"

    epochs: Count = 200
    batch_size: Count = 256
    schedule: Literal["steps", "one-cycle"] = "steps"
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 5e-4
    crop_padding: Few = 4
    flip: bool = True
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    paper_selection: bool = False
    seed: Seed = 0
    mean_sparse_alpha: Positive | None = None
    mean_sparse_ramp: Count | None = None

    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool | None = None
    compile: bool = False
    cuda_graphs: bool = False
    device: str = "auto"
    time_limit: Positive | None = None
    plan: Annotated[bool, Field(exclude=True)] = False
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

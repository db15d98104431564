"""What is known of a data set by its name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetFacts:
    """``image_shape`` is (channels, height, width)."""

    n_classes: int
    image_shape: tuple[int, int, int]
    eps: dict[str, str]
    """Budget by norm when none is given, as RobustBench evaluates this data set (digits: our own choice)."""


KNOWN_DATASETS: dict[str, DatasetFacts] = {
    "digits": DatasetFacts(10, (1, 8, 8), {"Linf": "0.1", "L2": "0.5"}),
    "cifar10": DatasetFacts(10, (3, 32, 32), {"Linf": "8/255", "L2": "0.5"}),
    "cifar100": DatasetFacts(100, (3, 32, 32), {"Linf": "8/255", "L2": "0.5"}),
    "imagenet": DatasetFacts(1000, (3, 224, 224), {"Linf": "4/255", "L2": "0.5"}),
}

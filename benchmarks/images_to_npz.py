"""Decode a data set once: images_to_npz.py DATASET DATA_DIR TARGET_DIR [WORKERS] writes train.npz and test.npz there.

The arrays keep the order of the images, so the splits are those of the original. A folder that has both is left alone.
"""

import sys
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from meansparse_cli.data.splits import load_split
from meansparse_cli.files import atomic_write
from meansparse_cli.training.images import read_pixels


def main(dataset: str, data_dir: Path, target: Path, n_workers: int) -> None:
    """Write both files, each whole or not at all."""
    wanted = {part: file for part in ("train", "test") if not (file := target / f"{part}.npz").exists()}
    if not wanted:
        return
    test = load_split(dataset, data_dir, "test")
    if len(test) < len(test.dataset):  # type: ignore[arg-type]
        sys.exit(
            f"{data_dir} is one set of images: expected a training and a test set in it, such as train.zip and test.zip"
        )
    for part, file in wanted.items():
        whole = (test if part == "test" else load_split(dataset, data_dir, "calibration")).dataset
        pixels, labels = read_pixels(Subset(whole, range(len(whole))), n_workers)  # type: ignore[arg-type]
        with atomic_write(file) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, x=pixels.numpy(), y=labels.numpy())
        print(f"{file}: {len(labels):,} images", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) == 5 else 0)

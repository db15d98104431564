"""What tells images from others: pixels in memory, files on disk."""

import hashlib

import numpy as np

from .read import ArrayImages, FileImages
from .splits import Split


def content_id(images: Split) -> str:
    """sha256 over what identifies the chosen images and labels: pixels in memory, names and checksums on disk."""
    digest, source = hashlib.sha256(), images.dataset
    indices = np.asarray(list(images.indices), dtype=np.int64)
    digest.update(indices.tobytes())
    if isinstance(source, ArrayImages):
        digest.update(source.y[indices].tobytes())
        digest.update(source.x.numpy()[indices].tobytes())
    elif isinstance(source, FileImages):
        if source.order == "number":
            digest.update(b"classes by number\n")
        for index, checksum in zip(indices, source.checksums(indices.tolist()), strict=True):
            label = f" {source.labels[index]}" if source.store.is_numbered else ""  # elsewhere the name says it
            digest.update(f"{source.names[index]} {checksum}{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def identity(images: Split) -> dict[str, str]:
    """What a report's ``inputs`` say of the images: their ``content_id``, and where it knows less than all of them."""
    known = {"images": content_id(images)}
    if getattr(images.dataset, "sizes_alone", False):
        known["images_known_by"] = "names and file sizes alone: more than 1 GiB of pictures"
    return known


def image_ids(images: Split) -> set[bytes]:
    """What tells each image from the others: its pixels in memory, its file's content on disk."""
    source, indices = images.dataset, list(images.indices)
    if isinstance(source, ArrayImages):
        return {hashlib.blake2b(source.x[i].numpy().tobytes(), digest_size=16).digest() for i in indices}
    if isinstance(source, FileImages):
        return {hashlib.blake2b(source.store.read(i), digest_size=16).digest() for i in indices}
    return set()

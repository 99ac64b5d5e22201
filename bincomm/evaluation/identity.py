"""Names for weights and for images in their present state, to recognize what was computed from them."""

import hashlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np

from bincomm.data.parquet import ParquetImages
from bincomm.data.shards import Shards
from bincomm.data.sources import Mix, Source

if TYPE_CHECKING:  # codes at rest are read without timm and DALI
    from bincomm.evaluation.pretrained import Pretrained


def weights_identity(model: "Pretrained") -> str:
    """A name for what a network computes: of its architecture and its weights."""
    from bincomm.weights import hash_weights  # which needs timm; so does a network, but not what is below

    digest = hashlib.sha256(repr((model.config.backbone, model.config.backbone_args)).encode())
    for network in (model.backbone, model.head):
        if network is not None:
            hash_weights(digest, network)
    return digest.hexdigest()[:32]


def images_identity(source: Source, *, closely: bool = False) -> str:
    """A name for images as they are now: of their names, their labels, and their files' sizes and times;
    closely also of the times that nobody can set (ctime), which show that a file was changed even if its own
    time was put back, but which differ for each copy of the files."""
    digest, images = hashlib.sha256(), source.images
    for name in images.names():
        digest.update(os.fsencode(name) + b"\0")
    if source.labels is not None:
        digest.update(
            json.dumps(source.classes).encode() + np.ascontiguousarray(source.labels, "<i8").tobytes()
        )
    parts = images.parts if isinstance(images, Mix) else [images]
    for file in (
        file
        for part in parts
        for file in (part.shards if isinstance(part, Shards | ParquetImages) else part.names())
    ):
        try:
            stat = os.stat(file)
            changed = f" {stat.st_ctime_ns}" if closely else ""
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}{changed}\0".encode())
        except OSError:  # a missing file is reported when it is read
            digest.update(b"gone\0")
    return digest.hexdigest()[:32]

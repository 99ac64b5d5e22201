"""The images nearest to a few, by features and by codes, as pictures."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bincomm.data.contact_sheet import crop_picture
from bincomm.data.sources import Source
from bincomm.evaluation.features import forward_batches
from bincomm.evaluation.labeled import unit
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.progress import spread

QUERIES, NEIGHBORS = 6, 6
GALLERY = 2000  # images searched, at most
PICTURE_SIZE = 80  # pixels a side, at most


class Shown(NamedTuple):
    """An image that is shown."""

    picture: Image.Image
    name: str
    label: str | None  # its class; None without labels


class Query(NamedTuple):
    """An image, and those nearest to it, the nearest first."""

    image: Shown
    by_features: list[Shown]
    by_codes: list[Shown]


class _Seen(NamedTuple):
    """What a network made of the images of a source that can be used."""

    images: list[Shown]
    features: Tensor  # (n, D), of unit length
    signs: Tensor  # (n, K), ±1


def find_neighbors(model: Pretrained, gallery: Source, queries: Source | None = None) -> list[Query]:
    """The images of a gallery that are nearest to a few queries, evenly from all of them, by the cosine of
    their features and by the Hamming distance of their codes.

    Args:
        model: a backbone with its head.
        gallery: at most `GALLERY` of its images are searched, evenly from all of it.
        queries: None: images of the gallery, each of which is then none of its own neighbors.
    """
    searched = _look_at(model, spread(gallery, GALLERY))
    if not searched.images:
        return []
    if queries is None:
        count = min(QUERIES, len(searched.images))
        rows = np.linspace(0, len(searched.images) - 1, count).astype(int).tolist()
        asked = _Seen([searched.images[row] for row in rows], searched.features[rows], searched.signs[rows])
    else:
        rows = []
        asked = _look_at(model, spread(queries, QUERIES))
    result = []
    for number, image in enumerate(asked.images):
        own = rows[number] if rows else None
        result.append(
            Query(
                image,
                _nearest(searched, searched.features @ asked.features[number], own),
                _nearest(searched, searched.signs @ asked.signs[number], own),
            )
        )
    return result


def _nearest(searched: _Seen, similarity: Tensor, own: int | None) -> list[Shown]:
    order = similarity.sort(descending=True, stable=True).indices.tolist()
    return [searched.images[row] for row in order if row != own][:NEIGHBORS]


def _look_at(model: Pretrained, source: Source) -> _Seen:
    images: list[Shown] = []
    features, signs = [torch.empty(0)], [torch.empty(0)]
    for batch in forward_batches(model, source):
        assert batch.logits is not None  # the model has a head
        features.append(unit(batch.features).cpu())
        signs.append(torch.where(batch.logits > 0, 1.0, -1.0).cpu())
        for index, crop in zip(batch.indices, batch.crops, strict=True):
            label = None if source.labels is None else source.classes[int(source.labels[index])]
            picture = crop_picture(crop, model.config.crops, PICTURE_SIZE)
            images.append(Shown(picture, source.images.name(index), label))
    return _Seen(images, *(torch.cat(each[1:] or each) for each in (features, signs)))

"""What a network makes of the images of a report: logits, pictures of the most certain, augmented views."""

from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from bincomm.data.contact_sheet import crop_picture
from bincomm.data.loader import Loader
from bincomm.data.sources import Source
from bincomm.evaluation.features import forward_batches
from bincomm.evaluation.pretrained import Pretrained

PICTURES = 8  # images shown on each side of a bit
PICTURE_SIZE = 96  # pixels a side at most
AUGMENTED = 2048  # images encoded in two augmented views


class Observations(NamedTuple):
    """What a network made of the images that can be used."""

    indices: Tensor  # (n,) int64, their numbers in the source
    logits: Tensor  # (n, K) fp32
    pictures: dict[int, Image.Image]  # of the PICTURES most certain images on each side of each bit, by row
    left_out: list[list[str]]  # name and why, of the others


@torch.no_grad()
def observe(model: Pretrained, source: Source, bits: list[int] | None = None) -> Observations:
    """Encode all images once, and keep pictures of those that are most certain for any bit.

    Args:
        model: with a head.
        bits: that will be shown; checked as soon as their number K is known.

    Raises:
        ValueError: there is no such bit.
    """
    indices: list[int] = []
    logits: list[Tensor] = []
    pictures: dict[int, Image.Image] = {}
    left_out: list[list[str]] = []
    extremes: list[tuple[Tensor, Tensor]] = []  # logits and rows (≤ PICTURES, K): the largest, the smallest

    def leave_out(image: int, why: str) -> None:
        left_out.append([source.images.name(image), why])

    for batch in forward_batches(model, source, leave_out):
        assert batch.logits is not None  # the model has a head
        values = batch.logits.float().cpu()
        count, size = values.shape
        if not extremes:
            if bits is not None and not all(0 <= bit < size for bit in bits):
                raise ValueError(f"bits: expected from 0 to {size - 1}, got {bits}")
            empty = values.new_empty(0, size)
            extremes = [(empty, empty.long())] * 2
        rows = torch.arange(len(indices), len(indices) + count)[:, None].expand_as(values)
        for side, (before, rows_before) in enumerate(extremes):
            candidates, candidate_rows = torch.cat([before, values]), torch.cat([rows_before, rows])
            candidates, order = candidates.sort(dim=0, descending=side == 0, stable=True)
            extremes[side] = candidates[:PICTURES], candidate_rows.gather(0, order)[:PICTURES]
        needed = set(torch.cat([rows_of_side for _, rows_of_side in extremes]).unique().tolist())
        pictures = {row: picture for row, picture in pictures.items() if row in needed}
        for row in needed - pictures.keys():
            pictures[row] = crop_picture(batch.crops[row - len(indices)], model.config.crops, PICTURE_SIZE)
        indices += batch.indices
        logits.append(values)
    return Observations(
        torch.tensor(indices), torch.cat(logits) if logits else torch.empty(0, 0), pictures, left_out
    )


class MostCertain(NamedTuple):
    """Rows of the images for which a bit is most certainly 1 and 0, the most certain first."""

    ones: list[int]
    zeros: list[int]


def most_certain(logits: Tensor, bit: int, count: int = PICTURES) -> MostCertain:
    """Images with the largest and the smallest logit of a bit, of equal ones the first; fewer than `count`
    where fewer have that sign.

    Args:
        logits: (n, K), whose signs are the code.
        bit: from 0 to K - 1.

    Raises:
        ValueError: there is no such bit.
    """
    if logits.dim() != 2 or not 0 <= bit < logits.shape[1]:
        raise ValueError(f"bit: expected one of the columns of {tuple(logits.shape)} logits, got {bit}")
    column = logits[:, bit]
    ones = int((column > 0).sum())
    rows = [
        column.sort(descending=largest, stable=True).indices[: min(count, of_sign)].tolist()
        for largest, of_sign in ((True, ones), (False, len(column) - ones))
    ]
    return MostCertain(*rows)


@torch.no_grad()
def augmented_signs(model: Pretrained, source: Source, seed: int) -> Tensor:
    """(2, m, K) bool, the codes of two augmented views of up to AUGMENTED images, made as in training."""
    assert model.head is not None
    n = len(source.images)
    batches = -(-n // min(256, model.config.batch_size))
    batch_size = n // batches  # because images that do not fill a last batch are left out
    loader = Loader(
        source,
        replace(model.config.crops, local_crops=0),
        batch_size=batch_size,
        seed=seed,
        device=model.device,
        threads=model.config.threads,
        max_unusable=1.0,
    )
    signs = []
    for _ in range(min(batches, AUGMENTED // batch_size)):
        crops, _ = loader.next()
        logits = model.head.code(model.backbone(crops.transpose(0, 1).flatten(0, 1)))
        signs.append((logits > 0).cpu().view(2, batch_size, -1))
    return torch.cat(signs, 1)

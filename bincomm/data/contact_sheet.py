"""A picture of the crops that a run begins with."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from bincomm.data.crops import Crops
from bincomm.data.loader import Loader
from bincomm.data.sources import Source

GAP = 4  # pixels between crops
TITLE = 16  # pixels above a column of crops
MIN_WIDTH = 64  # pixels of a column, so that its title fits
LABEL = 80  # pixels of the labels before the rows


def contact_sheet(
    source: Source, recipes: Mapping[str, Crops], *, seed: int, images: int = 8
) -> tuple[Image.Image, list[str]]:
    """The crops of the first images of a run with this seed, and the images' names. An image has a row for
    each recipe, with its label if there are several; all recipes have crops of the same number and sizes."""
    batches = {label: first_crops(source, crops, seed, images) for label, crops in recipes.items()}
    names = next(iter(batches.values()))[1]
    rows = [
        (label, pictures[image]) for image in range(len(names)) for label, (pictures, _) in batches.items()
    ]
    titles = ["global 1", "global 2", *(f"local {number + 1}" for number in range(len(rows[0][1]) - 2))]
    widths = [max(MIN_WIDTH, crop.width) for crop in rows[0][1]]
    height = max(crop.height for crop in rows[0][1])
    margin = LABEL if len(recipes) > 1 else 0
    size = margin + sum(widths) + GAP * (len(widths) + 1), TITLE + (height + GAP) * len(rows) + GAP
    sheet = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(sheet)
    left = margin + GAP
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        drawing.text((left, 2), title, fill="black")
        for row, (_, pictures) in enumerate(rows):
            sheet.paste(pictures[column], (left, TITLE + GAP + row * (height + GAP)))
        left += width + GAP
    if margin:
        for row, (label, _) in enumerate(rows):
            drawing.text((GAP, TITLE + GAP + row * (height + GAP)), label, fill="black")
    return sheet, names


def first_crops(
    source: Source, crops: Crops, seed: int, images: int, most: int | None = None
) -> tuple[list[list[Image.Image]], list[str]]:
    """The crops of the first images of a run, those of an image in one list, and the images' names; see
    `crop_picture` for `most`."""
    loader = Loader(
        source,
        crops,
        # The crops of an image do not depend on how many others are in its batch.
        batch_size=min(images, len(source.images)),
        seed=seed,
        device=torch.device("cpu"),
        max_unusable=1.0,
    )
    groups = [group for group in loader.next() if group is not None]
    pictures = [
        [crop_picture(crop, crops, most) for group in groups for crop in group[image]]
        for image in range(len(groups[0]))
    ]
    return pictures, [source.images.name(index) for index in loader.indices]


def crop_picture(crop: Tensor, crops: Crops, most: int | None = None) -> Image.Image:
    """A crop (C, S, S), normalized as `crops` says, as a picture of at most so many pixels a side: RGB as it
    was; else what `shown` says."""
    crop = crop.float()
    if most is not None and crop.shape[-1] > most:
        crop = F.adaptive_avg_pool2d(crop, most)
    values = crop.permute(1, 2, 0).cpu().numpy()
    if crops.rgb:
        pixels = 255 * (values * crops.std + crops.mean)
    else:
        pixels = 255 * (0.5 + values[..., [0, 1, 2] if crops.channels >= 3 else [0, 0, 0]] / 4)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def shown(crops: Crops) -> str:
    """What of other images than RGB `crop_picture` shows, in words; "" of RGB."""
    if crops.rgb:
        return ""
    channels = "channels 1 to 3 as red, green and blue" if crops.channels >= 3 else "channel 1 in gray"
    return f"{channels}, from two standard deviations below its mean to two above"

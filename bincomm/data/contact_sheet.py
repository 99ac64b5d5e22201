"""A picture of the crops that a run begins with."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from bincomm.data.crops import Crops
from bincomm.data.loader import Loader
from bincomm.data.sources import Source

GAP = 4  # pixels between crops
TITLE = 16  # pixels above a column of crops
MIN_WIDTH = 64  # pixels of a column, so that its title fits


def contact_sheet(
    source: Source, crops: Crops, *, seed: int, images: int = 8
) -> tuple[Image.Image, list[str]]:
    """The crops of the first images of a run with this seed, a row for each image, and the images' names."""
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
    rows = [
        [_picture(crop, crops) for group in groups for crop in group[image]]
        for image in range(len(groups[0]))
    ]
    titles = ["global 1", "global 2", *(f"local {number + 1}" for number in range(crops.local_crops))]
    widths = [max(MIN_WIDTH, crop.width) for crop in rows[0]]
    height = max(crop.height for crop in rows[0])
    size = sum(widths) + GAP * (len(widths) + 1), TITLE + (height + GAP) * len(rows) + GAP
    sheet = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(sheet)
    left = GAP
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        drawing.text((left, 2), title, fill="black")
        for row, pictures in enumerate(rows):
            sheet.paste(pictures[column], (left, TITLE + GAP + row * (height + GAP)))
        left += width + GAP
    return sheet, [source.images.name(index) for index in loader.indices]


def _picture(crop: torch.Tensor, crops: Crops) -> Image.Image:
    pixels = 255 * (crop.permute(1, 2, 0).numpy() * crops.std + crops.mean)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

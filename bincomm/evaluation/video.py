"""Objects followed through videos by patch features: label propagation on DAVIS-2017 and DAVIS-2016."""

import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import KDTree
from torch import Tensor

from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.dense import (
    IGNORED,
    centers,
    mask_palette,
    open_image,
    open_mask,
    open_png,
    patch_features,
    preprocess,
    write_mask,
)
from bincomm.evaluation.layouts import Pair, file_error, plain_name, read_list, refusal
from bincomm.evaluation.pretrained import Pretrained, check_rgb
from bincomm.files import expand_home
from bincomm.logs import progress_bar
from bincomm.patches import stride_of

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# Lists of validation sequences, and the set that each belongs to. The archive of DAVIS-2017 has that of
# ImageSets/2016, too; that of DAVIS-2016 has ImageSets/480p, with a line for each frame and its mask.
LISTS = {
    "ImageSets/2017/val.txt": "DAVIS-2017",
    "ImageSets/480p/val.txt": "DAVIS-2016",
    "ImageSets/2016/val.txt": "DAVIS-2016",
}
FRAMES_OF, MASKS_OF = "JPEGImages/480p", "Annotations/480p"
ABOUT_255 = "; masks of 0 and 255 are DAVIS-2016's, which is taken where ImageSets/2017/val.txt is missing"
ACCEPTED = f"DAVIS with {FRAMES_OF}, {MASKS_OF} and one of {', '.join(LISTS)}"
FRAMES, RADIUS, NEIGHBORS, TEMPERATURE = 7, 12, 5, 0.1  # DINO's
SIDE, MULTIPLE = 480, 64  # pixels
TILE = 16  # patches a side whose neighborhoods are compared together
# Cosines are rounded to 2⁻¹⁶: coarser than fp32's rounding, which depends on the size of the product and must
# not choose among equally near patches.
RESOLUTION = 1 << 16
TOLERANCE = 0.008  # of the diagonal


class Davis(NamedTuple):
    """The validation sequences of a folder of DAVIS."""

    name: str  # DAVIS-2016 or DAVIS-2017
    sequences: dict[str, list[Pair]]  # frames and masks in the order of time


def open_davis(folder: str | os.PathLike[str]) -> Davis:
    """The validation sequences of DAVIS-2017 or, where their list is missing, of DAVIS-2016. Only the list
    and names are read.

    Raises:
        ValueError: the folder has another layout, a sequence has fewer than three frames, or frames or masks
            are missing; the message names what was expected and what there is.
    """
    root = expand_home(folder)
    path = list_of(root)
    if path is None or not all((root / kind).is_dir() for kind in (FRAMES_OF, MASKS_OF)):
        raise refusal("davis", root, ACCEPTED, list_of)
    lines = read_list(root / path, "sequences")
    if path == "ImageSets/480p/val.txt":
        words = [PurePosixPath(line[0]).parent.name for line in lines]
    else:
        words = [word for line in lines for word in line]
    names = dict.fromkeys(plain_name(word, root / path) for word in words)
    return Davis(LISTS[path], {name: _sequence(root, name) for name in names})


def list_of(folder: Path) -> str | None:
    """Which list of validation sequences a folder has, the first of LISTS; None if it has none."""
    return next((path for path in LISTS if (folder / path).is_file()), None)


def evaluate_davis(
    model: Pretrained,
    folder: str | os.PathLike[str],
    *,
    masks: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """J, F and J&F on DAVIS's validation set, its objects tracked from the masks of the first frame.

    The protocol of DINO (arXiv 2104.14294, after Jabri et al., arXiv 2006.14613): the shorter side is resized
    (bicubic; by DINO bilinear) to 480 pixels, the longer in proportion and down to a multiple of 64, either
    to a multiple of the backbone's stride where that does not divide these, and `propagate` does the rest.
    Figures are those of the benchmark's semi-supervised task (Pont-Tuset et al., arXiv 1704.00675): the
    objects are those of the first frame; the first frame, which is given, and the last one do not count; of
    every object the mean over its frames is taken, and of these the mean over all objects of all sequences.
    Pixels whose annotation is 255 are background.

    In DAVIS-2016 (Perazzi et al., CVPR 2016) a sequence has one object, of all pixels that are not 0, and so
    the means are those over its sequences.

    Args:
        model: a pretrained network; its mean and std normalize the frames' colors.
        folder: the folder of DAVIS-2017 or DAVIS-2016, see `open_davis`.
        masks: a folder for the predicted masks, SEQUENCE/FRAME.png for every frame, as the benchmarks' own
            programs read them: of the frame's size, numbers and palette of DAVIS-2017, 0 and 255 of
            DAVIS-2016. The first frame's is the one that is given.
        ranks: all call, each tracks a share of the sequences, and all get the figures.

    Returns:
        "j", "f", "jf" (their mean), from 0 to 1, and "objects", their number; "sequences", these four of
        every sequence, by name; and "set", DAVIS-2017 or DAVIS-2016.

    Raises:
        ValueError: something is missing or cannot be read, masks and frames differ in size, a sequence of
            fewer than three frames or without objects, or a backbone that gives no map. The message names
            the file.
        OSError: a predicted mask cannot be written.
    """
    check_rgb("davis", model)
    davis = open_davis(folder)
    names = list(davis.sequences)
    own = {name: davis.sequences[name] for name in names[ranks.rank :: ranks.world]}
    frames = sum(len(pairs) for pairs in own.values())
    logger.info("%s: %d sequences", davis.name, len(names))
    single = davis.name == "DAVIS-2016"
    with progress_bar(
        total=frames, desc="tracking objects", unit="frame", leave=False, disable=ranks.rank > 0
    ) as bar:
        shares = ranks.gather(
            {
                name: _track(model, pairs, bar, single, None if masks is None else masks / name)
                for name, pairs in own.items()
            }
        )
    by_name = {name: objects for share in shares for name, objects in share.items()}
    objects = [by_name[name] for name in names]
    return {
        **_figures(np.concatenate(objects)),
        "sequences": {name: _figures(each) for name, each in zip(names, objects, strict=True)},
        "set": davis.name,
    }


@torch.no_grad()
def propagate(features: Iterable[Tensor], first: Tensor | np.ndarray) -> Iterator[Tensor]:
    """Propagate the mask of a video's first frame through the following frames, by their features alone.

    A patch takes its labels from the first frame and the 7 before it: of their patches that are at most 12
    rows and columns away, the 5 nearest by cosine c, weighted by exp(c/0.1); those as near as the fifth are
    taken too. The first frame's labels are those at its patches' centers. For the mask, labels are
    interpolated to the pixels (bilinear), those of each object stretched to [0, 1] over the frame, and the
    highest is taken. All of this is DINO's, except for resized frames: DINO interpolates to their size, and
    takes the mask's pixels from the nearest there.

    Args:
        features: (h, w, D) of one frame after another in the order of time, any dtype, any device; read as
            they are needed, and at most nine are held.
        first: (H, W) mask of the first frame, integers: 0 is background, 1 to L are objects.

    Yields:
        The mask (H, W) uint8, CPU, of every frame from the second on.

    Raises:
        ValueError: a mask without an object, no frames, or features that are not (h, w, D), differ in shape,
            or are not finite.
    """
    first = torch.as_tensor(first).long().cpu()
    if first.dim() != 2 or first.numel() == 0 or not 0 < int(first.max()) < IGNORED or int(first.min()) < 0:
        raise ValueError(f"first: expected a mask (H, W) with objects from 1 to 254, got {_describe(first)}")
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=FRAMES)
    start = None
    height, width = first.shape
    for frame in features:
        frame = _unit(frame, start)
        if start is None:
            rows, columns = frame.shape[:2]
            start = frame, patch_labels(first, (rows, columns)).to(frame.device)
            continue
        labels = _carry(frame, [start, *context])
        context.append((frame, labels))
        yield _enlarge(labels, (height, width))
    if start is None:
        raise ValueError("features: expected at least one frame, got none")


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection of two masks (H, W) over their union; 1 where both are empty."""
    mask, truth = mask.astype(bool), truth.astype(bool)
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def contour_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """F, the harmonic mean of precision and recall of a mask's contour, both masks (H, W).

    A pixel is of the contour if it differs from its neighbor to the right, below, or below to the right
    (inside the image; so a mask of all pixels has no contour). It is matched if a pixel of the other contour
    is at most ⌈0.008·√(H² + W²)⌉ pixels away. 1 where neither mask has a contour, 0 where only one has. From
    Perazzi et al., CVPR 2016, as the code of DAVIS-2017 has it; there contours are dilated by a disk, which
    is the same.
    """
    contours = [contour(mask.astype(bool)), contour(truth.astype(bool))]
    if not all(map(len, contours)):
        return float(len(contours[0]) == len(contours[1]))
    radius = math.ceil(TOLERANCE * math.hypot(*mask.shape))
    precision, recall = (
        # Distances are roots of integers; those beyond the bound are returned as infinity.
        np.mean(KDTree(other).query(own, distance_upper_bound=radius + 0.5)[0] <= radius)
        for own, other in (contours, contours[::-1])
    )
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask's contour, see `contour_accuracy`: (H, W) bool -> (n, 2) rows and columns."""
    around = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    below, right, across = around[1:, :-1], around[:-1, 1:], around[1:, 1:]
    return np.argwhere((mask != below) | (mask != right) | (mask != across))


def _sequence(folder: Path, name: str) -> list[Pair]:
    """Frames and masks of a sequence, in the order of time."""
    frames, masks = folder / FRAMES_OF / name, folder / MASKS_OF / name
    frame_stems, mask_stems = (
        # Not those with a dot at the start: macOS adds a ._NAME to each.
        {path.stem for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")}
        for folder, suffix in ((frames, ".jpg"), (masks, ".png"))
    )
    if len(frame_stems | mask_stems) < 3:
        raise file_error(frames, f"expected at least 3 frames, got {len(frame_stems)}")
    pairs = [(frames / f"{stem}.jpg", masks / f"{stem}.png") for stem in sorted(frame_stems | mask_stems)]
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            other = "frame" if path.suffix == ".png" else "mask"
            raise file_error(path, f"expected a file, as there is a {other} of that name")
    return pairs


def _track(
    model: Pretrained, pairs: list[Pair], bar: "tqdm", single: bool, output: Path | None
) -> np.ndarray:
    """J and F of every object of a sequence, means over its frames: (objects, 2)."""
    first = _annotation(pairs[0][1], single)
    if not first.any():
        raise file_error(
            pairs[0][1],
            "expected an object, got background alone"
            + (ABOUT_255 if not single and open_mask(pairs[0][1]).any() else ""),
        )
    objects = np.unique(first[first > 0])
    figures = []
    height, width = first.shape
    palette = None if single else mask_palette(pairs[0][1])
    # The last frame does not count, so it is followed only where its mask is to be written.
    followed = pairs[:-1] if output is None else pairs
    masks = propagate(_features(model, followed, (height, width), bar), first)
    for (_, path), predicted in zip(followed, chain([first], map(Tensor.numpy, masks)), strict=True):
        if output is not None:
            write_mask(output / path.name, 255 * predicted if single else predicted, palette)
        if path in (pairs[0][1], pairs[-1][1]):
            continue
        truth = _annotation(path, single)
        if truth.shape != first.shape:
            raise file_error(path, f"expected {_pixels(first.shape)} as before, got {_pixels(truth.shape)}")
        masks_of = [(predicted == number, truth == number) for number in objects]
        figures.append([[region_similarity(*pair), contour_accuracy(*pair)] for pair in masks_of])
    bar.update(len(pairs) - len(followed))
    return np.mean(figures, axis=0)


def _features(model: Pretrained, pairs: list[Pair], shape: tuple[int, int], bar: "tqdm") -> Iterator[Tensor]:
    size = resized_shape(shape, stride_of(model.backbone))
    for path, _ in pairs:
        image = open_image(path)
        if image.size[::-1] != shape:
            actual = _pixels(image.size[::-1])
            raise file_error(path, f"expected {_pixels(shape)} as of the first frame's mask, got {actual}")
        bar.update()
        yield patch_features(model.backbone, preprocess(model, image, size))[0]


def resized_shape(shape: tuple[int, int], stride: int) -> tuple[int, int]:
    """The (height, width) to which frames of a shape (H, W) are resized for a backbone's stride."""
    multiple = MULTIPLE if MULTIPLE % stride == 0 else stride
    shorter = max(1, SIDE // stride) * stride
    height, width = (
        shorter if side == min(shape) else max(1, SIDE * side // min(shape) // multiple) * multiple
        for side in shape
    )
    return height, width


def _annotation(path: Path, single: bool) -> np.ndarray:
    """A mask (H, W) uint8, 0 for background. A `single` object, 1, is all that is not 0, or not black: some
    masks of DAVIS-2016 have colors and transparency."""
    if single:
        picture = open_png(path)
        pixels = np.array(picture if picture.mode in ("P", "L", "1") else picture.convert("RGB"))
        return (pixels != 0).reshape(*pixels.shape[:2], -1).max(-1).astype(np.uint8)
    mask = open_mask(path)
    mask[mask == IGNORED] = 0
    return mask


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]} pixels"


def _figures(objects: np.ndarray) -> dict[str, Any]:
    j, f = objects.mean(0).tolist()
    return {"j": j, "f": f, "jf": (j + f) / 2, "objects": len(objects)}


def _describe(mask: Tensor) -> str:
    values = f", values from {int(mask.min())} to {int(mask.max())}" if mask.numel() else ""
    return f"shape {tuple(mask.shape)}{values}"


def _unit(frame: Tensor, start: tuple[Tensor, Tensor] | None) -> Tensor:
    """Features of length 1, fp32."""
    expected = "(h, w, D)" if start is None else str(tuple(start[0].shape))
    if frame.dim() != 3 or frame.numel() == 0 or (start is not None and frame.shape != start[0].shape):
        raise ValueError(f"features: expected {expected} of every frame, got {tuple(frame.shape)}")
    if not frame.isfinite().all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    return F.normalize(frame.float(), dim=-1)


def patch_labels(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (h, w, 1 + L) of patches, those of the pixels at their centers."""
    rows, columns = (centers(patches, pixels) for pixels, patches in zip(mask.shape, grid, strict=True))
    return F.one_hot(mask[rows[:, None], columns], int(mask.max()) + 1).float()


def _enlarge(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask (H, W) of labels (h, w, 1 + L)."""
    labels = F.interpolate(labels.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0]
    low, high = labels.flatten(1).aminmax(dim=1)
    spread = (high - low)[:, None, None]
    stretched = (labels - low[:, None, None]) / spread
    # A label that is the same everywhere cannot be stretched: one of an object that has left, for example.
    return torch.where(spread > 0, stretched, labels).argmax(0).to(torch.uint8).cpu()


def _carry(frame: Tensor, context: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Labels (h, w, 1 + L) of a frame from those of other frames; features (h, w, D) of length 1.

    Tile by tile, so that only the similarities of a tile's patches to those within the radius of the tile are
    in memory at once. All patches of two frames, at a stride of 8, would be 39 million pairs, for each of
    eight frames.
    """
    height, width = frame.shape[:2]
    result = frame.new_empty(height, width, context[0][1].shape[-1])
    rows, columns = (torch.arange(side, device=frame.device) for side in (height, width))
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            near = (
                slice(max(0, top - RADIUS), top + TILE + RADIUS),
                slice(max(0, left - RADIUS), left + TILE + RADIUS),
            )
            far_rows, far_columns = (
                (indices[own, None] - indices[other]).abs() > RADIUS
                for indices, own, other in zip((rows, columns), tile, near, strict=True)
            )
            far = (far_rows[:, None, :, None] | far_columns[None, :, None, :]).flatten(2).flatten(0, 1)
            keys, labels = (
                torch.cat([x[near].flatten(0, 1) for x in part]) for part in zip(*context, strict=True)
            )
            similarity = (frame[tile].flatten(0, 1) @ keys.T * RESOLUTION).round()
            similarity.unflatten(1, (len(context), -1)).masked_fill_(far[:, None], -torch.inf)
            nearest = similarity.topk(min(NEIGHBORS, len(keys)), dim=-1).values
            weights = ((similarity - nearest[:, :1]) / RESOLUTION / TEMPERATURE).exp()
            weights.masked_fill_(similarity < nearest[:, -1:], 0)
            carried = weights @ labels / weights.sum(-1, keepdim=True)
            result[tile] = carried.view_as(result[tile])
    return result

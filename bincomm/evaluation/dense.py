"""Semantic segmentation on frozen patch features: nearest patches, and a linear probe of every patch."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bincomm.data.images import WITHOUT_RANGE, eight_bits, open_encoded, read_file
from bincomm.evaluation.layouts import Pair, file_error, open_masked_images
from bincomm.evaluation.linear import HELD_OUT, LEARNING_RATES, Descent, cross_entropy, scaling
from bincomm.evaluation.pretrained import Pretrained, check_rgb
from bincomm.files import write_file
from bincomm.logs import printable_name, progress_bar
from bincomm.patches import patch_map, stride_of

logger = logging.getLogger(__name__)

CLASSES = 255  # an eight-bit mask holds the classes 0 to 254
IGNORED = 255
LONGEST = 32  # a longer side, in shorter ones: a strip, resized by its shorter side, would have no bound
NEIGHBORS, TEMPERATURE = 30, 0.02  # Hummingbird's
SIMILARITIES = 1 << 24  # held at once
SCORES = 1 << 26  # of classes at pixels, held at once
STEPS, BATCH = 2000, 1024  # of the linear probe, in patches
Predict = Callable[[Tensor], Tensor]


@torch.no_grad()
def patch_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """A feature for every patch of images: (n, 3, H, W) -> (n, h, w, D), h = ⌈H/s⌉, w = ⌈W/s⌉ for stride s.

    They are those of `bincomm.patches.patch_map`, of a ViT the patch tokens of the last layer after the final
    norm. Images whose sides are no multiples of the stride are continued to the right and below by their last
    pixels.

    Args:
        backbone: a timm model, in evaluation mode.
        images: normalized, of any size the backbone can take.

    Raises:
        ValueError: the backbone gives no such map or cannot take images of this size, or there are none.
    """
    stride = stride_of(backbone)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images: expected shape (n, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    rows, columns = -(-height // stride), -(-width // stride)
    images = F.pad(images, (0, columns * stride - width, 0, rows * stride - height), mode="replicate")
    name = type(backbone).__name__
    forward_features: Any = backbone.forward_features
    try:
        features = forward_features(images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        size = f"{images.shape[-2]}×{images.shape[-1]}"
        raise ValueError(f"backbone: {name} cannot take images of {size} pixels: {error}") from error
    return patch_map(backbone, features, (rows, columns))


def evaluate_segmentation(
    model: Pretrained,
    folder: str | os.PathLike[str],
    *,
    void: Iterable[int] = (),
    masks: Path | None = None,
    size: int = 512,
    memory: int = 1 << 17,
) -> dict[str, Any]:
    """Segment the images of a folder's `val` by the annotated ones of its `train`, the backbone left frozen.

    "knn": as in "Toward In-Context Scene Understanding" (Hummingbird, arXiv 2306.01667), without its
    augmentation: every patch of an image takes the mean of the class histograms of the 30 nearest patches by
    cosine c, weighted by softmax(c/0.02). "linear": softmax regression of the class that most pixels of a
    patch have, by SGD with momentum 0.9, no weight decay, cosine to 0; the learning rate is chosen by the
    cross-entropy on every tenth training image. What patches are given is interpolated to the pixels
    (bilinear), where the class that has most is taken.

    A mask is a PNG of the same size as its image, of one channel: a class from 0 to 254 at every pixel or
    255. Pixels of 255, of `void` and of the layout's own void classes count neither in training nor in the
    figure.

    Args:
        model: a pretrained network; its mean and std normalize the images' colors.
        folder: the images and masks, in a layout of `open_masked_images`.
        void: classes, from 0 to 254, that do not count.
        masks: a folder for the predicted masks, knn/NAME.png and linear/NAME.png for every image of `val`:
            of its own size, with the numbers and the palette of the annotated masks.
        size: the shorter side in pixels to which images are resized (bicubic), in proportion but to multiples
            of the backbone's stride. Masks are not resized: the figure counts their own pixels.
        memory: number of patches of training images to store, drawn with a fixed seed, as many from each
            image. A patch takes at most 20·D + 2040 bytes on the model's device.

    Returns:
        "knn" and "linear", each {"miou", "iou": {class: IoU}} from 0 to 1, see `mean_iou`; the latter with
        its "learning_rate"; the numbers "train_images", "val_images", "patches" (stored) and "classes" (of
        these); "layout", and "void", the classes left out.

    Raises:
        ValueError: another layout; no images; masks that are missing, unreadable, of another size or with no
            class; fewer than two training images with classes; or a backbone that gives no map, or NaN or
            infinity.
        OSError: a predicted mask cannot be written.
    """
    check_rgb("segmentation", model)
    layout, train, val, own_void = open_masked_images(folder)
    if memory < 1 or size < 1:
        raise ValueError(f"memory and size: expected at least 1, got {memory} and {size}")
    left_out = sorted({*own_void, *check_void(void), IGNORED})
    logger.info(
        "segmentation: layout %s, %d images to learn from, %d to measure; pixels of %s do not count",
        layout,
        len(train),
        len(val),
        ", ".join(map(str, left_out)),
    )
    patches = collect_patches(model, train, size, memory, left_out)
    # The linear probe first, as it needs more memory while it is trained.
    linear, rate = linear_patches(patches)
    predictors = {"knn": nearest_patches(patches), "linear": linear}
    tables = {name: torch.zeros(CLASSES, CLASSES, dtype=torch.int64) for name in predictors}
    labeled = labeled_patches(model, val, size, "segmenting", left_out)
    for (image, annotated), (features, mask) in zip(val, labeled, strict=True):
        height, width = mask.shape
        for name, predict in predictors.items():
            predicted = patches.classes[to_pixels(predict(features), (height, width))].cpu()
            tables[name] += confusion(mask, predicted)
            if masks is not None:
                path = masks / name / f"{image.stem}.png"
                write_mask(path, predicted.byte().numpy(), mask_palette(annotated))
    if not tables["knn"].any():
        raise ValueError(f"val: expected a class at some pixel, got none in {printable_name(str(folder))}")
    figures = {name: mean_iou(table) for name, table in tables.items()}
    return {
        "knn": {"miou": figures["knn"][0], "iou": figures["knn"][1]},
        "linear": {"miou": figures["linear"][0], "iou": figures["linear"][1], "learning_rate": rate},
        "train_images": len(train),
        "val_images": len(val),
        "patches": len(patches.features),
        "classes": len(patches.classes),
        "layout": layout,
        "void": left_out,
    }


def check_void(void: Iterable[int]) -> list[int]:
    """Classes that do not count, if a mask can hold them."""
    classes = list(void)
    wrong = [number for number in classes if not 0 <= number <= IGNORED]
    if wrong:
        raise ValueError(f"void: expected classes from 0 to {IGNORED - 1}, got {wrong[0]}")
    return classes


def confusion(truth: Tensor, predicted: Tensor) -> Tensor:
    """How many pixels of each class were taken for each: truth and predicted (H, W), integers from 0 to 254
    -> (255, 255) int64, `table[truth, predicted]`. Where the truth is 255, a pixel does not count."""
    counted = truth != IGNORED
    pairs = truth[counted].long() * CLASSES + predicted[counted].long()
    return torch.bincount(pairs, minlength=CLASSES * CLASSES).view(CLASSES, CLASSES)


def mean_iou(table: Tensor) -> tuple[float, dict[int, float]]:
    """Intersection over union, of a `confusion` (C, C) of all images: its mean over classes, and of each.

    `IoU = hits / (pixels of the class + pixels taken for it - hits)`. The classes are those that the truth
    has: one that is only predicted wrongly costs the others their pixels, and has no IoU itself.

    Raises:
        ValueError: the table is empty.
    """
    hits, truth, taken = table.diagonal(), table.sum(1), table.sum(0)
    present = truth.nonzero().flatten().tolist()
    if not present:
        raise ValueError("table: expected at least one pixel that counts, got none")
    iou = {c: int(hits[c]) / int(truth[c] + taken[c] - hits[c]) for c in present}
    return sum(iou.values()) / len(iou), iou


def open_image(path: Path) -> Image.Image:
    """An image in RGB, of the colors that the loader of pretraining gives it.

    Raises:
        ValueError: it is missing, cannot be read, has pixels of no known range, or is too long a strip.
    """
    image = _open(path)
    if image.mode in WITHOUT_RANGE:
        raise file_error(path, f"its {WITHOUT_RANGE[image.mode]} pixels have no known range")
    if max(image.size) > LONGEST * min(image.size):
        size = "×".join(map(str, image.size))
        raise file_error(path, f"expected a longer side of at most {LONGEST} shorter ones, got {size} pixels")
    return eight_bits(image).convert("RGB")


def open_mask(path: Path) -> np.ndarray:
    """A mask of one channel, palette or gray: its indices (H, W) uint8, 255 among them.

    Raises:
        ValueError: it is missing, cannot be read, is no PNG, or has other pixels.
    """
    mask = open_png(path)
    if mask.mode not in ("P", "L", "1"):
        raise file_error(
            path,
            f"expected a mask of one eight-bit channel, got pixels of kind {mask.mode}; write classes as "
            "numbers into a gray or palette PNG",
        )
    return np.array(mask, dtype=np.uint8)


def open_png(path: Path) -> Image.Image:
    """A PNG; others may have lost the exact values of a mask. ValueError if it is none or cannot be read."""
    image = _open(path)
    if image.format != "PNG":
        raise file_error(path, f"expected a mask as PNG, which keeps its values, got {image.format}")
    return image


def mask_palette(path: Path) -> list[int] | None:
    """The 256 colors of a palette PNG, as 768 numbers; None for a gray one."""
    palette = open_png(path).getpalette()
    # Of fewer colors, Pillow would write fewer bits than the numbers need.
    return None if palette is None else palette + [0] * (768 - len(palette))


def write_mask(path: Path, mask: np.ndarray, palette: list[int] | None) -> None:
    """Write a mask (H, W) uint8 as a PNG, gray or with 256 colors, and make the folder that it lies in."""
    image = Image.fromarray(mask)
    if palette is not None:
        image.putpalette(palette)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: image.save(file, format="png"))


def centers(parts: int, cells: int) -> Tensor:
    """A line is divided into equal parts, and into equal cells: the index of the cell that holds the center
    of each part, (parts,) int64; the later one where the center lies between two."""
    return (2 * torch.arange(parts) + 1) * cells // (2 * parts)


def preprocess(model: Pretrained, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image resized to (height, width), bicubic, and normalized: (1, 3, H, W), on the model's device."""
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).to(model.device).permute(2, 0, 1).float() / 255
    mean, std = (
        torch.tensor(x, device=model.device)[:, None, None] for x in (model.config.mean, model.config.std)
    )
    return ((pixels - mean) / std)[None]


class PatchMemory(NamedTuple):
    """Patches of training images."""

    features: Tensor  # (N, D) fp32
    shares: Tensor  # (N, C) of a patch's pixels that have each class
    images: Tensor  # (N,) the image each is of
    classes: Tensor  # (C,) that occur in a patch


def labeled_patches(
    model: Pretrained, pairs: list[Pair], size: int, activity: str, void: Iterable[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Patch features (h, w, D), fp32, and mask (H, W) uint8, CPU, of one image after another; what is void is
    255 there."""
    stride = stride_of(model.backbone)
    counted = np.arange(256, dtype=np.uint8)
    counted[list(void)] = IGNORED
    with progress_bar(total=len(pairs), desc=activity, unit="img", leave=False) as bar:
        for path, mask_path in pairs:
            image, mask = open_image(path), counted[open_mask(mask_path)]
            if mask.shape != image.size[::-1]:
                expected, actual = (f"{w}×{h}" for w, h in (image.size, mask.shape[::-1]))
                raise file_error(mask_path, f"expected {expected} pixels as of its image, got {actual}")
            scale = size / min(image.size)
            width, height = (max(1, round(side * scale / stride)) * stride for side in image.size)
            features = patch_features(model.backbone, preprocess(model, image, (height, width)))[0].float()
            if not features.isfinite().all():
                raise file_error(path, "expected finite features, got NaN or infinity")
            yield features, torch.from_numpy(mask)
            bar.update()


def collect_patches(
    model: Pretrained, pairs: list[Pair], size: int, memory: int, void: Iterable[int] = ()
) -> PatchMemory:
    """At most `memory` patches of training images, drawn with a fixed seed, as many of each image."""
    some_void = False
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for image, (features, mask) in enumerate(labeled_patches(model, pairs, size, "collecting patches", void)):
        some_void = some_void or bool((mask == IGNORED).any())
        rows, columns = features.shape[:2]
        shares = class_shares(mask, (rows, columns))
        labeled = shares.sum(1).nonzero().flatten()
        # The same share of memory for each; where there are more images than patches, one or none.
        quota = memory * (image + 1) // len(pairs) - memory * image // len(pairs)
        drawn = labeled[torch.randperm(len(labeled), generator=generator)[:quota]]
        parts[0].append(features.flatten(0, 1)[drawn.to(features.device)])
        parts[1].append(shares[drawn].to(features.device))
        parts[2].append(torch.full((len(drawn),), image))
    features, shares, images = (torch.cat(part) for part in parts)
    if len(features) == 0:
        folder = printable_name(str(pairs[0][1].parent))
        raise ValueError(f"train: expected a class at some pixel, got none in {folder}")
    classes = shares.any(0).nonzero().flatten()
    if some_void and classes.tolist() == [0]:
        raise ValueError(
            "train: expected two classes or more, got class 0 alone beside pixels that do not count (255); "
            "write the class of masks of 0 and 255 as another number, such as 1"
        )
    return PatchMemory(features, shares[:, classes], images.to(features.device), classes)


def class_shares(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """What share of the pixels of every patch has each class: (H, W) -> (h·w, 255). A pixel belongs to the
    patch that holds its center; what the ignored pixels of a patch lack of 1 votes for nothing."""
    rows, columns = (centers(pixels, patches) for pixels, patches in zip(mask.shape, grid, strict=True))
    patches = (rows[:, None] * grid[1] + columns).flatten()
    counts = torch.bincount(patches * 256 + mask.flatten(), minlength=grid[0] * grid[1] * 256)
    counts = counts.view(-1, 256)
    return counts[:, :CLASSES] / counts.sum(1, keepdim=True).clamp(min=1)


def nearest_patches(memory: PatchMemory) -> Predict:
    """The class shares of the nearest patches: a function of features (h, w, D) -> (h, w, C)."""
    keys = F.normalize(memory.features, dim=-1)
    block = max(1, SIMILARITIES // len(keys))

    def predict(features: Tensor) -> Tensor:
        votes = []
        for queries in F.normalize(features, dim=-1).flatten(0, 1).split(block):
            near = (queries @ keys.T).topk(min(NEIGHBORS, len(keys)), dim=-1)
            weights = (near.values / TEMPERATURE).softmax(-1)
            votes.append((weights[:, None] @ memory.shares[near.indices])[:, 0])
        return torch.cat(votes).unflatten(0, features.shape[:2])

    return predict


def linear_patches(memory: PatchMemory) -> tuple[Predict, float]:
    """The linear probe, a function of features (h, w, D) -> logits (h, w, C), and its learning rate."""
    features, targets = memory.features, memory.shares.argmax(-1)
    standardized, device = scaling(features), features.device
    generator = torch.Generator().manual_seed(0)

    def train(patches: Tensor, rates: tuple[float, ...]) -> Tensor:
        descent = Descent(rates, len(memory.classes), features.shape[1] + 1, STEPS, device)
        order = patches[:0]
        for _ in range(STEPS):
            if len(order) == 0:
                order = patches[torch.randperm(len(patches), generator=generator).to(device)]
            batch, order = order[:BATCH], order[BATCH:]
            descent.step(standardized(features[batch]), targets[batch])
        return descent.weights

    # By images, as patches of one are much alike.
    held_out = memory.images.unique(return_inverse=True)[1] % HELD_OUT == 0
    rest, chosen = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    if len(rest) == 0:
        raise ValueError("train: expected at least 2 images with classes, got 1")
    losses = cross_entropy(
        train(rest, LEARNING_RATES), standardized(features[chosen]), targets[chosen], BATCH
    )
    rate = LEARNING_RATES[int(losses.argmin())]
    (weights,) = train(torch.arange(len(features), device=device), (rate,))
    return lambda x: (standardized(x.flatten(0, 1)) @ weights.T).unflatten(0, x.shape[:2]), rate


def to_pixels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of the C scores of patches (h, w, C), interpolated to pixels, is the highest: (H, W) int64."""
    highest = scores.new_full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    block = max(1, SCORES // (size[0] * size[1]))
    for number, part in enumerate(scores.permute(2, 0, 1).split(block)):
        value, index = F.interpolate(part[None], size, mode="bilinear", align_corners=False)[0].max(0)
        better = value > highest
        highest = torch.where(better, value, highest)
        classes = torch.where(better, index + number * block, classes)
    return classes


def _open(path: Path) -> Image.Image:
    try:
        image = open_encoded(read_file(str(path)))
        image.load()
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise file_error(path, f"more than {limit} pixels, the most that are decoded") from None
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Pillow's readers raise whatever a damaged image leads them to
        raise file_error(path, f"cannot be read: {error}") from error
    return image

"""Objects discovered in images by cuts through their patch features: MaskCut, and its average precision."""

import io
import json
import logging
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.linalg import eigh
from torch import Tensor

from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.coco import AnnotatedImage, AnnotatedObject, open_objects
from bincomm.evaluation.dense import centers, open_image, patch_features, preprocess
from bincomm.evaluation.layouts import file_error
from bincomm.evaluation.pretrained import Pretrained, check_rgb
from bincomm.files import write_text
from bincomm.logs import progress_bar
from bincomm.patches import stride_of

logger = logging.getLogger(__name__)

CUTS, THRESHOLD, WEIGHT = 3, 0.15, 1e-5  # CutLER's N, τ and ε
CORNERS = 3  # of the image's four: what has so many is background
OVERLAP, SMALLEST = 0.5, 0.01  # of a later cut: IoU with the one before, share of the patches
SIDE = 480  # pixels
CATEGORY = 1  # of all that is found


def evaluate_objects(
    model: Pretrained,
    folder: str | os.PathLike[str],
    *,
    masks: Path | None = None,
    size: int = SIDE,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Class-agnostic average precision of the objects that MaskCut finds, the backbone left frozen.

    MaskCut of CutLER (arXiv 2301.11320) on the backbone's patch features, see `cut_objects`: images are
    resized to a square (bicubic; by CutLER Lanczos), and a pixel of the image belongs to a mask if the patch
    that holds its center does. CutLER takes the keys of the last attention as features, and refines masks by
    a conditional random field, which is left out here.

    Args:
        model: a pretrained network; its mean and std normalize the images' colors.
        folder: images and annotations in COCO's format, see `bincomm.evaluation.coco.open_objects`.
        masks: a folder for objects.json, all that is found in COCO's format of results.
        size: the side of the square in pixels, rounded to a multiple of the backbone's stride.
        ranks: all call, and each cuts a share of the images; rank 0 gets the result, and the others {}.

    Returns:
        "bbox" and "segm", boxes and masks, see `average_precision`; the numbers "images", "objects" (that
        are annotated and no crowds) and "found".

    Raises:
        ValueError: what `open_objects` raises; an image that cannot be read or has another size than its
            record; or a backbone that gives no map, or NaN or infinity. The message names the file.
        ImportError: there is no pycocotools.
        OSError: objects.json cannot be written.
    """
    from pycocotools.mask import encode, toBbox

    check_rgb("objects", model)
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    images = open_objects(folder)
    stride = stride_of(model.backbone)
    side = max(1, round(size / stride)) * stride
    own = images[ranks.rank :: ranks.world]
    logger.info("objects: %d images", len(images))
    share: dict[int, list[dict[str, Any]]] = {}
    with progress_bar(
        total=len(own), desc="finding objects", unit="img", leave=False, disable=ranks.rank > 0
    ) as bar:
        for image in own:
            share[image.id] = []
            for mask in _masks(model, image, side):
                runs = encode(np.asfortranarray(mask, np.uint8))
                share[image.id].append(
                    {
                        "image_id": image.id,
                        "category_id": CATEGORY,
                        "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode()},
                        "bbox": toBbox(runs).tolist(),
                        # All are as certain. pycocotools then keeps this order, and that of the images.
                        "score": 1.0,
                    }
                )
            bar.update()
    by_image = {number: found for part in ranks.gather(share) for number, found in part.items()}
    if ranks.rank:
        return {}
    results = [each for image in images for each in by_image[image.id]]
    if masks is not None:
        masks.mkdir(parents=True, exist_ok=True)
        write_text(masks / "objects.json", json.dumps(results) + "\n")
    return {
        **average_precision(images, results),
        "images": len(images),
        "objects": sum(not annotated.crowd for image in images for annotated in image.objects),
        "found": len(results),
    }


@torch.no_grad()
def cut_objects(features: Tensor) -> list[np.ndarray]:
    """Discover up to three objects in an image by normalized cuts of its patches, as MaskCut does.

    Patches i, j are joined by `W = 1` if their cosine is above 0.15, else by 1e-5. The cut is by the second
    smallest eigenvalue of `(D - W) y = λ D y`, D the sums of W's rows: patches with y above its mean and the
    others. Foreground is the side that has the largest |y|, unless it has three or four of the image's
    corners: then it is the other side. The object is the part of the foreground, connected by sides of
    patches, that holds the peak of y there. Its patches are then joined to all by 1e-5 alone, for the next
    cut. Of a mask what was found before is taken off, and its holes are filled. A later cut ends the search
    if its IoU with the one before is above 0.5, if it has at most 1 % of the patches, or none that is new.

    From the paper (arXiv 2301.11320, after TokenCut, arXiv 2202.11539) and, in details, its code. There the
    corners of either side may decide, as the sign of the eigenvector has it, which is arbitrary.

    Args:
        features: (h, w, D), any dtype, any device.

    Returns:
        Masks (h, w) bool, in the order in which they are found; none where all patches are alike.

    Raises:
        ValueError: the features are not (h, w, D).
    """
    if features.dim() != 3 or features.numel() == 0:
        raise ValueError(f"features: expected shape (h, w, D), got {tuple(features.shape)}")
    unit = F.normalize(features.flatten(0, 1).double(), dim=-1)
    alike = (unit @ unit.T > THRESHOLD).cpu().numpy()
    masks: list[np.ndarray] = []
    if alike.all():
        return masks
    found = before = np.zeros(features.shape[:2], bool)
    for _ in range(CUTS):
        cut = foreground(_second_eigenvector(alike).reshape(found.shape))
        overlap = (cut & before).sum() / (cut | before).sum()
        if (masks and (overlap > OVERLAP or cut.mean() <= SMALLEST)) or not (cut & ~found).any():
            break
        masks.append(ndimage.binary_fill_holes(cut & ~found))
        found, before = found | cut, cut
        alike &= ~(found.reshape(-1, 1) | found.reshape(1, -1))
    return masks


def foreground(vector: np.ndarray) -> np.ndarray:
    """The object of a cut, see `cut_objects`: the eigenvector (h, w), of either sign -> (h, w) bool."""
    seed = np.abs(vector).argmax()
    if vector.flat[seed] < vector.mean():
        vector = -vector
    side = vector > vector.mean()
    if np.count_nonzero(side[[0, 0, -1, -1], [0, -1, 0, -1]]) >= CORNERS:
        side, seed = ~side, vector.argmin()
    parts, _ = ndimage.label(side)
    return parts == parts.flat[seed]


def average_precision(
    images: Sequence[AnnotatedImage], results: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """COCO's figures of boxes and masks without categories, by pycocotools.

    AP is that of a ranking. Results of the same score are in the order of `images`, and in one image in that
    of the list.

    Args:
        images: as `open_objects` returns them.
        results: records of COCO's format of results: "image_id", "segmentation" (compressed runs), "bbox" and
            "score".

    Returns:
        "bbox" and "segm", each from 0 to 1: "ap", the mean of the average precisions at the IoUs 0.5, 0.55 to
        0.95; "ap50" and "ap75", those at 0.5 and 0.75; "ar100", the mean recall at the same IoUs, of at most
        100 results an image.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from pycocotools.mask import area

    # Numbers of our own: pycocotools takes an object of the number 0 for one that was not found.
    numbers = {image.id: number for number, image in enumerate(images, 1)}
    objects = [
        {"image_id": numbers[image.id], "bbox": annotated.box, "iscrowd": int(annotated.crowd)}
        | {"segmentation": encode_object(annotated, image.shape)}
        for image in images
        for annotated in image.objects
    ]
    found = [{**result, "image_id": numbers[result["image_id"]]} for result in results]

    shapes = [
        {"id": numbers[image.id], "height": image.shape[0], "width": image.shape[1]} for image in images
    ]

    def index(records: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": shapes,
            "categories": [{"id": CATEGORY}],
            "annotations": [
                {**record, "id": number, "category_id": CATEGORY, "area": float(area(record["segmentation"]))}
                for number, record in enumerate(records, 1)
            ],
        }
        coco.createIndex()
        return coco

    figures = {}
    with redirect_stdout(io.StringIO()):  # it prints as it goes
        truth, discovered = index(objects), index(found)
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(truth, discovered, kind)
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.params.maxDets = [100]
            evaluation.evaluate()
            evaluation.accumulate()
            precision = evaluation.eval["precision"][..., 0, 0, 0]  # (IoUs, recalls)
            figures[kind] = {
                "ap": float(precision.mean()),
                "ap50": float(precision[0].mean()),
                "ap75": float(precision[5].mean()),
                "ar100": float(evaluation.eval["recall"].mean()),
            }
    return figures


def _masks(model: Pretrained, image: AnnotatedImage, side: int) -> list[np.ndarray]:
    """What is found in an image: masks (H, W) bool of its own size."""
    picture = open_image(image.path)
    if picture.size != image.shape[::-1]:
        expected, actual = (f"{w}×{h} pixels" for w, h in (image.shape[::-1], picture.size))
        raise file_error(image.path, f"expected {expected} as in the file of annotations, got {actual}")
    features = patch_features(model.backbone, preprocess(model, picture, (side, side)))[0]
    if not features.isfinite().all():
        raise file_error(image.path, "expected finite features, got NaN or infinity")
    rows, columns = (
        centers(pixels, patches).numpy()
        for pixels, patches in zip(image.shape, features.shape[:2], strict=True)
    )
    masks = [mask[rows][:, columns] for mask in cut_objects(features)]
    return [mask for mask in masks if mask.any()]  # a small image may have fewer pixels than patches


def _second_eigenvector(alike: np.ndarray) -> np.ndarray:
    """y of the second smallest λ of (D - W) y = λ D y: (n, n) bool -> (n,) fp64.

    With `y = D^-1/2 v` it is the symmetric problem `D^-1/2 W D^-1/2 v = (1 - λ) v`. By LAPACK on the CPU,
    which computes this vector alone: all of them, as PyTorch has them, take three times as long there.
    """
    weights = np.where(alike, 1.0, WEIGHT)
    scale = weights.sum(1) ** -0.5
    second = len(weights) - 2
    normalized = scale[:, None] * weights * scale
    return scale * eigh(normalized, overwrite_a=True, subset_by_index=(second, second))[1][:, 0]


def encode_object(annotated: AnnotatedObject, shape: tuple[int, int]) -> dict[str, Any]:
    """The mask of an object as pycocotools' compressed runs."""
    from pycocotools.mask import frPyObjects, merge

    if annotated.polygons:
        return merge(frPyObjects(annotated.polygons, *shape))
    return frPyObjects({"size": list(shape), "counts": annotated.runs}, *shape)

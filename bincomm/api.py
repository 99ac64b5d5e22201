"""The commands as Python functions: `bincomm.pretrain`, `bincomm.adapt`, `bincomm.compare`,
`bincomm.evaluate`, `bincomm.encode` and `bincomm.load_pretrained`, and here also `messages`, `search`,
`report` and `export`.

Under torchrun every process calls the same function; all but the first get None.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bincomm.files import expand_home
from bincomm.logs import printable_name

if TYPE_CHECKING:
    from bincomm.codes.encode import Encoded
    from bincomm.codes.search import Neighbor
    from bincomm.evaluation.pretrained import Pretrained
    from bincomm.exporting import Exported
    from bincomm.messages import Written

logger = logging.getLogger(__name__)

Data = str | Path | Mapping[str, float]


def pretrain(data: Data = "digits", *, recipe: str | None = None, **keys: Any) -> dict[str, Any] | None:
    """Pretrain a backbone on images without labels, or resume the unfinished run in `output`.

    Args:
        data: a folder of images, tar or Parquet shards, a .txt file of paths, a standard set, or "digits"; or
            several with weights, as a mapping.
        recipe: a name in `bincomm.recipes.recipe_names()`, or a YAML file; None: the one that fits the
            images.
        keys: keys of `bincomm.config.PretrainConfig`, which replace those of the recipe.

    Returns:
        The content of the run's result.json.

    Raises:
        ValueError: an unknown recipe or key, or a value that does not fit; see
            `bincomm.configuration.configure`.
        Other errors are those of `bincomm.pretraining.pretrain`.
    """
    from bincomm.configuration import configure
    from bincomm.pretraining import pretrain

    return pretrain(configure(recipe, data=data, **keys))


def adapt(weights: str | Path, data: Data, *, recipe: str = "adapt", **keys: Any) -> dict[str, Any] | None:
    """Continue to train a pretrained backbone, under a new head, on unlabeled images of another domain.

    Args:
        weights: a run's directory, a .safetensors file, or the name of a timm model with pretrained weights.
        data: the images, as in `pretrain`.
        recipe: the name of a recipe, or a YAML file.
        keys: keys of `PretrainConfig`, which replace those of the recipe; all others are those of the run
            that the weights come from.

    Returns:
        The content of the run's adapt.json: k-NN and linear probe before and after, if there are labels.

    Raises:
        Errors are those of `bincomm.adaptation.configure` and `bincomm.adaptation.adapt`.
    """
    from bincomm.adaptation import adapt, configure

    return adapt(configure(weights, recipe, data=data, **keys))


def messages(
    weights: str | Path | Sequence[str | Path],
    data: Data = "digits",
    output: str | Path = "messages",
    *,
    recipe: str | None = None,
    **keys: Any,
) -> "Written | None":
    """Write what a frozen teacher says of all global crops of a run, for the key messages of `pretrain`, or
    the files that an earlier call left.

    Args:
        weights: the teacher, or several: a run's directory, a .safetensors file that bincomm wrote, or the
            name of a timm model with pretrained weights.
        data, recipe, keys: those of the runs to come; see `pretrain`.
        output: the folder of the messages.

    Raises:
        Errors are those of `bincomm.messages.configure` and `bincomm.messages.write_messages`.
    """
    from bincomm.messages import configure, write_messages

    teachers = [weights] if isinstance(weights, str | Path) else weights
    paths = [os.fspath(each) for each in teachers]
    return write_messages(configure(paths, recipe, data=data, output=os.fspath(output), **keys))


def compare(
    data: Data = "digits",
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    prototypes: int | None = None,
    recipe: str | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Train several methods on the same images, steps and seeds, and evaluate all in the same way.

    Args:
        data: images with labels, as in `pretrain`.
        methods: names in `bincomm.comparison.METHODS`; None: `DEFAULT_METHODS` there.
        seeds: every method has a run for each seed; None: only the key seed.
        prototypes: number of prototypes of dino; None: one that fits the number of images.
        recipe: as in `pretrain`.
        keys: keys of `PretrainConfig`, which all runs share, also in place of a method's own; without output
            it is runs/compare-DATA-RECIPE.

    Returns:
        The content of table.json.

    Raises:
        Errors are those of `bincomm.configuration.configure_comparison` and `bincomm.comparison.compare`.
    """
    from bincomm.comparison import DEFAULT_METHODS, compare
    from bincomm.configuration import configure_comparison

    config = configure_comparison(recipe, data=data, **keys)
    return compare(config, DEFAULT_METHODS if methods is None else methods, seeds, prototypes, keys)


def load_pretrained(
    weights: str | Path, device: str = "auto", *, backbone: str | None = None, **preprocessing: Any
) -> "Pretrained":
    """Load a pretrained backbone, images (n, C, S, S) -> features (n, D), and its head if it has one.

    Args:
        weights: a run's directory, a checkpoint, a .safetensors file or the name of a timm model with
            pretrained weights; the last two have no head.
        device: "cpu", "cuda", or "auto", which takes a GPU if there is one.
        backbone: timm's name of the backbone, for a .safetensors file that does not name it.
        preprocessing: preprocessing keys that replace those of training: global_size, eval_crop, batch_size,
            threads; see `PretrainConfig`.

    Raises:
        ValueError: there are no such weights, or they do not fit.
    """
    import torch

    from bincomm.evaluation.pretrained import load_pretrained

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but this torch finds no GPU")
    return load_pretrained(weights, device, backbone=backbone, **preprocessing)


def evaluate(
    weights: str | Path,
    data: Data | None = None,
    *,
    protocols: Sequence[str] | None = None,
    davis: str | Path | None = None,
    objects: str | Path | None = None,
    segmentation: str | Path | None = None,
    void: Sequence[int] = (),
    masks: str | Path | None = None,
    hashing: str | Path | None = None,
    at: int = 1000,
    unmatched: Literal["zero", "skip"] = "zero",
    device: str = "auto",
    backbone: str | None = None,
    output: str | Path | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    **preprocessing: Any,
) -> dict[str, Any] | None:
    """Evaluate a pretrained backbone on labeled images, on DAVIS, on annotated objects, on segmentation masks
    and on images with several labels.

    Args:
        weights, device, backbone, preprocessing: as in `load_pretrained`.
        data: labeled images, as in `pretrain`.
        protocols: protocols to evaluate on the data; None: all that the weights allow.
        davis: the folder of DAVIS-2017 or DAVIS-2016 that contains ImageSets.
        objects: the folder of COCO that contains annotations and val2017 or val2014, or one with
            annotations.json in COCO's format and images, or FILE@IMAGES; see
            `bincomm.evaluation.coco.open_objects`.
        segmentation: a folder with train/images, train/masks, val/images and val/masks, or VOC, ADE20K or
            CamVid as published; see `bincomm.evaluation.layouts.open_masked_images`.
        void: classes of the segmentation, from 0 to 254, that do not count, besides 255 and the layout's own.
        masks: a new or empty folder for the predicted masks: davis/SEQUENCE/FRAME.png, objects.json, and of
            the segmentation knn/IMAGE.png and linear/IMAGE.png.
        hashing: a folder with database.txt and test.txt, images with several labels; see
            `bincomm.evaluation.hashing.open_lists`.
        at: how many of the nearest images count in mAP@k, of the data and of hashing.
        unmatched: there, queries to which no image is relevant count as 0 or are left out, "skip".
        output: a JSON file for the results, written after each part.
        on_result: called with each part as soon as it is evaluated, because a later part may fail.

    Returns:
        The results of all parts, which `bincomm.evaluation.evaluate.evaluate`, `evaluate_davis`,
        `evaluate_objects`, `evaluate_segmentation` and `evaluate_hashing` document.

    Raises:
        ValueError: there is nothing to evaluate, or an argument does not fit; the message names it.
        ImportError: objects need pycocotools, which is not installed.
        OSError: the output could not be written.
    """
    from bincomm.data.sources import evaluation_sources, open_source, why_no_evaluation
    from bincomm.distributed.ranks import join_ranks
    from bincomm.evaluation.coco import open_objects
    from bincomm.evaluation.dense import check_void, evaluate_segmentation
    from bincomm.evaluation.evaluate import evaluate as evaluate_images
    from bincomm.evaluation.hashing import evaluate_hashing, open_lists
    from bincomm.evaluation.layouts import open_masked_images
    from bincomm.evaluation.objects import evaluate_objects
    from bincomm.evaluation.pretrained import load_pretrained
    from bincomm.evaluation.video import evaluate_davis, open_davis
    from bincomm.files import check_empty_folder, check_file, write_json

    if not (data or davis or objects or segmentation or hashing):
        raise ValueError(
            "evaluate: expected at least one of data, davis, objects, segmentation and hashing, got none"
        )
    if protocols and not data:
        raise ValueError("protocols: expected data to evaluate them on, got none")
    for name, folder in (("davis", davis), ("segmentation", segmentation)):
        if folder and not expand_home(folder).is_dir():
            unpack = ", a file; unpack it if it is an archive" if expand_home(folder).is_file() else ""
            raise ValueError(f"{name}: expected a folder, got {folder}{unpack}")
    if void and not segmentation:
        raise ValueError("void: expected segmentation, whose classes these are, got none")
    if masks and not (davis or objects or segmentation):
        raise ValueError("masks: expected davis, objects or segmentation, whose masks to write, got none")
    if objects and not find_spec("pycocotools"):
        raise ImportError("no module named 'pycocotools'", name="pycocotools")
    if at < 1:
        raise ValueError(f"at: expected at least 1, got {at}")
    if unmatched not in ("zero", "skip"):
        raise ValueError(f"unmatched: expected zero or skip, got {unmatched}")
    # Whatever is wrong with later parts is told before the first.
    check_void(void)
    if davis:
        open_davis(davis)
    if objects:
        open_objects(objects)
    if segmentation:
        open_masked_images(segmentation)
    if hashing:
        open_lists(hashing)
    if output:
        output = check_file("output", output)
    data = os.fspath(data) if isinstance(data, os.PathLike) else data

    predicted = expand_home(masks) if masks else None
    with join_ranks(device) as ranks:
        if predicted:
            ranks.first(lambda: check_empty_folder("masks", predicted))
        model = load_pretrained(weights, ranks.device, backbone=backbone, **preprocessing)
        results: dict[str, Any] = {"weights": os.fspath(weights)}

        def add(part: dict[str, Any]) -> None:
            results.update(part)
            if on_result is not None:
                on_result(part)
            if output:
                write_json(output, results)

        # DAVIS and objects first, because all ranks work at them.
        if davis:
            tracking = evaluate_davis(model, davis, masks=predicted and predicted / "davis", ranks=ranks)
            if ranks.rank == 0:
                add({"davis": tracking})
        if objects:
            discovery = evaluate_objects(model, objects, masks=predicted, ranks=ranks)
            if ranks.rank == 0:
                add({"objects": discovery})
        if data:
            source = ranks.leaders_first(lambda: open_source(data))
            sources = ranks.leaders_first(lambda: evaluation_sources(data, source))
            if sources is None:
                raise ValueError(
                    "data: expected images with labels, in folders named after two classes or more, got "
                    f"{data}: {why_no_evaluation(data, source)}"
                )
            gallery, queries, held_out = sources
            result = evaluate_images(
                model, gallery, queries, protocols, ranks=ranks, at=at, unmatched=unmatched
            )
            if ranks.rank == 0:
                add({"data": data, "queries_held_out": held_out, **result})
        if hashing:
            result = evaluate_hashing(model, hashing, at=at, unmatched=unmatched, ranks=ranks)
            if ranks.rank == 0:
                add({"hashing": result})
        ranks.leave()
        if ranks.rank:
            return None
        if segmentation:
            add({"segmentation": evaluate_segmentation(model, segmentation, void=void, masks=predicted)})
        return results


def encode(
    weights: str | Path,
    data: Data,
    output: str | Path,
    *,
    split: str = "all",
    features: bool = False,
    index: bool = False,
    device: str = "auto",
    **preprocessing: Any,
) -> "Encoded | None":
    """Write the codes of images into a folder of Parquet files, or the files that are missing there.

    Args:
        weights, device, preprocessing: as in `load_pretrained`; the weights need a head.
        data: images, as in `pretrain`.
        output: the folder; see `bincomm.codes.encode.encode` for its content.
        split: the part of the data to encode, "train", "val" or "test"; "all": all of it.
        features: also write the backbone's features.
        index: also write index.faiss, a flat binary index.

    Returns:
        Numbers of codes, bits and files, and the images that cannot be used.

    Raises:
        ValueError: the weights have no head, or the folder holds other codes; the message says which.
        ImportError: an index needs faiss, which is not installed.
        OSError: the folder cannot be written.
    """
    from bincomm.codes.encode import encode
    from bincomm.codes.search import build_index
    from bincomm.data.sources import open_source
    from bincomm.distributed.ranks import join_ranks
    from bincomm.evaluation.pretrained import load_pretrained
    from bincomm.files import check_folder

    if index and not find_spec("faiss"):
        raise ImportError("no module named 'faiss'", name="faiss")
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    if expand_home(weights).exists():  # so that `search` finds them from any working directory
        weights = expand_home(weights).absolute()
    output = expand_home(output)
    with join_ranks(device) as ranks:
        ranks.first(lambda: check_folder("output", output))
        model = load_pretrained(weights, ranks.device, **preprocessing)
        source = ranks.leaders_first(lambda: open_source(data, split))
        source.announce()
        result = encode(model, source, output, features=features, ranks=ranks)
        if ranks.rank:
            return None
        if index:
            build_index(output)
        return result


def search(
    folder: str | Path,
    query: str | Path,
    k: int = 20,
    *,
    weights: str | Path | None = None,
    sheet: str | Path | None = None,
    root: str | Path | None = None,
) -> "list[Neighbor]":
    """The k images of an encoded folder whose codes are nearest to that of an image, the nearest first.

    Args:
        folder: a folder of codes, written by `encode`.
        query: an image file.
        k: number of images.
        weights: the weights that gave the codes; None: the path that the folder names.
        sheet: a PNG file for a picture of the query and its nearest images.
        root: the folder below which images are shown there, because the codes may be someone else's and
            name any file; None: the working directory. Those in bincomm's cache are shown, too.

    Raises:
        ValueError: the folder, the weights or the image do not fit; the message says which.
    """
    import torch

    from bincomm.codes.search import MAX_SHOWN, contact_sheet, is_below, nearest
    from bincomm.codes.storage import open_parts
    from bincomm.data.cache import cache_folder
    from bincomm.evaluation.pretrained import load_pretrained
    from bincomm.files import check_file, write_file

    folder, query = expand_home(folder), expand_home(query)
    if sheet is not None:
        sheet = check_file("sheet", sheet)
    root = expand_home(root or os.curdir)
    if not root.is_dir():
        raise ValueError(f"root: expected a folder, got {root}")
    parts = open_parts(folder)
    metadata = parts[0].metadata
    if weights is None:
        weights = str(metadata.get("weights", ""))
        if not os.path.exists(weights):
            raise ValueError(
                f"weights: those of the codes in {folder} were {weights or 'not noted'}, which does not "
                "exist; give their present path (weights)"
            )
    model = load_pretrained(weights, torch.device("cpu"))
    (neighbors,) = nearest(model, folder, [query], k)
    files = -(-metadata.get("images", 0) // metadata.get("rows", 1))
    if len(parts) < files:
        logger.info("note: %d of %d files exist; `bincomm encode` writes the others", len(parts), files)
    if sheet is not None:
        below = [root, cache_folder()]
        picture = contact_sheet(query, neighbors, below, model.config.crops)
        outside = [one.path for one in neighbors[: MAX_SHOWN - 1] if not is_below(one.path, below)]
        if outside:
            folders = printable_name(
                os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in outside])
            )
            logger.warning(
                "%d images lie outside %s, so the picture has their paths only; if you trust the codes, show "
                "them by --root %s",
                len(outside),
                root.absolute(),
                folders,
            )
        write_file(sheet, lambda file: picture.save(file, format="png"))
    return neighbors


def report(
    weights: str | Path,
    data: Data,
    output: str | Path,
    *,
    split: str = "all",
    attributes: str | Path | None = None,
    classes: tuple[str, str] | None = None,
    bits: Sequence[int] | None = None,
    other: str | Path | None = None,
    device: str = "auto",
    **preprocessing: Any,
) -> dict[str, Any]:
    """Write a page about the code, codes.html, and its figures, codes.json, into a folder.

    Args:
        weights, device, preprocessing: as in `load_pretrained`; the weights need a head.
        data: images, as in `pretrain`.
        output: the folder.
        split: as in `encode`.
        other: the same run before or after a reset of its head, to compare with.
        attributes, classes, bits: see `bincomm.codes.report.report`.

    Returns:
        The content of codes.json.

    Raises:
        Errors are those of `bincomm.codes.report.report`.
    """
    from bincomm.codes.report import report
    from bincomm.data.sources import open_source
    from bincomm.files import check_folder

    output = check_folder("output", output)
    model = load_pretrained(weights, device, **preprocessing)
    source = open_source(os.fspath(data) if isinstance(data, os.PathLike) else data, split)
    source.announce()
    return report(
        model,
        source,
        output,
        attributes=None if attributes is None else expand_home(attributes),
        classes=classes,
        bits=None if bits is None else list(bits),
        other=None if other is None else load_pretrained(other, device, **preprocessing),
    )


def export(
    weights: str | Path,
    *,
    onnx: str | Path,
    codes: bool = False,
    backbone: str | None = None,
    **preprocessing: Any,
) -> "Exported":
    """Write a backbone as an ONNX file, "images" (n, C, S, S) -> "features" (n, D), for any n.

    Args:
        weights, backbone, preprocessing: as in `load_pretrained`; global_size is S.
        onnx: the file to write.
        codes: the bits of the code, "bits" (n, K), are an output, too; the weights need a head.

    Returns:
        The shapes, and how far ONNX Runtime, with which the file is checked, is from PyTorch.

    Raises:
        Errors are those of `load_pretrained` and `bincomm.exporting.export_onnx`.
    """
    from bincomm.exporting import export_onnx
    from bincomm.files import check_file

    path = check_file("onnx", onnx)
    return export_onnx(load_pretrained(weights, "cpu", backbone=backbone, **preprocessing), path, codes=codes)

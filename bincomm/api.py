"""What the commands do, from Python: the functions `bincomm.pretrain`, `bincomm.adapt`, `bincomm.compare`,
`bincomm.evaluate`, `bincomm.encode` and `bincomm.load_pretrained`, and `search` and `report`.

Under torchrun every process calls the same function; those after the first get None.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bincomm.codes.encode import Encoded
    from bincomm.codes.search import Neighbor
    from bincomm.evaluation.pretrained import Pretrained

logger = logging.getLogger(__name__)

Data = str | Path | Mapping[str, float]


def pretrain(data: Data = "digits", *, recipe: str | None = None, **keys: Any) -> dict[str, Any] | None:
    """Pretrain a backbone on images without labels, or go on with the run in `output`, to the end.

    Args:
        data: a folder of images, tar shards, a .txt file of paths, a standard set, or "digits"; or several
            with weights, as a mapping.
        recipe: a name in `bincomm.recipes.recipe_names()`, or a YAML file; None: what fits the images.
        keys: of `bincomm.config.PretrainConfig`, before those of the recipe.

    Returns:
        What the run's result.json holds.

    Raises:
        ValueError: an unknown recipe or key, or one whose value does not fit; see `bincomm.config.configure`.
        Other errors are those of `bincomm.pretraining.pretrain`.
    """
    from bincomm.config import configure
    from bincomm.pretraining import pretrain

    return pretrain(configure(recipe, data=data, **keys))


def adapt(source: str | Path, data: Data, *, recipe: str = "adapt", **keys: Any) -> dict[str, Any] | None:
    """Train a pretrained backbone on, under a new head, on unlabeled images of another domain.

    Args:
        source: a run's directory, a .safetensors file, or a timm model with pretrained weights, by name.
        data: the images, as in `pretrain`.
        recipe: the name of one, or a YAML file.
        keys: of `PretrainConfig`, before those of the recipe; what neither says is as in the source's run.

    Returns:
        What the run's adapt.json holds: k-NN and linear probe before and after, where there are labels.

    Raises:
        Errors are those of `bincomm.adaptation.configure` and `bincomm.adaptation.adapt`.
    """
    from bincomm.adaptation import adapt, configure

    return adapt(configure(os.fspath(source), recipe, data=data, **keys))


def compare(
    data: Data = "digits",
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    prototypes: int | None = None,
    recipe: str | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Train several methods on the same images, steps and seeds, and measure them alike.

    Args:
        data: images with labels, as in `pretrain`.
        methods: names in `bincomm.comparison.METHODS`; None: `DEFAULT_METHODS` there.
        seeds: a run of every method for each; None: the key seed alone.
        prototypes: of dino; None: as many as fit the number of images.
        recipe: as in `pretrain`.
        keys: of `PretrainConfig`, which all runs share; the output is runs/compare-RECIPE without one.

    Returns:
        What table.json holds.

    Raises:
        Errors are those of `bincomm.config.configure_comparison` and `bincomm.comparison.compare`.
    """
    from bincomm.comparison import DEFAULT_METHODS, compare
    from bincomm.config import configure_comparison

    config = configure_comparison(recipe, data=data, **keys)
    return compare(config, DEFAULT_METHODS if methods is None else methods, seeds, prototypes)


def load_pretrained(
    weights: str | Path, device: str = "auto", *, backbone: str | None = None, **shown: Any
) -> "Pretrained":
    """Load what was pretrained: a backbone, images (n, 3, S, S) -> features (n, D), and its head where it has
    one.

    Args:
        weights: a run's directory, a checkpoint, a .safetensors file or a timm model with pretrained weights,
            by name; the last two have no head.
        device: "cpu", "cuda", or "auto", which takes a GPU where there is one.
        backbone: timm's name of it, for a .safetensors file that does not say.
        shown: keys of `PretrainConfig` that tell how images are shown, where not as in training: global_size,
            eval_crop, batch_size, threads.

    Raises:
        ValueError: there are no such weights, or they do not fit.
    """
    import torch

    from bincomm.evaluation.pretrained import load_pretrained

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but this torch finds no GPU")
    return load_pretrained(weights, device, backbone=backbone, **shown)


def evaluate(
    weights: str | Path,
    data: Data | None = None,
    *,
    protocols: Sequence[str] | None = None,
    davis: str | Path | None = None,
    segmentation: str | Path | None = None,
    device: str = "auto",
    output: str | Path | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    **shown: Any,
) -> dict[str, Any] | None:
    """Measure what was pretrained, on labeled images, on DAVIS-2017 and on segmentation masks.

    Args:
        weights, device, shown: as in `load_pretrained`, with backbone.
        data: labeled images, as in `pretrain`.
        protocols: on these; None: all that the weights allow.
        davis: the folder of DAVIS-2017 in which ImageSets lies.
        segmentation: a folder with train/images, train/masks, val/images and val/masks.
        output: a JSON file for the results, written after each part.
        on_result: called with each part once it is measured, for what comes after it may fail.

    Returns:
        The results of all parts; `bincomm.evaluation.evaluate.evaluate`, `evaluate_davis` and
        `evaluate_segmentation` tell what they hold.

    Raises:
        ValueError: there is nothing to measure, or what is given does not allow it; the message names it.
        OSError: the output could not be written.
    """
    from bincomm.data.sources import evaluation_sources, open_source
    from bincomm.distributed.ranks import join_ranks
    from bincomm.evaluation.dense import evaluate_segmentation
    from bincomm.evaluation.evaluate import evaluate as evaluate_images
    from bincomm.evaluation.pretrained import load_pretrained
    from bincomm.evaluation.video import evaluate_davis
    from bincomm.files import write_json

    if not (data or davis or segmentation):
        raise ValueError("evaluate: expected at least one of --data, --davis and --segmentation")
    if protocols and not data:
        raise ValueError("protocols: they measure on --data, got none")
    for name, folder in (("davis", davis), ("segmentation", segmentation)):
        if folder and not Path(folder).expanduser().is_dir():
            raise ValueError(f"{name}: expected a folder, got {folder}")
    if output:
        check_file("output", output)
    data = os.fspath(data) if isinstance(data, os.PathLike) else data

    with join_ranks(device) as ranks:
        model = load_pretrained(weights, ranks.device, **shown)
        results: dict[str, Any] = {"weights": os.fspath(weights)}

        def add(part: dict[str, Any]) -> None:
            results.update(part)
            if on_result is not None:
                on_result(part)
            if output:
                write_json(Path(output), results)

        # DAVIS first, because all ranks work at it; the rest is measured by one.
        if davis:
            following = evaluate_davis(model, os.fspath(davis), ranks=ranks)
            if ranks.rank == 0:
                add({"davis": following})
        if data:
            source = ranks.leaders_first(lambda: open_source(data))
            sources = ranks.leaders_first(lambda: evaluation_sources(data, source))
            if sources is None:
                expected = (
                    "images with labels (folders named after two classes or more), got none"
                    if source.labels is None
                    else "folders train and val, or five images of a class at least, got fewer"
                )
                raise ValueError(f"data: expected {expected} in {data}")
            gallery, queries, held_out = sources
            measured = evaluate_images(model, gallery, queries, protocols, ranks=ranks)
            if ranks.rank == 0:
                add({"data": data, "queries_held_out": held_out, **measured})
        ranks.leave()
        if ranks.rank:
            return None
        if segmentation:
            add({"segmentation": evaluate_segmentation(model, os.fspath(segmentation))})
        return results


def encode(
    weights: str | Path,
    data: Data,
    output: str | Path,
    *,
    features: bool = False,
    index: bool = False,
    device: str = "auto",
    **shown: Any,
) -> "Encoded | None":
    """Write the codes of images into a folder of Parquet files, or go on with what is unfinished there.

    Args:
        weights, device, shown: as in `load_pretrained`, with backbone; the weights need a head.
        data: images, as in `pretrain`.
        output: the folder; see `bincomm.codes.encode.encode` for what lies in it.
        features: write the backbone's features, too.
        index: write index.faiss, a flat binary index, too.

    Returns:
        Numbers of codes, bits and files, and the images that cannot be used.

    Raises:
        ValueError: the weights have no head, or the folder is of other codes; the message says which.
        ImportError: an index needs faiss, and it is not there.
        OSError: the folder cannot be written.
    """
    from bincomm.codes.encode import encode
    from bincomm.codes.search import build_index
    from bincomm.data.sources import open_source
    from bincomm.distributed.ranks import join_ranks
    from bincomm.evaluation.pretrained import load_pretrained

    if index and not find_spec("faiss"):
        raise ImportError("no module named 'faiss'", name="faiss")
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    weights = os.path.expanduser(os.fspath(weights))
    if os.path.exists(weights):  # so that `search` finds them from anywhere
        weights = os.path.abspath(weights)
    with join_ranks(device) as ranks:
        model = load_pretrained(weights, ranks.device, **shown)
        source = ranks.leaders_first(lambda: open_source(data))
        for note in source.notes:
            logger.info("note: %s", note)
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
) -> "list[Neighbor]":
    """The k images of an encoded folder whose codes are nearest to that of an image, the nearest first.

    Args:
        folder: of codes, as `encode` left it.
        query: the file of an image.
        weights: those of the codes; None: where the folder says they are.
        sheet: a PNG file for a picture of the query and what is nearest to it.

    Raises:
        ValueError: the folder, the weights or the image do not allow it; the message says which.
    """
    import torch

    from bincomm.codes.search import contact_sheet, nearest
    from bincomm.codes.storage import open_parts
    from bincomm.evaluation.pretrained import load_pretrained
    from bincomm.files import write_file

    if sheet is not None:
        check_file("sheet", sheet)
    parts = open_parts(folder)
    metadata = parts[0].metadata
    if weights is None:
        weights = metadata.get("weights", "")
        if not os.path.exists(weights):
            raise ValueError(
                f"weights: those of the codes in {folder} were {weights or 'not noted'}, which is not there; "
                "expected --weights to say where they are"
            )
    model = load_pretrained(weights, torch.device("cpu"))
    (neighbors,) = nearest(model, folder, [query], k)
    files = -(-metadata.get("images", 0) // metadata.get("rows", 1))
    if len(parts) < files:
        logger.info("note: %d of %d files are there; `bincomm encode` makes the others", len(parts), files)
    if sheet is not None:
        picture = contact_sheet(query, neighbors)
        write_file(Path(sheet), lambda file: picture.save(file, format="png"))
    return neighbors


def report(
    weights: str | Path,
    data: Data,
    output: str | Path,
    *,
    attributes: str | Path | None = None,
    classes: tuple[str, str] | None = None,
    bits: Sequence[int] | None = None,
    other: str | Path | None = None,
    device: str = "auto",
    **shown: Any,
) -> dict[str, Any]:
    """Write a page about the code, codes.html, and its figures, codes.json, into a folder.

    Args:
        weights, device, shown: as in `load_pretrained`; the weights need a head.
        data: images, as in `pretrain`.
        other: the same run before or after a reset of its head, to compare with.
        attributes, classes, bits: see `bincomm.codes.report.report`.

    Returns:
        What codes.json holds.

    Raises:
        Errors are those of `bincomm.codes.report.report`.
    """
    from bincomm.codes.report import report
    from bincomm.data.sources import open_source

    model = load_pretrained(weights, device, **shown)
    return report(
        model,
        open_source(os.fspath(data) if isinstance(data, os.PathLike) else data),
        Path(output),
        attributes=None if attributes is None else Path(attributes),
        classes=classes,
        bits=None if bits is None else list(bits),
        other=None if other is None else load_pretrained(other, device, **shown),
    )


def check_file(argument: str, path: str | Path) -> None:
    """Refuse a path that cannot be a file's, before the work for it."""
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{argument}: expected a file in a folder that exists, got {path}")

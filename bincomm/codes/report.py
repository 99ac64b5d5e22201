"""A code laid open: `codes.json` with all figures, and `codes.html`, a page that shows and explains them."""

import csv
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor

from bincomm.codes import statistics
from bincomm.codes.page import FEWEST_OF_CLASS, draw_page
from bincomm.data.loader import Loader
from bincomm.data.sources import Source
from bincomm.evaluation.features import forward_batches as look
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import write_json, write_text
from bincomm.ops.hamming import hamming_distance
from bincomm.ops.messages import pack_signs

SHOWN = 8  # images on each side of a bit
CHOSEN = 6  # bits shown with images where none are named
MAPPED = 2000  # images on the map
FEWEST_MAPPED = 10
VIEWED = 2048  # images seen in two augmented views
NEIGHBORS = 10
THUMBNAIL = 96  # pixels a side at most
MANY_VALUES = 10  # a column of more different numbers is cut in two at its median
STRONGEST = 20  # pairs of bits listed


class Looked(NamedTuple):
    """What a network made of the images: their numbers (n,), logits (n, K), pictures of the surest."""

    images: Tensor
    logits: Tensor
    pictures: dict[int, Image.Image]  # by row
    left_out: list[list[str]]  # name, why


class Attribute(NamedTuple):
    """A column of the attributes' file: a number for the value of each image, -1 unknown, and their names."""

    values: np.ndarray
    names: list[str]


def report(
    model: Pretrained,
    source: Source,
    output: Path,
    *,
    attributes: Path | None = None,
    classes: tuple[str, str] | None = None,
    bits: list[int] | None = None,
    other: Pretrained | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the code that a network gives images, and write `codes.json` and `codes.html` into a folder.

    The images are looked at once, and some of them again in two augmented views. What needs labels is left
    out where there are none, or of one class only; `notes` tell what was left out, and why.

    Args:
        model: a backbone with its head.
        source: the images, at least 2 that can be used.
        output: the folder, made where it is not there.
        attributes: a CSV file with a header; its first column names images, by path or by as much of the
            path's end as tells them apart, the others are attributes. Numbers of more than 10 values are cut
            at their median; empty fields and NaN are unknown.
        classes: two to tell apart; without them the two whose codes are most alike.
        bits: those shown with images; without them some that tell most about the classes, and least.
        other: the same run at another time, before a reset of the head or after, to be compared with.
        seed: of everything drawn at random.

    Returns:
        What `codes.json` holds: outputs of `bincomm.codes.statistics`, whose docstrings tell what they are.

    Raises:
        ValueError: no head, too few images, no such class or bit, an attributes' file that cannot be read or
            does not fit, or an output that cannot be a folder.
        OSError: there is no space left, for example; of the two files an older one then stays as it was.
    """
    for name, one in (("model", model), ("other", other)):
        if one is not None and one.head is None:
            raise ValueError(
                f"{name}: {one.name} has no head, so it gives no codes; name a run or a checkpoint"
            )
    pair = None if classes is None else _two(source, classes)
    notes = list(source.notes)
    names = list(source.images.names()) if attributes is not None else []
    columns = {} if attributes is None else _read_attributes(attributes, names, notes)
    _check_writable(output)  # before all images are looked at
    looked = _look(model, source, bits)
    if len(looked.images) < 2:
        raise ValueError(f"data: expected at least 2 images that can be used, got {len(looked.images)}")
    _check_finite("model", model, looked.logits)
    result = _measure(model, source, looked, columns, pair, bits, other, seed, notes)
    page = draw_page(result, looked.images.tolist(), looked.pictures, source)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "codes.html", page)
    write_json(output / "codes.json", result)
    return result


def _check_writable(output: Path) -> None:
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "no file can be made there" if there.is_dir() else f"{there} is a file"
        raise ValueError(f"output: expected a folder, or where one can be made, got {output}: {why}")


def _check_finite(argument: str, model: Pretrained, logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise ValueError(f"{argument}: {model.name} gives codes that are not finite: its training had failed")


# What is seen and read.


@torch.no_grad()
def _look(model: Pretrained, source: Source, bits: list[int] | None) -> Looked:
    images: list[int] = []
    logits: list[Tensor] = []
    pictures: dict[int, Image.Image] = {}
    left_out: list[list[str]] = []
    extremes: list[tuple[Tensor, Tensor]] = []  # logits and rows (≤ SHOWN, K) of the surest ones, and zeros
    for seen in look(model, source, lambda image, why: left_out.append([source.images.name(image), why])):
        some = seen.logits.float().cpu()
        if not extremes:
            if bits is not None and not all(0 <= bit < some.shape[1] for bit in bits):
                raise ValueError(f"bits: expected from 0 to {some.shape[1] - 1}, got {bits}")
            nothing = some.new_empty(0, some.shape[1])
            extremes = [(nothing, nothing.long())] * 2
        rows = torch.arange(len(images), len(images) + len(some))[:, None].expand_as(some)
        for side, (values, of_rows) in enumerate(extremes):
            values, of_rows = torch.cat([values, some]), torch.cat([of_rows, rows])
            values, order = values.sort(dim=0, descending=side == 0, stable=True)
            extremes[side] = values[:SHOWN], of_rows.gather(0, order)[:SHOWN]
        needed = set(torch.cat([of_rows for _, of_rows in extremes]).unique().tolist())
        pictures = {row: picture for row, picture in pictures.items() if row in needed}
        for row in needed - pictures.keys():
            pictures[row] = _picture(seen.crops[row - len(images)], model)
        images += seen.indices
        logits.append(some)
    return Looked(
        torch.tensor(images), torch.cat(logits) if logits else torch.empty(0, 0), pictures, left_out
    )


def _picture(crop: Tensor, model: Pretrained) -> Image.Image:
    pixels = (
        F.adaptive_avg_pool2d(crop.float(), min(THUMBNAIL, crop.shape[-1])).cpu().permute(1, 2, 0).numpy()
    )
    pixels = 255 * (pixels * model.config.std + model.config.mean)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@torch.no_grad()
def _views(model: Pretrained, source: Source, seed: int) -> Tensor:
    """(2, m, K) signs of two augmented views of up to VIEWED images."""
    n = len(source.images)
    batches = -(-n // min(256, model.config.batch_size))
    batch_size = n // batches  # as what does not fill a last batch is left out
    loader = Loader(
        source,
        replace(model.config.crops, local_crops=0),
        batch_size=batch_size,
        seed=seed,
        device=model.device,
        threads=model.config.threads,
        max_unusable=1.0,
    )
    found = []
    for _ in range(min(batches, VIEWED // batch_size)):
        crops, _ = loader.next()
        logits = model.head.code(model.backbone(crops.transpose(0, 1).flatten(0, 1)))
        found.append((logits > 0).cpu().view(2, batch_size, -1))
    return torch.cat(found, 1)


def _two(source: Source, classes: tuple[str, str]) -> tuple[int, int]:
    if source.labels is None:
        raise ValueError("classes: expected images with labels, the data has none")
    for name in classes:
        if name not in source.classes:
            some = ", ".join(source.classes[:10]) + (", ..." if len(source.classes) > 10 else "")
            raise ValueError(f"classes: there is no class {name!r} among {some}")
    if len(classes) != 2 or classes[0] == classes[1]:
        raise ValueError(f"classes: expected two different ones, got {', '.join(classes)}")
    return source.classes.index(classes[0]), source.classes.index(classes[1])


def _read_attributes(path: Path, names: list[str], notes: list[str]) -> dict[str, Attribute]:
    """The columns of an attributes' file, for images of these names; what does not fit is noted."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, skipinitialspace=True)
            header, *rows = [(reader.line_num, row) for row in reader if row] or [(0, [])]
    except (OSError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"attributes: {path} cannot be read as CSV: {why}") from error
    header = [name.strip() for name in header[1]]
    if len(header) < 2:
        raise ValueError(
            f"attributes: {path} wants a header of the images' column and at least one more, a comma between"
        )
    if len(set(header)) != len(header):
        raise ValueError(f"attributes: {path} has two columns of the same name")
    if any(_key(name, {header[0]: header}) for name in names):
        raise ValueError(f"attributes: {path} begins with an image, {header[0]!r}; expected a header")
    found: dict[str, list[str]] = {}
    for line, row in rows:
        key = os.path.normpath(row[0])
        if len(row) != len(header) or key in found:
            wrong = "is the second of its image" if key in found else f"has {len(row)} fields"
            raise ValueError(
                f"attributes: line {line} of {path} {wrong}, expected one row an image, of {len(header)}"
            )
        found[key] = row
    keys = [_key(name, found) for name in names]
    used = Counter(key for key in keys if key is not None)
    if not used:
        raise ValueError(f"attributes: {path} names none of the images; its first column is {header[0]!r}")
    twice = next((key for key, count in used.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"attributes: {twice!r} in {path} names {used[twice]} images; say more of the path")
    if sum(used.values()) < len(names) or len(used) < len(found):
        notes.append(
            f"The attributes' file names {len(used):,} of {len(names):,} images, and "
            f"{len(found) - len(used):,} that are not among them."
        )
    return {
        name: _attribute([found[key][place].strip() if key else "" for key in keys])
        for place, name in enumerate(header)
        if place
    }


def _key(name: str, found: dict[str, list[str]]) -> str | None:
    """The longest end of a path that is a key."""
    if name in found:
        return name
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in found), None)


def _attribute(column: list[str]) -> Attribute:
    column = ["" if word.lower() == "nan" else word for word in column]
    words = sorted({word for word in column if word})
    try:
        numbers = np.array([float(word) if word else np.nan for word in column])
    except ValueError:
        numbers = np.full(len(column), np.nan)
    if len(words) > MANY_VALUES and len(np.unique(numbers[np.isfinite(numbers)])) > MANY_VALUES:
        middle = np.nanmedian(numbers)
        above, names = numbers > middle, [f"≤ {middle:.10g}", f"> {middle:.10g}"]
        if np.sum(numbers >= middle) < np.sum(numbers <= middle):  # more even, as where half are the largest
            above, names = numbers >= middle, [f"< {middle:.10g}", f"≥ {middle:.10g}"]
        return Attribute(np.where(np.isnan(numbers), -1, above).astype(np.int64), names)
    ranks = {word: rank for rank, word in enumerate(words)}
    return Attribute(np.array([ranks.get(word, -1) for word in column], np.int64), words)


# What is measured.


def _measure(
    model: Pretrained,
    source: Source,
    looked: Looked,
    columns: dict[str, Attribute],
    pair: tuple[int, int] | None,
    bits: list[int] | None,
    other: Pretrained | None,
    seed: int,
    notes: list[str],
) -> dict[str, Any]:
    signs = looked.logits > 0
    n, size = signs.shape
    labels = None
    if source.labels is None:
        notes.append("The data has no labels: what needs them is left out.")
    else:
        labels = torch.from_numpy(source.labels)[looked.images]
        if len(labels.unique()) < 2:
            labels = None
            notes.append("All images are of one class: what compares classes is left out.")
    if looked.left_out:
        count = len(looked.left_out)
        notes.append(f"{count} image{'s' * (count != 1)} could not be used.")
    blocks = statistics.block_entropies(signs)
    duplicates = statistics.duplicate_bits(signs)
    histograms = statistics.distance_histograms(signs, labels, seed=seed)
    usable = source
    if looked.left_out and source.weights is None:
        usable = source.select(looked.images.tolist())
    folders = {os.path.dirname(name) for name in source.images.names()}
    views = _views(model, usable, seed)
    steady = statistics.stability(*views)
    result: dict[str, Any] = {
        "weights": model.name,
        "data": os.path.commonpath([os.path.abspath(folder) for folder in folders]),
        "images": n,
        "bits": size,
        "seed": seed,
        "classes": source.classes if labels is not None else [],
        "left_out": looked.left_out,
        "notes": notes,
        "use": {
            "ones": statistics.share_of_ones(signs).tolist(),
            "entropy": statistics.bit_entropies(signs).tolist(),
            "dead": statistics.dead_bits(signs),
            "same": [list(pair) for pair in duplicates.same],
            "inverted": [list(pair) for pair in duplicates.inverted],
        },
        "blocks": {name: value.tolist() for name, value in blocks._asdict().items()},
        "correlations": _correlations(signs),
        "distances": {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in histograms._asdict().items()
        },
        "stability": {"images": views.shape[1]}
        | {name: value.tolist() for name, value in steady._asdict().items()},
    }
    if labels is not None:
        result |= _of_classes(signs, labels, source.classes, pair, seed, notes)
        if histograms.within.sum() and histograms.between.sum():
            result["distances"]["separation"] = statistics.separation(histograms.within, histograms.between)
    if columns:
        result["attributes"] = _of_attributes(signs, looked.images, columns, seed, notes)
    if other is not None:
        result["other"] = _of_other(signs, looked.images, source, other, seed, notes)
    result["shown"] = _of_shown(result, looked, source, bits)
    result["map"] = _map(signs, looked.images, seed, notes)
    return result


def _correlations(signs: Tensor) -> dict[str, Any]:
    """Their matrix in short, it has K² entries; without dead bits, which one odd image can make alike."""
    dead = statistics.dead_bits(signs)
    alive = torch.tensor([bit for bit in range(signs.shape[1]) if bit not in dead], dtype=torch.int64)
    first, second = alive[torch.triu_indices(len(alive), len(alive), 1)]
    values = statistics.bit_correlations(signs)[first, second]
    order = values.abs().sort(descending=True, stable=True).indices[:STRONGEST].tolist()
    return {
        "rms": values.square().mean().sqrt().item() if len(values) else 0.0,
        "by_chance": len(signs) ** -0.5,
        "absolute": torch.histc(values.abs().float(), 50, 0, 1).long().tolist(),
        "strongest": [[int(first[one]), int(second[one]), float(values[one])] for one in order],
    }


def _of_classes(
    signs: Tensor,
    labels: Tensor,
    classes: list[str],
    pair: tuple[int, int] | None,
    seed: int,
    notes: list[str],
) -> dict[str, Any]:
    size = signs.shape[1]
    images, shares = statistics.class_shares(signs, labels, len(classes))
    kept = [size] + [count for count in (2**power for power in range(12, 2, -1)) if count < size]
    result: dict[str, Any] = {
        "class_images": images.tolist(),
        "class_shares": [None if row.isnan().any() else row.tolist() for row in shares],
        "information": _as_lists(statistics.mutual_information(signs, labels, seed=seed)),
        "sharing": _as_lists(
            statistics.Sharing(*(x.sum(0) for x in statistics.sharing(signs, labels, len(classes))))
        ),
    }
    try:
        found = statistics.precision_by_bits(signs, labels, kept, seed=seed)
        # A code that is always the same ranks by lot: its precision is above the share of the class, by as
        # much as ln n / n, the more so the smaller classes are.
        silent = statistics.precision_by_bits(torch.zeros_like(signs[:, :1]), labels, [1], seed=seed)
        result["retrieval"] = {
            "by_chance": silent[0].precision,
            "kept": [one._asdict() for one in found],
        }
    except ValueError:
        notes.append("No query has another image of its class: retrieval is left out.")
    given = pair is not None
    pair = pair or _most_alike(images, shares)
    if min(images[list(pair)]) == 0:
        notes.append("One of the two classes to tell apart has no images: they are left out.")
    else:
        found = statistics.telling_apart(signs, labels, *pair)
        result["telling_apart"] = {
            "classes": [classes[one] for one in pair],
            "named": given,
            **_as_lists(found),
        }
    return result


def _most_alike(images: Tensor, shares: Tensor) -> tuple[int, int]:
    """The two classes whose bits' shares differ least on average; of those with enough images, if any."""
    there = (images >= FEWEST_OF_CLASS).nonzero().flatten()
    if len(there) < 2:
        there = (images > 0).nonzero().flatten()
    apart = torch.cdist(shares[there], shares[there], p=1).fill_diagonal_(float("inf"))
    first, second = divmod(int(apart.argmin()), len(there))
    return int(there[first]), int(there[second])


def _of_attributes(
    signs: Tensor, images: Tensor, columns: dict[str, Attribute], seed: int, notes: list[str]
) -> dict[str, Any]:
    found = {}
    for name, column in columns.items():
        values = torch.from_numpy(column.values)[images]
        known, there = int((values >= 0).sum()), len(values[values >= 0].unique())
        if there < 2 or there > known / 5:
            why = "fewer than two values" if there < 2 else f"{there} values of {known} images are too many"
            notes.append(f"Attribute {name} is left out: {why}.")
            continue
        told = statistics.mutual_information(signs, values, seed=seed)
        found[name] = {"values": column.names, "known": known, **_as_lists(told)}
    return found


def _of_other(
    signs: Tensor, images: Tensor, source: Source, other: Pretrained, seed: int, notes: list[str]
) -> dict[str, Any] | None:
    rows = {int(image): row for row, image in enumerate(images)}
    pairs, found = [], []
    for seen in look(other, source):
        there = [place for place, image in enumerate(seen.indices) if image in rows]
        pairs += [rows[seen.indices[place]] for place in there]
        _check_finite("other", other, seen.logits)
        found.append((seen.logits[there] > 0).cpu())
    if len(pairs) < 4:
        notes.append("Two checkpoints are compared from 4 images on: that is left out.")
        return None
    mine, theirs = signs[pairs], torch.cat(found)
    k = min(NEIGHBORS, len(pairs) - 1)
    return {
        "weights": other.name,
        "images": len(pairs),
        "bits": theirs.shape[1],
        "from_other": _as_lists(statistics.predicted_from(mine, theirs, seed=seed)),
        "from_this": _as_lists(statistics.predicted_from(theirs, mine, seed=seed)),
        "neighbors": {"k": k, **statistics.neighbor_overlap(mine, theirs, k, seed=seed)._asdict()},
    }


def _of_shown(result: dict, looked: Looked, source: Source, bits: list[int] | None) -> dict[str, Any]:
    """The bits shown with images, and the images: [name, logit] each."""
    why = "named"
    if bits is None:
        told = result["information"]["corrected"] if "information" in result else result["stability"]["kappa"]
        dead = set(result["use"]["dead"])
        order = sorted((bit for bit in range(result["bits"]) if bit not in dead), key=lambda bit: -told[bit])
        order = order or list(range(result["bits"]))
        least = CHOSEN // 3 if len(order) > CHOSEN else 0
        bits = order[: CHOSEN - least] + order[len(order) - least :]
        why = "information" if "information" in result else "stability"
    found = []
    for bit in bits:
        rows = statistics.surest(looked.logits, bit, SHOWN)
        sides = {
            side: [
                {
                    "image": source.images.name(int(looked.images[row])),
                    "row": row,
                    "logit": float(looked.logits[row, bit]),
                }
                for row in of_side
            ]
            for side, of_side in rows._asdict().items()
        }
        found.append({"bit": bit, **sides})
    return {"chosen_by": why, "bits": found}


def _map(signs: Tensor, images: Tensor, seed: int, notes: list[str]) -> dict[str, Any] | None:
    rows = torch.randperm(len(signs), generator=torch.Generator().manual_seed(seed))[:MAPPED].sort().values
    messages = pack_signs(signs[rows].float())
    if len(rows) < FEWEST_MAPPED or len(messages.unique(dim=0)) < 3:
        notes.append(f"The map wants {FEWEST_MAPPED} images and 3 different codes: it is left out.")
        return None
    # The root of the Hamming distance is the Euclidean distance of the bits, which t-SNE squares.
    distances = hamming_distance(messages, messages).double().sqrt().numpy()
    perplexity = min(30.0, (len(rows) - 1) / 3)
    tsne = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed)
    x, y = tsne.fit_transform(distances).T.astype(float)
    return {"images": images[rows].tolist(), "perplexity": perplexity, "x": x.tolist(), "y": y.tolist()}


def _as_lists(found: Any) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in found._asdict().items()
    }

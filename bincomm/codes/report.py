"""A report on a code: `codes.json` with all figures, and `codes.html`, a page that explains them."""

import os
from pathlib import Path
from typing import Any

import torch
from sklearn.manifold import TSNE
from torch import Tensor

from bincomm.codes.attributes import Attribute, read_attributes
from bincomm.codes.classes import (
    class_difference,
    class_shares,
    majority_classes,
    most_alike,
    significant_information,
)
from bincomm.codes.distances import distance_histograms, neighbor_overlap, precision_by_bits, separation
from bincomm.codes.observations import Observations, augmented_signs, most_certain, observe
from bincomm.codes.page import draw_page
from bincomm.codes.stability import predicted_from, stability
from bincomm.codes.usage import (
    bit_entropies,
    block_entropies,
    dead_bits,
    duplicate_bits,
    share_of_ones,
    summarize_correlations,
)
from bincomm.data.sources import Source
from bincomm.evaluation.features import forward_batches
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import check_folder, write_json, write_text
from bincomm.ops.hamming import hamming_distance
from bincomm.ops.messages import pack_signs

CHOSEN = 6  # number of bits shown with images if none are named
MAPPED = 2000  # images on the map at most
MIN_MAPPED = 10
NEIGHBORS = 10


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

    The network sees the images once, and a part of them again in two augmented views. What needs labels is
    left out where there are none, or only one class; `notes` say what was left out, and why.

    Args:
        model: a backbone with its head.
        source: the images, at least 2 that can be used.
        output: the folder, made where it does not exist.
        attributes: a CSV file with attributes of the images, see `bincomm.codes.attributes.read_attributes`.
        classes: two to compare; without them the two whose codes are most alike.
        bits: those shown with images; without them the ones that say most about the classes, and least.
        other: the same run at another time, before or after a reset of the head, to be compared with.
        seed: of everything drawn at random.

    Returns:
        What `codes.json` holds: results of the functions imported here, whose docstrings explain them.

    Raises:
        ValueError: no head, too few images, no such class or bit, an attributes' file that cannot be read or
            does not fit, or an output that cannot be a folder.
        OSError: there is no space left, for example; an older one of the two files then stays as it was.
    """
    for argument, network in (("model", model), ("other", other)):
        if network is not None and network.head is None:
            raise ValueError(
                f"{argument}: {network.name} has no head, so it gives no codes; name a run or a checkpoint"
            )
    pair = None if classes is None else _class_pair(source, classes)
    notes = list(source.notes)
    columns: dict[str, Attribute] = {}
    if attributes is not None:
        columns, misfits = read_attributes(attributes, list(source.images.names()))
        notes += misfits
    output = check_folder("output", output)  # before the network sees all images
    observed = observe(model, source, bits)
    if len(observed.indices) < 2:
        raise ValueError(f"data: expected at least 2 images that can be used, got {len(observed.indices)}")
    _check_finite("model", model, observed.logits)

    signs, labels = observed.logits > 0, _labels(source, observed, notes)
    if observed.left_out:
        count = len(observed.left_out)
        notes.append(f"{count} image{'s' * (count != 1)} could not be used.")
    folders = {os.path.dirname(name) for name in source.images.names()}
    result: dict[str, Any] = {
        "weights": model.name,
        "data": os.path.commonpath([os.path.abspath(folder) for folder in folders]),
        "images": signs.shape[0],
        "bits": signs.shape[1],
        "seed": seed,
        "classes": source.classes if labels is not None else [],
        "left_out": observed.left_out,
        "notes": notes,
        **_of_bits(signs),
        "distances": _of_distances(signs, labels, seed),
        "stability": _of_views(model, source, observed, seed),
    }
    if labels is not None:
        result |= _of_classes(signs, labels, source.classes, pair, seed, notes)
    if columns:
        result["attributes"] = _of_attributes(signs, observed.indices, columns, seed, notes)
    if other is not None:
        result["other"] = _of_other(signs, observed.indices, source, other, seed, notes)
    result["shown"] = _of_shown(result, observed, source, bits)
    result["map"] = _map(signs, observed.indices, seed, notes)

    page = draw_page(result, observed, source)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "codes.html", page)
    write_json(output / "codes.json", result)
    return result


def _check_finite(argument: str, model: Pretrained, logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise ValueError(f"{argument}: {model.name} gives codes that are not finite: its training had failed")


def _class_pair(source: Source, classes: tuple[str, str]) -> tuple[int, int]:
    if source.labels is None:
        raise ValueError("classes: expected images with labels, the data has none")
    for name in classes:
        if name not in source.classes:
            names = ", ".join(source.classes[:10]) + (", ..." if len(source.classes) > 10 else "")
            raise ValueError(f"classes: there is no class {name!r} among {names}")
    if len(classes) != 2 or classes[0] == classes[1]:
        raise ValueError(f"classes: expected two different ones, got {', '.join(classes)}")
    return source.classes.index(classes[0]), source.classes.index(classes[1])


def _labels(source: Source, observed: Observations, notes: list[str]) -> Tensor | None:
    """(n,) labels of the observed images; None where they are of no class, or all of one."""
    if source.labels is None:
        notes.append("The data has no labels: what needs them is left out.")
        return None
    labels = torch.from_numpy(source.labels)[observed.indices]
    if len(labels.unique()) < 2:
        notes.append("All images are of one class: what compares classes is left out.")
        return None
    return labels


def _of_bits(signs: Tensor) -> dict[str, Any]:
    duplicates = duplicate_bits(signs)
    correlations = summarize_correlations(signs)
    return {
        "use": {
            "ones": share_of_ones(signs).tolist(),
            "entropy": bit_entropies(signs).tolist(),
            "dead": dead_bits(signs),
            "same": [list(pair) for pair in duplicates.same],
            "inverted": [list(pair) for pair in duplicates.inverted],
        },
        "blocks": _as_lists(block_entropies(signs)),
        "correlations": {
            **correlations._asdict(),
            "strongest": [list(pair) for pair in correlations.strongest],
        },
    }


def _of_distances(signs: Tensor, labels: Tensor | None, seed: int) -> dict[str, Any]:
    histograms = distance_histograms(signs, labels, seed=seed)
    result = _as_lists(histograms)
    within, between = histograms.within, histograms.between
    if within is not None and between is not None and within.sum() and between.sum():
        result["separation"] = separation(within, between)
    return result


def _of_views(model: Pretrained, source: Source, observed: Observations, seed: int) -> dict[str, Any]:
    if observed.left_out and source.weights is None:
        source = source.select(observed.indices.tolist())
    first, second = augmented_signs(model, source, seed)
    return {"images": len(first), **_as_lists(stability(first, second))}


def _of_classes(
    signs: Tensor,
    labels: Tensor,
    classes: list[str],
    pair: tuple[int, int] | None,
    seed: int,
    notes: list[str],
) -> dict[str, Any]:
    images, shares = class_shares(signs, labels, len(classes))
    majority = majority_classes(signs, labels, len(classes))
    result: dict[str, Any] = {
        "class_images": images.tolist(),
        "class_shares": [None if row.isnan().any() else row.tolist() for row in shares],
        "information": _as_lists(significant_information(signs, labels, seed=seed)),
        "majority_classes": {"ones": majority.ones.sum(0).tolist(), "zeros": majority.zeros.sum(0).tolist()},
    }
    size = signs.shape[1]
    counts = [size] + [count for count in (2**power for power in range(12, 2, -1)) if count < size]
    try:
        by_bits = precision_by_bits(signs, labels, counts, seed=seed)
        # A constant code ranks at random: its precision is above the share of the class, by as much as
        # ln n / n, the more so the smaller classes are.
        constant = precision_by_bits(torch.zeros_like(signs[:, :1]), labels, [1], seed=seed)
        result["retrieval"] = {
            "by_chance": constant[0].precision,
            "by_bits": [subset._asdict() for subset in by_bits],
        }
        if unmatched := by_bits[0].unmatched:
            notes.append(f"Retrieval leaves out {unmatched} queries without another image of their class.")
    except ValueError:
        notes.append("No query has another image of its class: retrieval is left out.")
    named = pair is not None
    pair = pair or most_alike(images, shares)
    if min(images[list(pair)]) == 0:
        notes.append("One of the two classes to compare has no images: they are left out.")
    else:
        result["class_difference"] = {
            "classes": [classes[label] for label in pair],
            "named": named,
            **_as_lists(class_difference(signs, labels, *pair)),
        }
    return result


def _of_attributes(
    signs: Tensor, images: Tensor, columns: dict[str, Attribute], seed: int, notes: list[str]
) -> dict[str, Any]:
    result = {}
    for name, column in columns.items():
        values = torch.from_numpy(column.values)[images]
        known = values[values >= 0]
        different = len(known.unique())
        if different < 2 or different > len(known) / 5:
            why = f"{different} values of {len(known)} images are too many"
            if different < 2:
                why = "fewer than two values"
            notes.append(f"Attribute {name} is left out: {why}.")
            continue
        information = significant_information(signs, values, seed=seed)
        result[name] = {"values": column.names, "known": len(known), **_as_lists(information)}
    return result


def _of_other(
    signs: Tensor, images: Tensor, source: Source, other: Pretrained, seed: int, notes: list[str]
) -> dict[str, Any] | None:
    row_of = {int(image): row for row, image in enumerate(images)}
    rows: list[int] = []
    batches: list[Tensor] = []
    for batch in forward_batches(other, source):
        assert batch.logits is not None  # it has a head
        _check_finite("other", other, batch.logits)
        common = [index for index, image in enumerate(batch.indices) if image in row_of]
        rows += [row_of[batch.indices[index]] for index in common]
        batches.append((batch.logits[common] > 0).cpu())
    if len(rows) < 4:
        notes.append("Comparing two checkpoints needs at least 4 images: that is left out.")
        return None
    signs, other_signs = signs[rows], torch.cat(batches)
    k = min(NEIGHBORS, len(rows) - 1)
    return {
        "weights": other.name,
        "images": len(rows),
        "bits": other_signs.shape[1],
        "from_other": _as_lists(predicted_from(signs, other_signs, seed=seed)),
        "from_this": _as_lists(predicted_from(other_signs, signs, seed=seed)),
        "neighbors": {"k": k, **neighbor_overlap(signs, other_signs, k, seed=seed)._asdict()},
    }


def _of_shown(
    result: dict[str, Any], observed: Observations, source: Source, bits: list[int] | None
) -> dict[str, Any]:
    """The bits shown with images, and for each its most certain images."""
    chosen_by = "named"
    if bits is None:
        chosen_by = "information" if "information" in result else "stability"
        score = result[chosen_by]["corrected" if "information" in result else "kappa"]
        dead = set(result["use"]["dead"])
        order = sorted((bit for bit in range(result["bits"]) if bit not in dead), key=lambda bit: -score[bit])
        order = order or list(range(result["bits"]))
        least = CHOSEN // 3 if len(order) > CHOSEN else 0
        bits = order[: CHOSEN - least] + order[len(order) - least :]
    shown = []
    for bit in bits:
        sides = {
            side: [
                {
                    "image": source.images.name(int(observed.indices[row])),
                    "row": row,
                    "logit": float(observed.logits[row, bit]),
                }
                for row in rows
            ]
            for side, rows in most_certain(observed.logits, bit)._asdict().items()
        }
        shown.append({"bit": bit, **sides})
    return {"chosen_by": chosen_by, "bits": shown}


def _map(signs: Tensor, images: Tensor, seed: int, notes: list[str]) -> dict[str, Any] | None:
    rows = torch.randperm(len(signs), generator=torch.Generator().manual_seed(seed))[:MAPPED].sort().values
    messages = pack_signs(signs[rows].float())
    if len(rows) < MIN_MAPPED or len(messages.unique(dim=0)) < 3:
        notes.append(f"The map needs {MIN_MAPPED} images and 3 different codes: it is left out.")
        return None
    # The root of the Hamming distance is the Euclidean distance of the bits, which t-SNE squares.
    distances = hamming_distance(messages, messages).double().sqrt().numpy()
    perplexity = min(30.0, (len(rows) - 1) / 3)
    tsne = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed)
    x, y = tsne.fit_transform(distances).T.astype(float)
    return {"images": images[rows].tolist(), "perplexity": perplexity, "x": x.tolist(), "y": y.tolist()}


def _as_lists(values: Any) -> dict[str, Any]:
    """The fields of a named tuple, with lists in place of tensors."""
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in values._asdict().items()
    }

"""Retrieval by codes on images that may have several labels, as papers of hashing measure it."""

import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from bincomm.data.listing import Files
from bincomm.data.sources import Source, check_listed
from bincomm.distributed.ranks import ALONE, Ranks
from bincomm.evaluation.evaluate import NoUsableImagesError, log_unusable, precision_at
from bincomm.evaluation.features import extract_features_cached
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import expand_home
from bincomm.logs import printable_name

LISTS = {"gallery": "database.txt", "queries": "test.txt"}
LABELS = re.compile(r"(?:[ \t]+[01])+[ \t\r]*$")


class Lists(NamedTuple):
    """Images of two lists, and (n, C) bool, the labels of each."""

    sources: dict[str, Source]
    labels: dict[str, np.ndarray]


def open_lists(folder: str | Path) -> Lists:
    """Lists as HashNet's code has them, and that of later papers: database.txt and test.txt, a line for an
    image, with its path and for each label 0 or 1, separated by spaces.

    Args:
        folder: that of the lists; paths are relative to it, and lie below it, or below IMAGES in
            FOLDER@IMAGES.

    Raises:
        ValueError: a list is missing, or a line of it is another one; the message begins with "hashing" and
            names the list and the line.
    """
    text, _, images = os.fspath(folder).rpartition("@")
    where = expand_home(folder)
    root = where
    if text and not where.is_dir():
        where = expand_home(text)
        root = where / expand_home(images or "/")
    if not where.is_dir():
        raise ValueError(f"hashing: expected a folder with {' and '.join(LISTS.values())}, got {folder}")
    sources, labels, width = {}, {}, 0
    for name, file in LISTS.items():
        paths, rows = [], []
        path = where / file
        try:
            lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
        except OSError as error:
            raise ValueError(f"hashing: {path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            match = LABELS.search(line)
            found = re.findall("[01]", match[0]) if match else []
            width = width or len(found)
            if not match or len(found) < width or not line[: match.start()].strip():
                raise ValueError(
                    f"hashing: {path}, line {number}: expected a path and {width or 'some'} labels, each 0 "
                    f"or 1, got {printable_name(line.strip()[:100])}"
                )
            # A name may itself end in such a number.
            words = line.rstrip().rsplit(maxsplit=width)
            paths.append(os.path.join(where.absolute(), words[0].strip()))
            rows.append([word == "1" for word in words[1:]])
        if not paths:
            raise ValueError(f"hashing: {path} lists no images")
        check_listed("hashing", path, paths, root, where)
        sources[name], labels[name] = Source(Files(paths)), np.array(rows, bool)
    return Lists(sources, labels)


def evaluate_hashing(
    model: Pretrained,
    folder: str | Path,
    *,
    at: int = 1000,
    unmatched: Literal["zero", "skip"] = "zero",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """mAP@k of codes on the images of two lists; images that share a label are relevant to each other.

    Args:
        model: a network with a head.
        folder: see `open_lists`.
        at, unmatched: see `mean_average_precision_at`.
        ranks: all call; rank 0 gets the result, and the others {}.

    Returns:
        "gallery_images" and "query_images" (those that can be used), "labels" and "unmatched_queries":
        numbers; "k", "codes" and "asymmetric", as of "map_at" in `bincomm.evaluation.evaluate.evaluate`.

    Raises:
        NoUsableImagesError: none of a list's images can be used.
        ValueError: what `open_lists` raises, or there is no head.
    """
    if model.head is None:
        raise ValueError(
            f"hashing: measures codes, and {model.name} holds a backbone without a head; take a run's "
            "directory with its checkpoints, or a checkpoint"
        )
    sources, given = open_lists(folder)
    values = {
        name: extract_features_cached(model, source, log_unusable(name, source), ranks=ranks)
        for name, source in sources.items()
    }
    if ranks.rank:
        return {}
    labels = {}
    for name, source in sources.items():
        indices = values[name]["indices"].long()
        if len(indices) == 0:
            raise NoUsableImagesError(f"hashing: none of the {len(source.images)} {name} can be used")
        labels[name] = torch.from_numpy(given[name])[indices].to(model.device)
    gallery, queries = (
        {key: value.to(model.device) for key, value in values[name].items()} for name in LISTS
    )
    matched = (labels["queries"] & labels["gallery"].any(0)).any(1)
    return {
        "gallery_images": len(labels["gallery"]),
        "query_images": len(labels["queries"]),
        "labels": labels["gallery"].shape[1],
        "unmatched_queries": int((~matched).sum()),
        **precision_at(
            model,
            gallery["signs"],
            labels["gallery"],
            queries["features"],
            queries["signs"],
            labels["queries"],
            k=at,
            unmatched=unmatched,
        ),
    }

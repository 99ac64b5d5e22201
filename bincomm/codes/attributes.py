"""Attributes of images, from a CSV file."""

import csv
import os
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

MANY_VALUES = 10  # a column of more different numbers is divided in two at its median


class Attribute(NamedTuple):
    """A column of the attributes' file."""

    values: np.ndarray  # (n,) int64, an index into `names` for each image; -1: unknown
    names: list[str]


def read_attributes(path: Path, images: list[str]) -> tuple[dict[str, Attribute], list[str]]:
    """The attributes of images with these names, from a CSV file with a header.

    Its first column names images, by path or by as much of the path's end as distinguishes them; the others
    are attributes. Numbers of more than MANY_VALUES values are divided in two at their median; empty fields
    and NaN are unknown.

    Returns:
        The attributes by name, and notes on what did not fit.

    Raises:
        ValueError: the file cannot be read or does not fit the images; the message says why.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, row) for row in reader if row] or [(0, [])]
    except (OSError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"attributes: {path} cannot be read as CSV: {why}") from error
    header = [name.strip() for name in lines[0][1]]
    if len(header) < 2:
        raise ValueError(
            f"attributes: {path} needs a header that names the images' column and at least one more, "
            "separated by commas"
        )
    if len(set(header)) != len(header):
        raise ValueError(f"attributes: {path} has two columns of the same name")
    if any(_matching_end(name, {header[0]}) for name in images):
        raise ValueError(f"attributes: {path} begins with an image, {header[0]!r}; expected a header")
    rows: dict[str, list[str]] = {}
    for line, row in lines[1:]:
        key = os.path.normpath(row[0])
        if len(row) != len(header) or key in rows:
            wrong = "is the second of its image" if key in rows else f"has {len(row)} fields"
            raise ValueError(
                f"attributes: line {line} of {path} {wrong}, expected one row an image, of {len(header)}"
            )
        rows[key] = row
    keys = [_matching_end(name, rows) for name in images]
    used = Counter(key for key in keys if key is not None)
    if not used:
        raise ValueError(f"attributes: {path} names none of the images; its first column is {header[0]!r}")
    twice = next((key for key, count in used.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"attributes: {twice!r} in {path} names {used[twice]} images; give more of the path")
    notes = []
    if sum(used.values()) < len(images) or len(used) < len(rows):
        notes.append(
            f"The attributes' file names {len(used):,} of {len(images):,} images, and "
            f"{len(rows) - len(used):,} that are not among them."
        )
    attributes = {
        name: as_attribute(["" if key is None else rows[key][column].strip() for key in keys])
        for column, name in enumerate(header)
        if column
    }
    return attributes, notes


def as_attribute(column: list[str]) -> Attribute:
    """What a column of words says: numbers of many values in two halves, all else by its different words."""
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
    indices = {word: index for index, word in enumerate(words)}
    return Attribute(np.array([indices.get(word, -1) for word in column], np.int64), words)


def _matching_end(name: str, keys: Container[str]) -> str | None:
    """The longest end of a path that is among the keys."""
    if name in keys:
        return name
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in keys), None)

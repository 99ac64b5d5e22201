"""The images of a folder of codes nearest to others: by code, by image, as a picture; and an index for faiss.

The search itself is `hamming_topk`, which is faster on a CPU than faiss's flat index and promises, as that
does not, the first of equally near codes. `build_index` is for programs that speak faiss.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from bincomm.codes.storage import Part, iterate_codes, open_parts, read_rows, to_codes, to_messages
from bincomm.data.crops import Crops
from bincomm.data.images import eight_bits, open_encoded
from bincomm.data.listing import Files
from bincomm.data.parquet import open_parquet
from bincomm.data.shards import open_shards
from bincomm.data.sources import Source
from bincomm.data.values import decode_values
from bincomm.evaluation.identity import weights_identity
from bincomm.files import write_file, write_json
from bincomm.ops.hamming import hamming_topk
from bincomm.ops.messages import pack_signs

if TYPE_CHECKING:
    from bincomm.evaluation.pretrained import Pretrained

TILE = 128  # pixels a side of an image in the sheet
CAPTION = 34  # pixels below it, two lines of text
GAP = 4
COLUMNS = 7
MAX_SHOWN = 20 * COLUMNS  # images in a sheet: few programs open a larger picture
GRAY = (200, 200, 200)


class Neighbor(NamedTuple):
    """An image of a folder, and in how many bits its code differs from the query's."""

    path: str
    label: str | None
    distance: int


def search(folder: str | Path, codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k codes of a folder nearest to each query; of equally near ones those that come first.

    The folder is read in pieces: memory does not grow with it.

    Args:
        codes: (Q, ⌈K/8⌉) uint8, as from `read_codes` and `to_codes`.
        k: from 1 to the number of codes.

    Returns:
        Distances (Q, k) int32, ascending, and rows (Q, k) int64, numbered as in `read_codes`.

    Raises:
        ValueError: the folder cannot be read, or the codes are of another number of bits, or k does not fit.
    """
    return _search(folder, open_parts(folder), codes, k)


def _search(
    folder: str | Path, parts: Sequence[Part], codes: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    bits, count = parts[0].metadata["bits"], sum(part.rows for part in parts)
    width = -(-bits // 8)
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint8 or codes.shape[1:] != (width,):
        given = f"{codes.dtype} {tuple(codes.shape)}" if hasattr(codes, "shape") else type(codes).__name__
        raise ValueError(f"codes: expected uint8 (queries, {width}) for {bits} bits in {folder}, got {given}")
    if bits % 8 and (codes[:, -1] >> bits % 8).any():
        raise ValueError(f"codes: expected {bits} bits as in {folder}, got some that are set beyond these")
    if not 1 <= k <= count:
        raise ValueError(f"k: expected from 1 to the number of codes in {folder}, {count}, got {k}")
    queries, first = to_messages(codes), 0
    distances, rows = queries.new_empty(len(codes), 0), torch.empty(len(codes), 0, dtype=torch.int64)
    for batch in iterate_codes(parts):
        batch_distances, indices = hamming_topk(queries, to_messages(batch), min(k, len(batch)))
        distances, rows = torch.cat([distances, batch_distances], 1), torch.cat([rows, indices + first], 1)
        distances, order = distances.sort(dim=1, stable=True)  # of a tie the earlier rows come first already
        distances, rows = distances[:, :k], rows.gather(1, order[:, :k])
        first += len(batch)
    return distances.numpy(), rows.numpy()


def nearest(
    model: "Pretrained", folder: str | Path, queries: Sequence[str | Path], k: int = 20
) -> list[list[Neighbor]]:
    """The images of a folder nearest to some images, for each of these at most k, the nearest first.

    An image that is in the folder is at distance 0 from itself, except for bits whose logits are so near 0
    that the rounding in a batch of another size, or on another device, decides them.

    Args:
        model: the one that the folder was encoded with. The queries are preprocessed as those images were.
        queries: files of images.
        k: at least 1.

    Raises:
        ValueError: the codes are of other weights, or of another number of bits; the weights have no head; a
            query cannot be used; or as `search`.
    """
    from bincomm.evaluation.features import forward_batches  # which needs timm and DALI; `search` does not

    parts = open_parts(folder)  # only once, because files encoded meanwhile would renumber the rows
    metadata = parts[0].metadata
    if model.head is None:
        raise ValueError(
            f"weights: expected those of the codes in {folder}, {metadata.get('weights')}, with their head, "
            f"got {model.name} without one"
        )
    if model.config.bits != metadata["bits"]:
        raise ValueError(
            f"weights: expected codes of {metadata['bits']} bits as in {folder}, got {model.name} with "
            f"{model.config.bits}"
        )
    identity = weights_identity(model)
    if identity != metadata.get("identity"):
        raise ValueError(
            f"weights: expected those of the codes in {folder}, {metadata.get('weights')} "
            f"({metadata.get('identity')}), got {model.name} ({identity})"
        )
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")

    def refuse(query: int, why: str) -> None:
        raise ValueError(f"query: {queries[query]} cannot be used: {why}")

    config = replace(
        model.config,
        global_size=metadata["global_size"],
        eval_crop=metadata["eval_crop"],
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
    )
    source = Source(Files(os.path.abspath(query) for query in queries))
    messages = []
    for batch in forward_batches(replace(model, config=config), source, refuse):
        assert batch.logits is not None  # the model has a head
        messages.append(pack_signs(batch.logits).cpu())
    if not messages:
        return []
    k = min(k, sum(part.rows for part in parts))
    distances, rows = _search(folder, parts, to_codes(torch.cat(messages), metadata["bits"]), k)
    images = iter(read_rows(parts, rows.reshape(-1)))
    return [[Neighbor(*next(images), distance) for distance in of_query] for of_query in distances.tolist()]


def contact_sheet(
    query: str | Path,
    neighbors: Sequence[Neighbor],
    below: Sequence[Path] | None = None,
    crops: Crops = Crops(),  # noqa: B008  (which cannot be changed)
) -> Image.Image:
    """The query and its neighbors, MAX_SHOWN images at most, as a picture, with distance and label (or name)
    under each.

    An image that can no longer be opened is a gray tile with its path, and so is a neighbor outside the
    folders `below`, of which nothing is read; None: any may be read. `crops` says how images are read;
    `bincomm.data.contact_sheet.shown` what is shown of others than RGB.
    """
    tiles = [(str(query), ("query", os.path.basename(query)))]
    for path, label, distance in neighbors[: MAX_SHOWN - 1]:
        tiles.append((path, (f"distance {distance}", os.path.basename(path) if label is None else label)))
    columns = min(COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    size = columns * (TILE + GAP) + GAP, lines * (TILE + CAPTION + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (path, caption) in enumerate(tiles):
        folders = below if number else None  # the query is the user's own
        left, top = GAP + number % columns * (TILE + GAP), GAP + number // columns * (TILE + CAPTION + GAP)
        sheet.paste(_tile(path, folders, crops), (left, top))
        for line, text in enumerate(caption):
            corner = left, top + TILE + 3 + line * CAPTION // 2
            drawing.text(corner, _fitting(drawing, text), fill="black")
    return sheet


def build_index(folder: str | Path) -> Path:
    """Write a flat binary index of a folder's codes for faiss, `index.faiss`, unless it is up to date.

    Its vectors are the codes in the order of `read_codes`, of d = 8 ⌈K/8⌉ bits. Those beyond K are 0 in all
    of them and in a query's code, so distances are those of K bits. `index.json` has the names, sizes and
    times of the parts.

    Raises:
        ValueError: the folder cannot be read.
        ImportError: there is no faiss.
        OSError: the index cannot be written.
    """
    parts = open_parts(folder)
    path, stamps_path = Path(folder) / "index.faiss", Path(folder) / "index.json"
    stamps = [_stamp(part) for part in parts]
    try:
        if path.exists() and json.loads(stamps_path.read_text()) == stamps:
            return path
    except (OSError, ValueError):
        pass
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "an index needs faiss; install it with: pip install 'bincomm[eval]'", name="faiss"
        ) from error
    index = faiss.IndexBinaryFlat(8 * -(-parts[0].metadata["bits"] // 8))
    for codes in iterate_codes(parts):
        index.add(codes)
    stamps_path.unlink(missing_ok=True)  # so that it never describes another index than the one beside it
    writer = faiss.PyCallbackIOWriter  # type: ignore[attr-defined]  # SWIG makes it at run time
    write_file(path, lambda file: faiss.write_index_binary(index, writer(file.write)))
    write_json(stamps_path, stamps)
    return path


def _stamp(part: Part) -> list[Any]:
    stat = part.path.stat()
    return [part.path.name, stat.st_size, stat.st_mtime_ns]


def is_below(path: str, folders: Sequence[Path]) -> bool:
    """Whether a path lies below one of some folders, both as it is written, so that nothing elsewhere is even
    looked up, and after its links are followed."""
    written = os.path.abspath(path)
    return any(
        any(written.startswith(os.path.join(start, "")) for start in (os.path.abspath(folder), real))
        and os.path.realpath(written).startswith(os.path.join(real, ""))
        for folder in folders
        for real in [os.path.realpath(folder)]
    )


def _read(path: str, below: Sequence[Path] | None) -> bytes:
    """The bytes of an image, of a file or of a shard's member, below one of some folders if any are given."""
    path = path if below is None else os.path.abspath(path)  # what `is_below` judges
    for end in re.finditer(r"\.(tar|parquet)(?=/)", path, re.IGNORECASE):
        shard, member = path[: end.end()], path[end.end() + 1 :]
        if (below is None or is_below(shard, below)) and os.path.isfile(shard):
            if shard.lower().endswith(".parquet"):
                images, _, _ = open_parquet([shard])
                return images.read(range(len(images)).index(int(member))).tobytes()
            shards, _, _ = open_shards([shard])
            return shards.read(shards.members.index(member)).tobytes()
    if below is not None and not is_below(path, below):
        raise PermissionError(path)
    return Files([path]).read(0).tobytes()


def _tile(path: str, below: Sequence[Path] | None, crops: Crops) -> Image.Image:
    try:
        data = _read(path, below)
        if crops.rgb:
            image = open_encoded(data)
            image.draft("RGB", (TILE, TILE))
            image = ImageOps.exif_transpose(eight_bits(image)).convert("RGB")
        else:
            image = _picture_of_values(data, crops)
        scale = TILE / max(image.size)  # at least a pixel is left of the shorter side
        image = image.resize([max(1, round(scale * side)) for side in image.size])
        return ImageOps.pad(image, (TILE, TILE), color="white")
    except Exception:  # whatever the decoder raises; what is left to show is the path
        tile = Image.new("RGB", (TILE, TILE), GRAY)
        drawing = ImageDraw.Draw(tile)
        rest, lines = path, list[str]()
        while rest and len(lines) < TILE // 12 - 1:
            lines.append(_fitting(drawing, rest))
            rest = rest[len(lines[-1]) :]
        drawing.multiline_text((2, 2), "\n".join(lines), fill="black", spacing=1)
        return tile


def _picture_of_values(data: bytes, crops: Crops) -> Image.Image:
    from bincomm.data.contact_sheet import crop_picture  # which needs DALI

    values = decode_values(np.frombuffer(data, np.uint8), crops.channels, crops.pixel_range)
    normalized = (values - np.array(crops.mean, np.float32)) / np.array(crops.std, np.float32)
    return crop_picture(torch.from_numpy(normalized).movedim(-1, 0), crops)


def _fitting(drawing: ImageDraw.ImageDraw, text: str) -> str:
    """As much of a text as fits the width of a tile, in letters that every font has."""
    # No letter is less than a pixel wide.
    text = text[:TILE].encode("latin-1", "replace").decode("latin-1").replace("\n", " ")
    while drawing.textlength(text) > TILE - 4:
        text = text[:-1]
    return text

import io
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_model import create_model, sample_digits

from bincomm import hamming_distance, hamming_topk
from bincomm.codes import search as search_module
from bincomm.codes.encode import encode
from bincomm.codes.search import (
    CAPTION,
    COLUMNS,
    GAP,
    GRAY,
    MAX_SHOWN,
    TILE,
    Neighbor,
    build_index,
    contact_sheet,
    nearest,
    search,
)
from bincomm.codes.storage import open_parts, read_codes, read_rows, to_messages, write_part
from bincomm.data.export import write_shards
from bincomm.data.sources import open_source


def fill(folder, codes, bits, ends):
    """Write codes into parts that end there."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, end in enumerate(ends):
        names = [f"/images/{row}.png" for row in range(first, end)]
        metadata = {"bits": bits, "identity": "a"}
        path = folder / f"part-{number:05}.parquet"
        write_part(path, names, [None] * len(names), codes[first:end], metadata)
        first = end
    return folder


def random_codes(count, bits):
    bools = np.random.default_rng(count).integers(0, 2, (count, bits), dtype=np.uint8)
    return np.packbits(bools, axis=1, bitorder="little")


def picture_of(sheet, number):
    left = GAP + number % COLUMNS * (TILE + GAP)
    top = GAP + number // COLUMNS * (TILE + CAPTION + GAP)
    return np.asarray(sheet.crop((left, top, left + TILE, top + TILE)))


@pytest.fixture(scope="module")
def source():
    return sample_digits()


@pytest.fixture(scope="module", params=[20, 64])
def encoded(request, source, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("encoded"), create_model(request.param)
    encode(model, source, folder, rows=30)
    return model, folder


@pytest.mark.parametrize("bits", [7, 20, 64, 100])
def test_finds_what_hamming_topk_finds_in_all(bits, tmp_path):
    codes, queries = random_codes(400, bits), random_codes(21, bits)
    fill(tmp_path, codes, bits, (3, 100, 100, 390, 400))  # some parts hold less than k
    for k in (1, 20, 400):
        distances, rows = search(tmp_path, queries, k)
        expected = hamming_topk(to_messages(queries), to_messages(codes), k)
        assert (distances.dtype, rows.dtype) == (np.int32, np.int64)
        assert (distances == expected[0].numpy()).all()
        assert (rows == expected[1].numpy()).all()  # of equally near ones the first
        all_distances = hamming_distance(to_messages(queries), to_messages(codes)).numpy()
        assert (np.take_along_axis(all_distances, rows, 1) == distances).all()
    assert [array.shape for array in search(tmp_path, queries[:0], 3)] == [(0, 3), (0, 3)]


def test_an_image_is_nearest_to_itself(encoded, source):
    model, folder = encoded
    numbers = [3, 31, 70]
    # Shown in another way it would have another code; it is shown as the folder's images were.
    other = replace(model, name="x", config=replace(model.config, global_size=20, mean=(0, 0, 0)))
    results = nearest(other, folder, [source.images.name(number) for number in numbers], 20)
    codes, _ = read_codes(folder)
    all_distances = hamming_distance(to_messages(codes), to_messages(codes))
    assert all_distances[numbers].float().mean() > model.config.bits / 4
    for number, neighbors in zip(numbers, results, strict=True):
        assert len(neighbors) == 20
        path, label = source.images.name(number), source.classes[source.labels[number]]
        assert Neighbor(path, label, 0) in neighbors
        expected, rows = all_distances[number].sort(stable=True)
        assert [neighbor.distance for neighbor in neighbors] == expected[:20].tolist()
        assert [(neighbor.path, neighbor.label) for neighbor in neighbors] == read_rows(
            open_parts(folder), rows[:20]
        )
    assert len(nearest(model, folder, [source.images.name(0)], 1000)[0]) == len(source.images)
    assert nearest(model, folder, []) == []


@pytest.mark.parametrize("bits", [20, 64])
def test_faiss_finds_the_same_in_the_index(bits, tmp_path):
    codes, queries = random_codes(300, bits), random_codes(9, bits)
    fill(tmp_path, codes, bits, (120, 300))
    path = build_index(tmp_path)
    assert path == tmp_path / "index.faiss"
    index = faiss.read_index_binary(str(path))
    assert (index.ntotal, index.d) == (300, 8 * codes.shape[1])
    distances, rows = index.search(queries, 20)
    assert (distances == search(tmp_path, queries, 20)[0]).all()
    all_distances = hamming_distance(to_messages(queries), to_messages(codes)).numpy()
    assert (np.take_along_axis(all_distances, rows, 1) == distances).all()


def test_the_index_is_made_anew_where_parts_changed(tmp_path):
    codes = random_codes(100, 16)
    fill(tmp_path, codes, 16, (60, 100))
    path = build_index(tmp_path)

    def held():
        index = faiss.read_index_binary(str(build_index(tmp_path)))
        return faiss.vector_to_array(index.xb).reshape(-1, 2)

    before = path.stat().st_mtime_ns
    assert (held() == codes).all()
    assert path.stat().st_mtime_ns == before
    fill(tmp_path, ~codes, 16, (60,))  # a part of the same size
    assert (held() == np.concatenate([~codes[:60], codes[60:]])).all()
    (tmp_path / "part-00001.parquet").unlink()
    assert (held() == ~codes[:60]).all()
    for name in ("index.json", "index.faiss"):
        (tmp_path / name).unlink()
        assert (held() == ~codes[:60]).all()
    (tmp_path / "index.json").write_text("[")
    before = path.stat().st_mtime_ns
    assert (held() == ~codes[:60]).all()
    assert path.stat().st_mtime_ns > before


@pytest.mark.slow
def test_searching_needs_neither_faiss_nor_what_training_needs(tmp_path, monkeypatch):
    fill(tmp_path, random_codes(10, 16), 16, (10,))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'bincomm\[eval\]'"):
        build_index(tmp_path)
    program = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys(("faiss", "timm", "nvidia.dali", "sklearn")))
        from bincomm.codes.search import search
        from bincomm.codes.storage import iterate_codes, open_parts
        print(search({str(tmp_path)!r}, next(iterate_codes(open_parts({str(tmp_path)!r})))[3:4], 1))"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("(array([[0]], dtype=int32), array([[3]]"), result.stderr


@pytest.mark.parametrize("moment", ["weights_identity", "hamming_topk"])
def test_files_that_come_meanwhile_do_not_shift_the_rows(encoded, source, tmp_path, monkeypatch, moment):
    model, folder = encoded
    query, late = source.images.name(45), tmp_path / "part-00000.parquet"
    for path in sorted(folder.glob("part-*.parquet"))[1:]:  # the first is still being written
        (tmp_path / path.name).write_bytes(path.read_bytes())
    function = getattr(search_module, moment)

    def slowly(*arguments):
        late.write_bytes((folder / late.name).read_bytes())
        return function(*arguments)

    monkeypatch.setattr(search_module, moment, slowly)
    ((neighbor,),) = nearest(model, tmp_path, [query], 1)
    assert late.exists()
    paths = [path for path, _ in read_rows(open_parts(folder), range(30, len(source.images)))]
    assert neighbor.distance == 0
    codes = read_codes(folder)[0]
    same = [path for path, code in zip(paths, codes[30:], strict=True) if (code == codes[45]).all()]
    assert neighbor.path == same[0]


def test_the_sheet_shows_the_query_and_its_neighbors(encoded, source):
    model, folder = encoded
    query = source.images.name(5)
    (neighbors,) = nearest(model, folder, [query], 9)
    sheet = contact_sheet(query, neighbors)
    assert sheet.size == (7 * (TILE + GAP) + GAP, 2 * (TILE + CAPTION + GAP) + GAP)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    assert Image.open(file).size == sheet.size
    for number, path in enumerate([query, *(neighbor.path for neighbor in neighbors)]):
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC))
        assert (picture_of(sheet, number) == expected).all()
    below = np.asarray(sheet.crop((GAP, GAP + TILE, GAP + TILE, GAP + TILE + CAPTION)))
    assert (below < 100).any()  # words
    assert contact_sheet(query, neighbors[:2]).size == (3 * (TILE + GAP) + GAP, TILE + CAPTION + 2 * GAP)
    label = "Ω, a longer label than is room for"
    other = contact_sheet(query, [one._replace(label=label, distance=99) for one in neighbors])
    assert (np.asarray(other) != np.asarray(sheet)).any()


def test_the_sheet_shows_images_of_shards_and_none_that_are_gone(source, tmp_path):
    write_shards(source.select(range(4)), tmp_path / "a.tar" / "shards")  # a folder named like a shard
    (shard,) = (tmp_path / "a.tar" / "shards").glob("*.tar")
    shards = open_source(str(shard)).images
    wide = tmp_path / "wide.png"
    Image.new("I;16", (40, 20), 40000).save(wide)
    (tmp_path / "text.png").write_text("no image")
    paths = [shards.name(0), f"{shard}/none.png", str(wide), str(tmp_path / "text.png"), f"/{'x' * 300}.png"]
    sheet = contact_sheet(shards.name(2), [Neighbor(path, None, 3) for path in paths])
    for number, image in ((0, 2), (1, 0)):
        picture = Image.open(io.BytesIO(shards.read(image).tobytes())).convert("RGB")
        expected = np.asarray(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
        assert (picture_of(sheet, number) == expected).all()
    assert (picture_of(sheet, 3)[TILE // 2] == 40000 // 257).all()
    assert (picture_of(sheet, 3)[0] == 255).all()  # as wide as it was, on white
    for number in (2, 4, 5):
        tile = picture_of(sheet, number)
        assert (tile[0, 0] == GRAY).all()
        assert (tile < 100).any()


def test_the_sheet_shows_images_of_parquet_files(source, tmp_path):
    path = tmp_path / "x.parquet"
    rows = [source.images.read(row).tobytes() for row in range(4)]
    pq.write_table(pa.table({"image": rows}), path)
    names = [f"{path}/{row}" for row in ("1", "4", "-1", "none", "../0")]
    sheet = contact_sheet(f"{path}/2", [Neighbor(name, None, 3) for name in names], below=[tmp_path])
    for number, row in ((0, 2), (1, 1)):
        picture = Image.open(io.BytesIO(rows[row])).convert("RGB")
        expected = np.asarray(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
        assert (picture_of(sheet, number) == expected).all()
    elsewhere = contact_sheet(f"{path}/2", [Neighbor(names[0], None, 3)], below=[tmp_path / "other"])
    for tile in (*(picture_of(sheet, number) for number in range(2, 6)), picture_of(elsewhere, 1)):
        assert (tile[0, 0] == GRAY).all()


def test_the_sheet_copes_with_what_is_extreme(tmp_path):
    for size in ((1, 300), (9000, 2)):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "line.png")
        tile = picture_of(contact_sheet(tmp_path / "line.png", []), 0)
        assert (tile == (200, 0, 0)).all(-1).sum() == TILE
    started = time.process_time()
    contact_sheet(tmp_path / "line.png", [Neighbor(f"/{'x' * 4000}.png", None, 3)])
    assert time.process_time() - started < 5
    many = [Neighbor("gone.png", None, 3)] * 10000
    assert (
        contact_sheet(tmp_path / "line.png", many).height
        == MAX_SHOWN // COLUMNS * (TILE + CAPTION + GAP) + GAP
    )


def test_names_of_any_bytes_are_found(encoded, source, tmp_path):
    model, _ = encoded
    name = os.path.join(os.fsencode(tmp_path), b"\xff \xc3\xa4.png")
    with open(source.images.name(3), "rb") as image, open(name, "wb") as copy:
        copy.write(image.read())
    encode(model, open_source(str(tmp_path)), tmp_path / "codes")
    ((neighbor,),) = nearest(model, tmp_path / "codes", [os.fsdecode(name)], 5)
    assert (os.fsencode(neighbor.path), neighbor.distance) == (name, 0)
    sheet = contact_sheet(os.fsdecode(name), [neighbor])
    assert (picture_of(sheet, 0) == picture_of(sheet, 1)).all()
    assert (picture_of(sheet, 1)[0, 0] != GRAY).any()


def test_what_is_wrong_is_named(encoded, source, tmp_path):
    model, folder = encoded
    bits, query = model.config.bits, source.images.name(0)
    codes, _ = read_codes(folder)
    with pytest.raises(
        ValueError, match=f"weights: expected codes of {bits} bits as in {folder}, got tiny with 33"
    ):
        nearest(create_model(33), folder, [query])
    with pytest.raises(ValueError, match=r"weights: expected those of .*, tiny \(\w+\), got tiny \(\w+\)"):
        nearest(create_model(bits, seed=1), folder, [query])
    with pytest.raises(ValueError, match="weights: expected .* with their head, got tiny without one"):
        nearest(replace(model, head=None), folder, [query])
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        nearest(model, folder, [query], 0)
    with pytest.raises(ValueError, match="query: gone.png cannot be used: No such file"):
        nearest(model, folder, [query, "gone.png"])
    for function in (lambda: nearest(model, tmp_path, [query]), lambda: build_index(tmp_path)):
        with pytest.raises(
            ValueError, match=f"folder: expected one that .* got {tmp_path}, which holds no part"
        ):
            function()
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    for function in (lambda: search(tmp_path, codes[:1], 1), lambda: build_index(tmp_path)):
        with pytest.raises(ValueError, match="folder: .*part-00000.parquet cannot be read"):
            function()
    for wrong in (codes[:, 1:], codes.astype(np.int32), codes[0], to_messages(codes), [1]):
        with pytest.raises(ValueError, match=rf"codes: expected uint8 \(queries, {codes.shape[1]}\).*got"):
            search(folder, wrong, 1)
    for k in (0, len(codes) + 1):
        with pytest.raises(
            ValueError, match=f"k: expected from 1 to the number of codes in .*, {len(codes)}, got {k}"
        ):
            search(folder, codes, k)
    if bits % 8:
        with pytest.raises(ValueError, match="codes: expected 20 bits .* beyond"):
            search(folder, ~codes, 1)


def test_only_images_below_the_root_are_read(tmp_path, monkeypatch):
    """Codes may name any file: by its path, by a link, by .., and as a member of a shard."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "inside", outside):
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 9), "red").save(folder / "a.png")
        with tarfile.open(folder / "x.tar", "w") as tar:
            tar.add(folder / "a.png", "a.png")
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "linked").symlink_to(outside)
    (root / "linked.tar").symlink_to(outside / "x.tar")
    (tmp_path / "rootless.png").write_bytes((outside / "a.png").read_bytes())
    shown = [root / "inside/a.png", root / "inside/x.tar/a.png", root / "inside/../inside/a.png"]
    hidden = [outside / "a.png", root / "link.png", root / "linked/a.png", root / "../outside/a.png"]
    hidden += [outside / "x.tar/a.png", root / "linked.tar/a.png", tmp_path / "rootless.png"]
    hidden += [root / "linked/x.tar/a.png", f"{outside}/x.tar/../../root/inside/none.png"]
    neighbors = [Neighbor(str(path), None, 1) for path in (*shown, *hidden)]
    read, real = [], os.open

    def noting(path, *rest, **options):
        read.append(str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", noting)
    sheet = contact_sheet(outside / "a.png", neighbors, [root])
    red = [(picture_of(sheet, number + 1)[64, 64] == (255, 0, 0)).all() for number in range(len(neighbors))]
    assert red == [True] * len(shown) + [False] * len(hidden)
    assert read.count(str(outside / "a.png")) == 1  # as the query, which the user names
    assert not [path for path in read if path.startswith(str(outside / "x.tar"))]
    everything = contact_sheet(outside / "a.png", neighbors)
    assert (picture_of(everything, len(shown) + 1)[64, 64] == (255, 0, 0)).all()

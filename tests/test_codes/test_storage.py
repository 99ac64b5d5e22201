from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bincomm import pack_signs
from bincomm.codes import storage
from bincomm.codes.storage import open_parts, read_codes, read_rows, to_codes, to_messages, write_part


def test_a_part_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="folder: expected one that `bincomm encode` wrote, got .*no part"):
        read_codes(tmp_path)
    path = tmp_path / "part-00000.parquet"
    codes = np.random.default_rng(0).integers(0, 256, (25, 3), dtype=np.uint8)
    write_part(path, [f"{number}.png" for number in range(25)], ["7"] * 25, codes, {"bits": 24})
    data, column = path.read_bytes(), pq.read_metadata(path).row_group(0).column(2)
    assert column.path_in_schema == "code"
    damaged = bytearray(data)
    damaged[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    for wrong in (data[:-100], b"", b"no Parquet", bytes(damaged)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"folder: {path} cannot be read.*makes it again"):
            read_codes(tmp_path)
    for table in (pa.table({"code": ["a"]}), pa.table({"a": [1]}).replace_schema_metadata({"bincomm": "{}"})):
        pq.write_table(table, path)
        with pytest.raises(ValueError, match=f"folder: {path} cannot be read: no column `code`"):
            open_parts(tmp_path)


@pytest.mark.slow
def test_no_damage_gives_other_codes_paths_or_labels(tmp_path, monkeypatch):
    """Parquet's own checksums are of the pages' contents: how long one is and how it is encoded has none."""
    monkeypatch.setattr(storage, "ROW_GROUP", 16)
    path = tmp_path / "part-00000.parquet"
    codes = np.random.default_rng(0).integers(0, 256, (40, 3), dtype=np.uint8)
    names = [f"/images/{number}.png" for number in range(40)]
    labels = [None if number % 5 == 0 else f"class {number % 3}" for number in range(40)]
    write_part(path, names, labels, codes, {"bits": 24}, unusable=[("a.png", "broken")])

    def read():
        parts = open_parts(tmp_path)
        about = parts[0].metadata, parts[0].unusable
        return read_codes(tmp_path)[0].tobytes(), read_rows(parts, range(40)), about

    whole, content = path.read_bytes(), read()
    assert content[1] == list(zip(names, labels, strict=True))
    damaged = [
        whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :] for byte in range(len(whole))
    ]
    damaged += [whole[:at] + whole[at + 40 :] for at in range(0, len(whole), 41)]
    refused = []
    for data in damaged:
        path.write_bytes(data)
        try:
            assert read() == content
        except ValueError as error:
            refused.append(str(error))
    assert all(str(path) in text for text in refused)
    assert len(refused) > len(damaged) // 2  # the others are in what nobody reads, such as the statistics


def test_a_part_without_checksums_can_be_read(tmp_path, monkeypatch):
    """Those of earlier versions."""
    path = tmp_path / "part-00000.parquet"
    codes = np.arange(30, dtype=np.uint8).reshape(10, 3)
    write_part(path, list("abcdefghij"), [None] * 10, codes, {"bits": 24})
    table = pq.read_table(path)
    about = {key: value for key, value in table.schema.metadata.items() if key != storage.CHECKSUMS_KEY}
    pq.write_table(table.replace_schema_metadata(about), path)
    assert (read_codes(tmp_path)[0] == codes).all()
    assert read_rows(open_parts(tmp_path), [3]) == [("d", None)]


def test_rows_are_found_in_their_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ROW_GROUP", 7)
    codes = np.arange(240, dtype=np.uint8).reshape(80, 3)
    names = [f"/images/{number}.jpg" for number in range(80)]
    labels = [None if number % 3 else f"class {number}" for number in range(80)]
    ends = (0, 10, 10, 45, 80)
    for part, (first, last) in enumerate(pairwise(ends)):
        path = tmp_path / f"part-{part:05}.parquet"
        write_part(path, names[first:last], labels[first:last], codes[first:last], {"bits": 22})
    rows = [79, 0, 9, 10, 44, 45, 6, 7, 0, 33]
    assert read_rows(open_parts(tmp_path), rows) == [(names[row], labels[row]) for row in rows]
    assert read_rows(open_parts(tmp_path), np.array([], np.int64)) == []
    assert (read_codes(tmp_path)[0] == codes).all()
    assert [len(batch) for batch in storage.iterate_codes(open_parts(tmp_path))] == [10, 35, 35]
    with pytest.raises(ValueError, match="rows: expected from 0 to 79, got 3 to 80"):
        read_rows(open_parts(tmp_path), [80, 3])
    # In the order of their numbers, even where these have more than five digits.
    for number in (100000, 99999):
        write_part(tmp_path / f"part-{number:05}.parquet", ["x"], [None], codes[:1], {"bits": 22})
    assert [part.path.stem for part in open_parts(tmp_path)[-2:]] == ["part-99999", "part-100000"]


def test_random_codes_take_little_more_than_their_bits(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (20000, 32), dtype=np.uint8)
    names = [f"/images/n{number // 1300:08}/n{number // 1300:08}_{number}.JPEG" for number in range(20000)]
    path = tmp_path / "part-00000.parquet"
    write_part(path, names, [name.split("/")[2] for name in names], codes, {"bits": 256})
    assert path.stat().st_size < 40 * 20000
    assert (read_codes(tmp_path)[0] == codes).all()


@pytest.mark.parametrize("bits", [1, 8, 20, 32, 33, 256])
def test_codes_and_messages(bits):
    logits = torch.randn(13, bits)
    messages = pack_signs(logits)
    codes = to_codes(messages, bits)
    assert (codes == np.packbits((logits > 0).numpy(), axis=1, bitorder="little")).all()
    assert torch.equal(to_messages(codes), messages)
    codes.flags.writeable = False
    assert torch.equal(to_messages(codes), messages)
    assert torch.equal(to_messages(codes[::2]), messages[::2])
    assert (to_codes(messages.t().contiguous().t()[::3], bits) == codes[::3]).all()
    assert to_messages(codes[:0]).shape == messages[:0].shape

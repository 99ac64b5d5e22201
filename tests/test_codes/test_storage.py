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

import pytest
import torch
from torch.library import opcheck

import bincomm
from bincomm.ops import hamming, reference

SHAPES = [  # messages, others, words
    (5, 7, 1),
    (1, 1000, 3),
    (33, 700, 8),
    (70, 513, 9),
    (3, 40, 32),
    (0, 5, 2),
    (5, 0, 2),
    (2, 50, 1),
    (3, 600, 9),
]


def messages(count, words, values=2**31):
    return torch.randint(-values, values, (count, words), dtype=torch.int32)


@pytest.fixture(params=["native", "in blocks"])
def topk(request, monkeypatch):
    """The CPU's kernel, and the search of devices without one, in blocks so small that there are several."""
    if request.param == "native":
        return bincomm.hamming_topk
    monkeypatch.setattr(hamming, "DISTANCES_PER_BLOCK", 1 << 14)
    return hamming.topk_in_blocks


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("n", "m", "words"), SHAPES)
def test_distances_of_all_pairs(n, m, words):
    a, b = messages(n, words), messages(m, words)
    distances = bincomm.hamming_distance(a, b)
    assert distances.dtype == torch.int32
    assert torch.equal(distances, reference.hamming_distance(a, b))
    for i in range(min(n, 3)):
        for j in range(min(m, 3)):
            pairs = zip(a[i].tolist(), b[j].tolist(), strict=True)
            assert distances[i, j] == sum(((x ^ y) & 0xFFFFFFFF).bit_count() for x, y in pairs)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("n", "m", "words"), SHAPES)
def test_nearest_against_brute_force(topk, n, m, words):
    for values in (2**31, 2):  # the second has so few different messages that most distances are ties
        queries, database = messages(n, words, values), messages(m, words, values)
        pairs = reference.hamming_distance(queries, database).tolist()
        for k in {0, min(1, m), min(20, m), m}:
            distances, indices = topk(queries, database, k)
            expected = [sorted((d, j) for j, d in enumerate(row))[:k] for row in pairs]
            assert distances.shape == indices.shape == (n, k)
            assert [
                list(zip(*row, strict=True)) for row in zip(distances.tolist(), indices.tolist(), strict=True)
            ] == expected


def test_the_reference_orders_ties_by_index():
    database = torch.zeros(9, 1, dtype=torch.int32)
    database[4] = 1
    distances, indices = reference.hamming_topk(database[:1], database, 9)
    assert indices.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8, 4]]
    assert distances.tolist() == [[0] * 8 + [1]]


def test_distances_are_those_of_the_signs():
    logits, others = torch.randn(6, 250), torch.randn(9, 250)
    distances = bincomm.hamming_distance(bincomm.pack_signs(logits), bincomm.pack_signs(others))
    expected = ((logits > 0)[:, None] != (others > 0)[None]).sum(-1)
    assert torch.equal(distances, expected.to(torch.int32))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 2, 200])
def test_the_same_for_any_number_of_threads(queries, threads):
    """For one query the database is cut into slices; many queries are themselves distributed."""
    rows, database = messages(queries, 2, 8), messages(5000, 2, 8)
    expected = reference.hamming_topk(rows, database, 50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result = bincomm.hamming_topk(rows, database, 50)
    torch.set_num_threads(before)
    assert all(map(torch.equal, result, expected))


def test_strides_change_nothing():
    a, b = messages(12, 6), messages(6, 40)
    expected = bincomm.hamming_distance(a[::2].contiguous(), b.mT.contiguous())
    assert torch.equal(bincomm.hamming_distance(a[::2], b.mT), expected)
    assert torch.equal(bincomm.hamming_topk(a[::2], b.mT, 3)[0], expected.sort().values[:, :3])


def test_opcheck_and_compile():
    a, b = messages(4, 3), messages(9, 3)
    opcheck(torch.ops.bincomm.hamming_distance, (a, b))
    opcheck(torch.ops.bincomm.hamming_topk, (a, b, 4))
    compiled = torch.compile(lambda a, b: bincomm.hamming_topk(a, b, 4), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(a, b), bincomm.hamming_topk(a, b, 4)))


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        ([1], messages(3, 2), TypeError, "a: expected int32 messages, got list"),
        (messages(3, 2).long(), messages(3, 2), TypeError, "a: .*int64"),
        (messages(3, 2), messages(3, 2).bool(), TypeError, "b: .*bool"),
        (messages(3, 2)[0], messages(3, 2), ValueError, r"a: expected shape .*\(2,\)"),
        (messages(3, 0), messages(3, 0), ValueError, r"a: expected shape .*\(3, 0\)"),
        (messages(3, 2), messages(3, 4), ValueError, "b: expected 2 words like a, got 4"),
        (messages(3, 2), messages(3, 2).to("meta"), ValueError, "b: expected on cpu like a, got meta"),
    ],
)
def test_wrong_arguments_are_named(a, b, error, words):
    with pytest.raises(error, match=words):
        bincomm.hamming_distance(a, b)
    with pytest.raises(
        error, match=words.replace("a: ", "queries: ").replace("b: ", "database: ").split(" like")[0]
    ):
        bincomm.hamming_topk(a, b, 1)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_k_that_does_not_fit_is_named(k):
    with pytest.raises(ValueError, match=f"k: expected from 0 to the database's size, 3, got {k}"):
        bincomm.hamming_topk(messages(2, 1), messages(3, 1), k)

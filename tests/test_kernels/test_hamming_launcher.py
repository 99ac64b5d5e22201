"""The launcher under Triton's interpreter; on a GPU, tests/test_gpu runs it through the operations."""

import pytest
import torch

from bincomm.kernels import hamming, sign_bce
from bincomm.ops import reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        not sign_bce.INTERPRETED.value, reason="needs Triton's interpreter (TRITON_INTERPRET=1)"
    ),
]


@pytest.mark.parametrize(("n", "m", "words"), [(1, 1, 1), (33, 70, 2), (64, 32, 3), (5, 40, 32), (0, 3, 1)])
def test_distances_of_all_pairs(n, m, words):
    a, b = (torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int32) for rows in (n, m))
    assert torch.equal(hamming.launch_hamming_distance(a, b), reference.hamming_distance(a, b))


def test_strides():
    a, b = (torch.randint(-(2**31), 2**31, (3, 80), dtype=torch.int32) for _ in range(2))
    distances = hamming.launch_hamming_distance(a.mT[::2], b.mT)
    assert torch.equal(distances, reference.hamming_distance(a.mT[::2], b.mT))


@pytest.mark.parametrize("values", [2**31, 2], ids=["all different", "ties"])
@pytest.mark.parametrize(
    ("n", "m", "words"),
    [(1, 1, 1), (2, 300, 3), (1, 700, 1), (5, 40, 2), (0, 3, 1), (1, 30, 63)],
)
def test_nearest(n, m, words, values, monkeypatch):
    """Several steps a segment, several segments a query, several parts of the queries."""
    monkeypatch.setattr(hamming, "SELECT_COLUMNS", 64)
    monkeypatch.setattr(hamming, "SELECT_PROGRAMS", 4)
    monkeypatch.setattr(hamming, "DISTANCES", 2 * m)
    queries, database = (torch.randint(-values, values, (rows, words), dtype=torch.int32) for rows in (n, m))
    for k in sorted({0, 1, min(20, m), m}):
        distances, indices = hamming.launch_hamming_topk(queries, database, k)
        expected = reference.hamming_topk(queries, database, k)
        assert torch.equal(distances, expected[0])
        assert torch.equal(indices, expected[1])
        assert (distances.dtype, indices.dtype) == (torch.int32, torch.int64)

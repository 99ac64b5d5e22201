"""hamming_topk beside faiss's exhaustive binary index, and beside a matrix of all distances."""

import pytest
import torch

import bincomm

K = 20
SHAPES = [(10_000, 100_000, 256), (1, 1_000_000, 256), (10_000, 100_000, 64)]  # queries, database, bits


def search_of(contender, queries, database):
    """A function that searches, and returns distances."""
    if contender == "bincomm":
        return lambda: bincomm.hamming_topk(queries, database, K)[0]
    faiss = pytest.importorskip("faiss", reason="the peer is faiss-cpu")
    faiss.omp_set_num_threads(torch.get_num_threads())
    bits = 32 * database.shape[1]
    index = faiss.IndexBinaryFlat(bits)
    index.add(database.numpy().view("uint8"))
    as_bytes = queries.numpy().view("uint8")
    return lambda: torch.from_numpy(index.search(as_bytes, K)[0])


@pytest.mark.parametrize("contender", ["bincomm", "faiss.IndexBinaryFlat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hamming_topk(measure_plain, device, shape, contender):
    if device.type == "cuda" and contender != "bincomm":
        pytest.skip("faiss-cpu does not search on a GPU")
    queries, database, bits = shape
    generator = torch.Generator().manual_seed(0)
    query_rows, database_rows = (
        torch.randint(-(2**31), 2**31, (rows, bits // 32), generator=generator, dtype=torch.int32).to(device)
        for rows in (queries, database)
    )
    search = search_of(contender, query_rows, database_rows)
    expected = bincomm.hamming_distance(query_rows[:20], database_rows).sort(stable=True).values[:, :K]
    assert torch.equal(search()[:20].to(expected), expected)
    labels = {"table": f"hamming_topk, k = {K}", "shape": shape, "dtype": "int32", "contender": contender}
    measure_plain(search, {**labels, "direction": "search", "elements": queries * database}, rounds=5)

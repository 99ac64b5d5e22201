"""Each operation by its definition, in plain differentiable PyTorch.

This is the specification: the tests compare every kernel with these functions in fp64, and the benchmarks
use them as baselines. They run on any device and in the dtype of their input, half types in fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # smallest norm a row of logits is divided by, as in torch.nn.functional.normalize


def widen(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Rows `a/‖a‖`, of any finite size; those shorter than `NORM_EPS` are divided by it."""
    a = widen(x)
    exponent = math.log2(torch.finfo(a.dtype).max)  # 128 for fp32
    # Large rows are made smaller first, by a power of two, else their squares overflow (from 2⁶⁴ on in fp32).
    values = a.detach()
    largest = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))
    is_large = largest > 2 ** (exponent * 3 / 8)
    scale = torch.ones_like(largest).masked_fill(is_large, 2 ** (-exponent * 5 / 8))
    return F.normalize(a * scale, dim=-1, eps=NORM_EPS)


def pack_signs(logits: Tensor) -> Tensor:
    """`m = 1[a > 0]` (..., K), 32 bits a word: (..., ⌈K/32⌉) int32, bit `j` of word `w` is bit `32w+j`."""
    bits = F.pad((logits > 0).to(torch.int64), (0, -logits.shape[-1] % 32))
    weights = torch.ones((), dtype=torch.int64, device=logits.device) << torch.arange(
        32, device=logits.device
    )
    words = (bits.unflatten(-1, (bits.shape[-1] // 32, 32)) * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_signs(messages: Tensor, bits: int) -> Tensor:
    """The inverse: (..., ⌈K/32⌉) int32 -> (..., K) bool."""
    shifts = torch.arange(32, device=messages.device, dtype=torch.int32)
    return ((messages.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :bits].to(torch.bool)


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of all pairs: (N, words) and (M, words) int32 -> (N, M) int32."""
    x, y = (unpack_signs(m, 32 * m.shape[-1]).double() for m in (a, b))
    return (x.sum(-1, keepdim=True) + y.sum(-1) - 2 * (x @ y.mT)).to(torch.int32)


def hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest by (distance, index): (Q, k) int32 distances and (Q, k) int64 indices."""
    distances, indices = hamming_distance(queries, database).sort(dim=-1, stable=True)
    return distances[:, :k], indices[:, :k]


def paired_views(views: int, teachers: int, pairs: str) -> list[tuple[int, int]]:
    """The pairs (teacher view, student view); `cross` leaves out u = v, `matched` u ≠ v."""
    candidates = [(u, v) for u in range(teachers) for v in range(views)]
    is_paired = {"cross": lambda u, v: u != v, "all": lambda u, v: True, "matched": lambda u, v: u == v}[
        pairs
    ]
    return [pair for pair in candidates if is_paired(*pair)]


def sign_bce(student: Tensor, teacher: Tensor, pairs: str = "cross") -> Tensor:
    """Mean over pairs, images and bits of `-log σ((2m-1)·a)`: BCE of student logits against teacher signs.

    Written with logσ rather than softplus(a) - m·a, so that infinite logits give 0 or inf, as they should.
    """
    a = widen(student).unbind()  # indexing would cost a gradient of all views for each pair
    if teacher.dtype == torch.int32:
        m = unpack_signs(teacher, student.shape[-1])
        unknown = torch.zeros_like(m)
    else:
        m, unknown = teacher > 0, teacher.isnan()
    terms = [
        F.logsigmoid(torch.where(m[u], a[v], -a[v])).masked_fill(unknown[u], torch.nan)
        for u, v in paired_views(len(student), len(teacher), pairs)
    ]
    return -torch.stack(terms).mean()


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the ranks of a process group, by its name; every rank's loss may depend on it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
        )

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.apply(grad, ctx.group), None


def regularized_gram(
    logits: Tensor,
    eps_squared: float = 0.05,
    group: "torch.distributed.ProcessGroup | None" = None,
    of_images: bool = False,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """`I + α zᵀz` with `z = a/‖a‖` row by row and `α = K/(N·ε²)`, and N: sums over the ranks of a group.

    `of_images` gives `I + α zzᵀ`, which has the same determinant; without `normalize`, z is a itself.
    """
    n, bits = logits.shape[-2:]
    with torch.autocast(logits.device.type, enabled=False):
        z = unit_rows(logits) if normalize else widen(logits)
        gram = z @ z.mT if of_images else z.mT @ z
        images = torch.full((), n, dtype=gram.dtype, device=gram.device)
        if group is not None:
            gram, images = (SumOverRanks.apply(x, group.group_name) for x in (gram, images))
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return identity + bits / (images * eps_squared) * gram, images


def coding_rate(
    logits: Tensor, eps_squared: float = 0.05, group: "torch.distributed.ProcessGroup | None" = None
) -> Tensor:
    """`½ logdet(I + α zᵀz)`: (..., n, K) -> (...,), nats."""
    return half_logdet(regularized_gram(logits, eps_squared, group)[0])


def half_logdet(matrix: Tensor) -> Tensor:
    """`½ log det` of a symmetric positive definite matrix: the log of its Cholesky factor's determinant.

    Not by `torch.logdet`, which factors by LU: some builds of MKL get that wrong for batches once the number
    of threads has been set.
    """
    return torch.linalg.cholesky_ex(matrix)[0].diagonal(dim1=-2, dim2=-1).log().sum(-1)

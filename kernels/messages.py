"""Packing of signs into messages on the GPU, and back, in groups of eight bits (one byte)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 128  # per program, one per thread: eight 16-bit logits are one 128-bit load
WARPS = 4


def launch_pack_signs(logits: Tensor) -> Tensor:
    """`1[a > 0]` of logits (..., K) fp32, fp16 or bf16, any strides -> (..., ⌈K/32⌉) int32."""
    bits = logits.shape[-1]
    words = triton.cdiv(bits, 32)
    messages = torch.empty((*logits.shape[:-1], words), dtype=torch.int32, device=logits.device)
    rows = logits.reshape(-1, bits) if bits else logits
    if messages.numel():
        with torch.cuda.device_of(logits):
            pack_signs_kernel[(_number_of_programs(messages),)](
                rows,
                messages.view(torch.uint8),
                len(rows),
                *rows.stride(),
                K=bits,
                BLOCK=GROUPS,
                num_warps=WARPS,
            )
    return messages


def launch_unpack_signs(messages: Tensor, bits: int) -> Tensor:
    """Messages (..., ⌈K/32⌉) int32 -> (..., K) bool."""
    signs = torch.empty((*messages.shape[:-1], bits), dtype=torch.bool, device=messages.device)
    if signs.numel():
        words = messages.contiguous()
        with torch.cuda.device_of(messages):
            unpack_signs_kernel[(_number_of_programs(words),)](
                words.view(torch.uint8),
                signs.view(torch.uint8),
                words.numel() // words.shape[-1],
                K=bits,
                BLOCK=GROUPS,
                num_warps=WARPS,
            )
    return signs


def _number_of_programs(messages: Tensor) -> int:
    groups = 4 * messages.numel()
    if groups >= 2**31:
        raise ValueError(f"messages: {messages.numel()} words exceed the limit of 2²⁹ words per call")
    return triton.cdiv(groups, GROUPS)


@triton.jit
def pack_signs_kernel(
    logits_ptr, messages_ptr, n, stride_row, stride_bit, K: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK bytes of the messages of n rows of K logits."""
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = (group // BYTES).to(tl.int64)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    group_mask = group < n * BYTES
    mask = group_mask & (bit < K) if K % 32 else group_mask & (bit >= 0)
    a = tl.load(logits_ptr + row * stride_row + bit.to(tl.int64) * stride_bit, mask=mask, other=0).to(
        tl.float32
    )
    byte = tl.sum((a > 0).to(tl.int32) << tl.arange(0, 8)[None, :], 1, keep_dims=True)
    tl.store(messages_ptr + group, byte.to(tl.uint8), mask=group_mask)


@triton.jit
def unpack_signs_kernel(messages_ptr, signs_ptr, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """The signs (n, K) that BLOCK bytes of the messages hold, as bytes 0 and 1."""
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = (group // BYTES).to(tl.int64)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    group_mask = group < n * BYTES
    mask = group_mask & (bit < K) if K % 32 else group_mask & (bit >= 0)
    byte = tl.load(messages_ptr + group, mask=group_mask, other=0).to(tl.int32)
    tl.store(signs_ptr + row * K + bit, ((byte >> tl.arange(0, 8)[None, :]) & 1).to(tl.uint8), mask=mask)

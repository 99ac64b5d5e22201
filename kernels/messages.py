"""Packing of signs into messages on the GPU, and back; a group of eight bits, so a byte, at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 128  # of eight bits a program, one a thread: eight 16-bit logits are one 128-bit load
WARPS = 4


def pack_signs(logits: Tensor) -> Tensor:
    """`1[a > 0]` of logits (..., K) fp32, fp16 or bf16, any strides -> (..., ⌈K/32⌉) int32."""
    bits = logits.shape[-1]
    words = triton.cdiv(bits, 32)
    messages = torch.empty((*logits.shape[:-1], words), dtype=torch.int32, device=logits.device)
    rows = logits.reshape(-1, bits) if bits else logits
    if messages.numel():
        with torch.cuda.device_of(logits):
            _pack[(_programs(messages),)](
                rows,
                messages.view(torch.uint8),
                len(rows),
                *rows.stride(),
                K=bits,
                BLOCK=GROUPS,
                num_warps=WARPS,
            )
    return messages


def unpack_signs(messages: Tensor, bits: int) -> Tensor:
    """Messages (..., ⌈K/32⌉) int32 -> (..., K) bool."""
    signs = torch.empty((*messages.shape[:-1], bits), dtype=torch.bool, device=messages.device)
    if signs.numel():
        words = messages.contiguous()
        with torch.cuda.device_of(messages):
            _unpack[(_programs(words),)](
                words.view(torch.uint8),
                signs.view(torch.uint8),
                words.numel() // words.shape[-1],
                K=bits,
                BLOCK=GROUPS,
                num_warps=WARPS,
            )
    return signs


def _programs(messages: Tensor) -> int:
    groups = 4 * messages.numel()
    if groups >= 2**31:
        raise ValueError(f"messages: {messages.numel()} words exceed the 2²⁹ of one call")
    return triton.cdiv(groups, GROUPS)


@triton.jit
def _pack(logits, messages, n, row_stride, bit_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = (group // BYTES).to(tl.int64)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    inside = group < n * BYTES
    mask = inside & (bit < K) if K % 32 else inside & (bit >= 0)
    a = tl.load(logits + row * row_stride + bit.to(tl.int64) * bit_stride, mask=mask, other=0).to(tl.float32)
    byte = tl.sum((a > 0).to(tl.int32) << tl.arange(0, 8)[None, :], 1, keep_dims=True)
    tl.store(messages + group, byte.to(tl.uint8), mask=inside)


@triton.jit
def _unpack(messages, signs, n, K: tl.constexpr, BLOCK: tl.constexpr):
    BYTES: tl.constexpr = 4 * ((K + 31) // 32)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = (group // BYTES).to(tl.int64)
    bit = (group % BYTES) * 8 + tl.arange(0, 8)[None, :]
    inside = group < n * BYTES
    mask = inside & (bit < K) if K % 32 else inside & (bit >= 0)
    byte = tl.load(messages + group, mask=inside, other=0).to(tl.int32)
    tl.store(signs + row * K + bit, ((byte >> tl.arange(0, 8)[None, :]) & 1).to(tl.uint8), mask=mask)

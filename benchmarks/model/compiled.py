"""The kernels compiled for a GPU that is not there, and what their machine code costs.

python -m benchmarks.model.compiled CAPABILITY prints the costs of the Triton kernels as JSON. It runs in a
process of its own, without TRITON_INTERPRET, because the interpreter cannot be switched off again.
"""

import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource

from benchmarks.model import sass
from bincomm.kernels import (  # type: ignore[attr-defined]
    discrete_communication,
    hamming,
    messages,
    sign_bce,
)
from bincomm.ops.discrete_communication import CONSTANTS

TOOLS = Path(nvidia).parent / "bin"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADER_FIELDS = ("<Q", 40), ("<H", 60), ("<H", 62)  # of ELF: section table, number of sections, their names
VIEWS, TEACHERS = 12, 2
SHARED = VIEWS - TEACHERS  # views that are paired with all teachers
# How often the loops run, by kernel, in the order of their ends: forward over views, around it over logs.
TRIPS = {
    "forward": {0: SHARED // sign_bce.VIEWS_IN_FLIGHT.value, 1: 1},
    "backward": {0: SHARED // 2},
}


def kernels(bits=256):
    """(name, kernel, pointers, numbers, compile-time values) as the launchers pass them."""
    strides = dict.fromkeys(("stride_student_view", "stride_student_image"), "i32")
    for dtype in TYPES:
        block = sign_bce.groups_per_program(TYPES[dtype])
        for mode in ("cross", "matched"):
            rest = SHARED % sign_bce.VIEWS_IN_FLIGHT.value if mode == "cross" else 0
            shared = {
                "K": bits,
                "U": TEACHERS,
                "MODE": sign_bce.MODES[mode],
                "BLOCK": block,
                "stride_student_bit": 1,
            }
            for packed in (False, True):
                yield (
                    f"forward {dtype} {mode}{' packed' if packed else ''}",
                    sign_bce.sign_bce_forward_kernel,
                    {
                        "student_ptr": f"*{dtype}",
                        "teacher_ptr": "*u8" if packed else f"*{dtype}",
                        "messages_ptr": "*u8",
                        "partial_ptr": "*fp32",
                    },
                    {
                        "views": "i32",
                        "n": "i32",
                        **strides,
                        "stride_teacher_view": "i32",
                        "stride_teacher_image": "i32",
                    },
                    {**shared, "PACKED": packed, "REST": rest, "stride_teacher_bit": 1},
                )
            yield (
                f"backward {dtype} {mode}",
                sign_bce.sign_bce_backward_kernel,
                {
                    "student_ptr": f"*{dtype}",
                    "messages_ptr": "*u8",
                    "grad_ptr": "*fp32",
                    "gradient_ptr": f"*{dtype}",
                },
                {"views": "i32", "n": "i32", **strides, "inverse_terms": "fp32"},
                shared,
            )
        yield (
            f"pack {dtype}",
            messages.pack_signs_kernel,
            {"logits_ptr": f"*{dtype}", "messages_ptr": "*u8"},
            {"n": "i32", "stride_row": "i32"},
            {"K": bits, "BLOCK": messages.GROUPS, "stride_bit": 1},
        )
    yield (
        "unpack",
        messages.unpack_signs_kernel,
        {"messages_ptr": "*u8", "signs_ptr": "*u8"},
        {"n": "i32"},
        {"K": bits, "BLOCK": messages.GROUPS},
    )
    yield (
        "hamming",
        hamming.hamming_distance_kernel,
        {"a_ptr": "*i32", "b_ptr": "*i32", "distances_ptr": "*i32"},
        {"n": "i32", "m": "i32", "words": "i32", "stride_a_row": "i32", "stride_b_row": "i32"},
        {"stride_a_word": 1, "stride_b_word": 1, "ROWS": hamming.ROWS, "COLUMNS": hamming.COLUMNS},
    )
    yield (
        "select",
        hamming.hamming_select_kernel,
        {"distances_ptr": "*i16", "keys_ptr": "*i64"},
        {"size": "i32", "k": "i32", "length": "i32"},
        {"BINS": 512, "COLUMNS": hamming.SELECT_COLUMNS},
    )
    yield (
        "reduce",
        sign_bce.sign_bce_reduce_kernel,
        {"partial_ptr": "*fp32", "loss_ptr": "*fp32"},
        {"programs": "i32", "scale": "fp32", "n": "i32"},
        {"BLOCK": sign_bce.REDUCE_BLOCK, "num_warps": sign_bce.REDUCE_WARPS},
    )
    for dtype in ("fp32", "bf16"):
        yield (
            f"count {dtype}",
            discrete_communication.count_ones_kernel,
            {"logits_ptr": f"*{dtype}", "ones_ptr": "*fp32"},
            {"n": "i32", "rows": "i32", "stride_view": "i32", "stride_image": "i32"},
            {
                "stride_bit": 1,
                "K": bits,
                "ROWS": discrete_communication.ROWS,
                "COLUMNS": discrete_communication.COLUMNS,
            },
        )
    numbers = ("scale", "bias", "beta", "balance", "least", "span")
    yield (
        "weigh",
        discrete_communication.weigh_rate_kernel,
        dict.fromkeys(
            ("partial_ptr", "rates_ptr", "ones_ptr", "state_ptr", "loss_ptr", "scalars_ptr"), "*fp32"
        ),
        dict.fromkeys(("programs", "teachers", "parts", "messages"), "i32") | dict.fromkeys(numbers, "fp32"),
        {
            **{"K": bits, "U": TEACHERS, "CONTROLLED": True, **CONSTANTS},
            "BLOCK": sign_bce.REDUCE_BLOCK,
            "PARTS": discrete_communication.PARTS_AT_ONCE,
            "BITS": discrete_communication.BITS_AT_ONCE,
            "num_warps": discrete_communication.WEIGH_WARPS,
        },
    )


def compile_kernel(kernel, pointers, scalars, constants, capability):
    """The binary (cubin) of a kernel."""
    names = kernel.arg_names
    options = {"num_warps": constants.get("num_warps", 4)}
    signature = {name: {**pointers, **scalars}.get(name, "constexpr") for name in names}
    # What the launcher sees at run time: pointers and strides are multiples of 16. The plain numbers are not.
    strides = [name for name in scalars if name.endswith(("_view", "_image", "stride_row"))]
    aligned = [*pointers, *strides]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["cubin"]


def resource_usage(cubin, folder):
    """Registers of a thread, and bytes that are spilled."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [TOOLS / "cuobjdump", "-res-usage", file]
    usage = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    registers, local, stack = (
        int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "LOCAL", "STACK")
    )
    return {"registers": registers, "spilled": local + stack}


def machine_code(cubin):
    """The section .text of an ELF file with one kernel."""
    table, count, names = (struct.unpack_from(form, cubin, at)[0] for form, at in HEADER_FIELDS)
    sections = [struct.unpack_from("<I20xQQ24x", cubin, table + 64 * i) for i in range(count)]
    strings = sections[names][1]
    (code,) = (
        cubin[offset : offset + size]
        for name, offset, size in sections
        if cubin.startswith(b".text.", strings + name)
    )
    return code


def disassemble(codes, capability, folder):
    """The instructions of each of these machine codes.

    The disassembler takes much longer to start than to work: all codes go through it as one file.
    """
    file = folder / "code.bin"
    file.write_bytes(b"".join(codes))
    command = [TOOLS / "nvdisasm", "-b", f"SM{capability}", "-hex", file]
    instructions = sass.parse(subprocess.check_output(command, text=True))
    ends = list(itertools.accumulate(map(len, codes), initial=0))
    return [
        [instruction for instruction in instructions if first <= instruction.address < end]
        for first, end in itertools.pairwise(ends)
    ]


def longest_loop(instructions):
    """The longest innermost loop: what further views, of a 128-bit load each, cost."""
    loops = sass.loops(instructions)
    innermost = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    bodies = [[i for i in instructions if a <= i.address <= b] for a, b in innermost]
    return max(bodies, key=len, default=[])


def loads_in_flight(instructions):
    """How many 128-bit loads are issued before the first instruction that waits for one of them."""
    count = 0
    scoreboards: set[int | None] = set()
    for instruction in instructions:
        if scoreboards & set(instruction.waits):
            break
        if instruction.operation.startswith("LDG") and ".128" in instruction.operation:
            count += 1
            scoreboards.add(instruction.when_written)
    return count


def executed(name, instructions):
    """How many instructions a warp executes with VIEWS and TEACHERS; None for kernels without such views."""
    kernel, *rest = name.split()
    if "cross" not in rest:
        return None
    return sum(1 for _ in sass.path(instructions, TRIPS[kernel]))


def compile_all(capability, bits=256, only=lambda name: True):
    """{kernel: (registers and spilled bytes, instructions)}."""
    cubins = {
        name: compile_kernel(kernel, pointers, scalars, constants, capability)
        for name, kernel, pointers, scalars, constants in kernels(bits)
        if only(name)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usages = [resource_usage(cubin, folder) for cubin in cubins.values()]
        codes = disassemble(list(map(machine_code, cubins.values())), capability, folder)
    return {name: (usage, code) for name, usage, code in zip(cubins, usages, codes, strict=True)}


def costs(capability):
    """{kernel: registers, spilled bytes, machine instructions and those of its loop}."""
    return {
        name: {
            **usage,
            "instructions": [instruction.operation for instruction in code],
            "loop": [instruction.operation for instruction in longest_loop(code)],
            "loads_in_flight": loads_in_flight(longest_loop(code)),
            "executed": executed(name, code),
        }
        for name, (usage, code) in compile_all(capability).items()
    }


if __name__ == "__main__":
    print(json.dumps(costs(int(sys.argv[1]))))

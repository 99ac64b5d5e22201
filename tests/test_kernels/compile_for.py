"""Compile every Triton kernel for a GPU that is not there and print, as JSON, what its code costs.

Run by test_static.py in a process of its own, for the interpreter cannot be switched off again:
python compile_for.py 90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource

from bincomm.kernels import hamming, messages, sign_bce

TOOLS = Path(nvidia).parent / "bin"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INSTRUCTION = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"  # after its address and its predicate
K = 256


def kernels():
    """(name, kernel, pointers, numbers, compile-time values) as the launchers pass them, for K = 256."""
    strides = dict.fromkeys(("student_view", "student_image"), "i32")
    for dtype in TYPES:
        block = sign_bce._groups(TYPES[dtype])
        for mode in ("cross", "matched"):
            shared = {"K": K, "U": 2, "MODE": sign_bce.MODES[mode], "BLOCK": block, "student_bit": 1}
            for packed in (False, True):
                yield (
                    f"forward {dtype} {mode}{' packed' if packed else ''}",
                    sign_bce._forward,
                    {
                        "student": f"*{dtype}",
                        "teacher": "*u8" if packed else f"*{dtype}",
                        "messages": "*u8",
                        "partial": "*fp32",
                    },
                    {"views": "i32", "n": "i32", **strides, "teacher_view": "i32", "teacher_image": "i32"},
                    {**shared, "PACKED": packed, "teacher_bit": 1},
                )
            yield (
                f"backward {dtype} {mode}",
                sign_bce._backward,
                {"student": f"*{dtype}", "messages": "*u8", "grad": "*fp32", "gradient": f"*{dtype}"},
                {"views": "i32", "n": "i32", **strides, "inverse_terms": "fp32"},
                shared,
            )
        yield (
            f"pack {dtype}",
            messages._pack,
            {"logits": f"*{dtype}", "messages": "*u8"},
            {"n": "i32", "row_stride": "i32"},
            {"K": K, "BLOCK": messages.GROUPS, "bit_stride": 1},
        )
    yield (
        "unpack",
        messages._unpack,
        {"messages": "*u8", "signs": "*u8"},
        {"n": "i32"},
        {"K": K, "BLOCK": messages.GROUPS},
    )
    yield (
        "hamming",
        hamming._distance,
        {"a": "*i32", "b": "*i32", "distances": "*i32"},
        {"n": "i32", "m": "i32", "words": "i32", "a_row": "i32", "b_row": "i32"},
        {"a_word": 1, "b_word": 1, "ROWS": hamming.ROWS, "COLUMNS": hamming.COLUMNS},
    )
    finish = {"programs": "i32", "scale": "fp32", "n": "i32"}
    yield (
        "finish",
        sign_bce._finish,
        {"partial": "*fp32", "loss": "*fp32"},
        finish,
        {"BLOCK": sign_bce.FINISH, "num_warps": sign_bce.FINISH_WARPS},
    )


def cost(kernel, pointers, scalars, constants, capability):
    """Registers, spills and the machine instructions of a kernel."""
    names = kernel.arg_names
    options = {"num_warps": constants.get("num_warps", 4)}
    signature = {name: {**pointers, **scalars}.get(name, "constexpr") for name in names}
    # What the launcher sees at run time: pointers and strides are multiples of 16. The plain numbers are not.
    strides = [name for name in scalars if name.endswith(("_view", "_image", "_stride"))]
    aligned = [*pointers, *strides]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output(
            [TOOLS / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.STDOUT
        )
        sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spilled": int(re.search(r"LOCAL:(\d+)", usage).group(1))
        + int(re.search(r"STACK:(\d+)", usage).group(1)),
        "instructions": re.findall(INSTRUCTION, sass),
        "loop": longest_loop(sass),
    }


def longest_loop(sass):
    """Instructions of the longest innermost loop: what further views cost, of each a 128-bit load."""
    labels, body, loops = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(body)
        if found := re.search(INSTRUCTION, line):
            body.append(found.group(1))
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if found.group(1).startswith("BRA") and target and target.group(1) in labels:
                loops.append((labels[target.group(1)], len(body)))
    innermost = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    return max((body[a:b] for a, b in innermost), key=len)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps({name: cost(*rest, capability) for name, *rest in kernels()}))

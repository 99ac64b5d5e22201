"""What the CUDA kernels compile to, without a GPU: budgets that no change may exceed unnoticed."""

import importlib.util
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from triton.backends import nvidia

import bincomm

EXTENSION = bincomm.doctor()["extension"]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not EXTENSION.get("cuda"),
        reason=f"no CUDA code: {EXTENSION.get('missing') or EXTENSION.get('no_cuda_reason')}",
    ),
]

CUOBJDUMP = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
ARCHITECTURES = [
    a for a in (80, 90, 100, 120) if f"{a // 10}.{a % 10}" in EXTENSION.get("cuda_architectures", "")
]
KERNEL = r"7bincomm\d+(coding_rate_\w+?|clip_\w+?)_kernel"  # in a mangled name
# Registers of a thread, and how often the kernel is compiled: for cluster sizes and parts, or types, sides of
# G, what a block computes, and whether the gradient is added.
BUDGETS = {
    "coding_rate_sweep": (128, 4),  # 512 threads
    "coding_rate_panel": (168, 1),  # 128 threads, so three blocks per SM
    "coding_rate_update": (128, 1),  # 128 threads, so four blocks per SM
    "coding_rate_gram": (128, 12),  # 256 threads, so two blocks per SM, or 128, so four
    "coding_rate_direction": (128, 12),
    "coding_rate_reciprocal_norms": (40, 3),
    "coding_rate_gradient": (80, 6),  # 24 loads in flight; 256 threads, so three blocks per SM
    "clip_sums": (40, 1),
    "clip_scale": (40, 1),
}


def dump(*arguments):
    extension = importlib.util.find_spec("bincomm._C").origin
    process = subprocess.run([CUOBJDUMP, *arguments, extension], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_few_registers(architecture):
    usage = dump("-res-usage", "-arch", f"sm_{architecture}")
    compiled = defaultdict(int)
    for name, registers, stack, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
    ):
        kernel = re.search(KERNEL, name)
        if kernel:
            compiled[kernel.group(1)] += 1
            assert (int(stack), int(local)) == (0, 0), name  # of local memory, where spilled registers are
            assert int(registers) <= BUDGETS[kernel.group(1)][0], name
    assert compiled == {kernel: number for kernel, (_, number) in BUDGETS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a <= 100])  # older tools read no 120
def test_products_are_mostly_multiplications(architecture):
    """In the innermost loop of a product of tiles at least four of five instructions multiply and add."""
    lengths = defaultdict(list)
    for function in dump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]:
        kernel = re.search(KERNEL, function)
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;", function)
        index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        last = 0  # end of the last loop, which lies inside those that end later and begin before it
        for end, (_, instruction) in enumerate(lines):
            jump = re.match(r"BRA.* 0x([0-9a-f]+)$", instruction)
            start = index[int(jump.group(1), 16)] if jump else end
            if kernel and last <= start < end:
                body = [text for _, text in lines[start : end + 1]]
                if sum(text.startswith("FFMA") for text in body) == 256:  # a lane's share of 32 x 32 x 8
                    lengths[kernel.group(1)].append(len(body))
            if start < end:
                last = end
    assert set(lengths) == {
        f"coding_rate_{name}" for name in ("sweep", "panel", "update", "gram", "direction")
    }
    for kernel, counts in lengths.items():
        print(f"sm_{architecture} {kernel}: {min(counts)} to {max(counts)} instructions for 256 FFMA")
        assert max(counts) * 4 <= 256 * 5, (kernel, counts)

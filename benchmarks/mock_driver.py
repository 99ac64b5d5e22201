"""A CUDA driver for Triton that compiles what is launched, for a GPU that is not there, and launches nothing.

python -m benchmarks.mock_driver CAPABILITY launches every kernel as its launcher does and prints the name of
each specialization that was compiled.
"""

import argparse
import itertools
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = 227 << 10  # bytes of a block, of an H100


class MockDriver:
    """Takes the place of Triton's driver; `compiled` has the names of the kernels, in their order.

    Tensors may be on any device: nothing reads them.
    """

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: list[str] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        """The GPU that code is for."""
        return self.target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton asks of a device."""
        return {"max_shared_mem": SHARED_MEMORY}

    def load_binary(self, name: str, *_: Any) -> tuple[None, int, int, int, int]:
        """Module, function, registers, spills and the most threads of a binary."""
        self.compiled.append(name)
        return None, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a kernel: nothing."""
        return lambda *arguments, **options: None


def install(capability: int) -> MockDriver:
    """Use such a driver from now on, in this process."""
    driver = MockDriver(capability)
    triton.runtime.driver.set_active(driver)
    return driver


def launch_everything() -> None:
    """Launch all kernels, with every dtype, kind of pairs and alignment that they distinguish."""
    from bincomm.kernels import (  # type: ignore[attr-defined]
        discrete_communication,
        hamming,
        messages,
        sign_bce,
    )
    from bincomm.ops import discrete_communication as objective

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype, bits, pairs in itertools.product(dtypes, (256, 250), sign_bce.MODES):
        views, teachers = (2, 2) if pairs == "matched" else (12, 2)
        student, teacher = (torch.empty(v, 64, bits, dtype=dtype) for v in (views, teachers))
        _, packed = sign_bce.launch_sign_bce_forward(student, teacher, pairs)
        sign_bce.launch_sign_bce_forward(student, packed, pairs)
        sign_bce.launch_sign_bce_backward(torch.empty(()), student, packed, pairs)
        rows = messages.launch_pack_signs(teacher.flatten(0, 1))
        messages.launch_unpack_signs(rows, bits)
        if pairs == "cross":
            discrete_communication.launch_count_ones(student[:teachers])
            for state in (torch.empty(0), torch.empty(3)):
                partial, rates = torch.empty(64), torch.empty(teachers)
                objective._weigh_on_cuda(partial, rates, student, state, 0.1, 0.05, "", 1)
    codes = torch.empty(100, 8, dtype=torch.int32)
    hamming.launch_hamming_distance(codes, codes)
    for words in (1, 2, 4, 8, 16, 32, 63):
        wide = torch.empty(100, words, dtype=torch.int32)
        hamming.launch_hamming_topk(wide, wide, 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, help="of the GPU, such as 90")
    driver = install(parser.parse_args().capability)
    launch_everything()
    print("\n".join(driver.compiled))

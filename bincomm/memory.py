"""Errors of all kinds that mean that memory is used up."""

import errno
import resource

# As PyTorch's allocators, CUDA, libraries in C++, Python's threads and the loader of libraries put it, in
# lower case. The last are DALI's where an image could not be decoded and no image is to blame.
WORDS = (
    "allocate memory", "out of memory", "enough memory", "bad_alloc", "bad alloc", "start new thread",
    "failed to map segment", "pipeline object is no longer valid",
)  # fmt: skip

NEEDED = 4 << 30  # bytes of address space to import PyTorch and DALI; with less, PyTorch aborts


def check_limit() -> None:
    """Raise MemoryError where the address space of this process is limited to less than imports need."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < NEEDED:
        raise MemoryError(
            f"ulimit -v allows {limit / 2**30:.1f} GB of address space, imports alone take {NEEDED >> 30}"
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory is used up, or came of one that does."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        text = str(error).lower()
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        # Others may quote the name of a file.
        if isinstance(error, RuntimeError | ImportError) and any(words in text for words in WORDS):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False

"""Errors of all kinds that mean that memory is used up."""

import errno

# As PyTorch's allocators, CUDA, libraries in C++, Python's threads and the loader of libraries put it, in
# lower case. The last are DALI's where an image could not be decoded and no image is to blame.
WORDS = ("allocate memory", "out of memory", "enough memory", "bad_alloc", "bad alloc", "start new thread")
WORDS += ("failed to map segment", "pipeline object is no longer valid")


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

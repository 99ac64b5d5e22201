"""Errors of all kinds that mean that memory is used up."""

import errno

# As PyTorch's allocators, CUDA, DALI, C++ and the threads of Python put it, in lower case.
WORDS = ("allocate memory", "out of memory", "enough memory", "bad_alloc", "bad alloc", "start new thread")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory is used up, or came of one that does."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        text = str(error).lower()
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        # Not a ValueError, which may quote a name: those libraries raise others.
        if not isinstance(error, ValueError) and any(words in text for words in WORDS):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False

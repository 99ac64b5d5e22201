"""Runs that leave out report.html and curves.png, which take as long as all else that a tiny run does.

That holds in a process that has imported this module, and in those forked from it. Tests of what is
left out begin their runs in `with pages():`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import bincomm.pretraining

_COMPLETE = {name: getattr(bincomm.pretraining, name) for name in ("plot_curves", "report_run")}


def leave_out_pages() -> None:
    for name in _COMPLETE:
        setattr(bincomm.pretraining, name, lambda *_: None)


def put_back_pages() -> None:
    for name, function in _COMPLETE.items():
        setattr(bincomm.pretraining, name, function)


@contextmanager
def pages() -> Iterator[None]:
    """Runs leave everything, as they do for users."""
    put_back_pages()
    try:
        yield
    finally:
        leave_out_pages()


leave_out_pages()

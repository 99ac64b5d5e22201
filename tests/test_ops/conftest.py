"""Operations are tested on two threads, also where tests as such are given one each."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)

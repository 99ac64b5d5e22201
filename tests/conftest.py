import os
from pathlib import Path

import pytest
import torch

# Without a GPU Triton kernels run in its interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """What torch.empty returns is NaN (or the largest integer), so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data():
    """Real images kept beside the checkout; they are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the folder shared/data beside the checkout (real images, not part of the project)")
    return SHARED_DATA

"""What all tests share, and which of them a bare install can run: the operations need torch alone."""

import logging
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def is_missing(module):
    """Whether a module cannot be imported; it is not imported to find out."""
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # of the package that it belongs to
        return True


# What bincomm[train] and bincomm[eval] bring, by module. Tests need all of it, but those of the bare install.
TRAINING = ["timm", "nvidia.dali", "safetensors", "jsonargparse", "PIL", "tqdm", "tensorboard", "matplotlib"]
TRAINING += ["sklearn", "pyarrow", "faiss", "scipy", "pycocotools"]
BARE = {"test_ops", "test_kernels", "test_gpu", "test_objectives.py", "test_beta_control.py"}
BARE |= {"test_architecture.py", "test_packaging.py"}
missing = [module for module in TRAINING if is_missing(module)]
left_out = sorted(path.name for path in Path(__file__).parent.glob("test_*") if path.name not in BARE)
collect_ignore = [*left_out, "test_gpu/test_training.py"] if missing else []
if is_missing("timm"):
    collect_ignore.append("test_gpu/test_gpu_step.py")
if is_missing("triton"):
    collect_ignore.append("test_kernels")


def pytest_report_header():
    """Says which tests are left out, and why."""
    absent = [*missing, *(["triton"] if is_missing("triton") else [])]
    return [f"left out: {', '.join(collect_ignore)}: without {', '.join(absent)}"] if collect_ignore else []


# Without a GPU Triton kernels run in its interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files of long tests, which several workers share; all other files stay together, so that what their fixtures
# make is made once.
SPREAD = {"test_distributed.py", "test_pretraining.py", "test_packaging.py"}
SPREAD |= {"test_budget.py", "test_benchmarks.py", "test_beta_control.py"}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, hands out files, those with the most tests first, and at the end the long tests
    one by one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).name in SPREAD else file

    return Scheduler(config, log)


@pytest.hookimpl(tryfirst=True)  # before fixtures of modules, which start runs
def pytest_runtest_setup(item):
    """Runs are quick ones; what only tests operations needs none."""
    if "bincomm.pretraining" in sys.modules:
        import quick_runs  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _signals_are_not_ignored():
    """As they are under nohup or in the background of a script: a run leaves ignored ones ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in defaults.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test leaves anything in the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BINCOMM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def every_nth_digit(tmp_path_factory):
    """A function that returns a new folder of every n-th of the digits, with train/ and test/."""
    from bincomm.data.digits import digits

    def link(n):
        folder = tmp_path_factory.mktemp("digits")
        for path in sorted(digits().glob("*/*/*.png"))[::n]:
            copy = folder / path.relative_to(digits())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
        return folder

    return link


@pytest.fixture(scope="session")
def few_digits(every_nth_digit):
    """A folder of a quarter of the digits, 360 for training and 90 queries."""
    return every_nth_digit(4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging():
    """A command shows what is logged; after the test nothing does, and caplog gets it again."""
    yield
    logger = logging.getLogger("bincomm")
    logger.handlers, logger.level, logger.propagate = [], logging.NOTSET, True


@pytest.fixture
def poisoned():
    """What torch.empty returns is NaN (or the largest integer), so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)

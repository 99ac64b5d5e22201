"""Check a wheel before it is given to others, as `make wheel` does.

    python tests/check_wheel.py dist/bincomm-*.whl

What its extension needs of torch is in the stable ABI; the size and the platform are shown. Then, in a new
environment each, with the oldest torch that it allows and with the newest, from the index: every module can
be imported that needs torch alone, and the operations give what their definitions do.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

# Run with the interpreter of the new environment, which has torch and this wheel alone.
SMOKE = """
import importlib, pkgutil, torch, bincomm
from bincomm.diagnosis import PACKAGES
from bincomm.ops import library, reference

assert library._C, library._C_ERROR

optional = {name.partition(".")[0] for name in PACKAGES} | {"numpy"}
modules = [module.name for module in pkgutil.walk_packages(bincomm.__path__, "bincomm.")]
incomplete = 0
for name in modules:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing = (error.__cause__ or error).name or ""
        assert missing.partition(".")[0] in optional, f"{name}: {error}"
        incomplete += 1

def compare(name, *inputs, rtol=1e-5):
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value, expected = getattr(bincomm, name)(*inputs), getattr(reference, name)(*exact)
    torch.testing.assert_close(value.double(), expected.double(), rtol=rtol, atol=rtol)
    if value.requires_grad:
        value.sum().backward(), expected.sum().backward()
        torch.testing.assert_close(inputs[0].grad.double(), exact[0].grad, rtol=1e-4, atol=rtol)

torch.manual_seed(0)
student, teacher = torch.randn(4, 24, 40), torch.randn(2, 24, 40)
compare("sign_bce", student, teacher)
compare("coding_rate", torch.randn(3, 24, 40))
messages = bincomm.pack_signs(teacher[0])
assert torch.equal(messages, reference.pack_signs(teacher[0]))
assert torch.equal(bincomm.unpack_signs(messages, 40), teacher[0] > 0)
compare("hamming_distance", messages, messages)
for part in range(2):
    nearest = [module.hamming_topk(messages, messages, 5)[part] for module in (bincomm, reference)]
    assert torch.equal(*nearest)
objective = bincomm.DiscreteCommunication()
objective(student.detach().requires_grad_(), teacher)["loss"].backward()
complete = len(modules) - incomplete
print(f"torch {torch.__version__}: operations as defined; {complete} of {len(modules)} modules imported,")
print("  the others need packages of an extra")
"""


def audit(folder: Path, oldest: Version) -> None:
    """Raise SystemExit unless what libraries below a folder need of torch is stable since that version."""
    from torch_abi_audit import inspect_package
    from torch_abi_audit.report import format_package_table

    report = inspect_package(folder)
    print(format_package_table(report))
    if report.torch_verdict != "torch-stable":
        raise SystemExit(f"{folder}: expected torch's stable ABI alone, got {report.torch_verdict}")
    if report.has_unknown_shim_symbols or Version(report.min_torch_version or "0") > oldest:
        raise SystemExit(f"{folder}: expected symbols of torch {oldest}, got {report.min_torch_display}")


def try_with(wheel: Path, torch: str) -> None:
    """Install a wheel with a torch into a new environment, and use it; raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        install = ["-m", "pip", "install", "--quiet", torch, wheel.absolute()]
        for command in (install, ["-c", SMOKE], ["-m", "bincomm.cli", "doctor"]):
            subprocess.run([python, "-I", *command], check=True, cwd=folder)


def check(wheel: Path) -> None:
    """Check one wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        (metadata,) = Path(folder).glob("*.dist-info")
        requirements = map(Requirement, PathDistribution(metadata).requires or [])
        (torch,) = (each for each in requirements if each.name == "torch")
        (specifier,) = torch.specifier  # >=, of the oldest
        (extension,) = Path(folder, "bincomm").glob("_C*")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        print(f"  {extension.name}: {extension.stat().st_size / 1e6:.1f} MB, most of it CUDA code:")
        print("  one copy for each architecture of TORCH_CUDA_ARCH_LIST, which `doctor` names below")
        audit(extension.parent, Version(specifier.version))
    subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], check=True)
    for version in (f"torch=={specifier.version}.*", "torch"):
        try_with(wheel, version)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    check(parser.parse_args().wheel)

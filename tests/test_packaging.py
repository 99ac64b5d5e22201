"""The bare install: torch alone."""

import os
import re
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import bincomm
from bincomm.ops import reference
from bincomm.ops.library import _C

ROOT = Path(__file__).parent.parent
HEAVY = (
    "timm",
    "nvidia",
    "jsonargparse",
    "safetensors",
    "sklearn",
    "matplotlib",
    "tqdm",
    "tensorboard",
    "triton",
    "yaml",
    "faiss",
)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


pytestmark = pytest.mark.slow


def test_importing_bincomm_imports_nothing_heavy():
    code = """
        import sys, torch
        before = set(sys.modules)
        import bincomm
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    process = python(code)
    assert process.returncode == 0, process.stderr
    assert not [name for name in HEAVY if f"'{name}'" in process.stdout]


def test_operations_and_doctor_work_with_torch_alone():
    code = f"""
        import sys, torch
        sys.modules.update(dict.fromkeys({HEAVY!r}))  # None: importing it fails
        import bincomm
        student = torch.randn(4, 8, 40, requires_grad=True)
        bincomm.DiscreteCommunication()(student, torch.randn(2, 8, 40))["loss"].backward()
        assert student.grad.isfinite().all()
        notes = " ".join(bincomm.doctor()["notes"])
        assert "timm is not installed" in notes and "triton is not installed" in notes, notes
        assert "bincomm[train]" in notes and "faiss is not installed" in notes and "bincomm[eval]" in notes
        from bincomm import cli
        assert cli.main(["pretrain"]) == 1
    """
    process = python(code)
    assert process.returncode == 0, process.stderr
    assert "pip install 'bincomm[train]'" in process.stderr


def test_a_step_needs_no_dali():
    """`make gpu` measures it where there is none, nor what parses a command line."""
    code = """
        import sys
        sys.modules["nvidia.dali"] = sys.modules["jsonargparse"] = None  # importing it fails
        import bincomm.dense, bincomm.engine.accumulation, bincomm.engine.cuda_graph, bincomm.engine.masks
    """
    process = python(code)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("backend", ["native", "reference"])  # all other tests use auto
def test_backends_by_name(backend):
    code = """
        import torch, bincomm
        torch.manual_seed(0)
        student, teacher = torch.randn(4, 8, 40), torch.randn(2, 8, 40)
        print(bincomm.sign_bce(student, teacher).item(), bincomm.coding_rate(student).sum().item())
    """
    process = python(code, BINCOMM_BACKEND=backend)
    assert process.returncode == 0, process.stderr
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 8, 40), torch.randn(2, 8, 40)
    expected = [reference.sign_bce(student, teacher).item(), reference.coding_rate(student).sum().item()]
    assert [float(value) for value in process.stdout.split()] == pytest.approx(expected, rel=1e-5)


def test_a_backend_chosen_by_name_never_falls_back():
    code = """
        import sys
        sys.modules["bincomm._C"] = None  # as if it had not been built
        import torch, bincomm
        try:
            bincomm.sign_bce(torch.randn(4, 8, 40), torch.randn(2, 8, 40))
        except RuntimeError as error:
            print(error)
        print(bincomm.doctor()["kernels"]["sign_bce"]["cpu"], *bincomm.doctor()["notes"])
    """
    assert (
        "BINCOMM_BACKEND=native, but sign_bce has no native kernel for cpu"
        in python(code, BINCOMM_BACKEND="native").stdout
    )
    fallback = python(code, BINCOMM_BACKEND="auto").stdout
    assert fallback.startswith("PyTorch ")
    assert "bincomm._C cannot be imported" in fallback
    assert "expected one of" in python(code, BINCOMM_BACKEND="fast").stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"BINCOMM_CUDA": "maybe"}, "BINCOMM_CUDA='maybe': expected auto, 0 or 1"),
        ({"BINCOMM_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "BINCOMM_CUDA=1 asks for the CUDA kernels, but"),
    ],
)
def test_setup_refuses_what_it_cannot_do(environment, words):
    process = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    assert process.returncode != 0
    assert words in process.stderr


GROUPS = {
    "version 2": {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                  "sys/fs/cgroup/a/cpu.max": "150000 100000\n", "sys/fs/cgroup/a/memory.max": "3000000000\n",
                  "sys/fs/cgroup/memory.max": "max\n"},
    "version 1": {"proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n2:x:/\n0::/\n",
                  "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
                  "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                  "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                  "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000000000\n"},
    "none": {},
}  # fmt: skip


def test_compilers_are_as_many_as_the_process_may_use(tmp_path):
    for kind, files in GROUPS.items():
        for name, text in files.items():
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / name).write_text(text)
    code = f"""
        import os, runpy, setuptools
        os.environ.pop("MAX_JOBS", None)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        setuptools.setup = lambda **options: None
        limits = runpy.run_path("setup.py")["group_limits"]
        for kind in {[*GROUPS]!r}:
            print(kind, *limits(f"{tmp_path}/{{kind}}"))
        print(os.environ["MAX_JOBS"], "job")
    """
    process = python(code, BINCOMM_CUDA="0")
    expected = ["version 2 1.5 3000000000", "version 1 1.5 3000000000", "none inf inf", "1 job"]
    assert process.stdout.splitlines()[-4:] == expected, process.stderr


def test_a_compiler_of_several_words_is_one_script(tmp_path):
    code = f"""
        import runpy, setuptools
        from pathlib import Path
        setuptools.setup = lambda **options: None
        one_word = runpy.run_path("setup.py")["one_word"]
        print(one_word("g++", Path("none")), one_word("env 'A=b c' echo -x", Path({str(tmp_path)!r}, "made")))
    """
    process = python(code, BINCOMM_CUDA="0")
    plain, script = process.stdout.split()[-2:]
    assert plain == "g++"
    assert Path(script).parent == tmp_path / "made"
    assert subprocess.run([script, "y z"], capture_output=True, text=True).stdout == "-x y z\n"


def test_cuda_code_is_in_the_extension_when_nvcc_was_found():
    facts = bincomm.doctor()["extension"]
    if not facts.get("cuda"):
        pytest.skip(f"built without CUDA: {facts.get('missing') or facts.get('no_cuda_reason')}")
    from bincomm import _C

    assert hasattr(_C, "device_code")
    assert "9.0" in facts["cuda_architectures"]


def test_the_extension_needs_of_torch_what_is_stable_since_the_oldest_that_is_allowed():
    pytest.importorskip("torch_abi_audit")
    from check_wheel import audit

    if _C is None:
        pytest.skip("bincomm._C is not built")
    (torch_requirement,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    audit(Path(_C.__file__), Version(torch_requirement))
    with pytest.raises(SystemExit, match=r"expected symbols of torch 2\.9, got 2\.11\.0"):
        audit(Path(_C.__file__), Version("2.9"))
    with pytest.raises(SystemExit, match="expected torch's stable ABI alone, got torch-unstable"):
        audit(Path(torch.__file__).parent / "lib" / "libtorch_python.so", Version("2.9"))


def test_a_wheel_is_tried_by_what_works_here():
    """In an environment that has as little as the new one, which takes minutes to make."""
    from check_wheel import SMOKE

    if _C is None:
        pytest.skip("bincomm._C is not built")
    process = python(f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n{SMOKE}")
    assert process.returncode == 0, process.stderr
    assert "operations as defined" in process.stdout


@pytest.mark.long
def test_the_triton_kernels_are_part_of_a_checkout_a_wheel_and_a_source_distribution(tmp_path):
    code = "import bincomm.kernels.sign_bce as kernels; print(kernels.__file__)"
    assert python(code).stdout.strip() == str(ROOT / "kernels" / "sign_bce.py")

    # The contents of a wheel, except bincomm._C, and a source distribution.
    build = (
        *("egg_info", "-e", tmp_path, "build_py", "--build-lib", tmp_path / "wheel"),
        *("sdist", "--formats", "tar", "-d", tmp_path),
    )
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True)
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "wheel", capture_output=True, text=True
    )
    assert process.stdout.strip() == str(tmp_path / "wheel" / "bincomm" / "kernels" / "sign_bce.py")

    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert names >= {
        "kernels/sign_bce.py",
        "bincomm/kernels/__init__.py",
        "csrc/rows.h",
        "csrc/sign_bce_cpu.cpp",
        "bincomm/recipes/digits.yaml",
    }

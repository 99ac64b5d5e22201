"""Imports run one way: a module imports from its own part of the package and from the layers below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top. Parts of one layer do not import each other. A package stands for all of its modules. The
# functions that `bincomm` takes from `api` when they are first used count as `api` does.
LAYERS = {
    "command line": {"cli"},
    "commands": {"commands"},
    "functions": {"api", "pretrain", "adapt", "compare", "evaluate", "encode"},
    "tasks": {"adaptation", "comparison", "codes", "exporting", "messages", "profiling", "dry_run"},
    "pretraining": {"pretraining"},
    "evaluation": {"evaluation"},
    "engine": {"engine"},
    "building": {"building"},
    "configuration": {"configuration"},
    "parsing": {"parsing"},
    "keys": {"config", "recipes", "weights"},
    "networks with patches": {"dense"},
    "parts": {"data", "objectives", "networks", "diagnosis"},
    "ground": {
        "distributed",
        "ops",
        "files",
        "bits",
        "interruption",
        "logs",
        "memory",
        "page",
        "backbone_arguments",
        "patches",
    },
    "compiled": {"kernels", "_C"},
}
# Packages that a part must do without.
WITHOUT = {name: {"timm", "nvidia"} for name in ("ops", "files", "bits", "logs", "backbone_arguments")}

DEPTH = {name: depth for depth, names in enumerate(LAYERS.values()) for name in names}


def modules():
    """(name, file) of all modules; the root `bincomm`, which gathers the public names, is not one."""
    folders = {"bincomm": ROOT / "bincomm", "bincomm.kernels": ROOT / "kernels"}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *inside]).removesuffix(".__init__")
            if name != "bincomm":
                yield name, file


MODULES = dict(modules())


def imported(name, file):
    """Names of all modules that a module imports, at its head or in a function."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                ancestors = package.split(".")[: len(package.split(".")) + 1 - node.level]
                origin = ".".join([*ancestors, origin]).removesuffix(".")
            yield from (f"{origin}.{alias.name}" if origin == "bincomm" else origin for alias in node.names)


def part(name):
    """`engine` of `bincomm.engine.step`; "" of other packages, and of public names that are no modules."""
    root, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return first if root == "bincomm" and first in DEPTH else ""


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    own = name.split(".")[1]
    assert own in DEPTH, f"{name} has no layer: add it to LAYERS"
    imports = set(imported(name, MODULES[name]))
    parts = {part(other) for other in imports} - {""}
    above = {other for other in parts if DEPTH[other] < DEPTH[own]}
    assert not above, f"{name} imports from a layer above: {sorted(above)}"
    beside = {other for other in parts if DEPTH[other] == DEPTH[own]} - {own}
    assert not beside, f"{name} imports from another part of its layer: {sorted(beside)}"
    packages = {other.partition(".")[0] for other in imports}
    assert not packages & WITHOUT.get(own, set())


def test_the_table_knows_no_module_twice():
    assert len(DEPTH) == sum(map(len, LAYERS.values()))


def test_imports_of_every_kind_are_noticed(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nimport bincomm.config as c\nfrom bincomm import ops, sign_bce\nfrom . import step\n"
        "def f():\n    from ..data.order import Order\n    from .run import open_run\n"
    )
    expected = {"os", "bincomm.config", "bincomm.ops", "bincomm.sign_bce", "bincomm.engine"}
    expected |= {"bincomm.data.order", "bincomm.engine.run"}
    assert set(imported("bincomm.engine.module", file)) == expected
    assert {part(name) for name in expected} == {"", "config", "ops", "engine", "data"}

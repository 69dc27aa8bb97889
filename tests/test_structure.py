"""The package's shape: import arrows, lazy optional imports, documented public names."""

from __future__ import annotations

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import autodrop_ext

ROOT = pathlib.Path(autodrop_ext.__file__).parent

# Who may import whom, by module or sub-package. Leaves import nothing of the package.
ARROWS: dict[str, set[str]] = {
    "requirements": set(),
    "reference": set(),
    "distributed": set(),
    "parameters": {"reference", "distributed"},
    "sampling": set(),
    "scatter": {"sampling"},
    "fraction": {"sampling", "scatter"},
    "meter_arguments": set(),
    "plan": {"reference", "parameters", "sampling"},
    "reading": set(),
    "log": {"reading"},
    "plotting": set(),
    "runs_plotting": {"plotting"},
    "backends": {"_C", "triton_kernels", "reference", "plan"},
    "rounding": {"arenas", "backends", "reading"},
    "arenas": {"backends", "plan", "reference", "scatter"},
    "survey": {"plan", "sampling"},
    "details": {"arenas", "backends", "distributed", "fraction", "reading", "sampling", "scatter"},
    "reader": {"arenas", "backends", "details", "distributed", "plan", "sampling"},
    "exchange": {"backends", "details", "distributed", "reader"},
    "meter_state": {"arenas", "distributed", "sampling", "velocity"},  # the last for types alone
    "faults": {"arenas", "backends", "distributed"},
    "velocity": {
        "arenas",
        "backends",
        "details",
        "distributed",
        "exchange",
        "faults",
        "fraction",
        "meter_arguments",
        "meter_state",
        "parameters",
        "reader",
        "reading",
        "rounding",
        "sampling",
        "survey",
    },
    "theory": set(),
    "averaging": {"backends", "parameters", "plan"},
    "epoch_plotting": set(),
    "schedulers": {
        "distributed",
        "velocity",
        "meter_state",
        "averaging",
        "reading",
        "plotting",
        "epoch_plotting",
        "theory",
    },
    "integrations": {"schedulers", "reading", "log"},
    "cli": {
        "schedulers",
        "theory",
        "velocity",
        "backends",
        "reading",
        "log",
        "plotting",
        "epoch_plotting",
        "runs_plotting",
        "_C",
        "__init__",
    },
    "__main__": {"cli"},
    "__init__": {"requirements", "log", "reading", "schedulers", "velocity"},
}


LEAVES = {"_C", "triton_kernels"}


def imported(path: pathlib.Path) -> set[str]:
    """Top-level parts of the package that a file imports; its own part is left out."""
    package = ["autodrop_ext", *path.relative_to(ROOT).parent.parts]
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            modules += [[*filter(None, module), alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
    ours = [module for module in modules if module[0] == "autodrop_ext"]
    parts = {module[1] if len(module) > 1 else "__init__" for module in ours}
    parts = {part if part in ARROWS or part in LEAVES else "__init__" for part in parts}
    return parts - {package[1] if len(package) > 1 else path.stem}


def files() -> list[pathlib.Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_arrows(path: pathlib.Path) -> None:
    relative = path.relative_to(ROOT)
    part = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    assert imported(path) <= ARROWS[part], f"{relative} may import only {sorted(ARROWS[part])}"


def test_schedulers_never_see_tensors_or_backends() -> None:
    for path in (ROOT / "schedulers").glob("*.py"):
        assert "backends" not in imported(path)
        assert "arenas" not in imported(path)


def test_importing_the_package_loads_nothing_optional() -> None:
    optional = ("matplotlib", "click", "rich", "sklearn", "triton", "scipy")
    optional += ("transformers", "lightning", "pytorch_lightning", "tensorboard", "wandb")
    script = f"import sys, autodrop_ext; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_old_torch_is_refused_in_words() -> None:
    script = "import torch; torch.__version__ = '2.5.1+cu124'; import autodrop_ext"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "ImportError: autodrop_ext needs torch 2.6 or newer, got torch 2.5.1+cu124: "
        "pip install --upgrade 'torch>=2.6'"
    )


def test_public_names_are_documented() -> None:
    for name in autodrop_ext.__all__:
        item = getattr(autodrop_ext, name)
        assert inspect.getdoc(item), name
        for attribute, member in vars(item).items() if inspect.isclass(item) else ():
            if not attribute.startswith("_") and inspect.isfunction(member):
                assert inspect.getdoc(member), f"{name}.{attribute}"


def test_no_file_is_longer_than_five_hundred_lines() -> None:
    long = {p.name: n for p in files() if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_the_version_stands_in_one_place() -> None:
    from autodrop_ext import _C  # type: ignore[attr-defined]

    assert autodrop_ext.__version__ == _C.version
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        autodrop_ext.nothing  # noqa: B018

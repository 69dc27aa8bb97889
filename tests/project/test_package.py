"""The package as it is imported: lazy optional imports, documented public names, the version."""

from __future__ import annotations

import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import autodrop_ext

ROOT = pathlib.Path(autodrop_ext.__file__).parent


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


@pytest.mark.parametrize("command", ["-c import autodrop_ext", "-m autodrop_ext doctor"])
def test_a_missing_torch_is_said_in_words(command: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command.split(maxsplit=1 if command.startswith("-c") else -1)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: autodrop_ext needs torch, which is not installed.")
    assert "https://pytorch.org/get-started has the commands for the CPU alone" in last


def test_public_names_are_documented() -> None:
    for name in autodrop_ext.__all__:
        item = getattr(autodrop_ext, name)
        assert inspect.getdoc(item), name
        for attribute, member in vars(item).items() if inspect.isclass(item) else ():
            if not attribute.startswith("_") and inspect.isfunction(member):
                assert inspect.getdoc(member), f"{name}.{attribute}"


def test_the_version_stands_in_one_place() -> None:
    from autodrop_ext import _C  # type: ignore[attr-defined]

    assert autodrop_ext.__version__ == _C.version
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        autodrop_ext.nothing  # noqa: B018

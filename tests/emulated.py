"""The CUDA kernels and the cuda backend on a CPU, through the emulator of ``csrc/tests/emulator``.

The module is built once into ``build/emulated``, in a folder that its sources' digest names.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
from types import ModuleType

import torch

from autodrop_ext.ops.cuda import CudaBackend

ROOT = pathlib.Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EMULATOR = CSRC / "tests" / "emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""

# No contraction, as in the package's own build.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra")
TWO_FLOATS = ("-DAUTODROP_TWO_FLOATS",)  # sums as for GPUs with few float64 units
PAIRS = (*TWO_FLOATS, "-DAUTODROP_PAIRS")  # and with their functions for two pairs at once
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
KERNELS = EMULATOR / "table.cpp"
OTHERS = (EMULATOR / "emulator.cpp", CSRC / "tests" / "test_emulated.cpp")


def run(*command: str | pathlib.Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")


def compiled(
    source: pathlib.Path,
    folder: pathlib.Path,
    *flags: str,
    overlay: pathlib.Path | None = None,
) -> pathlib.Path:
    """An object file. ``overlay``: its files stand in for those of csrc."""
    target = folder / f"{source.parent.name}-{source.stem}.o"
    before = [] if overlay is None else [f"-I{overlay}"]
    includes = [*before, f"-I{EMULATOR}", f"-I{CSRC}"]
    run(COMPILER, *FLAGS, *flags, *includes, "-c", source, "-o", target)
    return target


def all_compiled(
    sources: tuple[pathlib.Path, ...], folder: pathlib.Path, *flags: str
) -> list[pathlib.Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: compiled(source, folder, *flags), sources))


def linked(target: pathlib.Path, objects: list[pathlib.Path], *flags: str) -> pathlib.Path:
    run(COMPILER, *flags, *objects, "-o", target)
    return target


@functools.cache
def module(*flags: str) -> ModuleType:
    """``csrc/bindings_cuda.cpp`` over the emulator, compiled with the pybind11 that torch has.

    ``flags``: none, :data:`TWO_FLOATS` or :data:`PAIRS`.
    """
    sources = (
        KERNELS,
        EMULATOR / "emulator.cpp",
        EMULATOR / "module.cpp",
        CSRC / "bindings_cuda.cpp",
    )
    digest = hashlib.sha256((torch.__version__ + sysconfig.get_config_var("EXT_SUFFIX")).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulated" / ("-".join(f[2:].lower() for f in flags) or "float64")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / digest.hexdigest()[:16] / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of pytest build it, too
        if not target.exists():
            for old in folder.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            includes = (
                pathlib.Path(torch.__file__).parent / "include",
                sysconfig.get_path("include"),
            )
            objects = all_compiled(
                sources,
                target.parent,
                *flags,
                "-fPIC",
                "-fvisibility=hidden",
                *(f"-isystem{i}" for i in includes),
            )
            partial = linked(target.with_suffix(".partial"), objects, "-shared")
            partial.rename(target)
    spec = importlib.util.spec_from_file_location("_emulated", target)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class EmulatedCuda(CudaBackend):
    """The cuda backend on CPU tensors."""

    name = "cuda emulated"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on cpu tensors, not on {device.type}"
        return None if COMPILER else "needs a C++ compiler: g++ or clang++"

    def core(self) -> ModuleType:
        return module()

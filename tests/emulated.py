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
import threading
import types
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from autodrop_ext.ops import cuda, native
from autodrop_ext.ops.cuda import CudaBackend, CudaOperations
from autodrop_ext.ops.plan import Plan, tile_table

ROOT = pathlib.Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EMULATOR = CSRC / "tests" / "emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""

# No contraction, as in the package's own build.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra")
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
def module() -> ModuleType:
    """``csrc/bindings_cuda.cpp`` over the emulator, compiled with the pybind11 that torch has."""
    sources = (
        KERNELS,
        EMULATOR / "kernels.cpp",
        EMULATOR / "emulator.cpp",
        EMULATOR / "module.cpp",
        CSRC / "bindings_cuda.cpp",
    )
    digest = hashlib.sha256((torch.__version__ + sysconfig.get_config_var("EXT_SUFFIX")).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulated"
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


class GpuPlan:
    """A plan of CPU tensors with what a plan on a GPU has in addition."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.device = torch.device("cpu", 0)
        self.tiles = torch.from_numpy(tile_table(plan.chunks[:, 2].numpy()))

    def __getattr__(self, name: str) -> object:
        return getattr(self._plan, name)


class Streams:
    """In place of torch's streams: one of the emulator's, or its default stream."""

    handle = 0

    def current(self, *arenas: Tensor | None) -> int:
        return self.handle


_BINDING = threading.Lock()


class EmulatedCuda(CudaBackend):
    """The cuda backend on CPU tensors."""

    name = "cuda emulated"

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on cpu tensors, not on {device.type}"
        return None if COMPILER else "needs a C++ compiler: g++ or clang++"

    def bind(self, plan: Plan) -> CudaOperations:
        zeros = torch.zeros

        def without_pinning(*shape: object, pin_memory: bool = False, **options: object) -> Tensor:
            return zeros(*shape, **options)  # type: ignore[call-overload]

        # Only what this backend sees is replaced, in one thread at a time: the memory watch of a
        # meter in another thread needs the real core.
        with (
            _BINDING,
            mock.patch.object(
                cuda, "native", types.SimpleNamespace(core=module(), address=native.address)
            ),
            mock.patch("torch.zeros", without_pinning),
        ):
            operations = CudaOperations(GpuPlan(plan))  # type: ignore[arg-type]
        operations._streams = Streams()  # type: ignore[assignment]
        return operations

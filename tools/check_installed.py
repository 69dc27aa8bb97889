"""Checks an installed wheel of this package with the standard library alone.

    python tools/check_installed.py [--cuda]

What is in it, whether every module compiles on this Python, and whether the compiled core loads.
``--cuda``: it must hold the CUDA kernels; otherwise it must not.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.metadata
import importlib.util
import pathlib
import platform


def main() -> None:
    """Check, and say in a line what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels must be inside")
    cuda = parser.parse_args().cuda
    distribution = importlib.metadata.distribution("autodrop_ext")
    files = distribution.files or []
    tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    # auditwheel puts bundled libraries next to the package.
    allowed = {
        "autodrop_ext",
        "autodrop_ext.libs",
        f"autodrop_ext-{distribution.version}.dist-info",
    }
    expect(tops <= allowed, f"only {sorted(allowed)} at the top", sorted(tops))
    package = pathlib.Path(str(distribution.locate_file("autodrop_ext")))
    expect((package / "py.typed").is_file(), "py.typed in the package", "none")
    expect((package / "triton_kernels/__init__.py").is_file(), "the Triton kernels", "none")
    commands = [entry.value for entry in distribution.entry_points]
    expect(commands == ["autodrop_ext.cli:main"], "one command", commands)
    expect(compileall.compile_dir(package, quiet=1), "modules that compile", "one that does not")
    (library,) = package.glob("_C.*")
    spec = importlib.util.spec_from_file_location("autodrop_ext._C", library)
    assert spec is not None and spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    expect(core.version == distribution.version, distribution.version, core.version)
    expect(core.cuda_built == cuda, f"cuda_built={cuda}", f"{core.cuda_built}: {core.cuda_reason}")
    python, kernels = platform.python_version(), core.cuda_architectures or "no CUDA kernels"
    print(f"Python {python}: autodrop_ext {core.version}, {library.name} loads, {kernels}")


def expect(good: bool, what: str, came: object) -> None:
    """Fails with words, also under -O."""
    if not good:
        raise SystemExit(f"expected {what}, got {came}")


if __name__ == "__main__":
    main()

"""Builds the source distribution and, out of it, a wheel for every Python here; tries each.

    python tools/check_packages.py

Each wheel is installed into an environment of its own. torch is hundreds of megabytes a Python, so
only the interpreter that runs this lends its torch; under the others the compiled core is loaded
and used by itself, and every module is compiled. Under this one, a typed user's script must pass
``mypy --strict`` against the installed package, and run. Needs ``build``, ``mypy`` and torch.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import interpreters

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"

CHECK_IMPORT = """
import autodrop_ext, autodrop_ext.triton_kernels
assert {site!r} in autodrop_ext.__file__, autodrop_ext.__file__
"""


def main() -> None:
    """Build, install and try."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--sdist", "--outdir", str(dist), str(ROOT))
    (sdist,) = dist.glob("*.tar.gz")
    # Two at a time: much of a build is one process that unpacks its tools.
    pool = concurrent.futures.ThreadPoolExecutor(2)
    with tempfile.TemporaryDirectory() as scratch, pool:
        folders = [pathlib.Path(scratch, version) for version in interpreters.VERSIONS]
        check = functools.partial(_check, sdist=str(sdist), dist=dist)
        for line in pool.map(check, interpreters.VERSIONS, folders):
            print(line, flush=True)


def _check(version: str, folder: pathlib.Path, sdist: str, dist: pathlib.Path) -> str:
    """What was found, in a line."""
    python = interpreters.find(version)
    if python is None:
        return f"Python {version}: not on this machine"
    wheels = dist / version
    pip = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), sdist]
    _run(*pip, AUTODROP_CUDA="0")
    (wheel,) = wheels.glob("*.whl")
    environment = folder / "environment"
    _run(python, "-m", "venv", "--without-pip", str(environment))
    inside = str(environment / "bin/python")
    _run(sys.executable, "-m", "pip", "--python", inside, "install", "--no-deps", str(wheel))
    found = _run(inside, "-I", str(ROOT / "tools/check_installed.py")).strip()
    if version != OWN:
        return found
    _check_with_torch(environment, folder)
    return f"{found}; imports; a typed script passes mypy --strict and runs"


def _check_with_torch(environment: pathlib.Path, folder: pathlib.Path) -> None:
    inside = str(environment / "bin/python")
    (site,) = environment.glob("lib/python*/site-packages")
    # A line of a .pth file is put on the path, but .pth files in there, such as that of an
    # editable install of this package, are not read.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(inside, "-I", "-c", CHECK_IMPORT.format(site=str(site)))
    script = shutil.copy(ROOT / "tools/typed_user.py", folder)
    _run(sys.executable, "-m", "mypy", "--strict", "--python-executable", inside, script)
    _run(inside, "-I", "-W", "error", str(script), cwd=folder)


def _run(*command: str, cwd: pathlib.Path | None = None, **environment: str) -> str:
    """What a command prints. Runs outside the checkout: its sources must not be found."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    with tempfile.TemporaryDirectory() as nowhere:
        done = subprocess.run(
            command, cwd=cwd or nowhere, env=env, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()

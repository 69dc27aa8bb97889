"""Which versions of Python this machine has."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""Those that the package is built and tested for."""


def find(version: str) -> str | None:
    """Path of the interpreter of a version such as "3.12": on the PATH, from pyenv, or None."""
    candidates = [shutil.which(f"python{version}"), shutil.which("python3")]
    candidates += sorted(
        map(str, pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    )
    for candidate in candidates:
        # A shim of pyenv is there for versions that are not switched on, and fails when run.
        if candidate is not None and _version_of(candidate) == version:
            return candidate
    return None


def _version_of(python: str) -> str | None:
    script = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

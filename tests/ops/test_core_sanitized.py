"""The C++ tests of the compiled core, built with AddressSanitizer and UBSan and run."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parents[2] / "csrc"


def run(*command: str) -> str:
    environment = os.environ | {
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "AUTODROP_CUDA": "0",
        "ASAN_OPTIONS": "abort_on_error=0",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake: pip install cmake")
def test_core_is_clean_under_sanitizers(tmp_path: pathlib.Path) -> None:
    run(
        "cmake",
        "-S",
        str(CSRC),
        "-B",
        str(tmp_path),
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DAUTODROP_TESTS=ON",
        "-DAUTODROP_MODULE=OFF",
        "-DAUTODROP_SANITIZE=address,undefined",
    )
    run("cmake", "--build", str(tmp_path), "--parallel", "2")
    output = run(str(tmp_path / "test_cpu"))
    assert " 0 failures" in output
    assert not output.startswith("0 checks")

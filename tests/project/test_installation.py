"""Installation: the GPUs that kernels are compiled for, and what users are told."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import autodrop_ext

ROOT = pathlib.Path(autodrop_ext.__file__).parent.parent
CSRC = ROOT / "csrc"

if not CSRC.exists():
    pytest.skip("the sources are not next to the installed package", allow_module_level=True)

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None, reason="needs cmake: pip install cmake"
)

KNOWN = "compute_80 compute_86 compute_89 compute_90 compute_120"
ALL = "80-real 86-real 89-real 90-real 120-real 120-virtual"


def executable(path: pathlib.Path, lines: str) -> pathlib.Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def chosen(folder: pathlib.Path, nvidia_smi: str, **environment: str) -> list[str]:
    """What CMake chooses and says where nvidia-smi is this script; nvcc knows KNOWN."""
    nvcc = executable(folder / "nvcc", f"printf '%s\\n' {KNOWN}")
    executable(folder / "nvidia-smi", nvidia_smi)
    script = folder / "script.cmake"
    script.write_text(
        f"include({CSRC}/cuda/architectures.cmake)\n"
        "autodrop_choose_architectures()\n"
        'list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)\n'
        "message(STATUS ${architectures})\n"
        "autodrop_announce()\n"
    )
    command = ["cmake", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-P", str(script)]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CUDAARCHS": "",
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,  # without a terminal, whose absence is no trouble
    )
    assert done.stderr == ""
    return done.stdout.removeprefix("-- ").splitlines()


@pytest.mark.parametrize(
    ("nvidia_smi", "architectures"),
    [
        ("printf '8.6\\n9.0\\n8.6\\n'", "86 90"),  # each also as PTX, for GPUs to come
        ("exit 9", ALL),
        ("echo No devices were found", ALL),
        ("echo 10.3", ALL),  # a GPU that this nvcc does not know
    ],
)
def test_kernels_are_compiled_for_the_gpus_that_are_seen(
    nvidia_smi: str, architectures: str, tmp_path: pathlib.Path
) -> None:
    first, said = chosen(tmp_path, nvidia_smi)
    assert first == architectures
    count = len(architectures.split())
    assert f"compiling CUDA kernels for {count} GPU architectures takes about" in said
    assert "min on " in said
    assert "CUDAARCHS=native" in said
    assert "AUTODROP_CUDA=0" in said


def test_the_users_choice_of_architectures_stays(tmp_path: pathlib.Path) -> None:
    assert chosen(tmp_path, "echo 9.0", CUDAARCHS="native")[0] == ""


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script, of util-linux")
def test_a_terminal_is_told_what_takes_long(tmp_path: pathlib.Path) -> None:
    """pip swallows the output of a build."""
    code = tmp_path / "announce.cmake"
    code.write_text(
        f"include({CSRC}/cuda/architectures.cmake)\n"
        "set(CMAKE_CUDA_ARCHITECTURES 80-real 90)\nautodrop_announce()\n"
    )
    command = f"cmake -P '{code}' > /dev/null 2>&1"
    script = ["script", "-qec", command, "/dev/null"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert "compiling CUDA kernels for 2 GPU architectures takes about 1 min" in done.stdout


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable", "build_sdist"])
def test_setup_py_is_the_build(hook: str, tmp_path: pathlib.Path) -> None:
    """Every way to install starts from one of these three hooks, which pyproject.toml names."""
    pytest.importorskip("setuptools", reason="needs setuptools: pip install setuptools")
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'build-backend = "setuptools.build_meta"\n' in settings
    (tmp_path / "pyproject.toml").write_text(settings)
    (tmp_path / "setup.py").write_text("raise SystemExit('this setup.py was run')\n")
    script = f"import setuptools.build_meta as backend; backend.{hook}('dist')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "this setup.py was run"


@pytest.mark.slow
def test_an_installation_leaves_nothing_behind_and_fails_in_a_line(tmp_path: pathlib.Path) -> None:
    checkout, target = tmp_path / "checkout", tmp_path / "target"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info", ".*", "dist")
    shutil.copytree(ROOT, checkout, ignore=unwanted)
    before = sorted(checkout.rglob("*"))

    def install(**environment: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), "-v"]
        env = {**os.environ, **environment}
        return subprocess.run([*pip, str(checkout)], env=env, capture_output=True, text=True)

    done = install(AUTODROP_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stdout + done.stderr
    assert sorted(checkout.rglob("*")) == before
    assert (target / "autodrop_ext/triton_kernels/table.py").is_file()
    assert list(target.glob("autodrop_ext/_C*.so"))

    nowhere = str(tmp_path / "nvcc")
    for environment, reason, advice in (
        ({"AUTODROP_CUDA": "1", "CUDACXX": nowhere}, "no nvcc was found", "AUTODROP_CUDA=1 needs"),
        ({"AUTODROP_CUDA": "0", "CXX": nowhere}, nowhere, "It needs a C++17 compiler"),
    ):
        failed = install(**environment)
        assert failed.returncode != 0
        assert "Traceback" not in failed.stdout + failed.stderr
        lines = (failed.stdout + failed.stderr).splitlines()
        (number,) = [n for n, line in enumerate(lines) if "autodrop_ext was not built" in line]
        assert advice in lines[number]
        assert "error: subprocess-exited-with-error" in lines[number + 1]  # pip's words
        assert any(reason in line for line in lines)
    assert sorted(checkout.rglob("*")) == before

"""What is shipped, what an import loads, and the tools that build and compare installations."""

from __future__ import annotations

import ctypes
import json
import pathlib
import subprocess
import sys

import compatibility
import cuda_stand_ins
import interpreters
import pytest
import typed_user

import autodrop_ext

PACKAGE = pathlib.Path(autodrop_ext.__file__).parent


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_typed_users_script_runs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CI also gives it to mypy --strict, against an installed wheel (tools/check_packages.py)."""
    monkeypatch.chdir(tmp_path)
    typed_user.main()
    assert capsys.readouterr().out.startswith("23 ")  # 100 steps, windows of 4, first two unread


def test_importing_the_package_after_torch_loads_nothing_more() -> None:
    """What torch has not loaded would be paid by everyone: torch.distributed.fsdp, scipy, ..."""
    script = (
        "import json, sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import autodrop_ext\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    assert "autodrop_ext.meter" in loaded
    # The standard library's sysconfig loads one file that is named after the machine.
    parts = {name.partition(".")[0] for name in loaded if not name.startswith("_sysconfigdata_")}
    assert parts - set(sys.stdlib_module_names) <= {"autodrop_ext", "numpy"}
    heavy = [name for name in loaded if name.startswith(("numpy.", "autodrop_ext.integrations"))]
    assert set(heavy) <= {"numpy.typing", "numpy._typing._add_docstring"}


def test_interpreters_are_of_the_version_asked_for() -> None:
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    for version in (own, *interpreters.VERSIONS):
        python = interpreters.find(version)
        if python is not None:
            done = subprocess.run(
                [python, "-c", script], capture_output=True, text=True, check=True
            )
            assert done.stdout.strip() == version
    assert interpreters.find("3.1") is None


# ---- the compatibility table ------------------------------------------------------------------


def cell(**changes: object) -> compatibility.Cell:
    usual = {"library": "torch", "version": "2.6.0", "torch": "2.6.0", "python": "3.11.7"}
    usual |= {"numpy": "1.26.4", "triton": "3.2.0", "autodrop_ext": "0.1.0"}
    return {**usual, "stand_ins": False, "passed": 9, "skipped": 0, "failed": 0, "failures": []} | {
        **changes
    }


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads(compatibility.RESULTS.read_text())
    assert compatibility.PAGE.read_text() == compatibility.render(results)


def test_a_failing_cell_is_shown() -> None:
    page = compatibility.render([cell(failed=1, failures=["tests/test_x.py::test_y"], skipped=2)])
    assert "| 2.6.0 | 3.11.7 | 1.26.4 | 3.2.0 | 9 passed, 1 failed, 2 skipped |" in page
    assert "Failed with torch 2.6.0:\n\n- `tests/test_x.py::test_y`" in page


def test_a_new_result_takes_the_place_of_the_same_minor_version(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "RESULTS", tmp_path / "results.json")
    for version in ("2.10.0", "2.9.0", "2.9.1"):
        compatibility.keep(cell(version=version))
    compatibility.keep(cell(library="python", version="3.10"))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [c["version"] for c in kept] == ["3.10", "2.9.1", "2.10.0"]


def test_stand_ins_satisfy_the_loader(tmp_path: pathlib.Path) -> None:
    """A library that needs one function with a version and one without, and has neither."""
    folder = tmp_path / "torch/lib"
    folder.mkdir(parents=True)
    versions = tmp_path / "versions"
    versions.write_text("libcublas.so.12 { global: *; };")
    build(tmp_path, "libcublas.so.12", "int cublasAdd(void) { return 7; }", f"{versions}")
    build(tmp_path, "libnccl.so.2", "int ncclAdd(void) { return 7; }")
    source = tmp_path / "torch.c"
    source.write_text(
        "int cublasAdd(void); int ncclAdd(void);\nint add(void) { return cublasAdd() + ncclAdd(); }"
    )
    library = folder / "libtorch.so"
    gcc = ["gcc", "-shared", "-fPIC", str(source), f"-L{tmp_path}", "-l:libcublas.so.12"]
    gcc += ["-l:libnccl.so.2", "-Wl,-rpath,$ORIGIN", "-Wl,-z,now", "-o", str(library)]
    subprocess.run(gcc, check=True)
    with pytest.raises(OSError, match=r"libcublas\.so\.12|libnccl\.so\.2"):
        ctypes.CDLL(str(library))
    (tmp_path / "libcublas.so.12").unlink()
    (tmp_path / "libnccl.so.2").unlink()
    assert cuda_stand_ins.make_stand_ins(tmp_path) == ["libcublas.so.12", "libnccl.so.2"]
    assert ctypes.CDLL(str(library)).add() == 0
    assert cuda_stand_ins.make_stand_ins(tmp_path) == []


def build(folder: pathlib.Path, name: str, code: str, versions: str | None = None) -> None:
    source = folder / f"{name}.c"
    source.write_text(code)
    gcc = ["gcc", "-shared", "-fPIC", str(source), f"-Wl,-soname,{name}", "-o", str(folder / name)]
    gcc += [f"-Wl,--version-script={versions}"] if versions else []
    subprocess.run(gcc, check=True)


def test_the_real_cuda_runtime_is_the_one_that_torch_asks_for(tmp_path: pathlib.Path) -> None:
    info = tmp_path / "torch-2.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Name: torch\nRequires-Dist: nvidia-cuda-runtime-cu12 (==12.4.127) ; x\n"
        "Requires-Dist: nvidia-cudnn-cu12 (==9.1.0.70) ; x\n"
    )
    assert cuda_stand_ins.real_requirements(tmp_path) == ["nvidia-cuda-runtime-cu12==12.4.127"]
    (info / "METADATA").write_text("Requires-Dist: cuda-toolkit[cublas,cudart]==13.0.2; x\n")
    assert cuda_stand_ins.real_requirements(tmp_path) == [
        "nvidia-cuda-runtime==13.0.*",
        "nvidia-cuda-cupti==13.0.*",
    ]

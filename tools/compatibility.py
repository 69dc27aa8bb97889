"""Runs the tests with many versions of torch, Python and other libraries; writes the table.

    python tools/compatibility.py                     # every cell; an hour on two cores
    python tools/compatibility.py --torch 2.6 2.15    # some; the others keep their last result
    python tools/compatibility.py --python 3.10
    python tools/compatibility.py --library transformers
    python tools/compatibility.py --write             # only docs/compatibility.md, from the results

Each cell is a scratch environment: the wheel of this checkout, the tests copied next to it, the
version in question. Results are kept in ``tools/compatibility.json``; the page is made from them.

PyPI's torch for Linux is built for CUDA. Its CUDA libraries, 2 to 3 GB a version, are replaced by
empty ones (``cuda_stand_ins.py``), since only CPU code is tested; ``--full`` installs them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import cuda_stand_ins
import interpreters

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools/compatibility.json"
PAGE = ROOT / "docs/compatibility.md"

OLDEST_TORCH = (2, 6)
USUAL_PYTHON = "3.11"
USUAL_TORCH = "2.13.0"

TESTS = (
    "tests/schedulers/test_autodrop.py",
    "tests/schedulers/test_epoch.py",
    "tests/ops/test_operations.py",
    "tests/test_faults.py",
    "tests/test_meter.py",
    "tests/test_parts.py",
    "tests/test_state.py",
)
"""Those that depend on torch's optimizers, hooks, formats and kernels."""

TEST_PACKAGES = ("pytest", "pytest-benchmark", "hypothesis", "click", "rich", "matplotlib")
TORCH_PACKAGES = (
    *("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing_extensions"),
)

# The oldest numpy that is allowed goes with the oldest torch. The interpreter of old triton, in
# which the Triton kernels are tested here, converts arrays in a way that numpy 2.4 has ended and
# that older ones warn of.
OLD_NUMPY = {"2.6": "numpy==1.26.*"}
NUMPY_FOR_OLD_TRITON = "numpy<2.4"
LENIENT_TRITON = (3, 8)
IGNORED = (
    "ignore:Conversion of an array with ndim:DeprecationWarning",
    "ignore:numpy.core is deprecated:DeprecationWarning",  # in accelerate 1.1
)

# Tests of the integrations, the oldest version that is allowed and later ones, and what else has to
# be there. "" is the newest.
LIBRARIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "transformers": (
        "tests/integrations/test_transformers.py",
        ("4.48.*", "4.57.*", "5.0.*", ""),
        ("accelerate", "tensorboard"),
    ),
    "accelerate": (
        "tests/integrations/test_accelerate.py",
        ("1.1.*", "1.6.*", "1.10.*", ""),
        (),
    ),
    "lightning": (
        "tests/integrations/test_lightning.py",
        ("2.4.*", "2.5.*", ""),
        ("tensorboard",),
    ),
}

Cell = dict[str, Any]


def main() -> None:
    """Run the cells that are asked for, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="*", metavar="2.6", help="minor versions")
    parser.add_argument("--python", nargs="*", metavar="3.10", help="minor versions")
    parser.add_argument("--library", nargs="*", choices=LIBRARIES, help="other libraries")
    parser.add_argument("--full", action="store_true", help="install torch's CUDA libraries too")
    parser.add_argument("--source", type=pathlib.Path, default=ROOT, help="another checkout")
    parser.add_argument("--write", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.write:
        some = (options.torch, options.python, options.library) != (None, None, None)
        everything = not some
        with tempfile.TemporaryDirectory(prefix="compatibility-") as scratch:
            bench = Bench(pathlib.Path(scratch), options.source, options.full)
            for version in _wanted(options.torch, everything, bench.torch_versions):
                bench.torch(version)
            for version in _wanted(options.python, everything, lambda: interpreters.VERSIONS):
                bench.python(version)
            for name in _wanted(options.library, everything, lambda: LIBRARIES):
                bench.library(name)
    write_page()


def _wanted(given: Sequence[str] | None, everything: bool, all_of: Any) -> Iterable[str]:
    if everything or given == []:
        return list(all_of())
    return given or ()


class Bench:
    """Makes scratch environments one after the other and runs the tests in them."""

    def __init__(self, scratch: pathlib.Path, checkout: pathlib.Path, full: bool) -> None:
        self.scratch = scratch
        self.full = full
        self.source = scratch / "source"
        _copy_sources(checkout, self.source)  # once: the checkout may change while this runs
        self.wheels: dict[str, str] = {}

    def torch_versions(self) -> list[str]:
        """Minor versions of torch from the oldest supported to the newest that pip finds."""
        return list(self._newest_patches())

    def torch(self, minor: str) -> None:
        """One version of torch, on the usual Python."""
        patches = self._newest_patches()
        if minor not in patches:
            sys.exit(f"--torch: expected some of {' '.join(patches)}, got {minor}")
        self._cell("torch", patches[minor], USUAL_PYTHON, patches[minor])

    def python(self, version: str) -> None:
        """One version of Python, with the usual torch."""
        self._cell("python", version, version, USUAL_TORCH)

    def library(self, name: str) -> None:
        """The versions of a library, with the usual torch and Python."""
        test, versions, more = LIBRARIES[name]
        if not (self.source / test).exists():
            print(f"{name}: no {test} yet", flush=True)
            return
        for version in versions:
            self._cell(name, version, USUAL_PYTHON, USUAL_TORCH, [test], more)

    def _newest_patches(self) -> dict[str, str]:
        listed = _run(sys.executable, "-m", "pip", "index", "versions", "torch")
        found = re.search(r"Available versions: (.*)", listed)
        newest: dict[str, str] = {}
        for text in reversed(found[1].split(", ") if found else []):
            minor = ".".join(text.split(".")[:2])
            if tuple(map(int, minor.split("."))) >= OLDEST_TORCH:
                newest[minor] = text.partition("+")[0]
        return newest

    # ---- one cell -----------------------------------------------------------------------------

    def _cell(
        self,
        library: str,
        version: str,
        python: str,
        torch: str,
        tests: Sequence[str] = TESTS,
        more: Sequence[str] = (),
    ) -> None:
        print(f"{library} {version or 'newest'}: ", end="", flush=True)
        interpreter = interpreters.find(python)
        if interpreter is None:
            print(f"no Python {python} on this machine", flush=True)
            return
        environment = self.scratch / "environment"
        shutil.rmtree(environment, ignore_errors=True)
        _run(interpreter, "-m", "venv", str(environment))
        pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet"]
        stand_ins = self._install_torch(environment, pip, torch)
        if library in LIBRARIES:
            wanted = f"{library}=={version}" if version else library
            _run(*pip, wanted, *more, f"torch=={torch}", "numpy", *_data_packages(tests))
        _run(*pip, "--no-deps", self._wheel(interpreter, python))
        cell: Cell = {
            "library": library,
            "version": version,
            "stand_ins": stand_ins,
            **_versions(environment, [library]),
            **self._test(environment, tests),
        }
        cell["version"] = cell.pop("installed") or cell["version"]
        if not cell["passed"] and not cell["failed"]:
            # Rather this program's fault than the version's: no result.
            print("no test ran; see build/compatibility.log", flush=True)
            return
        print(outcome(cell), flush=True)
        for line in cell["failures"]:
            print("   ", line, flush=True)
        keep(cell)
        write_page()
        shutil.rmtree(environment)

    def _install_torch(self, environment: pathlib.Path, pip: list[str], torch: str) -> bool:
        """Torch with what its tests need; whether its CUDA libraries are stand-ins."""
        (site,) = environment.glob("lib/python*/site-packages")
        minor = ".".join(torch.split(".")[:2])
        deps = [] if self.full else ["--no-deps"]
        _run(*pip, "--no-cache-dir", *deps, f"torch=={torch}")
        metadata = next(site.glob("torch-*.dist-info/METADATA")).read_text()
        pinned = re.search(r"^Requires-Dist: triton ?\(?==([\d.]+)", metadata, re.MULTILINE)
        triton = f"triton=={pinned[1]}" if pinned else "triton>=3.2"
        numpy = OLD_NUMPY.get(minor, "numpy")
        if (
            numpy == "numpy"
            and pinned
            and tuple(map(int, pinned[1].split(".")[:2])) < LENIENT_TRITON
        ):
            numpy = NUMPY_FOR_OLD_TRITON
        _run(*pip, *TORCH_PACKAGES, *TEST_PACKAGES, numpy, triton)
        real = cuda_stand_ins.real_requirements(site)
        if self.full or not real:
            return False
        _run(*pip, "--no-cache-dir", "--no-deps", *real)
        return bool(cuda_stand_ins.make_stand_ins(site))

    def _wheel(self, interpreter: str, version: str) -> str:
        if version not in self.wheels:
            folder = self.scratch / f"wheel-{version}"
            command = [interpreter, "-m", "pip", "wheel", "--quiet", "--no-deps"]
            _run(*command, "--wheel-dir", str(folder), str(self.source), AUTODROP_CUDA="0")
            (wheel,) = folder.glob("*.whl")
            self.wheels[version] = str(wheel)
        return self.wheels[version]

    def _test(self, environment: pathlib.Path, tests: Sequence[str]) -> Cell:
        """Run tests in a folder from which the package's sources cannot be imported."""
        folder = self.scratch / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("tests", "benchmarks", "examples"):
            shutil.copytree(self.source / name, folder / name)
        shutil.copy(self.source / "pyproject.toml", folder)
        warnings = [option for ignored in IGNORED for option in ("-W", ignored)]
        done = subprocess.run(
            [environment / "bin/pytest", "-q", "-p", "no:cacheprovider", *warnings, *tests],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        log = ROOT / "build/compatibility.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", last)
        count = {word: int(n) for n, word in counts}
        failures = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return {
            "passed": count.get("passed", 0),
            "skipped": count.get("skipped", 0),
            "failed": count.get("failed", 0) + count.get("error", 0),
            "failures": _summed_up(failures),
        }


def _summed_up(names: Sequence[str]) -> list[str]:
    """Names of tests without their parameters, each once."""
    counts = collections.Counter(name.partition("[")[0] for name in names)
    return [name if n == 1 else f"{name} ({n} cases)" for name, n in counts.items()]


def _data_packages(tests: Sequence[str]) -> list[str]:
    """What the integrations' tests train on comes with scikit-learn."""
    return ["scikit-learn"] if any("integrations" in test for test in tests) else []


def _copy_sources(checkout: pathlib.Path, target: pathlib.Path) -> None:
    """What the wheel is built from, and the tests; the build leaves nothing in the checkout."""
    target.mkdir()
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in ("autodrop_ext", "benchmarks", "csrc", "examples", "tests", "triton_kernels"):
        shutil.copytree(checkout / name, target / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(checkout / name, target)


def _versions(environment: pathlib.Path, asked: Sequence[str]) -> dict[str, str]:
    script = (
        "import importlib.metadata as m, platform, json, sys\n"
        "def v(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return ''\n"
        "names = ['torch', 'numpy', 'triton', 'autodrop_ext']\n"
        "found = {name: v(name) for name in names}\n"
        "found['python'] = platform.python_version()\n"
        "found['installed'] = '' if sys.argv[1] == 'python' else v(sys.argv[1])\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(_run(str(environment / "bin/python"), "-c", script, *asked))
    return found


def _run(*command: str, **environment: str) -> str:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


# ---- results and page -------------------------------------------------------------------------


def keep(cell: Cell) -> None:
    """Put a cell's result in the place of its last one."""
    cells: list[Cell] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    cells = [c for c in cells if _key(c) != _key(cell)] + [cell]
    cells.sort(key=lambda c: (c["library"], _as_numbers(c["version"])))
    RESULTS.write_text(json.dumps(cells, indent=1) + "\n")


def write_page() -> None:
    """Write the page from all results."""
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


def _key(cell: Cell) -> tuple[str, str]:
    """A newer patch of a minor version takes the place of an older one."""
    return cell["library"], ".".join(cell["version"].split(".")[:2])


def _as_numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


def outcome(cell: Cell) -> str:
    """A cell in words."""
    words = [f"{cell['passed']} passed"]
    words += [f"{cell['failed']} failed"] if cell["failed"] else []
    words += [f"{cell['skipped']} skipped"] if cell["skipped"] else []
    return ", ".join(words)


def render(cells: Sequence[Cell]) -> str:
    """The page ``docs/compatibility.md``."""
    parts = [HEAD]
    for library, title in TITLES.items():
        rows = [cell for cell in cells if cell["library"] == library]
        if not rows:
            continue
        first = "" if library in ("torch", "python") else f" {library} |"
        parts.append(f"\n## {title}\n\n|{first} torch | Python | numpy | triton | tests |\n")
        parts.append(f"|{':-- |' if first else ''}:-- |:-- |:-- |:-- |:-- |\n")
        for cell in rows:
            mark = "" if not cell["stand_ins"] else " *"
            lead = f" {cell['version']} |" if first else ""
            parts.append(
                f"|{lead} {cell['torch']}{mark} | {cell['python']} | {cell['numpy']} "
                f"| {cell['triton'] or '-'} | {outcome(cell)} |\n"
            )
        for cell in rows:
            failed = "".join(f"\n- `{name}`" for name in cell["failures"])
            parts += [f"\nFailed with {library} {cell['version']}:\n{failed}\n"] if failed else []
    return "".join(parts)


TITLES = {
    "torch": "torch",
    "python": "Python",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "lightning": "lightning",
}

HEAD = """# Compatibility

`make compatibility` writes this page. For each row it creates a fresh environment, installs this \
checkout's wheel with the versions shown and the newest compatible versions of everything else, \
and runs tests of the package. The machine has no GPU, so the tests cover the CPU kernels, the \
reference, and the Triton kernels in Triton's interpreter.

The rows were measured with the package as it was before its meter became a count sketch, and \
have not been repeated since.

The rows for torch and Python run `tests/schedulers/test_{autodrop,epoch}.py`, \
`tests/ops/test_operations.py` and `tests/test_{faults,meter,parts,state}.py`. The rows for other \
libraries run their file in `tests/integrations/`.

\\* The CUDA build of torch, with empty stand-ins for the CUDA libraries.
"""


if __name__ == "__main__":
    main()

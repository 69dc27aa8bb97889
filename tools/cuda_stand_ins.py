"""Lets a CUDA build of torch be imported on a CPU without its gigabytes of CUDA libraries.

``python tools/cuda_stand_ins.py SITE_PACKAGES`` looks which shared libraries the torch in there
needs and does not find, and puts a library of that name next to it whose functions return 0. The
loader is content, and nothing calls them, because the real CUDA runtime (a megabyte) finds no
driver and torch sees no GPU. For tests of CPU code on many versions of torch, and for nothing else.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

# Initialised by torch before it knows whether there is a GPU, so they have to be real; each is
# small. Their names are those of the packages that bring them.
REAL = ("nvidia-cuda-runtime", "nvidia-cuda-cupti")

# Of the functions in libraries whose symbols have no versions.
PREFIXES = ("cufile", "cuFile", "cusparseLt", "nccl", "nvshmem", "nvrtc", "nvtx")

# Where it is missing, torch knows that there is no GPU.
DRIVER = "libcuda.so.1"


def main() -> None:
    """Put stand-ins for the libraries that torch does not find next to it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site_packages", type=pathlib.Path)
    site = parser.parse_args().site_packages
    if not (site / "torch/lib").is_dir():
        sys.exit(f"{site}: expected a folder with torch in it")
    made = make_stand_ins(site)
    print(", ".join(made) if made else "nothing is missing")


def real_requirements(site: pathlib.Path) -> list[str]:
    """The packages of :data:`REAL`, in the versions that the torch in ``site`` asks for."""
    (metadata,) = site.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    wanted = re.findall(r"^Requires-Dist: (nvidia-cuda-[\w-]+) ?\(?(==[\w.*]+)", text, re.MULTILINE)
    found = [name + version for name, version in wanted if name.startswith(REAL)]
    toolkit = re.search(r"^Requires-Dist: cuda-toolkit\S*?\(?==(\d+\.\d+)", text, re.MULTILINE)
    if not found and toolkit:
        return [f"{name}=={toolkit[1]}.*" for name in REAL]
    return found


def make_stand_ins(site: pathlib.Path) -> list[str]:
    """Names of the libraries made, in ``torch/lib``, where torch's own libraries look."""
    folder = site / "torch/lib"
    present = {path.name for path in site.glob("**/*.so*")} | _system_libraries() | {DRIVER}
    needed: set[str] = set()
    versions: dict[str, set[str]] = {}  # by library
    functions: dict[str, set[str]] = {}  # by the version that is asked for, "" for none
    for library in folder.glob("lib*.so*"):
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-dW", str(library))))
        for name, version in _version_needs(_run("readelf", "-VW", str(library))):
            versions.setdefault(name, set()).add(version)
        symbols = _run("nm", "-D", "--undefined-only", str(library))
        for name, version in re.findall(r" U (\w+)(?:@(\S+))?$", symbols, re.MULTILINE):
            functions.setdefault(version, set()).add(name)
    # Functions without a version are put into each of the libraries without one: any library that
    # defines the name will do.
    plain = {name for name in functions[""] if name.startswith(PREFIXES)}
    missing = sorted(needed - present)
    for name in missing:
        nodes = {version: functions.get(version, set()) for version in versions.get(name, ())}
        _compile(folder / name, nodes, plain)
    return missing


def _version_needs(listing: str) -> list[tuple[str, str]]:
    """Pairs of library and version out of what readelf says."""
    needs, library = [], ""
    for line in listing.splitlines():
        if file := re.search(r"File: (\S+)", line):
            library = file[1]
        elif version := re.search(r"Name: (\S+) .*Version: \d+$", line):
            needs.append((library, version[1]))
    return needs


def _system_libraries() -> set[str]:
    listed = _run("/sbin/ldconfig", "-p")
    return {line.split()[0] for line in listed.splitlines()[1:] if line.strip()}


def _compile(target: pathlib.Path, nodes: dict[str, set[str]], plain: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, script = pathlib.Path(folder, "functions.c"), pathlib.Path(folder, "versions")
        functions = set().union(*nodes.values()) if nodes else plain
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in functions))
        script.write_text(
            "".join(
                f"{version} {{ global: {' '.join(f'{name};' for name in names)} }};\n"
                for version, names in nodes.items()
            )
        )
        flags = [f"-Wl,--version-script={script}"] if nodes else []
        flags += ["-shared", "-fPIC", "-w", f"-Wl,-soname,{target.name}"]
        _run("gcc", str(source), *flags, "-o", str(target))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()

"""The build: ``pip install .`` compiles ``csrc/`` with CMake and ninja into ``autodrop_ext._C``.

Everything else about the package is in ``pyproject.toml``. torch is not needed here.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ADVICE = {
    False: "It needs a C++17 compiler (Debian and Ubuntu: apt install g++; "
    "Fedora: dnf install gcc-c++).",
    True: "AUTODROP_CUDA=1 needs nvcc on the PATH or in CUDACXX, and a C++17 compiler.",
}


class BuildWithCMake(build_ext):
    """Build the extension as ``csrc/CMakeLists.txt`` says; the last line of a failure is advice."""

    def build_extension(self, extension: Extension) -> None:
        library = pathlib.Path(self.get_ext_fullpath(extension.name)).resolve()
        build = os.path.abspath(self.build_temp)
        version = self.distribution.get_version()
        configure = ["cmake", "-S", "csrc", "-B", build, "-G", "Ninja"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DAUTODROP_VERSION={version}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        environment = {**os.environ, "PATH": search_path()}
        try:
            for command in (
                configure,
                ["cmake", "--build", build],
                ["cmake", "--install", build, "--prefix", str(library.parents[1])],
            ):
                subprocess.run(command, env=environment, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            advice = ADVICE[os.environ.get("AUTODROP_CUDA") == "1"]
            raise SystemExit(
                f"{error}\nautodrop_ext was not built; the first error above says why. {advice} "
                "AUTODROP_CUDA=0 pip install . leaves out the CUDA kernels."
            ) from None


def search_path() -> str:
    """Return PATH, preceded by the folders of the Python packages cmake and ninja if installed.

    Their commands are not on the PATH if an environment is used without being activated.
    """
    folders = [os.environ.get("PATH", os.defpath)]
    for package, folder in (("ninja", "BIN_DIR"), ("cmake", "CMAKE_BIN_DIR")):
        if importlib.util.find_spec(package):
            folders.insert(0, getattr(importlib.import_module(package), folder))
    return os.pathsep.join(folders)


# setuptools writes build/ and *.egg-info into the checkout unless it is given another folder.
with tempfile.TemporaryDirectory() as scratch:
    setup(
        license="BSD-3-Clause",
        cmdclass={"build_ext": BuildWithCMake},
        ext_modules=[Extension("autodrop_ext._C", sources=[])],
        options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}},
        # triton_kernels is at the top of the repository for those who look for kernels; a
        # top-level package of that name belongs to another project.
        packages=[*find_packages(include=["autodrop_ext*"]), "autodrop_ext.triton_kernels"],
        package_dir={"autodrop_ext.triton_kernels": "triton_kernels"},
        package_data={"autodrop_ext": ["py.typed"]},
        include_package_data=False,  # it fails if egg_base is another folder
    )

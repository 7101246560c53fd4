"""Build `fastrnn._cpp`. Everything else is said in pyproject.toml.

The extension gets addresses and sizes from Python and is not linked to torch, so one build serves
every torch release.

Environment:
    CC, CXX            the compiler, GCC or Clang
    FASTRNN_CXXFLAGS   more compiler flags, after the ones below
    FASTRNN_NO_OPENMP  1 to build without OpenMP
    FASTRNN_NO_CPP     1 to leave the extension out; the backends in Python work without it
"""

import os
import shlex
import tempfile
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# No -ffast-math: linking with it can turn on flush-to-zero for the whole process. No -march=native:
# a wheel runs on other machines, and the sources pick the instruction set at run time.
CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]

OPENMP_TRIAL = """
#include <omp.h>
int main() {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += omp_get_num_threads();
  return threads == 0;
}
"""


EXTENSION = Extension(
    "fastrnn._cpp",
    sorted(set(glob("csrc/*.cpp")) - {"csrc/selftest.cpp"}),
    include_dirs=[pybind11.get_include()],
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    language="c++",
)


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        if self.compiler.compiler_type != "unix":
            raise PlatformError(
                "fastrnn's extension is written in GNU C++17: build it with GCC or Clang on Linux "
                "or macOS, or set FASTRNN_NO_CPP=1 to do without it (this compiler is of type "
                f"{self.compiler.compiler_type!r})"
            )
        openmp = ["-fopenmp"] if self.has_openmp() else []
        more = shlex.split(os.environ.get("FASTRNN_CXXFLAGS", ""))
        for extension in self.extensions:
            extension.extra_compile_args = [*CXXFLAGS, *openmp, *more]
            # No rpath and no copy of libgomp: under its plain name it is the one that torch has
            # loaded, and torch.set_num_threads holds here too. Clang brings libomp instead, which
            # torch does not know of.
            extension.extra_link_args = openmp
        super().build_extensions()

    def has_openmp(self) -> bool:
        if os.environ.get("FASTRNN_NO_OPENMP") == "1":
            self.warn("FASTRNN_NO_OPENMP=1: the extension will run on one thread")
            return False
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "trial.cpp")
            source.write_text(OPENMP_TRIAL)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=directory, extra_postargs=["-fopenmp"]
                )
                self.compiler.link_executable(
                    objects,
                    "trial",
                    output_dir=directory,
                    extra_postargs=["-fopenmp"],
                    target_lang="c++",
                )
            except (CompileError, LinkError):
                self.warn("no OpenMP with this compiler: the extension will run on one thread")
                return False
        return True


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[] if os.environ.get("FASTRNN_NO_CPP") == "1" else [EXTENSION],
)

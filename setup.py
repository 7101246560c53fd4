"""Build the extension `fastrnn._cpp`. All other metadata is in pyproject.toml.

The extension gets addresses and sizes from Python and is not linked to torch, so one build works
with every torch release.

Environment:
    CC, CXX              the compiler, GCC or Clang
    FASTRNN_CXXFLAGS     more compiler flags, after the ones below
    FASTRNN_NO_OPENMP    1 to build without OpenMP
    FASTRNN_NO_CPP       1 to build without the extension; the backends in Python work without it,
                         and the wheel is the same for every platform
    FASTRNN_REQUIRE_CPP  1 to fail if the extension cannot be built; otherwise it is left out
"""

import os
import shlex
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# setuptools replaces this module by its own.
from distutils.ccompiler import new_compiler  # isort: skip
from distutils.sysconfig import customize_compiler  # isort: skip

# No -ffast-math: linking with it can turn on flush-to-zero for the whole process. No -march=native:
# a wheel runs on other machines, and the engine selects the instruction set at run time.
CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    # The register tiles' loops span few cache lines wherever the linker puts them: otherwise a
    # change elsewhere can make a cell a tenth slower.
    "-falign-loops=64",
]

# What the sources require: GNU C++17, and Python's headers.
TRIAL = """
#include <Python.h>
#include <type_traits>
typedef float Vector __attribute__((vector_size(16)));
static_assert(std::is_same_v<decltype(Vector()[0] + 1.0f), float>);
int main() { return 0; }
"""

OPENMP_TRIAL = """
#include <omp.h>
int main() {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += omp_get_num_threads();
  return threads == 0;
}
"""


REQUIRED = os.environ.get("FASTRNN_REQUIRE_CPP") == "1"

EXTENSION = Extension(
    "fastrnn._cpp",
    sorted(set(glob("csrc/*.cpp")) - {"csrc/selftest.cpp"}),
    include_dirs=[pybind11.get_include()],
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    language="c++",
    # A failure that the trials did not predict is a warning too.
    optional=not REQUIRED,
)


def fails(compiler, source: str, flags: list[str], link: bool) -> str | None:
    """The compiler's error for a source that it cannot compile; None if it can."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trial.cpp")
        path.write_text(source)
        try:
            objects = compiler.compile([str(path)], output_dir=directory, extra_postargs=flags)
            if link:
                compiler.link_executable(
                    objects,
                    "trial",
                    output_dir=directory,
                    extra_postargs=flags,
                    target_lang="c++",
                )
        except (CompileError, LinkError, PlatformError) as error:
            return str(error)
    return None


def without_extension() -> str | None:
    """The reason to leave the extension out; None if it can be built."""
    if os.environ.get("FASTRNN_NO_CPP") == "1":
        return "FASTRNN_NO_CPP=1"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it requires the GIL, and free-threaded Python is not supported"
    compiler = new_compiler()
    if compiler.compiler_type != "unix":
        return (
            "it requires GCC or Clang on Linux or macOS, got a compiler of type "
            f"{compiler.compiler_type!r}"
        )
    customize_compiler(compiler)
    compiler.add_include_dir(sysconfig.get_path("include"))
    problem = fails(compiler, TRIAL, ["-std=c++17"], link=False)
    return problem and f"a trial of the C++ compiler failed: {problem}"


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        openmp = ["-fopenmp"] if self.has_openmp() else []
        more = shlex.split(os.environ.get("FASTRNN_CXXFLAGS", ""))
        for extension in self.extensions:
            extension.extra_compile_args = [*CXXFLAGS, *openmp, *more]
            # No rpath and no copy of libgomp: its plain name resolves to the copy that torch has
            # loaded, so torch.set_num_threads applies here too. Clang links libomp instead, which
            # torch does not use.
            extension.extra_link_args = openmp
        super().build_extensions()

    def has_openmp(self) -> bool:
        if os.environ.get("FASTRNN_NO_OPENMP") == "1":
            self.warn("FASTRNN_NO_OPENMP=1: the extension will run on one thread")
            return False
        if fails(self.compiler, OPENMP_TRIAL, ["-fopenmp"], link=True):
            self.warn("no OpenMP with this compiler: the extension will run on one thread")
            return False
        return True


left_out = without_extension()
if left_out:
    message = f"the fastrnn C++ extension is left out: {left_out}"
    if REQUIRED:
        raise SystemExit(f"{message}; FASTRNN_REQUIRE_CPP=1 makes this an error")
    print(f"warning: {message}", file=sys.stderr)
setup(cmdclass={"build_ext": BuildExt}, ext_modules=[] if left_out else [EXTENSION])

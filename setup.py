"""Build `fastrnn._cpp`. Everything else is said in pyproject.toml.

The extension gets addresses and sizes from Python and is not linked to torch, so one build serves
every torch release.

Environment:
    CC, CXX              the compiler, GCC or Clang
    FASTRNN_CXXFLAGS     more compiler flags, after the ones below
    FASTRNN_NO_OPENMP    1 to build without OpenMP
    FASTRNN_NO_CPP       1 to leave the extension out; the backends in Python work without it, and
                         the wheel is one for every platform
    FASTRNN_REQUIRE_CPP  1 to fail where the extension cannot be built, which otherwise is left out
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

# setuptools puts its own in place.
from distutils.ccompiler import new_compiler  # isort: skip
from distutils.sysconfig import customize_compiler  # isort: skip

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

# What the sources are written in: GNU C++17, and Python's headers.
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
    # What the trials did not foresee is a warning too.
    optional=not REQUIRED,
)


def fails(compiler, source: str, flags: list[str], link: bool) -> str | None:
    """What a compiler says of a source that it cannot compile; None if it can."""
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
    """Why the extension is left out; None if it can be built."""
    if os.environ.get("FASTRNN_NO_CPP") == "1":
        return "FASTRNN_NO_CPP=1"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it relies on the lock that this free-threaded Python does without"
    compiler = new_compiler()
    if compiler.compiler_type != "unix":
        return (
            "it is written in GNU C++17, for GCC or Clang on Linux or macOS, and this compiler is "
            f"of type {compiler.compiler_type!r}"
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
            # No rpath and no copy of libgomp: under its plain name it is the one that torch has
            # loaded, and torch.set_num_threads holds here too. Clang brings libomp instead, which
            # torch does not know of.
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
    message = f"fastrnn's C++ extension is left out: {left_out}"
    if REQUIRED:
        raise SystemExit(f"{message}; and FASTRNN_REQUIRE_CPP=1 asks for it")
    print(f"warning: {message}", file=sys.stderr)
setup(cmdclass={"build_ext": BuildExt}, ext_modules=[] if left_out else [EXTENSION])

# The environment is created once. VENV=, PYTHON=, TORCH=, TRITON= and CXX= select another, for example
#   make test VENV=.venv-old TORCH='torch==2.6.0 --index-url https://download.pytorch.org/whl/cpu'
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The torch with which the platform wheel is tested; several GB on Linux, where PyPI has CUDA builds only.
NEWEST_TORCH ?= torch==2.14.1
# The versions of Python, torch and Numba for `make matrix`: every Python, from the oldest set to the newest.
MATRIX ?= 3.10-2.6.0-0.61.2 3.11-2.13.0 3.12-2.13.0 3.13-2.14.1
# The plan table was chosen with this version; others, from 3.6 on, generate different code.
TRITON ?= triton==3.7.1

bin := $(VENV)/bin
pip := $(bin)/python -m pip install -qq
# Not `python -m pytest`: it puts the root on the path, and with it a second copy of kernels/.
pytest := $(bin)/pytest -q
csrc := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc)
extension := build/extension-$(notdir $(VENV))
junctions := build/usr/lib/R/site-library/mlbench/data/DNA.rda
selftest := build/selftest-$(notdir $(lastword $(CXX)))

.DELETE_ON_ERROR:
.PHONY: help demo gallery junctions test coverage mutants heavy test-isa test-numba test-gpu aot bench readme bench-loaded bench-compare scaling lint sanitize fuzz soak \
	wheel matrix aarch64 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train a small language model with torch.nn and with fastrnn, and plot both
	$(bin)/python examples/char_lm.py --plot char_lm.png

gallery: $(VENV)/.examples ## run the examples and draw the plots of docs/examples
	$(bin)/python examples/one_step.py --plot docs/examples/one_step.png
	$(bin)/python examples/melody.py --plot docs/examples/melody.png
	$(bin)/python examples/classify.py --task sentiment --plot docs/examples/sentiment.png
	$(bin)/python examples/tag.py --plot docs/examples/tag.png
	$(bin)/python examples/translate.py --plot docs/examples/translate.png
	$(bin)/python examples/char_lm.py --plot docs/examples/char_lm.png
	$(bin)/python examples/forecast.py --cell gru --plot docs/examples/forecast.png
	$(bin)/python examples/gradients.py --plot docs/examples/gradients.png --flow docs/examples/flow.png
	$(MAKE) junctions
	$(bin)/python examples/classify.py --task dna --cell gru --hidden 32 --embedding 8 --dropout 0.2 --steps 2000 \
		--plot docs/examples/dna.png

# May not be shipped: the data frame DNA of the R package mlbench.
junctions: $(junctions) ## fetch the DNA data of examples/classify.py from Debian
$(junctions):
	mkdir -p build && cd build && rm -f r-cran-mlbench_*.deb && apt-get download r-cran-mlbench && \
		dpkg -x r-cran-mlbench_*.deb .

# Each worker begins with half of the files and then takes tests from the other. Tests that share a
# cached reference are neighbours, and mostly stay together.
parallel := -n 2 --dist worksteal

test: $(VENV)/.dev ## run the tests except the heavy ones
	$(pytest) $(parallel) -m "not heavy" tests

coverage: $(VENV)/.dev ## run the same tests and check line coverage
	$(pytest) $(parallel) -m "not heavy" tests --cov

mutants: $(VENV)/.dev ## plant faults one at a time and report which test finds each; MUTANTS= selects some
	$(bin)/python tests/mutants.py $(MUTANTS)

heavy: $(VENV)/.dev ## run the heavy tests: full grids, long sequences, every example with every cell
	$(pytest) -m heavy --timeout 1800 -o faulthandler_timeout=1860 tests

# Without AVX-512, `make test` runs with AVX2 already.
isa := $(if $(shell grep -s -m 1 avx512f /proc/cpuinfo),avx2) default
test-isa: $(VENV)/.dev ## run the engine tests on smaller instruction sets of this processor
	for isa in $(isa); do \
		ATEN_CPU_CAPABILITY=$$isa $(pytest) $(parallel) -m "isa and not heavy" tests || exit 1; done

test-numba: $(VENV)/.dev ## run the tests of the modules on the Numba backend
	FASTRNN_BACKEND=numba $(pytest) $(parallel) -m "contract and not heavy" tests

test-gpu: $(VENV)/.dev ## run the tests of the Triton kernels on the GPU of this machine
	FASTRNN_TEST_GPU=1 $(pytest) tests/test_gpu.py

aot: $(VENV)/.dev ## compile the GPU kernels without a GPU and check their resources; AOT= has options
	$(bin)/python -m fastrnn.kernels.triton $(AOT)

# Competitors are optional: those that are not installed are reported as missing. Timings use one process.
bench := $(bin)/pytest -q --timeout 900 -o faulthandler_timeout=960 \
	--benchmark-disable-gc --benchmark-columns=median --benchmark-sort=name
bench: build/probe $(VENV)/.bench ## measure fastrnn against torch.nn and the other competitors, and plot
	@mkdir -p build/bench && rm -f build/bench/results.json
	$(bench) --probe build/probe --memory --benchmark-json build/bench/results.json bench; \
		status=$$?; $(bin)/python bench/report.py build/bench/results.json && exit $$status

readme: ## write the last results of bench and bench-loaded into README.md and docs/
	$(bin)/python bench/report.py build/bench/results.json --readme \
		--beside $(wildcard build/bench/busy.json build/bench/one-core.json)

loaded := $(bench) --competitors torch.nn --seconds 0.5 \
	-k "not (layers or bidirectional or packed or thread or cell or deterministic)"
bench-loaded: $(VENV)/.bench ## measure against torch.nn on busy cores and on one core
	@mkdir -p build/bench && rm -f build/bench/one-core.json build/bench/busy.json
	taskset -c 0 $(loaded) --benchmark-json build/bench/one-core.json bench
	$(loaded) --busy --benchmark-json build/bench/busy.json bench

bench-compare: $(VENV)/.bench ## compare this tree with another commit: BASE=rev
	$(bin)/python bench/compare.py $(BASE)

scaling: build/scaling-engine $(VENV)/.bench ## predict the speed of 1 to 64 threads, and measure it on the cores that there are
	$(bin)/python bench/scaling.py $<

lint: $(VENV)/.dev ## check style and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $(csrc) $(wildcard bench/*.cpp)

sanitize: $(selftest) $(selftest)-openmp build/selftest-threads fuzz ## run the C++ self-test under the address, undefined-behaviour and thread sanitizers
	$(selftest)
	$(selftest)-openmp
	TSAN_OPTIONS=ignore_noninstrumented_modules=1 build/selftest-threads

# The argument checks of the extension. Python is not sanitized, so the runtime is preloaded.
fuzz: build/sanitized $(VENV)/.dev ## call the extension with wrong arguments under the same sanitizers
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192 \
		PYTHONPATH=$<:tests $(bin)/python tests/fuzz_extension.py

# By default glibc has a heap per thread, and the holes between blocks of many sizes accumulate.
soak: $(VENV)/.dev ## run layers of all kinds and sizes for SECONDS (default 300) and watch memory and threads
	MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 $(bin)/python tests/soak.py $(SECONDS)

# The sdist; from it a wheel for this platform, without a copy of libgomp, because it uses that of
# torch; and a pure-Python wheel for all platforms. All later installations use these files. The
# pure-Python wheel is tested with the torch of `make test`, the platform wheel with the newest.
wheel: $(VENV)/.dev ## build the sdist and the wheels, and test each wheel in a clean environment
	rm -rf dist build/wheel
	FASTRNN_REQUIRE_CPP=1 $(bin)/python -m build --quiet
	PATH="$(abspath $(bin)):$$PATH" $(bin)/auditwheel -v repair --exclude libgomp.so.1 --wheel-dir dist \
		dist/*-linux_*.whl 2>build/auditwheel.log || (cat build/auditwheel.log && false)
	rm dist/*-linux_*.whl
	FASTRNN_NO_CPP=1 $(bin)/python -m pip -qq wheel --no-deps --wheel-dir dist dist/*.tar.gz
	$(bin)/python -m venv build/wheel
	$(wheel) -m pip install -qq --upgrade pip
	$(wheel) -m pip install -qq $(TORCH)
	$(wheel) -m pip install -qq $(TRITON)
	$(wheel) -m pip install -qq "$$(echo dist/*-manylinux*.whl)[test]"
	cd build/wheel && bin/python -c "import torch, fastrnn, fastrnn._cpp as cpp, fastrnn.kernels as \
	kernels; assert all('site-packages' in m.__file__ for m in (fastrnn, cpp, kernels))"
	$(wheel) -m pip install -qq --force-reinstall --no-deps dist/*-none-any.whl
	export FASTRNN_NO_CPP=1; $(call test-wheel,installed)
	$(wheel) -m pip install -qq --force-reinstall --no-deps dist/*-manylinux*.whl
	$(wheel) -m pip install -qq $(NEWEST_TORCH)
	$(call test-wheel,isa or installed)

wheel := build/wheel/bin/python
test-wheel = cd build/wheel && bin/python -m fastrnn info && \
	bin/pytest -q $(parallel) -m "($(1)) and not heavy" $(CURDIR)/tests

# What pip builds from the sdist, with the compiler, for each Python that is on the path. On Linux
# torch from PyPI is the CUDA build, several GB each time.
matrix: $(MATRIX:%=build/matrix/%.txt) ## install the sdist with each Python and torch of MATRIX, and run the tests of the wheels there
	@cat $^

part = $(word $(1),$(subst -, ,$*))
build/matrix/%.txt: build/matrix/sdist
	rm -rf build/matrix/$* && python$(call part,1) -m venv build/matrix/$*
	cd build/matrix/$* && bin/python -m pip install -qq --upgrade pip && bin/python -m pip install -qq torch==$(call part,2)
	cd build/matrix/$* && FASTRNN_REQUIRE_CPP=1 bin/python -m pip install -qq --no-cache-dir --no-binary fastrnn \
		"$$(echo ../sdist/*)[test]" torch==$(call part,2) $(addprefix numba==,$(call part,3))
	cd build/matrix/$* && bin/python -m fastrnn info
	cd build/matrix/$* && bin/pytest -q $(parallel) -m "(isa or installed) and not heavy" $(CURDIR)/tests >pytest.log || \
		(cat pytest.log && false)
	cd build/matrix/$* && bin/python -c "import sys, torch, numba; print(f'Python {sys.version.split()[0]}, \
	torch {torch.__version__}, numba {numba.__version__}: {list(open(\"pytest.log\"))[-1]}', end='')" >../$*.log
	rm -rf build/matrix/$* && mv build/matrix/$*.log $@

build/matrix/sdist: setup.py pyproject.toml $(csrc) $(wildcard src/fastrnn/*.py src/fastrnn/*/*.py kernels/*/*.py) | $(VENV)/.dev
	rm -rf $@ && $(bin)/python -m build --quiet --sdist --outdir $@

# Debian's g++-aarch64-linux-gnu and qemu-user.
aarch64: build/selftest-aarch64 ## build the engine for aarch64 and run its self-test in an emulator
	OMP_NUM_THREADS=2 QEMU_LD_PREFIX=/usr/aarch64-linux-gnu qemu-aarch64 $<

clean: ## remove build results but not the environment
	rm -rf build dist src/*.egg-info src/fastrnn/*.so char_lm.png
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch first and alone, so that no other requirement can select another build, such as one for CUDA.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(pip) --upgrade pip
	$(pip) $(TORCH)
	$(pip) $(TRITON)
	$(pip) --upgrade 'setuptools>=77' 'pybind11>=2.12'
	@touch $@

$(extension): setup.py $(filter-out csrc/selftest.cpp, $(csrc)) | $(VENV)/.torch
	FASTRNN_REQUIRE_CPP=1 $(bin)/python setup.py --quiet build_ext --inplace --force
	@mkdir -p build && touch $@

# Without FASTRNN_NO_CPP pip would compile the extension again at every change of pyproject.toml.
$(VENV)/.demo $(VENV)/.examples $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(extension)
	FASTRNN_NO_CPP=1 $(pip) --no-build-isolation --editable '.[$*]'
	@touch $@

build/probe: bench/probe.cpp
	@mkdir -p build
	$(CXX) -O2 -std=c++17 -Wno-psabi -pthread $< -o $@

# The flags of setup.py. parallel.cpp is replaced.
build/scaling-engine: bench/scaling.cpp $(filter-out csrc/bindings.cpp csrc/parallel.cpp csrc/selftest.cpp, $(csrc))
	@mkdir -p build
	$(CXX) -O3 -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=fast -falign-loops=64 -Icsrc \
		$(filter %.cpp, $^) -o $@

sanitizers := -fsanitize=address,undefined -fno-sanitize-recover=all
build/sanitized: setup.py $(filter-out csrc/selftest.cpp, $(csrc)) \
		$(wildcard src/fastrnn/*.py src/fastrnn/*/*.py) | $(VENV)/.torch
	rm -rf $@
	FASTRNN_REQUIRE_CPP=1 FASTRNN_CXXFLAGS="-O1 -g $(sanitizers)" $(bin)/python setup.py --quiet build_ext --build-lib $@ \
		--build-temp $@/objects --force
	cp -r src/fastrnn/*.py src/fastrnn/*/ $@/fastrnn

# The floating-point flags are those of setup.py.
$(selftest): more := $(sanitizers) -Wno-unknown-pragmas
$(selftest)-openmp: more := $(sanitizers) -fopenmp
# GCC's OpenMP does not report synchronisation to the sanitizer. Clang's does, through Archer. It
# handles vectors of 16 bytes at most, which are those of the generic engine.
build/selftest-threads: CXX := clang++
build/selftest-threads: more := -fsanitize=thread -fopenmp
build/selftest-aarch64: CXX := aarch64-linux-gnu-g++
build/selftest-aarch64: more := -fopenmp
$(selftest) $(selftest)-openmp build/selftest-threads build/selftest-aarch64: $(filter-out csrc/bindings.cpp, $(csrc))
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=fast \
		$(more) $(filter %.cpp, $^) -o $@

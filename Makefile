# The environment is made once. VENV=, PYTHON=, TORCH=, TRITON= and CXX= choose another, for example
#   make test VENV=.venv-old TORCH='torch==2.6.0 --index-url https://download.pytorch.org/whl/cpu'
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The wheel is tested beside this torch; several GB on Linux, where PyPI has builds for CUDA only.
NEWEST_TORCH ?= torch==2.14.1
# Python, torch and Numba that `make matrix` tries: every Python, from the oldest of all to the newest.
MATRIX ?= 3.10-2.6.0-0.61.2 3.11-2.13.0 3.12-2.13.0 3.13-2.14.1
# With which the plan table was chosen; other versions from 3.6 on compile other code.
TRITON ?= triton==3.7.1

bin := $(VENV)/bin
pip := $(bin)/python -m pip install -qq
# Not `python -m pytest`, which would put the root, and so a second copy of kernels/, on the path.
pytest := $(bin)/pytest -q
csrc := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc)
extension := build/extension-$(notdir $(VENV))
junctions := build/usr/lib/R/site-library/mlbench/data/DNA.rda
selftest := build/selftest-$(notdir $(lastword $(CXX)))

.DELETE_ON_ERROR:
.PHONY: help demo gallery junctions test coverage heavy test-isa test-numba test-gpu aot bench readme bench-loaded bench-compare lint sanitize fuzz soak \
	wheel matrix aarch64 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train a small language model with fastrnn and with torch.nn, and plot both
	$(bin)/python examples/char_lm.py --plot char_lm.png

gallery: $(VENV)/.examples ## run the examples, and draw the plots of docs/examples
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

# What may not be shipped: the data frame DNA of R's package mlbench.
junctions: $(junctions) ## fetch the DNA that examples/classify.py learns, from Debian
$(junctions):
	mkdir -p build && cd build && rm -f r-cran-mlbench_*.deb && apt-get download r-cran-mlbench && \
		dpkg -x r-cran-mlbench_*.deb .

# Each worker begins with half of the files and then takes tests from the other. Tests that share a
# cached reference are neighbours, and mostly stay together.
parallel := -n 2 --dist worksteal

test: $(VENV)/.dev ## run the tests, but for the heavy ones
	$(pytest) $(parallel) -m "not heavy" tests

coverage: $(VENV)/.dev ## run the same tests, and check how many of the lines they run
	$(pytest) $(parallel) -m "not heavy" tests --cov

heavy: $(VENV)/.dev ## run the heavy tests: full grids, long sequences, every example with every cell
	$(pytest) -m heavy --timeout 1800 -o faulthandler_timeout=1860 tests

# Where there is no AVX-512, AVX2 is what `make test` runs with.
isa := $(if $(shell grep -s -m 1 avx512f /proc/cpuinfo),avx2) default
test-isa: $(VENV)/.dev ## run the engine's tests with only part of the processor's instruction set
	for isa in $(isa); do \
		ATEN_CPU_CAPABILITY=$$isa $(pytest) $(parallel) -m "isa and not heavy" tests || exit 1; done

test-numba: $(VENV)/.dev ## run the tests of the modules with the Numba backend
	FASTRNN_BACKEND=numba $(pytest) $(parallel) -m "contract and not heavy" tests

test-gpu: $(VENV)/.dev ## run the tests of the Triton kernels on this machine's GPU
	FASTRNN_TEST_GPU=1 $(pytest) tests/test_gpu.py

aot: $(VENV)/.dev ## compile the GPU kernels, without a GPU, and check what they take; AOT= has options
	$(bin)/python -m fastrnn aot $(AOT)

# The peers are optional: whoever is not installed is reported as missing. Timings have one process.
bench := $(bin)/pytest -q --timeout 900 -o faulthandler_timeout=960 \
	--benchmark-disable-gc --benchmark-columns=median --benchmark-sort=name
bench: build/probe $(VENV)/.bench ## measure fastrnn against torch.nn and every other peer, and plot
	@mkdir -p build/bench && rm -f build/bench/results.json
	$(bench) --probe build/probe --memory --benchmark-json build/bench/results.json bench; \
		status=$$?; $(bin)/python bench/report.py build/bench/results.json && exit $$status

readme: ## write the last run of `make bench`, and of bench-loaded, into README.md and docs/
	$(bin)/python bench/report.py build/bench/results.json --readme \
		--beside $(wildcard build/bench/busy.json build/bench/one-core.json)

loaded := $(bench) --peers torch.nn --seconds 0.5 \
	-k "not (layers or bidirectional or packed or thread or cell or deterministic)"
bench-loaded: $(VENV)/.bench ## measure against torch.nn on busy cores, and on one core
	@mkdir -p build/bench && rm -f build/bench/one-core.json build/bench/busy.json
	taskset -c 0 $(loaded) --benchmark-json build/bench/one-core.json bench
	$(loaded) --busy --benchmark-json build/bench/busy.json bench

bench-compare: $(VENV)/.bench ## measure this tree against another commit: BASE=rev
	$(bin)/python bench/compare.py $(BASE)

lint: $(VENV)/.dev ## check style and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $(csrc) bench/probe.cpp

sanitize: $(selftest) $(selftest)-openmp build/selftest-threads fuzz ## run the C++ under checks of addresses, undefined behaviour and threads
	$(selftest)
	$(selftest)-openmp
	TSAN_OPTIONS=ignore_noninstrumented_modules=1 build/selftest-threads

# The extension's argument checks. Python is not sanitized, so the runtime is loaded before it.
fuzz: build/sanitized $(VENV)/.dev ## call the extension with wrong arguments, under the same checks
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192 \
		PYTHONPATH=$<:tests $(bin)/python tests/fuzz_extension.py

# glibc would keep holes between blocks of many sizes, more and more of them, in a heap for each thread.
soak: $(VENV)/.dev ## run layers of all kinds and sizes for SECONDS, 300 if not said, and watch memory and threads
	MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 $(bin)/python tests/soak.py $(SECONDS)

# The sdist; from it a wheel for this platform, without a copy of libgomp, which is torch's; and one
# of Python alone for all platforms. Whatever is installed later comes from these files. The wheel of
# Python alone is tested beside the torch of `make test`, the other one beside the newest.
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

# What pip makes of the sdist, with the compiler, wherever that Python is on the path. On Linux PyPI's
# torch is that for CUDA, several GB each time.
matrix: $(MATRIX:%=build/matrix/%.txt) ## install the sdist beside each Python and torch of MATRIX, and run the wheels' tests there
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
aarch64: build/selftest-aarch64 ## build the engine for another architecture, and test it in an emulator
	OMP_NUM_THREADS=2 QEMU_LD_PREFIX=/usr/aarch64-linux-gnu qemu-aarch64 $<

clean: ## remove what was built, but not the environment
	rm -rf build dist src/*.egg-info src/fastrnn/*.so char_lm.png
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch first and alone: no other requirement can then bring a build of its own choice, such as one
# for CUDA.
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

# pip would compile the extension once more, and at every change of pyproject.toml.
$(VENV)/.demo $(VENV)/.examples $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(extension)
	FASTRNN_NO_CPP=1 $(pip) --no-build-isolation --editable '.[$*]'
	@touch $@

build/probe: bench/probe.cpp
	@mkdir -p build
	$(CXX) -O2 -std=c++17 -Wno-psabi -pthread $< -o $@

sanitizers := -fsanitize=address,undefined -fno-sanitize-recover=all
build/sanitized: setup.py $(filter-out csrc/selftest.cpp, $(csrc)) \
		$(wildcard src/fastrnn/*.py src/fastrnn/backends/*.py) | $(VENV)/.torch
	rm -rf $@
	FASTRNN_REQUIRE_CPP=1 FASTRNN_CXXFLAGS="-O1 -g $(sanitizers)" $(bin)/python setup.py --quiet build_ext --build-lib $@ \
		--build-temp $@/objects --force
	cp -r src/fastrnn/*.py src/fastrnn/backends $@/fastrnn

# The flags of the vector maths are those of setup.py.
$(selftest): more := $(sanitizers) -Wno-unknown-pragmas
$(selftest)-openmp: more := $(sanitizers) -fopenmp
# GCC's OpenMP does not tell the sanitizer who waits for whom. Clang's does, through Archer. It sees
# vectors of 16 bytes at most, which are those of the generic engine.
build/selftest-threads: CXX := clang++
build/selftest-threads: more := -fsanitize=thread -fopenmp
build/selftest-aarch64: CXX := aarch64-linux-gnu-g++
build/selftest-aarch64: more := -fopenmp
$(selftest) $(selftest)-openmp build/selftest-threads build/selftest-aarch64: $(filter-out csrc/bindings.cpp, $(csrc))
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=fast \
		$(more) $(filter %.cpp, $^) -o $@

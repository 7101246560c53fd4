# The environment is made once. VENV=, PYTHON=, TORCH=, TRITON= and CXX= choose another, for example
#   make test VENV=.venv-old TORCH='torch==2.6.0 --index-url https://download.pytorch.org/whl/cpu'
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# With which the plan table was chosen; other versions from 3.6 on compile other code.
TRITON ?= triton==3.7.1

bin := $(VENV)/bin
pip := $(bin)/python -m pip install -qq
# Not `python -m pytest`, which would put the root, and so a second copy of kernels/, on the path.
pytest := $(bin)/pytest -q
csrc := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc)
extension := build/extension-$(notdir $(VENV))
selftest := build/selftest-$(notdir $(lastword $(CXX)))

.DELETE_ON_ERROR:
.PHONY: help demo test heavy test-isa test-gpu aot bench readme bench-loaded bench-compare lint sanitize fuzz wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train a small language model with fastrnn and with torch.nn, and plot both
	$(bin)/python examples/char_lm.py --plot char_lm.png

test: $(VENV)/.dev ## run the tests, but for the heavy ones
	$(pytest) -n 2 -m "not heavy" tests

heavy: $(VENV)/.dev ## run the heavy tests
	$(pytest) -m heavy --timeout 1800 -o faulthandler_timeout=1860 tests

test-isa: $(VENV)/.dev ## run the engine's tests with only part of the processor's instruction set
	ATEN_CPU_CAPABILITY=avx2 $(pytest) -n 2 -m "isa and not heavy" tests
	ATEN_CPU_CAPABILITY=default $(pytest) -n 2 -m "isa and not heavy" tests

test-gpu: $(VENV)/.dev ## run the tests of the Triton kernels on this machine's GPU
	FASTRNN_TEST_GPU=1 $(pytest) tests/test_gpu.py

aot: $(VENV)/.dev ## compile the GPU kernels, without a GPU, and check what they take
	$(bin)/python -m fastrnn aot

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
	-k "not (layers or bidirectional or packed or thread or cell)"
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

sanitize: $(selftest) $(selftest)-openmp fuzz ## run the C++ under address and undefined-behaviour checks
	$(selftest)
	$(selftest)-openmp

# The extension's argument checks. Python is not sanitized, so the runtime is loaded before it.
fuzz: build/sanitized $(VENV)/.dev
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192 \
		PYTHONPATH=$<:tests $(bin)/python tests/fuzz_extension.py

wheel: $(VENV)/.dev ## build the sdist and from it the wheel, and test that in a clean environment
	rm -rf dist build/wheel
	$(bin)/python -m build --quiet
	$(bin)/python -m venv build/wheel
	build/wheel/bin/python -m pip install -qq --upgrade pip
	build/wheel/bin/python -m pip install -qq $(TORCH)
	build/wheel/bin/python -m pip install -qq $(TRITON)
	build/wheel/bin/python -m pip install -qq "$$(echo dist/*.whl)[test]"
	cd build/wheel && bin/python -c "import torch, fastrnn, fastrnn._cpp as cpp, fastrnn.kernels as \
	kernels; assert all('site-packages' in m.__file__ for m in (fastrnn, cpp, kernels))"
	cd build/wheel && bin/pytest -q -n 2 -m "not heavy" $(CURDIR)/tests

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
	$(bin)/python setup.py --quiet build_ext --inplace --force
	@mkdir -p build && touch $@

# pip would compile the extension once more, and at every change of pyproject.toml.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(extension)
	FASTRNN_NO_CPP=1 $(pip) --no-build-isolation --editable '.[$*]'
	@touch $@

build/probe: bench/probe.cpp
	@mkdir -p build
	$(CXX) -O2 -std=c++17 -Wno-psabi -pthread $< -o $@

sanitizers := -fsanitize=address,undefined -fno-sanitize-recover=all
build/sanitized: setup.py $(filter-out csrc/selftest.cpp, $(csrc)) \
		$(wildcard src/fastrnn/*.py src/fastrnn/backends/*.py) | $(VENV)/.torch
	rm -rf $@
	FASTRNN_CXXFLAGS="-O1 -g $(sanitizers)" $(bin)/python setup.py --quiet build_ext --build-lib $@ \
		--build-temp $@/objects --force
	cp -r src/fastrnn/*.py src/fastrnn/backends $@/fastrnn

# The flags of the vector maths are those of setup.py.
$(selftest): openmp := -Wno-unknown-pragmas
$(selftest)-openmp: openmp := -fopenmp
$(selftest) $(selftest)-openmp: $(filter-out csrc/bindings.cpp, $(csrc))
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=fast \
		$(sanitizers) $(openmp) $(filter %.cpp, $^) -o $@

# Every target sets up what it needs (apt packages, .venv, the build) and is quick when that is done.
#   make demo    the main job: sentence embeddings and a small language model, trained and sampled
#   make test    all tests that this machine can run
#   make bench   CPU benchmarks: JSON and charts in bench_output/
#   make format  rewrite the sources in the project's style      make lint   check style, types, common mistakes
#   make cuda    compile the CUDA backend (no GPU needed)         make clean  remove what was built
#   make test-cuda    all GPU tests, on a machine with a GPU

JOBS ?= $(shell nproc)
DEMO ?=
BENCH ?= suite

python := .venv/bin/python
onepass := PYTHONPATH=python $(python) -m onepass
cmake_flags := -DPython_EXECUTABLE=$(CURDIR)/$(python)
# The toolkit of the machine, or the one that tools/setup installs from PyPI when there is none.
nvcc = $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc) \
  $(abspath $(wildcard .venv/lib/python3*/site-packages/nvidia/cu1*/bin/nvcc)))
py_files := python tests examples bench tools/check-cuda
cxx_files = $(shell git ls-files '*.h' '*.cpp' '*.c' '*.cu' '*.cuh')

.PHONY: demo test test-cpp test-asan test-tsan test-python test-cuda bench format lint cuda cuda-build clean setup build
.DEFAULT_GOAL := build

setup:
	@tools/setup build

build: setup
	@cmake --preset cpu $(cmake_flags) >/dev/null
	@cmake --build --preset cpu -j $(JOBS)

demo: build
	@$(onepass) demo $(DEMO)

bench: build
	@$(onepass) bench $(BENCH)

test: test-cpp test-asan test-tsan test-python

test-cpp: build
	@ctest --test-dir build/cpu --output-on-failure -j $(JOBS)

test-asan test-tsan: test-%: setup
	@cmake --preset $* >/dev/null
	@cmake --build --preset $* -j $(JOBS)
	@ctest --test-dir build/$* --output-on-failure -j $(JOBS)

test-python: build
	@tools/setup build test
	@PYTHONPATH=python $(python) -m pytest -q tests/python

format:
	@tools/setup build lint
	@clang-format -i $(cxx_files)
	@.venv/bin/ruff format $(py_files)
	@.venv/bin/ruff check --fix $(py_files)

lint:
	@tools/setup build lint
	@clang-format --dry-run --Werror $(cxx_files)
	@.venv/bin/ruff format --check --quiet $(py_files)
	@.venv/bin/ruff check --quiet $(py_files)
	@.venv/bin/mypy python/onepass

cuda-build:
	@tools/setup build cuda
	@cmake --preset cuda $(cmake_flags) -DCMAKE_CUDA_COMPILER=$(nvcc) >/dev/null
	@cmake --build --preset cuda -j $(JOBS)

cuda: cuda-build
	@tools/check-cuda build/cuda/libonepass.a

# The C++ suite on every CUDA backend, the Python suite with CUDA tensors, and what only CUDA has.
test-cuda: cuda-build
	@tools/setup build test
	@build/cuda/tests/cpp/onepass_tests --gtest_filter='*/cuda*:*/hopper*' --gtest_brief=1
	@PYTHONPATH=python $(python) -m pytest -q -m cuda tests/python tests/cuda

clean:
	@rm -rf build dist demo_output bench_output python/onepass/lib/*.so

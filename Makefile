# `make lint test` checks a change in the environment that is active; .ci/run makes a fresh one.
.PHONY: lint format build test bench

CPP = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/*/*.h tests/*/*.cpp)

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

build:
	python setup.py build_ext --inplace

# gomp's spinning costs whole scheduler slices where other processes want the cores.
test: build
	OMP_WAIT_POLICY=passive pytest -n 2 --dist worksteal

bench: build
	python -m benchmarks.run

# Short names for the ways to build, test and run; `make help` lists them. CMakePresets.json and
# scripts/ do the work.
.DEFAULT_GOAL := help
.PHONY: help run build test lint coverage install clean
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr/local
JOBS := $(shell nproc)
CUDA_FLAGS = $(shell scripts/cuda_flags.sh)

help:
	@echo 'make run                  set up, build, replay the sample trace and verify it'
	@echo 'make test                 set up, build, run every test that this machine can run'
	@echo 'make build                set up and build build/release'
	@echo 'make lint                 formatting, warnings as errors, clang-tidy, shape of sources'
	@echo 'make coverage             line coverage of src/core and src/plan'
	@echo 'make install PREFIX=DIR   build and install under DIR (default /usr/local)'
	@echo 'make clean                remove build/'

build:
	@scripts/setup.sh build test
	@cmake --preset release $(CUDA_FLAGS) > /dev/null
	@cmake --build --preset release -j $(JOBS)

run:
	@scripts/setup.sh build
	@cmake --preset release $(CUDA_FLAGS) -DDIFFKV_BUILD_TESTS=OFF > /dev/null
	@cmake --build --preset release -j $(JOBS)
	build/release/cli/diffkv replay examples/traces/sample.csv --verify 200

test:
	@scripts/setup.sh build test
	@scripts/test.sh

lint:
	@scripts/setup.sh build test lint
	@scripts/lint.sh

coverage:
	@scripts/setup.sh build test coverage
	@scripts/coverage.sh

install:
	@scripts/setup.sh build
	@cmake --preset release -DDIFFKV_BUILD_TESTS=OFF > /dev/null
	@cmake --build --preset release -j $(JOBS)
	@cmake --install build/release --prefix '$(PREFIX)'

clean:
	rm -rf build

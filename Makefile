# Two commands set up everything on a fresh machine: `make demo` and `make test`.
#
#   PYTHON  interpreter that the virtual environment is made with
#   TORCH   torch requirement to install; any 2.6 or newer works, this one made the README's figures
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
SHELL := /bin/bash

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: demo test test-slow attacks check docs packages import-time compatibility bench bench-anytime bench-memory accuracy decisions train-table lengths ablations paper cifar cifar-part gpu gpu-build gpu-test gpu-sanitize gpu-bench pictures clean
.DELETE_ON_ERROR:

# torch first and by itself: with it there, the package's own requirement brings no other build of it.
# The wheel is built in isolation, without torch.
$(VENV)/.%: pyproject.toml setup.py csrc/CMakeLists.txt csrc/cuda/architectures.cmake $(CPP) $(wildcard triton_kernels/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)" numpy
	$(INSTALL) --editable ".[$*]"
	touch $@ $(if $(filter dev,$*),$(VENV)/.test)  # dev holds test

demo: $(VENV)/.demo   ## train on handwritten digits; a table and a picture in demo-output/
	$(BIN)/python examples/demo/run.py

test: $(VENV)/.test   ## the tests, the compiled core under sanitizers included; a few minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.test   ## what takes minutes, and a tensor of more than 2^31 elements, 13 GiB
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

attacks: $(VENV)/.test   ## fuzzers, interrupts and damaged checkpoints in large; a few minutes
	AUTODROP_ATTACKS=1 $(BIN)/python -m pytest tests/attacks -n 2 --dist worksteal

check: $(VENV)/.dev   ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

docs: $(VENV)/.dev   ## the site, into build/site; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -b html . build/site
	@echo "open build/site/index.html"

packages: $(VENV)/.dev   ## source distribution, a wheel for every Python on this machine, each tried
	$(BIN)/python tools/check_packages.py

pictures: $(VENV)/.bench   ## the pictures of the documents, in light and dark
	$(BIN)/python tools/pictures.py

import-time: $(VENV)/.test   ## what importing this package takes after torch
	$(BIN)/python tools/import_time.py

compatibility:   ## docs/compatibility.md: many versions of torch and others; an hour, 10 GB of downloads
	$(PYTHON) tools/compatibility.py

bench: $(VENV)/.test   ## throughput next to torch's own operations, minutes; see benchmarks/README.md
	$(BIN)/python -m pytest benchmarks/speed/bench_throughput.py -o addopts= --benchmark-json benchmark.json
	$(BIN)/python benchmarks/speed/report.py benchmark.json

bench-anytime: $(VENV)/.test   ## what AnytimeAutoDrop costs over a run; a minute
	$(BIN)/python benchmarks/speed/anytime.py counts --steps 1000 10000 100000 1000000
	$(BIN)/python benchmarks/speed/anytime.py run

bench-memory: $(VENV)/.test   ## memory of this process, and on the devices of a large model; seconds
	$(BIN)/python benchmarks/speed/memory.py

# DATA is a folder of CIFAR-10, see benchmarks/training.md; without it ResNet-18 is left out.
accuracy: $(VENV)/.bench   ## the error of a sketched angle next to its law; ten minutes
	$(BIN)/python benchmarks/accuracy/law.py motion --hashes 400
	$(BIN)/python benchmarks/accuracy/law.py runs $(if $(DATA),--cifar10 "$(DATA)")
	$(BIN)/python benchmarks/accuracy/law.py exact

decisions: $(VENV)/.bench   ## drops and final quality with sketched and with exact angles; minutes
	$(BIN)/python benchmarks/accuracy/decisions.py

train-table: $(VENV)/.bench   ## every schedule on two small models, three seeds; under half an hour
	$(BIN)/python benchmarks/training/command.py table

# Rows go to build/lengths as they come; a run that was killed goes on.
lengths: $(VENV)/.bench   ## one setting read at many lengths against schedules set for each; hours
	$(BIN)/python benchmarks/training/lengths.py run
	$(BIN)/python benchmarks/training/lengths.py report

ablations: $(VENV)/.bench   ## AutoDrop's settings one at a time; a quarter of an hour
	$(BIN)/python benchmarks/training/command.py ablations
	$(BIN)/python benchmarks/training/command.py ablations --model byte-transformer --vary window

# WHAT is one table or figure of the papers or several, such as WHAT=uai-table-2; without it they are
# listed with the data that they need. DATA is what --data takes, such as DATA="cifar10=FOLDER". The
# interpreter is $(PYTHON), because most of them need a GPU and their own build of torch.
paper:   ## a table or figure of the papers; see docs/papers.md
	$(PYTHON) benchmarks/papers/command.py paper $(WHAT) $(foreach d,$(DATA),--data $(d)) $(OPTIONS)

# DATA is a folder of CIFAR-10, see benchmarks/training.md. Needs a GPU: a CPU takes days.
cifar:   ## ResNet-18 on CIFAR-10 as in the papers, AutoDrop next to step decay
	$(PYTHON) benchmarks/papers/command.py run --model cifar10-resnet18 --schedule autodrop --schedule step --data "$(DATA)"
	$(PYTHON) benchmarks/papers/command.py report build/training --to build/training

# The same on a part of the images: SUBSET of them, EPOCHS times. With these it takes three quarters
# of an hour on two cores, one schedule on each. A run that is interrupted goes on when the command
# is given again.
SUBSET ?= 1000
EPOCHS ?= 40
cifar-part:   ## ResNet-18 on a part of CIFAR-10 on a CPU
	for schedule in "autodrop --set window=auto" step; do \
	  OMP_NUM_THREADS=1 $(PYTHON) benchmarks/papers/command.py run --model cifar10-resnet18 \
	    --schedule $$schedule --data "$(DATA)" --subset $(SUBSET) --epochs $(EPOCHS) --batch 32 \
	    --log-every 8 --output build/cifar-part & \
	done; wait
	$(PYTHON) benchmarks/papers/command.py report build/cifar-part --to build/cifar-part

# Offline, with the torch, pybind11, setuptools, cmake and ninja that $(PYTHON) already has.
# Each target takes less than four minutes and can run alone, so that a machine that is lent for a
# short time wastes none of it. Results go, row by row, to the folder OUT.
OUT ?= benchmarks/results
ON_GPU := AUTODROP_REQUIRE_GPU=1 timeout 200
# Only this package's kernels are instrumented: torch's take most of an hour. The option's name has
# changed between releases of the tool.
SANITIZER = compute-sanitizer --error-exitcode 9 \
  $$(compute-sanitizer --help | grep -q -e --kernel-name && echo --kernel-name || echo --filter) \
  kns=autodrop

gpu: gpu-test gpu-sanitize gpu-bench   ## on a machine with a GPU: the three below, one after the other

gpu-build:   ## on a machine with a GPU: build for it
	AUTODROP_CUDA=1 CUDAARCHS=native $(PYTHON) -m pip install --no-build-isolation --no-deps --editable .

gpu-test: gpu-build   ## on a machine with a GPU: tests, results to OUT/gpu-tests.txt
	mkdir -p $(OUT)
	set -o pipefail; $(ON_GPU) $(PYTHON) -u -m pytest -v tests/ops/test_gpu.py | tee $(OUT)/gpu-tests.txt

gpu-sanitize: gpu-build   ## on a machine with a GPU: compute-sanitizer, results to OUT/gpu-*check.txt
	mkdir -p $(OUT)
	for tool in memcheck racecheck initcheck synccheck; do \
	  set -o pipefail; PYTORCH_NO_CUDA_MEMORY_CACHING=1 AUTODROP_REQUIRE_GPU=1 timeout 55 \
	    $(SANITIZER) --tool $$tool $(PYTHON) -u -m pytest -v tests/ops/test_gpu.py \
	    -k "cuda and (close or ragged or dtypes) and not bits" | tee $(OUT)/gpu-$$tool.txt || exit 1; \
	done

gpu-bench: gpu-build   ## on a machine with a GPU: throughput, results to OUT/GPU-NAME.*
	$(PYTHON) benchmarks/speed/gpu.py --output $(OUT) --minutes 3

clean:
	rm -rf $(VENV) build dist *.egg-info autodrop_ext/*.so demo-output benchmark.json

# make pretrain · make test · make check · make bench: each sets up what it needs first, once.
#
# Variables: PYTHON (the interpreter the virtual environment is made from), ARGS (passed on to the command),
# DATA (a folder of images for the benchmarks of the data path and of learning; docs/results.md says what the latter need).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: setup pretrain check test test-long test-fuzz lint types bench bench-codes bench-curriculum bench-data bench-defaults \
  bench-dense bench-domains bench-factors bench-learning bench-messages bench-small-step bench-step gpu gpu-tables \
  gpu-bench-data wheel clean
.DELETE_ON_ERROR:

# One at a time: a second one waits, and then finds it done.
setup:
	@$(if $(shell command -v flock),flock pyproject.toml )$(MAKE) --no-print-directory $(VENV)/ready

# What the extra "all" brings, but for bincomm itself.
define requirements
from setuptools.compat.py310 import tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(each for extra in extras.values() for each in extra if not each.startswith("bincomm[")), sep="\n")
endef
export requirements

# The extension compiles while packages are unpacked, which one processor does.
# The stamp is written last, so an interrupted set-up is taken up again; without pip the environment is made anew.
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*)
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch numpy 'setuptools>=70.1' ninja pybind11
	@mkdir -p build
	@$(BIN)/python -c "$$requirements" > build/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement build/requirements.txt & packages=$$!; \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .; project=$$?; \
	  wait $$packages && exit $$project
	@touch $@

pretrain: setup
	$(BIN)/bincomm pretrain --recipe digits $(ARGS)

# Several tests run at a time, so each has one thread; tests of operations take two, which do not spin while they wait.
# Inductor takes long to find out which vector units the processor has: here it uses none.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TORCHINDUCTOR_VEC_ISA_OK=0 $(BIN)/python -m pytest

# What every change should pass before it is committed.
check: lint types
	$(PYTEST) -n 2 --dist worksteal -q -m "not slow and not kernels and not gpu and not long" $(ARGS)

test: setup
	$(PYTEST) -n 3 --dist loadfile -m "not long" $(ARGS)

test-long: setup
	$(PYTEST) -n 2 -m long --timeout 3600 $(ARGS)

# Readers and operations with random input, each for half of the time; ARGS="--minutes N", default 1. What is printed
# repeats a finding.
test-fuzz: setup
	minutes=$$(echo "$(ARGS)" | sed -n 's/.*--minutes[ =]*\([0-9.]*\).*/\1/p'); \
	half=$$(awk "BEGIN { print $${minutes:-1} / 2 }"); status=0; \
	for script in $(wildcard tests/fuzz_*.py); do $(BIN)/python $$script --minutes $$half || status=1; done; \
	exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	@mkdir -p build
	$(call measure,$(BIN)/python,cpu)

# Source distribution and wheel in dist/. The wheel is tried in new environments, with the oldest torch that it allows and
# with the newest, which takes gigabytes of downloads.
wheel: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python tests/check_wheel.py dist/*.whl

# For a machine with a GPU whose `python3` already has torch, triton and nvcc; nothing is installed there. In under ten
# minutes: correctness and the key figures. STAGES=tests,step chooses; ARGS=--dry rehearses without a GPU.
gpu:
	$(PYTHON) -m benchmarks.gpu benchmarks/results/gpu $(if $(STAGES),--stages $(STAGES)) $(ARGS)

# The long tables with peers under torch.compile, in parts of less than nine minutes each.
gpu-tables:
	$(if $(part-$(PART)),,$(error PART: expected 1 (sign_bce), 2 (coding_rate and hamming_topk), 3 (step of ViT-S) or 4 \
	  (step of ViT-B), got '$(PART)'))
	$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build
	$(part-$(PART))

part-1 = $(call measure_part,sign_bce,benchmarks/bench_sign_bce.py)
part-2 = $(call measure_part,coding_rate,benchmarks/bench_coding_rate.py benchmarks/bench_hamming.py)
part-3 = $(PYTHON) -m benchmarks.step benchmarks/results/gpu-step-small --case vit_small
part-4 = $(PYTHON) -m benchmarks.step benchmarks/results/gpu-step-base --case vit_base

# What was measured is written even where a check failed or the time ran out.
define measure_part
status=0; timeout --foreground -s INT $(or $(LIMIT),480) $(PYTHON) -m pytest $(2) -p no:cacheprovider \
	  -o python_files='bench_*.py' --benchmark-json=build/gpu-$(1).json $(ARGS) || status=$$?; \
	  $(PYTHON) benchmarks/report.py build/gpu-$(1).json benchmarks/results/gpu-$(1) && exit $$status
endef

bench-data: setup
	$(call measure_data,$(BIN)/python,cpu)

gpu-bench-data:
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(call measure_data,$(PYTHON),gpu)

bench-codes: setup
	$(BIN)/python -m benchmarks.codes benchmarks/results/codes

bench-factors: setup
	$(BIN)/python -m benchmarks.factors benchmarks/results/factors

# Of learning: hours, but what is measured is stored and not measured again; ARGS="--only REGEX" chooses.
bench-defaults: setup
	$(has_data)
	$(BIN)/python -m benchmarks.defaults benchmarks/results/defaults digits=digits cifar10="$(DATA)/cifar10" \
	  photo="$(DATA)/photo" sketch="$(DATA)/sketch" photographs="$(DATA)/photographs" $(ARGS)

bench-curriculum: setup
	$(has_data)
	$(BIN)/python -m benchmarks.curriculum benchmarks/results/curriculum cifar10="$(DATA)" $(ARGS)

bench-dense: setup
	$(has_data)
	$(BIN)/python -m benchmarks.dense benchmarks/results/dense photographs="$(DATA)" $(ARGS)

bench-domains: setup
	$(has_data)
	$(BIN)/python -m benchmarks.domains benchmarks/results/domains photo="$(DATA)/photo" sketch="$(DATA)/sketch" $(ARGS)

bench-learning: setup
	$(has_data)
	$(BIN)/python -m benchmarks.learning benchmarks/results/learning cifar10="$(DATA)" $(ARGS)

bench-messages: setup
	$(has_data)
	$(BIN)/python -m benchmarks.messages benchmarks/results/messages cifar10="$(DATA)" $(ARGS)

bench-step: setup
	$(BIN)/python -m benchmarks.step benchmarks/results/step-cpu

# What layout, precision and torch.compile do for a small network's step.
bench-small-step: setup
	$(BIN)/python -m benchmarks.small_step benchmarks/results/small-step

has_data = @test -d "$(DATA)" || { echo "DATA: expected a folder of images, got '$(DATA)'"; exit 2; }

define measure_data
	$(has_data)
	$(1) -m benchmarks.loader "$(DATA)" benchmarks/results/data-$(2)
endef

# Freed memory is kept: else glibc returns large tensors to the system, and what is measured is page faults, in every
# contender and more or fewer of them by chance.
bench: export MALLOC_MMAP_MAX_ = 0
bench: export MALLOC_TRIM_THRESHOLD_ = 17179869184

# Runs the benchmarks and writes their table; a table is replaced only by a session in which every check passed.
define measure
	$(1) -m pytest benchmarks -p no:cacheprovider -o python_files='bench_*.py' --benchmark-json=build/$(2).json $(ARGS)
	$(1) benchmarks/report.py build/$(2).json benchmarks/results/$(2)
endef

clean:
	rm -rf $(VENV) build *.egg-info bincomm/_C*.so

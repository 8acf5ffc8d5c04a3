# make demo | test | check | soak | clean. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= outputs/demo
DEMO_T2I_DIR ?= outputs/demo-t2i
SOAK_KILLS ?= 200
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What tests of eval/ compare with, off the path: it asks for torchvision, and torchmetrics would import it.
REFERENCES := torch-fidelity==0.4.0

.PHONY: help install demo demo-t2i test check soak format clean

help:
	@echo "make demo     distil the digits teacher and compare it with its student, into $(DEMO_DIR)"
	@echo "make demo-t2i distil a small text-to-image pipeline and judge it, into $(DEMO_T2I_DIR)"
	@echo "make test     the whole test suite, on the CPU"
	@echo "make check    formatting, lint, types, layering"
	@echo "make soak     kill training $(SOAK_KILLS) times and look at what is left (docs/reliability.md)"
	@echo "make format   format and fix what can be fixed"
	@echo "make clean    remove the virtual environment and caches; outputs/ stays"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/references --upgrade $(REFERENCES)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python train/demo.py --output_dir $(DEMO_DIR)

demo-t2i: $(INSTALLED)
	$(BIN)/python train/demo_t2i.py --output_dir $(DEMO_T2I_DIR)

# One thread a worker: two workers with torch's default threads fight over the same cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy diffusion_distill
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_layers.py

soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --kills $(SOAK_KILLS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

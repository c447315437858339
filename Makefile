# make demo        set up, train the whole cascade on captioned shapes on this machine, sample, evaluate: configs/shapes.py
#                  on a CPU, configs/shapes_large.py on a GPU or a TPU (CONFIG=configs/emoji.py: another one)
#                  (RUN=NAME SEED=N: another run, another seed; DEMO="decoder.steps=8000 ...": other fields)
# make test        set up, run the tests (make test-slow: the long ones, half an hour and 12 GiB)
# make parity      the comparisons with the peers' own code, run anew: an environment with torch, diffusers, ...
#                  (CHECKOUTS=DIR: also GLIDE, guided-diffusion, improved-diffusion, Karlo, DALL-E and ru-dalle, from
#                  glide-text2im, ... in that folder)
# make benchmark   ours against diffusers and dalle2-pytorch, in turn, on the GPU if there is one: .cache/benchmark.json
#                  (COMPARE="--cases prior-2,prior-8 --reps 25": python -m benchmarks.compare --help); use a quiet machine
# make notebooks   execute all of notebooks/ in full on this machine, and keep what they show (an hour on two CPU cores;
#                  NOTEBOOKS="01_gan 02_autoencoder_vae": only these); those of a run want runs/demo, so make demo first
# make lint        ruff
# make clean       remove the virtual environment and the caches (runs/ stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With an NVIDIA GPU, jax for it; on a TPU say EXTRAS=dev,tpu.
comma := ,
EXTRAS ?= dev$(if $(shell command -v nvidia-smi 2>/dev/null),$(comma)cuda)
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))
CONFIG ?= configs/shapes$(if $(filter cuda tpu,$(subst $(comma), ,$(EXTRAS))),_large).py
RUN ?= demo
SEED ?= 0

.PHONY: demo test test-slow parity benchmark notebooks lint setup clean

demo: setup
	@echo "training $(CONFIG)"
	@$(BIN)/python -m train $(CONFIG) all --run $(RUN) --seed $(SEED) $(DEMO)
	@$(BIN)/dalle2 evaluate runs/$(RUN)
	@echo
	@echo "Look at runs/$(RUN)/samples.png. Then generate what you like:"
	@echo "  $(BIN)/dalle2 generate runs/$(RUN) \"a large purple cross on a white background\" --count 4 --out samples"
	@echo "  $(BIN)/dalle2 describe runs/$(RUN)"
	@echo "  $(BIN)/python -m train describe $(CONFIG)"

test: setup
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -m "not slow and not live" -q --durations=8 -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	@$(BIN)/python -m pytest -m slow -q --durations=8

# One after the other: in which the peers run has torch and no jax.
PARITY := .venv-parity
LIVE := .cache/parity
MADE := clip prior schedulers karlo open_clip resize vae gan encoder_decoder
MAKE_REFERENCE = PARITY_REFERENCES=$(LIVE) $(PARITY)/bin/python -m tests.parity.torchvision_shim tests.parity.make_

parity: setup $(PARITY)/.ready
	@for name in $(MADE); do $(MAKE_REFERENCE)$$name || exit 1; done
ifdef CHECKOUTS
	@$(MAKE_REFERENCE)unet --guided $(CHECKOUTS)/guided-diffusion --glide $(CHECKOUTS)/glide-text2im
	@PYTHONPATH=$(CHECKOUTS)/guided-diffusion:. $(MAKE_REFERENCE)diffusion
	@$(MAKE_REFERENCE)glide --glide $(CHECKOUTS)/glide-text2im
	@$(MAKE_REFERENCE)karlo_original --karlo $(CHECKOUTS)/karlo
	@$(MAKE_REFERENCE)ddpm --improved $(CHECKOUTS)/improved-diffusion
	@$(MAKE_REFERENCE)dvae --dalle $(CHECKOUTS)/DALL-E
	@$(MAKE_REFERENCE)dalle1 --rudalle $(CHECKOUTS)/ru-dalle
endif
	@$(MAKE_REFERENCE)live $(LIVE) $(if $(CHECKOUTS),$(CHECKOUTS)/glide-text2im)
	@$(PARITY)/bin/python -m pytest --noconftest -q tests/parity/live_torch.py
	@PARITY_REFERENCES=$(LIVE) $(BIN)/python -m pytest -m "not slow" -q -s tests/parity tests/data/test_degrade.py

# Without the first line pip takes a torch for CUDA.
$(PARITY)/.ready: tests/parity/requirements.txt
	@$(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/parity/requirements.txt
	@touch $@

# Each is executed from its .py, which is what one edits.
NOTEBOOKS ?= $(basename $(notdir $(sort $(wildcard notebooks/[0-9]*.py))))

notebooks: setup $(VENV)/.notebooks
	@for name in $(NOTEBOOKS); do \
	  echo "notebooks/$$name.ipynb"; \
	  $(BIN)/jupytext --quiet --to ipynb --execute --output notebooks/$$name.ipynb notebooks/$$name.py || exit 1; \
	done

$(VENV)/.notebooks: pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[notebooks]"
	@touch $@

# The peers have pins of their own, so that they live apart.
BENCHMARK := .venv-benchmark
ON := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)

benchmark: setup $(BENCHMARK)/.ready
	@mkdir -p .cache
	@$(BIN)/python -m benchmarks.compare --device $(ON) --out .cache/benchmark.json $(COMPARE)

# Without the first line pip takes a torch for CUDA; dalle2-pytorch needs the old setuptools.
$(BENCHMARK)/.ready: benchmarks/requirements.txt
	@$(PYTHON) -m venv $(BENCHMARK)
	@$(BENCHMARK)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BENCHMARK)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

setup: $(READY)

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12 demo" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); Python 3.11 or newer is needed: make PYTHON=python3.12 demo" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@started=$$(date +%s); $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]" && echo "set up in $$(( $$(date +%s) - started )) s"
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) $(BENCHMARK) .cache .pytest_cache .ruff_cache

# On a new machine `make quickstart` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of 7,600 modules a run imports some, which Python compiles then: to do it for all takes a third of the set-up.
INSTALL := $(BIN)/pip install --quiet --no-compile
# What Python has compiled is kept beside the packages, whatever the caller's environment says of it: each of
# the tests' many processes would compile its 700 modules anew, for a second.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
# A file's kernels are compiled by one worker. tests/conftest.py puts the longest files first; those
# of tests/parity come in the order of their names, the longest two among the first.
LONGEST_FIRST := -n auto --dist loadfile --no-loadscope-reorder
# Most of the tests' time Mesa's llvmpipe compiles kernels that run a few times on little data: without
# LLVM's optimizations and with vectors of four that takes two thirds of the time, and gives the same
# numbers. What computes for minutes keeps them. numpy's threads would spin beside the other workers'.
QUICK := GALLIVM_PERF=nopt LP_NATIVE_VECTOR_WIDTH=128 OPENBLAS_NUM_THREADS=1
# Debian 12's Mesa (22.3) compiles kernels four times as slowly as that of `make test-dawn` (26.1): there the
# tests take the newer one, on wgpu-native as elsewhere. The file holds the command that is to run them.
DRIVEN := $(VENV)/.driven
# It is fetched while packages are installed where that Debian is likely to ask for it.
AHEAD := $(shell { . /etc/os-release; } 2>/dev/null && [ "$$ID" = debian ] && [ "$${VERSION_ID:-13}" -lt 13 ] && echo $(VENV)/.dawn/fetched)
# Vectors of eight are subgroups of eight lanes, for which llvmpipe has matrix units.
DAWN := LORA_WEBGPU=dawn VK_DRIVER_FILES=$(abspath $(VENV))/.dawn/driver.json LP_NATIVE_VECTOR_WIDTH=256
DAWN_PYTHON := $(VENV)/.dawn/py/bin/python
# Of the judges' tests, those that compute with tiny models alone (but test_paired.py, whose kernels on
# matrix units did not compile in five minutes so).
TINY := $(addprefix tests/parity/test_,adapted_embedding.py architectures.py chat_templates.py \
	multimodal_classes.py options.py peft_adapters.py scales.py tokenizers.py \
	trained_tokens.py)

# All folders with tests of theirs: to collect the others takes each worker ten seconds.
JUDGED := tests/parity tests/optim tests/benchmarks

.PHONY: quickstart test test-dawn parity parity-long lint docs clean

## quickstart: train a small adapter and print the held-out score before and after
quickstart: $(VENV)/.vulkan
	$(BIN)/lora pull smollm2-135m
	$(BIN)/lora train configs/quickstart.yaml
	$(BIN)/lora eval configs/quickstart.yaml --adapter runs/quickstart

## test: lint, types, and every test that needs no judge
test:
	-$(MAKE) --no-print-directory -j2 $(VENV)/.test $(AHEAD)
	$(MAKE) --no-print-directory -j2 lint $(DRIVEN)
	$(BIN)/lora pull smollm2-135m
	LORA_WEBGPU=wgpu $(QUICK) $$(cat $(DRIVEN)) -m pytest $(LONGEST_FIRST) --ignore=tests/parity \
		-p tests.support.covered_lines --durations=10
	LORA_WEBGPU=wgpu $$(cat $(DRIVEN)) -m pytest tests/parity

## test-dawn: the tests of `make test` through Dawn, on a software driver with matrix units
test-dawn: $(VENV)/.dawn/ready $(VENV)/.vulkan
	$(BIN)/lora pull smollm2-135m
	$(QUICK) $(DAWN) $(DAWN_PYTHON) -m pytest -m "not parity" $(LONGEST_FIRST) --ignore=tests/parity --durations=10
	$(DAWN) $(DAWN_PYTHON) -m pytest tests/parity

## parity: compare live with PyTorch, transformers, PEFT and llama.cpp
parity: $(VENV)/.parity $(DRIVEN)
	$(BIN)/lora pull smollm2-135m
	$(BIN)/lora pull gemma3-270m
	LORA_WEBGPU=wgpu $(QUICK) $$(cat $(DRIVEN)) -m pytest -m "parity and not long" $(LONGEST_FIRST) --durations=5 $(TINY)
	LORA_WEBGPU=wgpu $$(cat $(DRIVEN)) -m pytest -m "parity and not long" $(LONGEST_FIRST) --durations=5 \
		$(addprefix --ignore=,$(TINY)) $(JUDGED)

## parity-long: what test and parity leave out for time
parity-long: $(VENV)/.parity $(VENV)/.vulkan
	$(BIN)/lora pull smollm2-135m
	$(BIN)/lora pull gemma3-270m
	$(BIN)/python -m pytest -m long -n auto --dist loadfile

## docs: the API page, made of the docstrings, in build/api
docs: $(VENV)/.test
	$(BIN)/python -m pdoc lora '!lora.' lora.training.open_session lora.training.learning_rate \
		--output-directory build/api

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.test: pyproject.toml constraints.txt
	scripts/venv.sh $(PYTHON) $(VENV)
	$(INSTALL) -e '.[test]' -c constraints.txt
	touch $@

$(VENV)/.parity: $(VENV)/.test
	$(INSTALL) torch==2.13.0 -c constraints.txt
	$(INSTALL) -e '.[test,parity]' -c constraints.txt
	touch $@

$(VENV)/.vulkan: $(VENV)/.test scripts/vulkan.sh
	scripts/vulkan.sh $(BIN)/python
	touch $@

$(VENV)/.dawn/fetched: scripts/newer_mesa.sh
	scripts/newer_mesa.sh $(VENV)/.dawn
	touch $@

$(VENV)/.dawn/ready: $(VENV)/.test $(VENV)/.dawn/fetched scripts/dawn_driver.sh
	scripts/dawn_driver.sh $(BIN)/python $(VENV)/.dawn
	touch $@

# What is fetched anew is made ready anew; where nothing could be fetched the tests take the old one.
$(DRIVEN): $(VENV)/.vulkan scripts/old_mesa.sh $(wildcard $(VENV)/.dawn/fetched)
	if { scripts/old_mesa.sh $(BIN)/python && $(MAKE) $(VENV)/.dawn/ready; } >&2; \
		then echo env VK_DRIVER_FILES=$(abspath $(VENV))/.dawn/driver.json $(DAWN_PYTHON); \
		else echo $(BIN)/python; fi >$@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

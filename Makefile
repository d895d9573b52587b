# make setup: a .venv with everything; make demo: train, export and question the embedded demo; make test: the checks of
# every change; make test-all: those and what takes long (real launchers, two hosts, benchmarks), for a scheduled run
PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup demo test test-all quick lint docs bench clean

setup: .venv/complete

# torch comes first and pinned: an open range would fetch another build, and a second one later.
.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,docs,lm-eval,tensorboard,trl]'
	touch $@

demo: setup
	python launch/demo.py

test: setup lint docs
	pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not nightly'

test-all: setup lint docs
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes seconds, for every change.
quick: setup
	pytest -n 2 --dist loadfile -m 'not slow'

lint: setup
	ruff check .
	ruff format --check .
	mypy

# The pages and the API reference, offline, into build/docs; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench: setup
	python benchmarks/layer.py
	python benchmarks/decomposition.py
	python benchmarks/step.py
	python benchmarks/startup.py
	python benchmarks/loss.py
	python benchmarks/export.py
	python benchmarks/base_4bit_memory.py
	python benchmarks/base_4bit_step.py
	python benchmarks/checkpoint.py
	python benchmarks/communication.py
	python benchmarks/plan.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

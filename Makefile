# Everything here works on a bare machine with Python 3.11 or newer: each target first makes what it needs.
PYTHON ?= python3
TRAIN ?= sac --env mujoco/HalfCheetah-v5 --steps 20000 --seed 0
BENCH ?= --repeats 5
SUBSET ?= --arms dqn-rr1 redo-rr1 least-rr1 random-rr1 --tasks minatar/Breakout minatar/SpaceInvaders --seeds 0 1 2 --steps 50000
SCALING ?= --out runs/scaling

# `python -m` in this folder would put agents/, envs/ ... on the path under names that other packages use.
export PYTHONSAFEPATH := 1

INSTALLED := .venv/.installed
PEERS := .venv-peers/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint format bench bench-peers bench-replay bench-device bench-scaling lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install the locked versions and resprout itself (editable) into .venv

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("resprout needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

train: setup ## the main job: train SAC for about two minutes; flags in TRAIN="..."
	.venv/bin/resprout train $(TRAIN)

test: setup ## every test but the slow ones
	.venv/bin/pytest -n auto --dist loadfile -m "not slow"

test-slow: setup ## the slow tests
	.venv/bin/pytest -n auto --dist loadfile -m slow || [ $$? -eq 5 ] # 5: there are none

lint: setup ## style, format and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	mkdir -p .typing && ln -sfn .. .typing/resprout
	.venv/bin/mypy

format: setup ## put the code in the form that lint asks for
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup ## a small suite end to end, table and report in runs/bench; goes on where it was stopped; flags in SUBSET="..."
	.venv/bin/resprout bench run redo-minatar --jobs $$(nproc) $(SUBSET) --out runs/bench
	.venv/bin/resprout bench table redo-minatar --out runs/bench --markdown > runs/bench/table.md
	.venv/bin/resprout bench report redo-minatar --out runs/bench --html runs/bench/report.html

bench-peers: setup $(PEERS) ## speed beside sbx and Stable-Baselines3, in paired runs; flags in BENCH="..."
	.venv/bin/python -m resprout.benchmarks.peers --peers-python .venv-peers/bin/python $(BENCH)

bench-replay: setup $(PEERS) ## speed and memory of the replay beside Stable-Baselines3, cpprb and flashbax; flags in BENCH="..."
	.venv/bin/python -m resprout.benchmarks.replay_speed --peers-python .venv-peers/bin/python $(BENCH)

bench-device: setup $(PEERS) ## speed of the loop on the device beside rejax, against capacity and seeds; flags in BENCH="..."
	.venv/bin/python -m resprout.benchmarks.device_speed --peers-python .venv-peers/bin/python $(BENCH)

bench-scaling: setup ## speed against seeds, capacity, environments and width, and time to the first update; flags in SCALING="..."
	.venv/bin/python -m resprout.benchmarks.scaling $(SCALING)

$(PEERS): requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement requirements-peers.txt
	touch $@

lock: setup ## requirements.lock anew from pyproject.toml, newest versions
	.venv/bin/uv pip compile pyproject.toml --group dev --extra minari --extra pixels --extra ray --extra tensorboard --universal --python-version 3.11 \
	  --fork-strategy fewest --upgrade --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet \
	  --output-file requirements.lock

clean: ## remove both environments and every cache
	rm -rf .venv .venv-peers .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

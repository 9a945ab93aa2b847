# `make demo` and `make test` set up everything themselves: they need Python >= 3.10, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes: scripts in tests spend much of their time starting up. A file's tests stay together, for its fixtures.
PARALLEL := -n 2 --dist loadfile
# What has a target of its own.
OTHERWISE := not browser and not benchmark and not soak and not hosts
# Where ESC-10 is, for what measures on real sounds.
ESC10 ?= $(wildcard ../shared/data/ESC-10)
CODE := modeling_dls datasets_scripts dls_training dls_sounds dls_comparison hub_cards benchmarks tests *.py

.PHONY: demo test test-fast test-benchmarks test-soak test-hostile test-hosts test-browser docs/space.png docs/label.png floors quality style benchmark gpu clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python demo.py

test: quality
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not alone and $(OTHERWISE)" $(PARALLEL)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m alone

test-fast: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not alone and $(OTHERWISE)" $(PARALLEL)

# Whether the benchmarks measure what they say.
test-benchmarks: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m benchmark

# A run that is killed twenty times.
test-soak: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak --ignore tests/test_hostile_input.py

# Thousands of files and command lines, changed at random.
test-hostile: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak tests/test_hostile_input.py --hostile_results results/hostile_input.csv

# Two hosts as two network namespaces; needs root and ip: on Debian, apt-get install iproute2.
test-hosts: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m hosts

# Needs a browser: on Debian, apt-get install chromium chromium-driver.
test-browser: $(BIN)/.installed-browser
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser

$(BIN)/.installed-browser: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[space,browser]'
	touch $@

# A picture of the page, from a finished fine-tuning on ESC-10 (docs/space.md): `make docs/space.png RUN=runs/esc10`.
docs/space.png: $(BIN)/.installed-browser
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser -k real_clip --space_run $(RUN) --space_picture $@

# Pictures of dls label, from an index of ESC-50's audio folder (docs/labelling.md): `make docs/label.png INDEX=esc50.parquet`.
docs/label.png: $(BIN)/.installed-browser
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser -k test_pictures --label_index $(INDEX) --label_pictures docs

# The fast tests with the oldest releases that pyproject.toml allows: `make floors PYTHON=python3.10` for the oldest Python.
floors:
	$(PYTHON) -m venv --clear .venv-floors
	.venv-floors/bin/pip install --quiet --disable-pip-version-check uv
	.venv-floors/bin/uv pip install --quiet --python .venv-floors/bin/python --resolution lowest-direct -e '.[dev]'
	HF_HUB_OFFLINE=1 .venv-floors/bin/python -m pytest -m "not slow and not alone and $(OTHERWISE)" $(PARALLEL)

quality: $(BIN)/.installed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

style: $(BIN)/.installed
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Of speed, with the machine to itself; takes a while. `make benchmark ESC10=/data/ESC-10` measures on real sounds.
benchmark: $(BIN)/.installed
	$(BIN)/python benchmarks/run_all.py $(if $(ESC10),--esc10 $(ESC10))

# On a machine with a GPU, in about ten minutes: the tests that it changes, training steps of the paper's network, and the
# paper's recipe on ESC-10. Writes benchmarks/gpu.csv and results/gpu.
gpu: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu -n 8
	$(BIN)/python benchmarks/gpu.py --compile
	$(BIN)/python reproduce.py results/gpu.yaml --max_minutes 6 $(if $(ESC10),--corpus esc10=$(ESC10))

clean:
	rm -rf $(VENV) .venv-floors demo_output runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache

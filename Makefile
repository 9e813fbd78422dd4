# Needs Python >= 3.11 and make; everything else goes into $(VENV), from the locked files in requirements/.
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
RUNNER ?= python -m pytest

# A newer interpreter under another name will do where `python3` is too old.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# Some images of containers set it. The tests start hundreds of processes, and each would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
DEV := $(VENV)/.dev
# What running needs is part of what developing needs.
RUN := $(if $(wildcard $(DEV)),$(DEV),$(VENV)/.tools)

CLIENTS := tests/clients
NODE_DEPS := $(if $(shell command -v npm 2>/dev/null),$(CLIENTS)/node_modules/.package-lock.json)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install check test cov faults fuzz mutation bench walks house demo run picture chart docs docs-site lock audit wheels sbom licenses clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(DEV) ## create .venv with everything that development needs

check: $(DEV) ## lint, format, types, import and house rules, and the documents' links, citations, tables and English
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict shim devtools supply bench
	$(BIN)/lint-imports
	$(BIN)/zizmor --offline --pedantic --quiet --no-progress .github/workflows
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck .ci/run .ci/helm-tools helm/post-renderer/*.sh
	$(BIN)/python helm/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --quiet
	$(BIN)/python -m pytest --quiet $(addprefix tests/docs/test_,english.py references.py configuration.py metrics.py \
		commands_page.py links.py) tests/security/test_static.py tests/test_completeness.py

test: $(DEV) $(NODE_DEPS) ## run the tests (ARGS go to pytest)
	$(BIN)/$(RUNNER) $(ARGS)

cov: export COVERAGE_FILE := $(CURDIR)/.coverage
cov: ## run the tests and hold the branch coverage of shim/, subprocesses included
	rm -f .coverage .coverage.*
	$(MAKE) test RUNNER="coverage run -m pytest"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

faults: $(DEV) ## break everything on purpose and prove that nothing is lost (LONG=1: an hour; SEED=n: the same again; GATEWAY=1: three replicas on PostgreSQL; SOAK=1: ten million calls)
	$(BIN)/python -m tests.chaos$(if $(GATEWAY),.harness.replicas)$(if $(SOAK),.harness.soak) $(if $(LONG),--long) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: export AGENT_SHIM_FUZZ_INPUTS := $(or $(INPUTS),1000000)
fuzz: $(DEV) ## a million inputs into parsers, decoders, connections and a whole bridge (INPUTS=n: another number)
	$(BIN)/python -m pytest tests/properties/test_moving_sessions.py tests/chaos/test_fuzz.py tests/chaos/test_differential.py tests/chaos/test_websocket_differential.py tests/chaos/test_schemathesis.py $(ARGS)

mutation: $(DEV) ## change the core and the delivery path in small ways, and list the changes that no test notices (ARGS=names of mutants)
	$(PIP) install mutmut==3.8.1
	CI=1 $(BIN)/mutmut run --max-children 1 $(ARGS)
	$(BIN)/mutmut results

bench: $(DEV) ## measure against baselines in the same run (ONLY=latency: a part; ARGS=--docs: write the pages)
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(ARGS)

walks: $(DEV) ## count calls, files and depth of the ways through shim/ for seven events
	@$(BIN)/python -m bench.walks

house: $(DEV) ## size and shape of the shipped package
	@$(BIN)/python -m bench.house

demo: $(RUN) ## watch an unmodified agent work through the shim (ARGS=--once ends by itself, ARGS=--gateway: two replicas on PostgreSQL)
	@$(BIN)/agent-shim demo $(ARGS)

run: $(RUN) ## run the shim with config/agent-shim.yaml (ARGS go to the command)
	@$(BIN)/agent-shim run --config config/agent-shim.yaml $(ARGS)

docs: $(DEV) ## draw the state machines in docs/ from their tables
	$(BIN)/python docs/generate.py

docs-site: $(DEV) ## build the documents as a site into build/site; a dead link or an orphan page is an error
	$(BIN)/mkdocs build --quiet

picture: export AGENT_SHIM_REQUIRE_TOOLS := 1
picture: export AGENT_SHIM_PICTURE := docs/status-page.png
picture: $(DEV) $(NODE_DEPS) ## take docs/status-page.png anew: the status page after a busy hour, in a real browser
	$(BIN)/python -m pytest --quiet "tests/browser/test_status_look.py::test_a_busy_hour_on_a_desk"

chart: $(DEV) ## write the chart's schema and README and the Kustomize components from their sources
	$(BIN)/python helm/generate.py

lock: $(DEV) ## resolve the dependencies anew into requirements/ (ARGS=--upgrade for newer releases)
	$(PIP) install 'uv>=0.7'
	$(call compile,dev,--extra tools --extra postgres --extra otel --group dev)
	$(call compile,tools,--extra tools --extra postgres --group build --constraints requirements/dev.txt)
	$(call compile,run,--extra tools --extra postgres --constraints requirements/dev.txt)
	$(call compile,run-otel,--extra tools --extra postgres --extra otel --constraints requirements/dev.txt)

audit: $(DEV) ## known vulnerabilities of what the image runs (ARGS go to pip-audit); exit code 2 where nobody can tell
	$(BIN)/python -m supply.audit $(ARGS)

wheels: $(DEV) ## build the wheel and the source archive of agent-shim and the wheel of its developer tools into dist/
	$(BIN)/python -m hatchling build -t wheel -t sdist -d dist
	cd devtools && $(abspath $(BIN))/python -m hatchling build -t wheel -d $(CURDIR)/dist

sbom: $(DEV) ## CycloneDX bills of materials into dist/: the wheel's, and with IMAGE=name that image's
	$(BIN)/python -m supply.sbom dist/agent-shim.cdx.json
	$(if $(IMAGE),$(BIN)/python -m supply.sbom dist/agent-shim-image.cdx.json --image $(IMAGE))

licenses: $(DEV) ## write docs/reference/licenses.md from the locked packages' metadata
	$(BIN)/python -m supply.licenses --write

clean: ## remove what the targets above made
	rm -rf $(VENV) dist build mutants htmlcov .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache
	rm -rf .import_linter_cache $(CLIENTS)/node_modules
	find shim devtools tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# One file per purpose: dev (all), tools (demo, run), run (the container image).
define compile
$(BIN)/uv pip compile pyproject.toml --quiet --universal --generate-hashes --python-version 3.11 \
	--custom-compile-command "make lock" $(2) $(ARGS) --output-file requirements/$(1).txt
endef

$(VENV)/.%: requirements/%.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -c "" 2>/dev/null || { echo "creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "installing requirements/$*.txt into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements/$*.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Without them (no network, say) the tests that use them are skipped and say so.
$(CLIENTS)/node_modules/.package-lock.json: $(CLIENTS)/package-lock.json $(CLIENTS)/package.json
	-npm --prefix $(CLIENTS) ci --no-audit --no-fund --loglevel=error && touch $@

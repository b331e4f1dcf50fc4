# Every target does its own set-up. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ENGINE ?= embedded
UV = "$$(scripts/uv.sh)"
BIN := .venv/bin
BASE := var/models/gemma-3-270m-q4_k_m.gguf
# Two jobs at most: compiling llama.cpp at full width runs a small machine out of memory.
export UV_CONCURRENT_BUILDS := 2
export GOFLAGS := -p=2
# A virtual environment that somebody else has active is none of ours.
unexport VIRTUAL_ENV
# Python compiles what it imports once, not at every start.
unexport PYTHONDONTWRITEBYTECODE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## install everything into .venv, from the lock file

.venv/installed: pyproject.toml agentloop/pyproject.toml uv.lock
	scripts/debian.sh build-essential cmake git
	$(UV) sync --frozen --all-extras --no-extra spark --group dev
	$(UV) export --quiet --frozen --only-group converter | \
		$(UV) pip install --quiet --no-deps --target .venv/converter --upgrade --requirements -
	ln -sfn "$$(scripts/llama.sh)" .venv/llama.cpp
	touch $@

lint: types ## ruff, mypy --strict, import rules, buf, ansible-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	scripts/buf_breaking.sh
	scripts/proto.sh --check
	$(BIN)/python -m scripts.dashboards --check
	cd infra/ansible && ANSIBLE_HOME="$$PWD/../../var/ansible" ../../$(BIN)/ansible-lint --offline

types: install ## mypy --strict
	$(BIN)/mypy

format: install ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PYTEST = $(BIN)/python -m pytest -m "not soak" -n 2 --no-loadscope-reorder --max-worker-restart 0
PARTS = scripts/debian.sh iproute2 chromium haproxy prometheus prometheus-node-exporter prometheus-alertmanager

test: install ollama ## unit and integration tests on real parts, and a small cycle end to end
	$(PARTS)
	$(PYTEST) --durations 40 --durations-min 3 --cov --cov-report term:skip-covered --cov-fail-under 90 $(TESTS)

# The same tests in two stages. What they cover is judged together, where both ran.
COVERAGE := $(CURDIR)/var/coverage
unit: install ## the unit tests alone
	$(PARTS)
	@mkdir -p $(COVERAGE)
	COVERAGE_FILE=$(COVERAGE)/unit $(PYTEST) --cov --cov-report= tests/unit

integration: install ollama ## the tests on real parts and the small cycle, then the coverage of all, if make unit ran
	$(PARTS)
	@mkdir -p $(COVERAGE)
	COVERAGE_FILE=$(COVERAGE)/integration $(PYTEST) --cov --cov-report= tests/integration tests/e2e
	@if [[ -e $(COVERAGE)/unit ]]; then \
		$(BIN)/coverage combine --quiet --keep --data-file=$(COVERAGE)/all $(COVERAGE)/unit $(COVERAGE)/integration && \
		$(BIN)/coverage report --data-file=$(COVERAGE)/all --skip-covered --fail-under=90; \
	else echo "coverage: not judged, as make unit has not run here"; fi

security: install ## secrets, dependencies and their known vulnerabilities (AUDIT=off: not those), the pipeline's own file
	$(BIN)/python -m scripts.secret_scan
	$(BIN)/python -m scripts.dependency_policy
	"$$(scripts/actionlint.sh)" .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
ifeq ($(AUDIT),off)
	@echo "NOT AUDITED: AUDIT=off, so no known vulnerability was looked for" >&2
else
	$(BIN)/python -m scripts.vulnerabilities
endif

IMAGES ?= server
build: install ## the release, signed, with its images (IMAGES="server postgres") and bills of materials, in var/releases
	$(BIN)/python -m scripts.build $(foreach image,$(IMAGES),--image $(image)) $(ARGS)

images: install ## container images (IMAGES="server postgres"); how to run them: infra/containers
	$(BIN)/python -m scripts.images $(IMAGES)

load: install ## ask a deployed service as 16 callers at once for a minute (AGENTLOOP_SERVER, AGENTLOOP_TOKEN_FILE)
	$(BIN)/python -m scripts.load $(ARGS)

STAGES = lint types unit integration security build deploy-staging
pipeline: ## the first seven stages of .github/workflows/pipeline.yml, here
	@for stage in $(STAGES); do echo "── $$stage"; begun=$$SECONDS; $(MAKE) "$$stage"; \
		echo "── $$stage: $$((SECONDS - begun)) s"; done

soak: install ollama spark ## what takes longer: the small cycle on Ollama, playbooks on real hosts
	scripts/debian.sh iproute2 chromium prometheus-alertmanager
	scripts/base_image.sh
	$(BIN)/python -m pytest -m soak

soak-year: install ## 365 nights in about an hour, resumable; their picture: var/year/year.html (AGENTLOOP_YEAR_NIGHTS=60: fewer)
	$(BIN)/python -m benchmarks year

demo: ## the whole loop, once: serve, log, learn, gate, roll out (ENGINE=embedded|ollama)
	scripts/demo.sh $(ENGINE)

learn: install ## seven nights on the leaderboard's traffic, then the sealed score, once; takes hours, goes on where it was ended
	$(BIN)/python -m demo.learn $(ARGS)

ollama: install ## find or build Ollama (cached outside the checkout)
	scripts/ollama.sh

$(BASE): | install
	$(BIN)/python -c 'import pathlib, sys, demo.serving; demo.serving.assemble_model(pathlib.Path(sys.argv[1]))' $@

serve: install $(BASE) ## run the server on 127.0.0.1:50051 (gRPC) and 127.0.0.1:8080 (HTTP)
	$(BIN)/python -m grpc_server serve --migrate

prepare: install $(BASE) ## do now what the first night would do once: convert the base for training
	$(BIN)/python -m training prepare

dag: install ## run the nightly DAG once, now, against the server that runs
	$(BIN)/python scripts/night.py

airflow: install ## every night, by Airflow's own scheduler; its pages on http://127.0.0.1:8090
	$(BIN)/python -m scripts.scheduler $(ARGS)

warmup: install ## train a first champion from imported sets (SETS="var/datasets/<set> ...")
	$(BIN)/python scripts/night.py $(foreach set,$(SETS),--warmup $(set))

mlflow: install ## MLflow's pages of the nights, on http://127.0.0.1:5000, while the server's Postgres runs
	$(BIN)/python -m training mlflow $(ARGS)

rollout: install ## roll the candidate of a cycle out, by hand (CYCLE=<cycle id>)
	$(BIN)/python -m scripts.rollout rollout $(ARGS)

rollback: install ## put the champion before a cycle back (CYCLE=<cycle id>), or any (TO=<model version>); or code (CODE=prod)
	$(BIN)/python -m scripts.rollout rollback $(ARGS)

deploy-staging: install ## the server's release to staging, blue-green (STAGING=<inventory> RELEASE=<file>)
	$(BIN)/python -m scripts.deploy staging $(ARGS)

deploy-prod: install ## what staging ran, to production; shows the diff and asks (PROD=<inventory> RELEASE=<file>)
	$(BIN)/python -m scripts.deploy prod $(ARGS)

gpu-monitor: install ## GPUs as they work: load, memory by process, temperature (ARGS=--once looks once)
	$(BIN)/python -m grpc_server gpu-monitor $(ARGS)

train-gemma-2b: install ## fine-tune Gemma 2 2B on a cycle's dataset (CYCLE=<cycle id> BASE_GGUF=<file>)
	$(BIN)/python -m training finetune --config training/configs/gemma2-2b.yaml \
		--cycle "cycles/$${CYCLE:?which cycle? CYCLE=<cycle id>}" --base-gguf "$${BASE_GGUF:?the base model? BASE_GGUF=<file>}" $(ARGS)

wheel: ## build the wheel that callers install, into dist/
	$(UV) build --wheel --package agentloop --out-dir dist

spark: .venv/spark ## add Spark, for validation past one machine (AGENTLOOP_VALIDATION_ENGINE=spark; 460 MB)

.venv/spark: .venv/installed
	$(UV) sync --frozen --all-extras --group dev
	touch $@

proto: install ## generate agentloop/v1 from protos/
	scripts/proto.sh

dashboards: install ## make Grafana's dashboards of infra/grafana/dashboards.yaml
	$(BIN)/python -m scripts.dashboards

terraform: ## check infra/terraform with mocks (TF_PLUGIN_DIR=<folder with the AWS provider>)
	scripts/terraform.sh

terraform-cost: install ## what stage and prod of infra/terraform cost a month, by list prices (ARGS=--json)
	$(BIN)/python -m scripts.terraform_cost $(ARGS)

BENCHMARKS = AGENTLOOP_OLLAMA_BIN="$$(scripts/ollama.sh | tail -1)" $(BIN)/python -m benchmarks
bench: install ollama $(BASE) ## run every benchmark and render docs/benchmarks.md (make bench-NAME: one)
	$(BENCHMARKS)

ci: lint test ## what .ci/run runs

bench-%: install ollama $(BASE)
	$(BENCHMARKS) $*

clean: ## remove what was built here (state in var/ and cycles/ stays; make clean-state removes it)
	rm -rf examples/go/gen examples/typescript/{dist,gen,node_modules} .venv .venv-serving dist .coverage coverage.xml .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-state: ## remove the log, the models and the cycles of this checkout
	rm -rf var cycles

.PHONY: help install lint format test soak soak-year demo learn ollama spark serve prepare dag warmup mlflow rollout rollback deploy-staging deploy-prod gpu-monitor train-gemma-2b wheel proto dashboards terraform terraform-cost bench ci types unit integration security build images load pipeline clean clean-state airflow

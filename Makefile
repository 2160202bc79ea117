# `make run` and `make test` need Python 3.11 to 3.13, make and g++; the rest they install.

PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
UV = $(shell command -v uv || echo .tools/bin/uv)
MINUTES ?= 100
# The chart's tools and what its objects are checked against; all of them Go modules.
HELM_VERSION := v4.3.1
HELM_DOCS_VERSION := v1.14.2
KUBERAY_VERSION := v1.6.2
KUBERNETES_VERSION := v1.34.4
PROMETHEUS_OPERATOR_VERSION := v0.92.1
CHART := helm/t5-summarizer
IMAGE ?= t5-serve
BUILDER ?= docker
BASE_IMAGE ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-cluster cluster-up cluster-down lint start-time lock image chart chart-tools demo-data demo-train demo-eval bench-engine bench-precision

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

KERNELS := $(wildcard serve_app/engine/native/*.cpp serve_app/engine/native/*.h)

$(VENV)/.installed: requirements-dev.lock pyproject.toml $(KERNELS)
	@command -v uv >/dev/null || test -x .tools/bin/uv || \
		$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools uv==$(UV_VERSION)
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python requirements-dev.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -m compileall -q serve_app
	@$(BIN)/python -m serve_app.engine.native
	@touch $@

run: $(VENV)/.installed ## the service on the demo model, with its page (ARGS: t5-serve run --help)
	@$(BIN)/t5-serve run $(ARGS)

test: lint chart-tools ## everything: lint, types, unit and integration tests
	$(BIN)/pytest $(ARGS)

test-cluster: $(VENV)/.installed chart-tools ## a real Kubernetes cluster on this machine, and its tests (root, go)
	$(BIN)/pytest tests/cluster --timeout=1200 --capture=no --verbose --exitfirst $(ARGS)

cluster-up: $(VENV)/.installed chart-tools ## that cluster, with the image and the operator's, to use by hand
	@$(BIN)/python -m tests.cluster up

cluster-down: $(VENV)/.installed ## stop it and remove what it made
	@$(BIN)/python -m tests.cluster down

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

start-time: $(VENV)/.installed ## seconds from start to the first summary
	@$(BIN)/t5-serve run --once

lock: $(VENV)/.installed ## the lock files from pyproject.toml
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --extra dev --extra training --extra bench --extra usage \
		pyproject.toml --output-file requirements-dev.lock
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --constraint requirements-dev.lock \
		pyproject.toml --output-file requirements.lock
	sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | $(UV) pip compile --quiet --universal \
		--generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
		--python-version 3.11 - --output-file requirements-build.lock

# Told apart by version and commit, and the same commit gives the same times inside.
image: COMMIT = $(shell git rev-parse --short=12 HEAD)$(shell git diff --quiet HEAD || echo -dirty)
image: VERSION = $(shell sed -n 's/__version__ = "\(.*\)"/\1/p' serve_app/__init__.py)
image: EPOCH = $(shell git log -1 --format=%ct)
image: ## the container image, tagged with version and commit (BUILDER: buildah, podman)
	SOURCE_DATE_EPOCH=$(EPOCH) $(BUILDER) build --tag $(IMAGE):$(VERSION)-$(COMMIT) \
		$(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(COMMIT) \
		--build-arg CREATED=$$(date --utc --date=@$(EPOCH) +%Y-%m-%dT%H:%M:%SZ) $(ARGS) .

chart: chart-tools ## the chart's README and kuberay/rayservice.yaml, from its values
	.tools/bin/helm-docs --chart-search-root $(CHART) --log-level warning
	.tools/bin/helm template t5-summarizer $(CHART) --namespace default \
		--show-only templates/serviceaccount.yaml --show-only templates/rayservice.yaml \
		| sed -e '/helm.sh.chart:/d' -e '/managed-by: Helm/d' -e '/^# Source:/d' > kuberay/rayservice.yaml

chart-tools: ## helm, helm-docs and schemas for the tests of the chart (needs go; without it they skip)
	@if command -v go >/dev/null; then \
		$(MAKE) --no-print-directory .tools/helm-$(HELM_VERSION) .tools/helm-docs-$(HELM_DOCS_VERSION) \
			.tools/schemas-$(KUBERAY_VERSION)-$(KUBERNETES_VERSION)-$(PROMETHEUS_OPERATOR_VERSION); \
	else echo "no go here: without helm the tests of the chart are skipped"; fi

.tools/helm-v%:
	GOBIN=$(CURDIR)/.tools/bin go install helm.sh/helm/v4/cmd/helm@v$*
	@touch $@

.tools/helm-docs-v%:
	GOBIN=$(CURDIR)/.tools/bin go install github.com/norwoodj/helm-docs/cmd/helm-docs@v$*
	@touch $@

module = $$(go mod download -json $(1) | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
.tools/schemas-%:
	@mkdir -p .tools/schemas
	cd .tools/schemas && cp -f $(call module,github.com/ray-project/kuberay/ray-operator@$(KUBERAY_VERSION))/config/crd/bases/ray.io_rayservices.yaml \
		$(call module,k8s.io/kubernetes@$(KUBERNETES_VERSION))/api/openapi-spec/swagger.json \
		$(call module,github.com/prometheus-operator/prometheus-operator@$(PROMETHEUS_OPERATOR_VERSION))/example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml .
	@touch $@

demo-data: $(VENV)/.installed ## the demo model's data and vocabulary (Debian: uses apt's package lists)
	$(BIN)/python -m training.data
	$(BIN)/python -m training.tokenizer

demo-train: $(VENV)/.installed ## train the demo model for MINUTES, resuming, and put it into the package
	$(BIN)/python -m training.train --minutes $(MINUTES)
	$(BIN)/python -m training.export
	$(BIN)/python -m training.curve

demo-eval: $(VENV)/.installed ## judge the demo model in the package
	$(BIN)/python -m training.evaluate

bench-engine: $(VENV)/.installed ## the engine against transformers and CTranslate2 (ARGS: --help)
	$(BIN)/python -m bench.engine $(ARGS)

bench-precision: $(VENV)/.installed ## what bfloat16 and int8 change in the demo model's summaries
	$(BIN)/python -m bench.precision

# `make run` and `make test` need Python 3.11 to 3.13, make and g++; the rest they install.

PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
UV = $(shell command -v uv || echo .tools/bin/uv)
MINUTES ?= 100
# The tools of chart and workflows, and what the chart's objects are checked against; all of them Go
# modules.
HELM_VERSION := v4.3.1
HELM_DOCS_VERSION := v1.14.2
ACTIONLINT_VERSION := v1.7.12
KUBERAY_VERSION := v1.6.2
KUBERNETES_VERSION := v1.34.4
PROMETHEUS_OPERATOR_VERSION := v0.92.1
# A stamp for what tests/prometheus pins.
PROMETHEUS := $(shell cat tests/prometheus/go.* | cksum | cut -d' ' -f1)
CHART := helm/t5-summarizer
IMAGE ?= t5-serve
BUILDER ?= docker
ARGS ?=
FAULTS ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-chaos test-cluster test-delivery cluster-up cluster-down lint start-time lock image chart chart-tools helm deploy-tools demo-data demo-train demo-eval gate audit bench-engine bench-observability bench-overload bench-precision bench-soak bench-verify

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

CLUSTER_TESTS := --timeout=1200 --capture=no --verbose --exitfirst --durations=12
SHELL_SCRIPTS = $(shell grep --files-with-matches --dereference-recursive --max-count=1 '^#!.*bash' .ci scripts kuberay)
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

# Tests that start no Ray, in as many processes as there are processors here, up to four; torch with one
# thread in each.
WORKERS ?= $(shell echo $$(( $$(nproc) < 4 ? $$(nproc) : 4 )))
ALONE := tests/unit tests/chart tests/pipeline

test: lint chart-tools ## everything: lint, types, all tests but the cluster's (ARGS: pytest's, to run some)
ifeq ($(ARGS),)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadfile $(ALONE)
	$(BIN)/pytest tests/integration
else
	$(BIN)/pytest $(ARGS)
endif

test-cluster: $(VENV)/.installed chart-tools ## a real Kubernetes cluster on this machine, and its tests (root, go; FAULTS=1: rarer faults, too)
	T5_CLUSTER_FAULTS=$(FAULTS) $(BIN)/pytest tests/cluster --ignore=tests/cluster/delivery $(CLUSTER_TESTS) $(ARGS)

test-chaos: $(VENV)/.installed ## faults under load on this machine, 20 minutes at most (ARGS: --seed N, --faults; --help)
	@$(BIN)/python -m tests.chaos $(ARGS)

test-delivery: $(VENV)/.installed chart-tools ## from a push to a served summary, with Argo CD, on that cluster
	$(BIN)/pytest tests/cluster/delivery $(CLUSTER_TESTS) $(ARGS)

cluster-up: $(VENV)/.installed chart-tools ## that cluster, with the image and the operator's, to use by hand
	@$(BIN)/python -m tests.cluster up

cluster-down: $(VENV)/.installed ## stop it and remove what it made
	@$(BIN)/python -m tests.cluster down

lint: $(VENV)/.installed ## ruff, mypy and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR $(SHELL_SCRIPTS)

start-time: $(VENV)/.installed ## seconds from start to the first summary
	@$(BIN)/t5-serve run --once

lock: $(VENV)/.installed ## the lock files from pyproject.toml
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --extra dev --extra training --extra bench --extra usage \
		--extra gcp --extra tune pyproject.toml --output-file requirements-dev.lock
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --constraint requirements-dev.lock \
		pyproject.toml --output-file requirements.lock
	sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | $(UV) pip compile --quiet --universal \
		--generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
		--python-version 3.11 - --output-file requirements-build.lock
	printf 'httpx\npyyaml\n' | $(UV) pip compile --quiet --universal --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --constraint requirements-dev.lock \
		--python-version 3.11 - --output-file requirements-deploy.lock

image: ## the container image, tagged with version and commit (BUILDER: docker, podman, buildah)
	@LAYOUT=none BUILDER=$(BUILDER) IMAGE=$(IMAGE) scripts/build-image $(ARGS)

chart: $(VENV)/.installed chart-tools ## the chart's README, dashboards and kuberay/rayservice.yaml
	$(BIN)/python -m monitoring
	.tools/bin/helm-docs --chart-search-root $(CHART) --log-level warning
	.tools/bin/helm template t5-summarizer $(CHART) --namespace default \
		--show-only templates/serviceaccount.yaml --show-only templates/rayservice.yaml \
		| sed -e '/helm.sh.chart:/d' -e '/managed-by: Helm/d' -e '/^# Source:/d' > kuberay/rayservice.yaml

chart-tools: ## helm, helm-docs, schemas, actionlint and Prometheus for the tests (needs go; without it they skip)
	@if command -v go >/dev/null; then \
		$(MAKE) --no-print-directory .tools/helm-$(HELM_VERSION) .tools/helm-docs-$(HELM_DOCS_VERSION) \
			.tools/actionlint-$(ACTIONLINT_VERSION) \
			.tools/schemas-$(KUBERAY_VERSION)-$(KUBERNETES_VERSION)-$(PROMETHEUS_OPERATOR_VERSION)-rules \
			.tools/prometheus-$(PROMETHEUS); \
	else echo "no go here: without helm the tests of the chart are skipped"; fi

helm: .tools/helm-$(HELM_VERSION) ## that helm alone

deploy-tools: .tools/deploy/.installed ## what scripts/deploy imports

.tools/deploy/.installed: requirements-deploy.lock
	$(PYTHON) -m venv --clear .tools/deploy
	.tools/deploy/bin/pip install --quiet --disable-pip-version-check --require-hashes \
		--requirement requirements-deploy.lock
	@touch $@

.tools/helm-v%:
	GOBIN=$(CURDIR)/.tools/bin go install helm.sh/helm/v4/cmd/helm@v$*
	@touch $@

.tools/actionlint-v%:
	GOBIN=$(CURDIR)/.tools/bin go install github.com/rhysd/actionlint/cmd/actionlint@v$*
	@touch $@

.tools/helm-docs-v%:
	GOBIN=$(CURDIR)/.tools/bin go install github.com/norwoodj/helm-docs/cmd/helm-docs@v$*
	@touch $@

# Less all its service discovery, which takes half the time to build.
.tools/prometheus-%:
	cd tests/prometheus && CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -tags remove_all_sd \
		-o $(CURDIR)/.tools/bin/ github.com/prometheus/prometheus/cmd/prometheus \
		github.com/prometheus/prometheus/cmd/promtool
	@touch $@

module = $$(go mod download -json $(1) | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
.tools/schemas-%:
	@mkdir -p .tools/schemas
	cd .tools/schemas && cp -f $(call module,github.com/ray-project/kuberay/ray-operator@$(KUBERAY_VERSION))/config/crd/bases/ray.io_rayservices.yaml \
		$(call module,k8s.io/kubernetes@$(KUBERNETES_VERSION))/api/openapi-spec/swagger.json \
		$(call module,github.com/prometheus-operator/prometheus-operator@$(PROMETHEUS_OPERATOR_VERSION))/example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml \
		$(call module,github.com/prometheus-operator/prometheus-operator@$(PROMETHEUS_OPERATOR_VERSION))/example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml .
	@touch $@

audit: $(VENV)/.installed ## requirements.lock against known vulnerabilities (ARGS: pip-audit --help)
	@scripts/audit $(ARGS)

demo-data: $(VENV)/.installed ## the demo model's data and vocabulary (Debian's packages by apt, 400 MB)
	$(BIN)/python -m training.data
	$(BIN)/python -m training.passages
	$(BIN)/python -m training.tokenizer
	$(BIN)/python -m training.prepare

demo-train: $(VENV)/.installed ## train the demo model for MINUTES, resuming, and put it into the package
	$(BIN)/python -m training.train --minutes $(MINUTES)
	$(BIN)/python -m training.export
	$(BIN)/python -m training.curve

demo-eval: $(VENV)/.installed ## judge the demo model in the package
	$(BIN)/python -m training.evaluate

gate: $(VENV)/.installed ## judge engine and model (ARGS: --local, or an image in buildah's store; --help)
	@scripts/gate $(or $(ARGS),--local)

bench-engine: $(VENV)/.installed ## the engine against transformers and CTranslate2 (ARGS: --help)
	$(BIN)/python -m bench.engine $(ARGS)

bench-observability: $(VENV)/.installed ## what usage events, metrics and traces cost (ARGS: --help)
	$(BIN)/python -m bench.observability_parts
	$(BIN)/python -m bench.observability $(ARGS)

bench-overload: $(VENV)/.installed ## three times the load it can bear, a retry storm, fair share (ARGS: --quick)
	$(BIN)/python -m bench.overload $(ARGS)

bench-precision: $(VENV)/.installed ## what bfloat16 and int8 change in the demo model's summaries
	$(BIN)/python -m bench.precision

bench-soak: $(VENV)/.installed ## two hours of mixed load, and what grew (ARGS: --minutes N; --help)
	@$(BIN)/python -m bench.soak $(ARGS)

bench-verify: $(VENV)/.installed ## three loads live and simulated, 13 minutes (ARGS: --help)
	$(BIN)/python -m bench.verify $(ARGS)

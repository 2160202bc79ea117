# The image of head, workers and jobs. Builds with docker, podman or buildah:
#
#   make image                                                     # tag: version and commit
#   docker build --build-arg HUB_MODEL=google-t5/t5-small .        # with a hub model inside
#
# BASE_IMAGE may be any Debian that has python3 (3.11 to 3.13) with its venv module.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

# What runs, but for the package itself: gigabytes that change only with the lock file, so that an
# image of the next commit is a small layer to push and to pull.
FROM ${BASE_IMAGE} AS runtime
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# KubeRay's probes run bash and wget; the kernels want libgomp.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        bash ca-certificates libgomp1 procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 t5 \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home --shell /bin/bash t5
COPY requirements.lock /opt/venv/
RUN python3 -m venv /opt/venv \
    && PYTHONHASHSEED=0 /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check \
        --no-deps --require-hashes --requirement /opt/venv/requirements.lock \
    && /opt/venv/bin/pip uninstall --yes pip \
    && echo /opt/t5-serve/package > "$(/opt/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/t5-serve.pth"


FROM runtime AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONHASHSEED=0
WORKDIR /src
COPY requirements-build.lock ./
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY serve_app serve_app
RUN /opt/build/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /dist . \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --no-deps \
        --target /opt/t5-serve/package /dist/*.whl \
    # The engine's kernels are compiled here: the image that runs has no compiler.
    && cd / && /opt/venv/bin/python -m serve_app.engine.native

# A hub model for `model.name: /opt/t5-serve/model`; without one there is the demo model only.
ARG HUB_MODEL=""
ARG HUB_REVISION=""
RUN if [ -n "$HUB_MODEL" ]; then \
        HF_HOME=/tmp/hub /opt/venv/bin/python -c 'import shutil, sys; from serve_app.engine.checkpoint import resolve; shutil.copytree(resolve(sys.argv[1], sys.argv[2] or None).path, "/opt/t5-serve/model")' "$HUB_MODEL" "$HUB_REVISION" \
        && rm -rf /tmp/hub; \
    fi


FROM runtime
COPY --from=build /opt/t5-serve /opt/t5-serve

# HOME: with a read-only root, /tmp is what can be written to.
# LD_LIBRARY_PATH: where GKE's device plugin mounts the GPU driver.
ENV PATH=/opt/venv/bin:/opt/t5-serve/package/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /tmp
USER 1000:1000

ARG VERSION=""
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="t5-serve" \
      org.opencontainers.image.description="T5 summarization on Ray Serve" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"

# One machine, as `make run`; on Kubernetes KubeRay puts its own command here.
EXPOSE 8000
CMD ["t5-serve", "run", "--host", "0.0.0.0"]

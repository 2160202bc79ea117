# Argo CD as its own image has it, on Debian: one program under several names, with git and Helm.
# Redis is here, too, for want of a registry with one.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git openssh-client redis-server tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 999 argocd \
    && useradd --uid 999 --gid 999 --create-home argocd \
    && mkdir -p /app/config/ssh /app/config/tls /app/config/gpg/source /app/config/gpg/keys
COPY --chmod=0755 argocd helm /usr/local/bin/
RUN for name in server repo-server application-controller; do \
        ln -s argocd "/usr/local/bin/argocd-$name"; \
    done
USER 999
WORKDIR /home/argocd
ENTRYPOINT ["/usr/bin/tini", "--"]

# The image of agent-shim. `--build-arg PYTHON_IMAGE=` takes any image with CPython 3.11 or newer under /usr/local.
ARG PYTHON_IMAGE=python:3.13-slim

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# The backend that builds our wheel, and what the image runs: both locked, with hashes, wheels only. With
# `--build-arg REQUIREMENTS=run-otel.txt` the image can export traces, too.
ARG REQUIREMENTS=run.txt
COPY requirements/tools.txt requirements/${REQUIREMENTS} ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /build/backend \
 && python -m venv --without-pip /opt/agent-shim \
 && pip --python /build/backend/bin/python install --require-hashes --only-binary :all: -r tools.txt \
 && pip --python /opt/agent-shim/bin/python install --require-hashes --only-binary :all: -r "${REQUIREMENTS}"

COPY pyproject.toml README.md LICENSE ./
COPY shim shim
COPY config/agent-shim.yaml config/agent-shim.yaml
# Bytecode is checked against nothing: neither a time nor a path of this machine is in it. pip leaves two files that
# only say where the wheel was lying.
RUN /build/backend/bin/python -m hatchling build -t wheel -d dist \
 && pip --python /opt/agent-shim/bin/python install --no-cache-dir --no-deps --no-index dist/*.whl \
 && find /opt/agent-shim -name direct_url.json -delete \
 && /opt/agent-shim/bin/python -m compileall -q --invalidation-mode unchecked-hash -s /opt -p /opt /opt/agent-shim/lib \
 && install -D -m 0644 config/agent-shim.yaml /build/root/etc/agent-shim/config.yaml \
 && install -d -m 0700 -o 10001 -g 10001 /build/root/var/lib/agent-shim

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}

ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="agent-shim" \
      org.opencontainers.image.description="Serves an agent's legacy HTTP API and speaks the vendor's WebSocket API for it." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"

COPY --from=build /opt/agent-shim /opt/agent-shim
COPY --from=build /build/root /

ENV PATH=/opt/agent-shim/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# The store's default path is relative: it lies here. The user has a number and no name, as Kubernetes wants to see it.
WORKDIR /var/lib/agent-shim
VOLUME ["/var/lib/agent-shim"]
USER 10001:10001

EXPOSE 7080 7090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["agent-shim", "health", "--config", "/etc/agent-shim/config.yaml"]
ENTRYPOINT ["agent-shim"]
CMD ["run", "--config", "/etc/agent-shim/config.yaml"]

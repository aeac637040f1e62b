# sbp-fast for machines with NVIDIA GPUs: docs/how-to/gpu.md says how to build and run it.
# The torch that `make setup` installs brings CUDA; the driver is the host's, by way of the NVIDIA Container Toolkit.
FROM python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

# a compiler for hnswlib, and for what Triton builds when a kernel is first launched
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

# files that the container writes to a mounted folder belong to this user: --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --create-home --uid "$UID" sbp && install --directory --owner sbp /opt/sbp-fast
USER sbp
WORKDIR /opt/sbp-fast

COPY --chown=sbp Makefile pyproject.toml README.md LICENSE ./
COPY --chown=sbp sbp_fast ./sbp_fast
COPY --chown=sbp kernels ./kernels
COPY --chown=sbp configs ./configs
COPY --chown=sbp bench ./bench
COPY --chown=sbp tests ./tests

# another build of torch: --build-arg TORCH=... with --build-arg PIP_EXTRA_INDEX_URL=..., as for `make setup`
ARG TORCH
ARG PIP_EXTRA_INDEX_URL
RUN PIP_NO_CACHE_DIR=1 make setup ${TORCH:+TORCH="$TORCH"}

ENV PATH=/opt/sbp-fast/.venv/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["sbp-fast", "doctor"]

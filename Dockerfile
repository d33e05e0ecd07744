# Serves an ensemble. It was written without Docker at hand and has not been built by the authors.
#
#   docker build -t multicolm .                                             for CPUs
#   docker build -t multicolm --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#                --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .     for GPUs
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/ensemble:/ensemble" multicolm /ensemble/ensemble.yaml
#
# MULTICOLM_API_KEY sets the key that clients must send. Models of the Hub are kept in /models.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The base for GPUs comes without Python.
RUN command -v python3 >/dev/null && python3 -m venv --help >/dev/null 2>&1 || \
    (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && \
     rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/multicolm
ENV PATH=/opt/multicolm/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
RUN pip install --no-cache-dir torch --index-url ${TORCH_INDEX}

COPY pyproject.toml README.md LICENSE /src/
COPY multicolm /src/multicolm
COPY policies /src/policies
COPY registry /src/registry
RUN pip install --no-cache-dir '/src[serve,remote,peft]' && rm -rf /src

RUN useradd --create-home multicolm && mkdir -p /models && chown multicolm /models
USER multicolm
VOLUME /models
EXPOSE 8000
ENTRYPOINT ["multicolm", "serve", "--host", "0.0.0.0"]
CMD ["tiny"]

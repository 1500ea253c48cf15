# CPU image. Stage one builds the virtual environment, stage two carries it; the server runs as an ordinary user.
ARG BASE=python:3.11-slim
FROM ${BASE} AS build
WORKDIR /app
RUN python -m venv /opt/venv
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install --yes --no-install-recommends g++
# Where the index offers several builds of torch, TORCH_INDEX is the address of one that has the build for CPUs, or
# TORCH_FIND_LINKS a folder with that wheel.
ARG TORCH_INDEX=""
ARG TORCH_FIND_LINKS=""
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
RUN /opt/venv/bin/pip install -c constraints.txt ${TORCH_INDEX:+--no-deps --index-url "$TORCH_INDEX"} \
    ${TORCH_FIND_LINKS:+--find-links "$TORCH_FIND_LINKS"} torch
RUN /opt/venv/bin/pip install -c constraints.txt 'setuptools>=80' numpy torch
COPY model model
COPY weights weights
COPY engine engine
COPY server server
COPY training training
COPY terminal terminal
COPY calibration calibration
COPY release release
# For `moedial version`: docker build --build-arg COMMIT=$(git rev-parse --short=12 HEAD)
ARG COMMIT="unknown"
RUN echo "$COMMIT" > server/commit.txt
# Native kernels for every instruction set of this kind of machine; which one runs is chosen when the server starts.
RUN /opt/venv/bin/pip install --no-build-isolation -c constraints.txt '.[hub,otel]' && cd / && /opt/venv/bin/moedial version

FROM ${BASE}
RUN useradd --create-home --uid 10001 moedial
COPY --from=build /opt/venv /opt/venv
# By number, since Kubernetes' runAsNonRoot cannot tell that a name is not root's.
USER 10001:10001
WORKDIR /home/moedial
ENV PATH=/opt/venv/bin:$PATH MOEDIAL_HOST=0.0.0.0 MOEDIAL_PORT=8000
EXPOSE 8000
# /ready answers 503 until the model is loaded, which takes minutes with large ones. With TLS, give an own check.
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"MOEDIAL_PORT\"]}/ready', timeout=2)"]
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.title="moedial" org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="An inference server for mixture-of-experts language models"
ENTRYPOINT ["moedial"]
CMD ["serve"]

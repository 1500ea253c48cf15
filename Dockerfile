# CPU image. Stage one builds the virtual environment, stage two carries it; the server runs as an ordinary user.
FROM python:3.11-slim AS build
WORKDIR /app
RUN python -m venv /opt/venv
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Where the index offers several builds of torch, point TORCH_FIND_LINKS at the CPU wheel.
ARG TORCH_FIND_LINKS=""
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN /opt/venv/bin/pip install -c constraints.txt ${TORCH_FIND_LINKS:+--find-links "$TORCH_FIND_LINKS"} torch
COPY model model
COPY weights weights
COPY engine engine
COPY server server
COPY training training
COPY terminal terminal
RUN /opt/venv/bin/pip install -c constraints.txt '.[hub]'
# Native kernels for every instruction set of this kind of machine; which one runs is chosen when the server starts.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && cd / && /opt/venv/bin/python -m model.backends.cpu.kernels.build

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 moedial
COPY --from=build /opt/venv /opt/venv
USER moedial
WORKDIR /home/moedial
ENV PATH=/opt/venv/bin:$PATH MOEDIAL_HOST=0.0.0.0 MOEDIAL_PORT=8000
EXPOSE 8000
# /health answers 503 until the model is loaded; large ones take minutes. With TLS or another port, give an own check.
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s \
    CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"
STOPSIGNAL SIGTERM
ENTRYPOINT ["moedial"]
CMD ["serve"]

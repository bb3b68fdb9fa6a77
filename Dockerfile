# The service in a container: models, indexes and keys are mounted, nothing of them is in the image.
#   docker build -t pairstream-serve .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pairstream pairstream
COPY data data
COPY pretrain pretrain
COPY finetune finetune
COPY retrieval retrieval
COPY explain explain
COPY serve serve
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[serve,finetune]"

FROM python:3.12-slim-bookworm
COPY --from=build /opt/venv /opt/venv
RUN useradd --system --uid 10001 --no-create-home pairstream
USER 10001
# Idle threads must not spin, and nothing is fetched from a hub while requests are answered.
ENV PATH=/opt/venv/bin:$PATH OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["pairstream", "serve", "--host", "0.0.0.0", "--port", "8000"]
# Who may ask has to be said: `--api-keys FILE`, or `--open-to-all`.
CMD ["--help"]

# One file, one target a role: docker build --target api|daemons|migrate|worker-cpu|worker-gpu .
# Nothing secret is copied or set here; every setting comes from the environment (docs/deploy.md).
# Every file that pip takes is named by its SHA-256 in requirements/ (docs/adr/0028).

FROM python:3.12-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_DEPS=1
RUN useradd --uid 10001 --create-home loractl
WORKDIR /srv/loractl
COPY requirements requirements
RUN pip install --require-hashes --requirement requirements/build.txt

# The wheel, built once; .dockerignore leaves only what goes into it.
FROM base AS wheel
COPY . .
RUN pip wheel --no-build-isolation --wheel-dir /wheels .

# What API, daemons and migrate share: no torch.
FROM base AS server
RUN pip install --require-hashes --requirement requirements/server.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-index /wheels/loractl-*.whl && pip check
USER loractl

FROM server AS migrate
HEALTHCHECK NONE
CMD ["python", "-m", "registry.db.migrate"]

FROM server AS daemons
HEALTHCHECK --interval=30s --timeout=15s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os; from registry.db.engine import Database; Database(os.environ['LORACTL_DATABASE_URL']).ping()"]
CMD ["python", "-m", "registry.daemons.run"]

FROM server AS api
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=5 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
CMD ["uvicorn", "--factory", "registry.api.app:create_app", "--host", "0.0.0.0", "--port", "8080"]

# Workers differ in torch only.
FROM base AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --require-hashes --extra-index-url "$TORCH_INDEX" --requirement requirements/torch-cpu.txt

# PyPI's torch for Linux brings the CUDA libraries; the host brings the driver.
FROM base AS torch-gpu
RUN pip install --require-hashes --requirement requirements/torch.txt --requirement requirements/cuda.txt

FROM torch-cpu AS worker-cpu
RUN pip install --require-hashes --no-build-isolation --requirement requirements/worker.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-index /wheels/loractl-*.whl && pip check && install -d -o loractl /var/cache/loractl
USER loractl
ENV LORACTL_CACHE_DIR=/var/cache/loractl
# A worker is healthy when it reaches its registry; a running job is watched by its lease.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=5 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['LORACTL_URL'] + '/health', timeout=8)"]
CMD ["celery", "-A", "workers.app", "worker", "-Q", "cpu"]

FROM torch-gpu AS worker-gpu
RUN pip install --require-hashes --no-build-isolation --requirement requirements/worker.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-index /wheels/loractl-*.whl && pip check && install -d -o loractl /var/cache/loractl
USER loractl
ENV LORACTL_CACHE_DIR=/var/cache/loractl
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=5 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['LORACTL_URL'] + '/health', timeout=8)"]
CMD ["celery", "-A", "workers.app", "worker", "-Q", "gpu"]

# Three images: service (a Bento with its models), canvas, pipeline (MLflow, Prefect, a worker). compose.yaml builds and
# runs them; docs/packages.md says what has to be there before.
FROM python:3.11-slim AS base
# Left empty it is PyTorch with CUDA, ten times the size. Without: docker compose build --build-arg PIP_EXTRA_INDEX_URL=URL,
# the index of PyTorch's CPU builds that its page "Get started" names.
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba \
    DO_NOT_TRACK=1 BENTOML_DO_NOT_TRACK=True DVC_NO_ANALYTICS=1 MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false STREAMLIT_BROWSER_GATHER_USAGE_STATS=false
WORKDIR /srv/pixelcnn
RUN useradd --uid 10001 --no-create-home pixelcnn && mkdir /srv/store /srv/artifacts data models && chown -R pixelcnn /srv

FROM base AS service
ENV BENTOML_HOME=/srv/store BENTOML_HOST=0.0.0.0
# Owned by who reads it: where the host's umask is strict, others may not.
COPY --chown=pixelcnn pixelcnn.bento ./
RUN python -m tarfile -e pixelcnn.bento bento && chmod -R a+rX bento && \
    pip install -r bento/env/python/requirements.txt -c bento/src/constraints.txt
USER pixelcnn
# A whole path: BentoML takes others from /
RUN bentoml import "$PWD/pixelcnn.bento"
EXPOSE 3000
HEALTHCHECK --start-period=60s CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:3000/readyz')"
# Not the Bento in the store: a volume there is filled but once, and would hide a newer one.
CMD ["bentoml", "serve", "/srv/pixelcnn/bento"]

FROM base AS canvas
COPY --chown=pixelcnn pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['app'], sep='\n')" \
    > app.txt && pip install -r app.txt -c constraints.txt
COPY --chown=pixelcnn .streamlit .streamlit
COPY --chown=pixelcnn app/__init__.py app/client.py app/environment.py app/
COPY --chown=pixelcnn app/canvas app/canvas
ENV PYTHONPATH=/srv/pixelcnn
USER pixelcnn
EXPOSE 8501
HEALTHCHECK CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8501/_stcore/health')"
CMD ["streamlit", "run", "app/canvas/main.py", "--server.address", "0.0.0.0"]

FROM base AS pipeline
COPY --chown=pixelcnn . .
RUN pip install -e '.[pipelines,cluster]' -c constraints.txt
# Adding a dataset records it with DVC, which otherwise looks for git: an image has neither the program nor the history.
RUN dvc config --local core.no_scm true && chown -R pixelcnn .
USER pixelcnn

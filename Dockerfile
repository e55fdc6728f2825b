# The service: no client, no training, no way to decrypt. docs/threat-model.md says why.
#
#   make pin-base image        # or, without make:
#   docker build --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:... --tag veilhead-server .
#
#   docker run --volume veilhead-state:/state veilhead-server tenants add clinic --state /state
#   docker run --publish 127.0.0.1:8000:8000 --volume "$PWD/store:/store:ro" \
#       --volume veilhead-state:/state veilhead-server
#
# The store's files are private to the user that published them: let that be user 10001, or give
# them to it (`chown -R 10001 store`). The service answers nobody without an API key, and speaks
# plain HTTP: publish the port on loopback only, or put a proxy with TLS in front of it.
#
# What is installed is pinned: packages by version and hash (locks/), the base by digest. No digest is
# written here, since none could be verified where this file was written: `make pin-base` asks your
# registry and keeps its answer in base-image.txt; keep that file, and builds stay on the same base. A base
# that is only a tag is refused, unless UNPINNED_BASE=yes says that whatever it stands for today will do.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG PYTHON_IMAGE
ARG UNPINNED_BASE=no
RUN case "$PYTHON_IMAGE@$UNPINNED_BASE" in \
        *@sha256:????????????????????????????????????????????????????????????????@* | *@yes) ;; \
        *) echo "the base $PYTHON_IMAGE is not pinned by a digest: make pin-base, or --build-arg UNPINNED_BASE=yes" >&2; \
           exit 1 ;; \
    esac
WORKDIR /src
COPY locks/build.txt locks/service.txt ./locks/
RUN python -m venv /opt/veilhead-build && python -m venv --without-pip /opt/veilhead
RUN /opt/veilhead-build/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
    --only-binary :all: --no-deps --require-hashes --requirement locks/build.txt
RUN /opt/veilhead-build/bin/python -m pip --python /opt/veilhead/bin/python install --no-cache-dir \
    --disable-pip-version-check --no-compile --only-binary :all: --no-deps --require-hashes \
    --requirement locks/service.txt
COPY pyproject.toml ./
COPY protocol/veilhead_protocol protocol/veilhead_protocol/
COPY models/veilhead_models models/veilhead_models/
COPY service/veilhead_service service/veilhead_service/
RUN /opt/veilhead-build/bin/python -m pip wheel --no-cache-dir --disable-pip-version-check \
    --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/veilhead-build/bin/python -m pip --python /opt/veilhead/bin/python install --no-cache-dir \
    --disable-pip-version-check --no-compile --no-index --no-deps dist/*.whl
# Commands of packages that are not here; and bytecode that depends on nothing but its source.
RUN rm /opt/veilhead/bin/veilhead /opt/veilhead/bin/veilhead-bench \
    && /opt/veilhead/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/veilhead/lib

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 veilhead \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin veilhead \
    && install --directory --owner 10001 --group 10001 --mode 0750 /store \
    && install --directory --owner 10001 --group 10001 --mode 0700 /state
COPY --from=build /opt/veilhead /opt/veilhead
ENV PATH=/opt/veilhead/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /store /state
EXPOSE 8000
# Whether queries can be evaluated, not only whether the process answers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["veilhead-server"]
CMD ["run", "--store", "/store", "--state", "/state", "--host", "0.0.0.0", "--port", "8000"]

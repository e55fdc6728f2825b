# The service: no client, no training, no way to decrypt. docs/threat-model.md says why.
#
#   docker build --tag veilhead-server .
#   docker run --volume veilhead-state:/state veilhead-server tenants add clinic --state /state
#   docker run --publish 127.0.0.1:8000:8000 --volume "$PWD/store:/store:ro" \
#       --volume veilhead-state:/state veilhead-server
#
# The store's files are private to the user that published them: let that be user 10001, or give
# them to it (`chown -R 10001 store`). The service answers nobody without an API key, and speaks
# plain HTTP: publish the port on loopback only, or put a proxy with TLS in front of it.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY protocol/veilhead_protocol protocol/veilhead_protocol/
COPY models/veilhead_models models/veilhead_models/
COPY service/veilhead_service service/veilhead_service/
RUN python -m venv /opt/veilhead
RUN /opt/veilhead/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
    --constraint constraints.txt '.[service]'
# Commands of packages that are not here.
RUN rm /opt/veilhead/bin/veilhead /opt/veilhead/bin/veilhead-bench

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 veilhead \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin veilhead \
    && install --directory --owner 10001 --group 10001 --mode 0750 /store \
    && install --directory --owner 10001 --group 10001 --mode 0700 /state
COPY --from=build /opt/veilhead /opt/veilhead
ENV PATH=/opt/veilhead/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME /store /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/livez', timeout=3)"]
ENTRYPOINT ["veilhead-server"]
CMD ["run", "--store", "/store", "--state", "/state", "--host", "0.0.0.0", "--port", "8000"]

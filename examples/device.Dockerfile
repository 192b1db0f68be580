# A device: the agent serves predictions, takes updates, and reports, as a user without rights.
#   docker buildx build --platform linux/amd64,linux/arm64 -f examples/device.Dockerfile -t sdlora-device .
#   docker run --rm -v store:/var/lib/sdlora-edge -v "$PWD/root.json:/root.json:ro" sdlora-device \
#     device init --from https://fleet.example.com --root /root.json --store /var/lib/sdlora-edge/store
#   docker run -d --read-only --tmpfs /tmp -v store:/var/lib/sdlora-edge -p 127.0.0.1:8080:8080 --memory 256m \
#     -e SDLORA_EDGE_AGENT_TOKEN="$(openssl rand -hex 32)" --restart always sdlora-device
# Without a repository, put a bundle into the store with device init --bundle, and mount a folder of packets: add
#   device run --store /var/lib/sdlora-edge/store --listen 0.0.0.0:8080 --watch /incoming
FROM python:3.12-slim AS build
COPY . /src
RUN pip wheel --no-cache-dir --wheel-dir /wheels '/src[agent]'

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels 'sdlora-edge[agent]'
# the store needs an owner; nothing else is written, so the root may be read-only
RUN useradd --uid 10001 sdlora && install -d -o sdlora -m 0700 /var/lib/sdlora-edge
USER 10001
VOLUME /var/lib/sdlora-edge
EXPOSE 8080
HEALTHCHECK --interval=30s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=5)"]
ENTRYPOINT ["sdlora-edge"]
CMD ["device", "run", "--store", "/var/lib/sdlora-edge/store", "--listen", "0.0.0.0:8080"]

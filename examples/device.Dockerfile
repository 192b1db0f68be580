# A device: it applies the packets that appear in /incoming, as a user without rights.
#   docker buildx build --platform linux/amd64,linux/arm64 -f examples/device.Dockerfile -t sdlora-device .
#   docker run --rm -v store:/var/lib/sdlora-edge -v "$PWD/bundle:/bundle:ro" sdlora-device \
#     device init --bundle /bundle --store /var/lib/sdlora-edge/store
#   docker run -d --read-only --tmpfs /tmp --tmpfs /run -v store:/var/lib/sdlora-edge \
#     -v "$PWD/packets:/incoming:ro" --restart always sdlora-device
FROM python:3.12-slim AS build
COPY . /src
RUN pip wheel --no-cache-dir --wheel-dir /wheels /src

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels sdlora-edge
# the store needs an owner; nothing else is written, so the root may be read-only
RUN useradd --uid 10001 sdlora && install -d -o sdlora -m 0700 /var/lib/sdlora-edge
USER 10001
VOLUME /var/lib/sdlora-edge
ENTRYPOINT ["sdlora-edge"]
CMD ["device", "watch", "/incoming", "--store", "/var/lib/sdlora-edge/store"]

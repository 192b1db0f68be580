# A workstation without a GPU: train, export, build packets.
#   docker build -t sdlora-edge --build-arg TORCH_INDEX_URL=... .
#   docker run --rm -v "$PWD:/project" --user "$(id -u)" sdlora-edge train --data images
# TORCH_INDEX_URL is the address of PyTorch's CPU wheels, as its install page shows it. Without it, pip
# takes the default wheels, which on x86-64 bring CUDA: about 6 GB.
FROM python:3.12-slim
ARG TORCH_INDEX_URL
RUN pip install --no-cache-dir torch torchvision ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
COPY . /src
RUN pip install --no-cache-dir '/src[host]' && rm -r /src
# timm's weights are kept beside the work, so a second container need not download them
ENV HF_HOME=/project/.cache/huggingface HOME=/tmp
RUN useradd --uid 10001 sdlora && install -d -o sdlora /project
USER 10001
WORKDIR /project
ENTRYPOINT ["sdlora-edge"]
CMD ["--help"]

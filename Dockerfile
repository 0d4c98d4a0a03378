# ZeroPipe with what DeepSpeed needs to build its extensions, and ssh and pdsh for launches on several hosts.
#   docker build -t zeropipe .
#   docker run --gpus all --ipc host -v $PWD:/work -w /work zeropipe launch gpt2_345m --deepspeed_config zero2
# On CPUs: docker build --build-arg BASE=debian:bookworm -t zeropipe .
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-venv python3-dev g++ ninja-build numactl iproute2 pdsh openssh-client openssh-server \
      openmpi-bin libopenmpi-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/zeropipe
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY zeropipe zeropipe
COPY data_prep data_prep
COPY trainer trainer
COPY launcher launcher
COPY ds_configs ds_configs
COPY recipes recipes
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt .
ENV PATH=/opt/venv/bin:$PATH
ENTRYPOINT ["zeropipe"]

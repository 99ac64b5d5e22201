# Everything for pretraining on NVIDIA GPUs; docs/launching.md says how to build and start it.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash bincomm

COPY --chown=bincomm . /opt/bincomm
RUN python3 -m venv /opt/venv && chown -R bincomm /opt/venv
USER bincomm
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/bincomm
# No GPU is visible while an image is built, so the compiler must be asked for by name: without it, this fails.
RUN pip install --no-cache-dir torch 'setuptools>=70.1' ninja pybind11 \
    && BINCOMM_CUDA=1 pip install --no-cache-dir --no-build-isolation '.[eval]'

WORKDIR /home/bincomm
ENTRYPOINT ["bincomm"]
CMD ["doctor"]

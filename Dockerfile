# An environment with the package built from this tree. Written, but not built here: there is no
# container engine on the machine that the project is developed on.
#
#   docker build -t coopflow .                          the CPU kernels
#   docker build -t coopflow --build-arg BASE=nvidia/cuda:13.0.0-devel-ubuntu24.04 \
#                --build-arg COOPFLOW_CUDA=1 .          and the CUDA kernels
#   docker run --rm coopflow coopflow info
#
# BASE must have apt. TORCH is what pip is asked for; which build of it comes is up to pip's index.
# COOPFLOW_CUDA: 0 no CUDA code, 1 an error where nvcc is missing.
ARG BASE=debian:12-slim
FROM ${BASE}
ARG TORCH=torch
ARG COOPFLOW_CUDA=0
ARG COOPFLOW_CUDA_ARCHITECTURES=
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PATH=/opt/coopflow/bin:$PATH
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/coopflow \
    && pip install ${TORCH} && pip install numpy 'setuptools>=77' 'cmake>=3.25' ninja \
       'scikit-build-core>=0.12' 'pybind11>=2.13'
COPY . /src
# COOPFLOW_BUILD_HOST: the headers on numpy arrays, which the tests alone use.
RUN cd /src && COOPFLOW_BUILD_HOST=0 COOPFLOW_CUDA=${COOPFLOW_CUDA} \
    COOPFLOW_CUDA_ARCHITECTURES=${COOPFLOW_CUDA_ARCHITECTURES} \
    pip install --no-build-isolation '.[train]' && rm -rf build
WORKDIR /work
CMD ["coopflow", "info"]

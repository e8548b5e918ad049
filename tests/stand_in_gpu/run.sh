#!/usr/bin/env bash
# The tests that need a GPU, on a machine without one: torch's CUDA operators and this library's are
# those of the CPU (device.py), below torch.cuda stands a runtime for a device of ordinary memory
# (runtime.cpp). So captures, replays, streams, generators and devices of tensors are torch's own, and
# graphs must make the numbers of plain runs. What it says nothing of, and tests of which are left out:
# kernels (the emulation's matter), several devices, torch.compile, times, and races between streams, as
# everything runs at once.
#
#   tests/stand_in_gpu/run.sh PYTHON [pytest's arguments…]
#
# PYTHON must have a torch with CUDA, such as `pip install torch` gives, of the CUDA version whose
# headers CUDA_HOME (/usr/local/cuda) holds, and this package.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
shift
build=$PWD/build/stand-in-gpu
cuda=${CUDA_HOME:-/usr/local/cuda}
mkdir -p "$build"
# By its name it is the driver's library as well.
"${CXX:-c++}" -std=c++17 -O1 -g1 -Wall -fPIC -shared -Wl,-soname,libcuda.so.1 "-I$cuda/include" \
  tests/stand_in_gpu/runtime.cpp tests/stand_in_gpu/driver.cpp -o "$build/libstand_in_gpu.so"
export LD_PRELOAD=$build/libstand_in_gpu.so PYTHONPATH=$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
of_kernels=(affine_coupling analytic_langevin_chain attention concat_elu gate_add_norm langevin
  langevin_errors mala_chain mixture_logistic mlp mlp_bfloat16 ops weight_norm)
ignored=("${of_kernels[@]/#/--ignore=tests/test_}")
others=(compile several_processes device_profile is_the_ops_option)
exec "$python" -m pytest -p stand_in_gpu --device cuda -m "not slow" "${ignored[@]/%/.py}" \
  -k "not ($(printf '%s or ' "${others[@]}") gpu_check)" "$@"

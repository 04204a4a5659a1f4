#!/usr/bin/env bash
# Options for cmake that build the CUDA backend for this machine's GPU or, without one, for one
# architecture, so that its code is compiled; `make install` and plain cmake build it for all.
if [ -n "${DIFFKV_CUDA_ARCHITECTURES:-}" ]; then
  architecture=$DIFFKV_CUDA_ARCHITECTURES
else
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
    head -1 | tr -d .)
fi
case $architecture in
  '' | 90) architecture=90a ;;
esac
printf '%s\n' "-DDIFFKV_CUDA_ARCHITECTURES=$architecture"

#!/bin/sh
# Builds ggml's CPU backend, as the llama-cpp-python package carries it, and the program that times
# its attention, in build/peers. Needs pip, network and the packages that the project itself needs.
set -eu
version=${1:-0.3.36}
root=$(cd "$(dirname "$0")/../../.." && pwd)
sources="$root/build/peers-src"
ggml="$sources/llama_cpp_python-$version/vendor/llama.cpp/ggml"
if [ ! -d "$ggml" ]; then
  mkdir -p "$sources"
  pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$sources" \
    "llama-cpp-python==$version"
  tar -xzf "$sources/llama_cpp_python-$version.tar.gz" -C "$sources"
fi
cmake -S "$root" -B "$root/build/peers" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DDIFFKV_BUILD_TESTS=OFF -DDIFFKV_CUDA=OFF -DDIFFKV_GGML_DIR="$ggml"
cmake --build "$root/build/peers" --target diffkv_cli ggml_peer

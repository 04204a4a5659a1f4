#!/bin/sh
# Times diffkv and ggml in turn, several rounds, and prints them side by side; of each scenario the
# least median of the rounds counts. Build both first with bench/peers/ggml/build.sh.
# usage: bench/peers/compare.sh [ROUNDS [SECONDS [SCENARIO]]]
set -eu
rounds=${1:-3}
seconds=${2:-1}
scenario=${3:-peer}
build=$(cd "$(dirname "$0")/../.." && pwd)/build/peers
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
for round in $(seq "$rounds"); do
  "$build/cli/diffkv" bench --scenario "$scenario" --seconds "$seconds" \
    --json "$results/diffkv-$round.json" > "$results/log" || { cat "$results/log"; exit 1; }
  "$build/bench/peers/ggml/ggml_peer" --scenario "$scenario" --seconds "$seconds" \
    --json "$results/ggml-$round.json"
done
"$build/cli/diffkv" bench --from "$results"/diffkv-*.json --against "$results"/ggml-*.json

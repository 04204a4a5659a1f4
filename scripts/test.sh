#!/usr/bin/env bash
# Builds and runs every test that this machine can run: a subset under AddressSanitizer and UBSan,
# each fuzz target for some seconds, and everything as released. Ends with ctest's summary and a
# line `N passed, N failed, N skipped` over all three. Exit status 0: built, and none failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

jobs=$(nproc)
# Tests run side by side: threads that wait should not keep a core from those that work.
export OMP_WAIT_POLICY=passive
export CTEST_OUTPUT_ON_FAILURE=1

passed=0
failed=0
skipped=0

attribute() {  # NAME FILE: that attribute of a JUnit file's test suite
  sed -n "s/.*[[:space:]]$1=\"\([0-9]*\)\".*/\1/p" "$2" | head -1
}

run_tests() {  # PRESET [CTEST ARGUMENT...]
  local preset=$1 junit=$PWD/build/$1/junit.xml
  shift
  printf '\n=== %s: build\n' "$preset"
  cmake --preset "$preset" "$(scripts/cuda_flags.sh)" > "build-$preset.log.tmp" 2>&1
  local configured=$?
  mkdir -p "build/$preset" && mv "build-$preset.log.tmp" "build/$preset/configure.log"
  if [ $configured -ne 0 ]; then
    cat "build/$preset/configure.log"
    echo "test: cmake --preset $preset failed" >&2
    exit 1
  fi
  if ! cmake --build --preset "$preset" -j "$jobs"; then
    echo "test: the $preset build failed" >&2
    exit 1
  fi
  printf '\n=== %s: tests\n' "$preset"
  rm -f "$junit"
  ctest --test-dir "build/$preset" -j "$jobs" --no-tests=error --output-junit "$junit" "$@"
  local status=$? total fails skips
  if [ ! -s "$junit" ]; then
    echo "test: ctest of $preset left no result (status $status)" >&2
    exit 1
  fi
  total=$(attribute tests "$junit")
  fails=$(attribute failures "$junit")
  skips=$(($(attribute skipped "$junit") + $(attribute disabled "$junit")))
  if [ $status -ne 0 ] && [ "$fails" -eq 0 ]; then
    fails=1
  fi
  passed=$((passed + total - fails - skips))
  failed=$((failed + fails))
  skipped=$((skipped + skips))
}

# Under the sanitizers without what only reads sources, and without the slow random problems.
run_tests asan --label-exclude 'shape|slow'
run_tests fuzz
run_tests release

echo
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]

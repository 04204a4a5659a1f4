#!/usr/bin/env bash
# Formatting, warnings as errors, clang-tidy and the rules about the shape of the sources.
# usage: scripts/lint.sh [FILE...]   with files, clang-tidy looks at these only
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

status=0
step() {  # TITLE COMMAND...
  printf '=== %s\n' "$1"
  shift
  "$@" || { status=1; echo "lint: failed"; }
}

mapfile -t sources < <(git ls-files -- '*.h' '*.cc' '*.cu' '*.cuh')
step "clang-format" clang-format-14 --dry-run -Werror "${sources[@]}"
step "shape of the sources" python3 tests/structure/check_sources.py .
step "configure" cmake --preset lint "$(scripts/cuda_flags.sh)"
step "build, warnings are errors" cmake --build --preset lint -j "$(nproc)"

if [ $# -gt 0 ]; then
  units=("$@")
else
  # Tests are checked by the compiler's warnings; GoogleTest's macros are not worth a tidy run.
  mapfile -t units < <(git ls-files -- 'src/*.cc' 'cli/*.cc')
fi
step "clang-tidy" python3 scripts/tidy.py build/lint "${units[@]}"
exit $status

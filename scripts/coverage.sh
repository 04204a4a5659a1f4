#!/usr/bin/env bash
# Line coverage of src/core and src/plan by the tests; the report is build/coverage/report.html.
set -euo pipefail
cd "$(dirname "$0")/.."

cmake --preset coverage
cmake --build --preset coverage -j "$(nproc)"
find build/coverage -name '*.gcda' -delete
ctest --test-dir build/coverage -j "$(nproc)" --no-tests=error --output-on-failure \
  --label-exclude 'shape|slow'
gcovr --root . --filter src/core/ --filter src/plan/ --exclude-throw-branches --print-summary \
  --html-details build/coverage/report.html build/coverage

#!/bin/sh
# Runs every GPU test from prebuilt programs, for machines that cannot build: needs in one folder
# cuda_test, cuda_stage_times and diffkv, linked so that they find their libraries there.
#
# usage: run_on_device.sh FOLDER [SUITE]     SUITE of `diffkv check`: quick (default) or full
#
# Logs go to $OUT (default: the folder). Exit status 1 if any part failed; a table comes last.
set -u
folder=${1:?usage: run_on_device.sh FOLDER [SUITE]}
suite=${2:-quick}
out=${OUT:-$folder}
table=
status=0

# part NAME SECONDS COMMAND...: runs a part for at most so long and adds a line to the table.
part() {
  name=$1
  limit=$2
  shift 2
  begin=$(date +%s)
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ "$code" -eq 0 ] || status=1
  table="$table$(printf '%-28s %4d s  exit %d' "$name" $(($(date +%s) - begin)) "$code")
"
  [ "$code" -eq 0 ] || grep -E 'Failure|FAILED|wrong|error|threw|=========' "$out/$name.log" |
    head -25
}

part tests 150 "$folder/cuda_test"
part stage_times 40 "$folder/cuda_stage_times"
part check_fp32 200 env DIFFKV_CUDA_KERNEL=fp32 "$folder/diffkv" check --backend cuda --suite "$suite"
part check 200 "$folder/diffkv" check --backend cuda --suite "$suite"
if command -v compute-sanitizer >/dev/null; then
  part memcheck 100 compute-sanitizer --error-exitcode 3 "$folder/cuda_test" \
    --gtest_filter='*SenselessIndices*:CudaUpdateCache.*'
fi

cat "$out/stage_times.log"
tail -n 40 "$out/check_fp32.log"
tail -n 12 "$out/check.log"
tail -n 3 "$out/tests.log"
printf '%s' "$table"
exit $status

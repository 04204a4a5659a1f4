#!/bin/sh
# Runs everything that needs a GPU from prebuilt programs, for machines that cannot build: needs in
# one folder cuda_test, cuda_stage_times and diffkv, linked so that they find their libraries there.
#
# usage: run_on_device.sh FOLDER [quick|full] [PART...]
#
#   FOLDER       of the programs; a compute-sanitizer in it is taken before the machine's, and
#                racecheck of the tensor-core kernels needs a folder racecheck in it: diffkv and its
#                libraries of a build with DIFFKV_CUDA_RACECHECK=ON
#   quick|full   the suite of check and check_fp32, default quick
#   PART         only these, default all; see parts below
#
# At most 8 minutes: first, alone, what measures times, then the others side by side. Each part has
# a limit in seconds. Exit status 1 if any part failed, took too long or could not start: the table
# at the end says which. To $OUT (default: the folder) go times.log, tests.log, check.log,
# sanitizers.log, bench.json and summary.txt.
set -u
usage='usage: run_on_device.sh FOLDER [quick|full] [PART...]'
folder=${1:?$usage}
shift
suite=quick
case ${1:-} in
  quick | full)
    suite=$1
    shift
    ;;
esac
parts='stage_times bench tests check check_fp32 memcheck initcheck synccheck racecheck_fp32 racecheck'
for wanted in "$@"; do
  case " $parts " in
    *" $wanted "*) ;;
    *)
      echo "run_on_device: there is no part $wanted, expected some of: $parts" >&2
      exit 2
      ;;
  esac
done
[ $# -eq 0 ] || parts=$*
out=${OUT:-$folder}
mkdir -p "$out" || exit 2
logs=$(mktemp -d) || exit 2
trap 'rm -rf "$logs"' EXIT
sanitizer=$folder/compute-sanitizer
[ -x "$sanitizer" ] || sanitizer=compute-sanitizer

# part NAME SECONDS COMMAND...: runs a part, if it is wanted, and leaves its log and its row.
part() {
  name=$1
  limit=$2
  shift 2
  case " $parts " in
    *" $name "*) ;;
    *) return 0 ;;
  esac
  begin=$(date +%s)
  timeout -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) what=right ;;
    124 | 137) what="FAILED: over $limit s" ;;
    127) what='FAILED: a program is missing' ;;
    *) what="FAILED: exit $code" ;;
  esac
  printf '%-16s %4d s  %s\n' "$name" $(($(date +%s) - begin)) "$what" >"$logs/$name.row"
}

# sanitized NAME SECONDS FILTERS OPTION...: `check` with each filter under the sanitizer; those with
# full: before them choose from the full suite. Of the programs in $programs.
programs=$folder
sanitized() {
  name=$1
  limit=$2
  filters=$3
  shift 3
  # shellcheck disable=SC2016  # the inner shell expands these
  part "$name" "$limit" env filters="$filters" sh -c '
    code=0
    for filter in $filters; do
      suite=quick
      [ "$filter" = "${filter#full:}" ] || suite=full
      "$@" --suite $suite --filter "${filter#full:}" || code=$?
    done
    exit $code' sh "$sanitizer" "$@" "$programs/diffkv" check --backend cuda --seed 1
}

part stage_times 40 "$folder/cuda_stage_times"
part bench 90 "$folder/diffkv" bench --backend cuda --scenario gpu_main --seconds 0.02 \
  --json "$out/bench.json"

# Host threads of those side by side, most of whose work is the reference's.
OMP_NUM_THREADS=$((($(nproc) + 3) / 4))
export OMP_NUM_THREADS
part tests 300 "$folder/cuda_test" &
part check 300 "$folder/diffkv" check --backend cuda --suite "$suite" &
part check_fp32 300 env DIFFKV_CUDA_KERNEL=fp32 "$folder/diffkv" check --backend cuda \
  --suite "$suite" &
# Every kernel that the GPU takes is in these cases: layers of one query, a few, many and all of
# these, bf16 and fp8 with biases and sinks; long sequences, whose tiles are cut and merged by
# attend or by combine; merges of states; the shapes of models; every pair of types; every size of
# kernel.
every='layer long batch_invariant merge/ model/ kv_dtype full:kernel_size'
sanitized memcheck 320 "$every" --tool memcheck --error-exitcode 3 &
sanitized initcheck 320 "$every" --tool initcheck --error-exitcode 3 &
sanitized synccheck 320 "$every" --tool synccheck --error-exitcode 3 &
mixed='long/mixed batch_invariant/mixed'
# The slowest of the tools, which follows the tensor-core kernels of a build for it alone. Left out
# is prefill of an fp8 cache, whose warps clear the same rows at once (docs/kernels/mma.md).
(
  DIFFKV_CUDA_KERNEL=fp32
  export DIFFKV_CUDA_KERNEL
  sanitized racecheck_fp32 320 "layer/ merge/mixed $mixed" \
    --tool racecheck --error-exitcode 3
) &
(
  programs=$folder/racecheck
  LD_LIBRARY_PATH=$programs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export LD_LIBRARY_PATH
  sanitized racecheck 320 \
    "layer/decode layer/multi layer/prefill_bf16 layer/mixed_bf16 merge/mixed long/ batch_invariant/
      full:192x128_bf16_in_bf16 full:192x128_bf16_in_fp8_e4m3_multi
      full:192x128_bf16_in_fp8_e5m2_decode full:many_tiles/64" --tool racecheck --error-exitcode 3
) &
wait

# merge FILE PART...: the logs of those parts that ran, the end of each, as one file.
merge() {
  file=$out/$1
  shift
  rm -f "$file"
  for name in "$@"; do
    [ -f "$logs/$name.log" ] || continue
    {
      echo "=== $name"
      tail -c 1000000 "$logs/$name.log"
    } >>"$file"
  done
}
merge times.log stage_times bench
merge tests.log tests
merge check.log check check_fp32
merge sanitizers.log memcheck initcheck synccheck racecheck_fp32 racecheck

status=0
summary() {
  for name in stage_times bench; do
    [ ! -f "$logs/$name.log" ] || cat "$logs/$name.log"
  done
  for name in check check_fp32; do
    [ ! -f "$logs/$name.log" ] || tail -n 3 "$logs/$name.log"
  done
  if [ -f "$logs/tests.log" ]; then
    tail -n 3 "$logs/tests.log"
    grep 'expected two' "$logs/tests.log" | sort | uniq -c
  fi
  for row in "$logs"/*.row; do
    grep -q FAILED "$row" || continue
    name=$(basename "$row" .row)
    echo "--- $name"
    grep -E 'Failure|FAILED|wrong|error|threw|not found|=========' "$logs/$name.log" | head -n 25
  done
  cat "$logs"/*.row
}
summary >"$out/summary.txt" 2>&1
cat "$out/summary.txt"
for name in $parts; do
  grep -q ' right$' "$logs/$name.row" 2>/dev/null || status=1
done
exit $status

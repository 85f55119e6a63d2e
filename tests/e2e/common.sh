# shellcheck shell=bash disable=SC2034
# Sourced by the end-to-end tests: the program, a temporary folder, and checks that say what they saw.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="${BITMILL_SOURCE_DIR:-$(cd "$here/../.." && pwd)}"
bitmill="${BITMILL_BINARY_DIR:-$root/build/cpu-release}/bin/bitmill"
tools="$here/tools.py"
cd "$root" || exit 1

if [ ! -x "$bitmill" ]; then
  echo "$bitmill does not exist: build the target bitmill, or set BITMILL_BINARY_DIR"
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failures=0

# The demo's inputs; the output path and what differs are added by each test.
demo=(configs/demo.cfg --report.html=false)

# complain TEXT: records a failure and goes on, so that one run shows all of them.
complain() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}

# ranks N ARGUMENT...: bitmill under mpirun; with N = 0 alone, without a launcher.
ranks() {
  local count="$1"
  shift
  if [ "$count" = 0 ]; then
    "$bitmill" "$@"
  else
    mpirun -n "$count" --bind-to none "$bitmill" "$@"
  fi
}

# must N ARGUMENT...: the same, has to exit 0; shows the output otherwise.
must() {
  local log="$work/must.log"
  if ! ranks "$@" >"$log" 2>&1; then
    complain "bitmill (ranks $1) ${*:2}"
    tail -n 20 "$log"
    return 1
  fi
}

# refused CODE PATTERN N ARGUMENT...: exit code CODE and output that matches PATTERN (grep -E, any case).
refused() {
  local code="$1" pattern="$2" log="$work/refused.log" seen=0
  shift 2
  ranks "$@" >"$log" 2>&1 || seen=$?
  if [ "$seen" != "$code" ]; then
    complain "exit $seen instead of $code (ranks $1): bitmill ${*:2}"
    tail -n 8 "$log"
  elif ! grep -qiE -- "$pattern" "$log"; then
    complain "no '$pattern' in the output (ranks $1): bitmill ${*:2}"
    tail -n 8 "$log"
  fi
}

# checkpoint_hash DIR: one line per file of the checkpoint, without the records in bitmill/.
checkpoint_hash() {
  (cd "$1" && find . -type f -not -path './bitmill/*' | LC_ALL=C sort | xargs sha256sum)
}

# same_as_first NAME RUN OUT: OUT has the bytes of the first finished run of NAME, which it may be itself. `first` is the
# caller's: empty before the first.
same_as_first() {
  checkpoint_hash "$3" >"$3.hash"
  if [ -z "$first" ]; then
    first="$3"
    grep -q 'model.*\.safetensors' "$3.hash" || complain "$1: $3 holds no model"
  elif ! diff "$first.hash" "$3.hash" >"$work/difference"; then
    complain "$1: $2 gives other bytes than ${first##*-}:"
    cat "$work/difference"
  fi
}

# no_checkpoint DIR: nothing in DIR that a loader could take for a finished checkpoint.
no_checkpoint() {
  local found
  found="$(find "$1" -maxdepth 1 \( -name '*.safetensors*' -o -name config.json -o -name quantize_config.json \) 2>/dev/null)"
  [ -z "$found" ] || complain "partial output is visible: $found"
}

finish() {
  if [ "$failures" -gt 0 ]; then
    echo "$failures checks failed"
    exit 1
  fi
  echo "all checks passed"
}

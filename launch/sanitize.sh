#!/usr/bin/env bash
# Builds everything again with checks at run time and runs the tests with them: memory, undefined behaviour and leaks, or
# data races. Minutes and what is suppressed: CONTRIBUTING.md, tests/sanitizers/.
#   launch/sanitize.sh                        address: unit, golden, conformance, mpi and end-to-end tests (preset cpu-debug)
#   launch/sanitize.sh address --label unit   one label
#   launch/sanitize.sh thread                 the tests that use several threads (preset cpu-thread)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

kind="${1:-address}"
select_tests=(-LE "nightly|interop|house")
case "$kind ${2:-} ${3:-}" in
  "address  " | "thread  ") ;;
  "address --label "?*) select_tests+=(-L "$3") ;;
  *) echo "sanitize.sh: unknown arguments $* (known: address [--label NAME], thread)" >&2; exit 2 ;;
esac

if [ "$kind" = thread ]; then
  configure cpu-thread
  cmake --build --preset cpu-thread -j "$jobs" --target thread_tests
  exec ctest --preset cpu-thread -L threads -j 1
fi
configure cpu-debug
cmake --build --preset cpu-debug -j "$jobs"
exec ctest --preset cpu-debug "${select_tests[@]}" -j "$jobs"

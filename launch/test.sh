#!/usr/bin/env bash
# Installs what is missing, builds everything and runs the tests that take minutes, not hours.
#   launch/test.sh                 all but the label nightly
#   launch/test.sh --interop       also loads outputs with other programs (makes Python environments, several GB)
#   launch/test.sh --label e2e     one label: unit, conformance, mpi, golden, e2e, house, interop
# Fails when a test fails or when no test ran, and ends with the list of skipped tests and their reasons.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

select_tests=(-LE nightly)
while [ $# -gt 0 ]; do
  case "$1" in
    --interop) export BITMILL_INTEROP=1; shift ;;
    --label)
      [ $# -ge 2 ] || { echo "test.sh: --label needs a label" >&2; exit 2; }
      select_tests=(-LE nightly -L "$2"); shift 2 ;;
    *) echo "test.sh: unknown argument $1 (known: --interop, --label NAME)" >&2; exit 2 ;;
  esac
done

launch/install_deps.sh
configure cpu-release
cmake --build --preset cpu-release -j "$jobs"

results="$PWD/build/cpu-release/test-results.xml"
rm -f "$results"
status=0
ctest --preset cpu-release "${select_tests[@]}" -j "$jobs" --output-junit "$results" \
  --test-output-size-passed 200000 || status=$?

# A skip is not a pass: name each one with the reason it printed.
python3 - "$results" <<'END' || status=1
import re, sys
import xml.etree.ElementTree as tree

cases = tree.parse(sys.argv[1]).getroot().findall("testcase")
skipped, hidden = [], []
for case in cases:
    if case.get("status") in ("notrun", "disabled") or case.find("skipped") is not None:
        printed = case.findtext("system-out") or ""
        if "[  FAILED  ]" in printed:
            hidden.append(case.get("name"))
        reasons = re.findall(r"^.*: Skipped\n(.+)$", printed, re.M) or re.findall(r"^SKIPPED: (.+)$", printed, re.M)
        skipped.append((case.get("name"), "; ".join(dict.fromkeys(reasons)) or case.find("skipped").get("message", "")))
print(f"\n{len(cases) - len(skipped)} tests ran, {len(skipped)} skipped or partly skipped")
for name, reason in skipped:
    print(f"  skipped: {name}: {reason.strip()}")
for name in hidden:
    print(f"  FAILED: {name}: counted as skipped, but one of its tests failed")
if len(cases) == len(skipped):
    print("no test ran")
sys.exit(bool(hidden) or len(cases) == len(skipped))
END
exit $status

#!/usr/bin/env bash
# bitmill doctor: what it says of this build and machine, and that a problem has an exit code and a sentence.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for count in 0 2; do
  must "$count" doctor --output.path="$work/out" --run.threads=1 --json="$work/doctor.json"
  for words in "families: .*llama" "algorithms: .*gptq" "formats: .*compressed-tensors" "\[ok\] output filesystem: .*writable" \
    "rank 0 on .* 1 threads"; do
    grep -qE "$words" "$work/must.log" || complain "ranks $count: doctor does not say '$words'"
  done
  [ ! -e "$work/out" ] || complain "doctor made the output directory"
  python3 - "$work/doctor.json" "$((count > 0 ? count : 1))" <<'END' || complain "ranks $count: doctor.json"
import json, sys
said, ranks = json.load(open(sys.argv[1])), int(sys.argv[2])
assert said["ok"] is True
assert [rank["rank"] for rank in said["ranks"]] == list(range(ranks)), said["ranks"]
for rank in said["ranks"]:
    assert rank["cpus"] >= 1 and rank["memory_bytes"] > 1e6 and rank["host"] and "cpu" in rank["backend"].lower(), rank
    assert sum(last - first + 1 for first, last in rank["cpu_ranges"]) == rank["cpus"], rank
assert {finding["state"] for finding in said["findings"]} <= {"ok", "warning"}, said["findings"]
assert {finding["what"] for finding in said["findings"]} >= {"threads", "output filesystem"}, said["findings"]
assert said["build"]["backends"] == ["cpu"] or "cuda" in said["build"]["backends"], said["build"]
END
done
# Without a path there is nothing to try.
must 0 doctor
grep -q "not checked; give --output.path" "$work/must.log" || complain "doctor without an output path"

# Rates: measured with one rank and two, printed as lines that are a config file.
for count in 0 2; do
  must "$count" doctor --benchmark --run.threads=1 --output.path="$work/out" --json="$work/rates.json"
  sed -n '/^\[machine\]/,$p' "$work/must.log" >"$work/machine.cfg"
  python3 - "$work/rates.json" "$count" <<'END' || complain "ranks $count: measured rates"
import json, sys
rates = json.load(open(sys.argv[1]))["machine"]
wanted = ["forward_flops", "hessian_flops", "factor_flops", "sweep_flops", "grid_elements", "read_bandwidth", "write_bandwidth"]
assert list(rates) == sorted(wanted + (["link_bandwidth"] if int(sys.argv[2]) == 2 else [])), list(rates)
assert all(rate > 1e5 for rate in rates.values()), rates
END
  must 0 plan "$work/machine.cfg" --model.path=configs/demo/model --ranks=2 --run.backend=cpu --json="$work/plan.json"
  [ "$(python3 "$tools" get "$work/plan.json" rates.sweep_flops)" != 120000000000.0 ] || complain "the plan does not use measured rates"
  compgen -G "$work/.bitmill-rate*" >"$work/left" && complain "files of the measurement are left behind"
done

# More threads than CPUs is a warning that says what to do, no problem.
must 2 doctor --run.threads=4000 --json="$work/doctor.json"
grep -q "\[warning\] threads: .* 8000 threads on .*fewer run.threads" "$work/must.log" || complain "doctor does not warn of 8000 threads"
[ "$(python3 "$tools" get "$work/doctor.json" ok)" = True ] || complain "a warning is no problem"

# An output that cannot be written: exit 6, on every rank.
: >"$work/file"
for count in 0 2; do
  refused 6 "\[problem\] output filesystem: .*$work/file" "$count" doctor --output.path="$work/file/out" --json="$work/doctor.json"
  [ "$(python3 "$tools" get "$work/doctor.json" ok)" = False ] || complain "ranks $count: a problem, and ok is true"
done
long="$(printf 'x%.0s' {1..300})"
refused 6 "\[problem\] output filesystem: .*File name too long" 0 doctor --output.path="$work/$long"
refused 6 "300 characters, expected at most 255" 0 doctor --output.path="$work/gone/$long"
refused 2 "run\.threads" 0 doctor --run.threads=none

finish

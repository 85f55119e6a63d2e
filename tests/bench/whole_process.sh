#!/usr/bin/env bash
# One whole `bitmill quantize` next to what its arithmetic needs at the machine's own matmul rate, measured in the same run.
#   tests/bench/whole_process.sh MODEL CALIBRATION_TOKENS [RUNS] [OPTION...]
# Prints per run: wall seconds, CPU seconds, peak resident MB; then the median and its ratio to the arithmetic's time.
# The programs are build/cpu-release/bin/bitmill and its bitmill_bench, or $BITMILL and $BITMILL_BENCH.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
model="$1" calibration="$2" runs="${3:-5}"
shift $(($# < 3 ? $# : 3))
root="$(cd "$(dirname "$0")/../.." && pwd)"
export BITMILL="${BITMILL:-$root/build/cpu-release/bin/bitmill}"
export BITMILL_BENCH="${BITMILL_BENCH:-$root/build/cpu-release/tests/bench/bitmill_bench}"

python3 - "$model" "$calibration" "$runs" "$@" <<'END'
import csv, json, os, re, resource, shutil, statistics, subprocess, sys, tempfile, time

model, calibration, runs, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
bitmill, bench = os.environ["BITMILL"], os.environ["BITMILL_BENCH"]


def matmul_rate(kind):
    """GFLOP/s of the machine's best in-cache product over all threads, as the benchmark program prints it first."""
    text = subprocess.run([bench, "--benchmark_filter=rms_norm/384", "--benchmark_min_time=0.01"], capture_output=True, text=True)
    return float(re.search(rf"matmul {kind}: ([0-9.]+) GFLOP/s", text.stdout + text.stderr).group(1))


def arithmetic(folder):
    """FLOP of forward, Hessians (triangle, one per distinct input), factorizations and sweeps, from layers.csv."""
    flop = 0.0
    with open(os.path.join(folder, "bitmill/layers.csv")) as file:
        for row in csv.DictReader(file):
            out, width, tokens = int(row["out"]), int(row["in"]), int(row["tokens"])
            flop += 2.0 * out * width * tokens + float(out) * width * width
            if not row["module"].endswith(("k_proj", "v_proj", "up_proj")):
                flop += float(width) * width * tokens + width ** 3 / 3
    return flop


work = tempfile.mkdtemp()
walls = []
try:
    for run in range(runs):
        out = os.path.join(work, f"out-{run}")
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([bitmill, "quantize", f"--model.path={model}", f"--calibration.tokens={calibration}",
                        f"--output.path={out}", *options], check=True, stderr=subprocess.DEVNULL)
        walls.append(time.monotonic() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        with open(os.path.join(out, "bitmill/report.json")) as file:
            report = json.load(file)
        memory = max(rank["peak_resident_bytes"] for rank in report["ranks"]) / 1e6
        print(f"run {run + 1}: wall {walls[-1]:.2f} s, CPU {cpu:.2f} s, peak resident {memory:.0f} MB")
    flop = arithmetic(out)
    kind = "bf16" if report["plan"]["compute"] == "bfloat16" else "fp32"
    rate = matmul_rate(kind)
    median = statistics.median(walls)
    print(f"median wall {median:.2f} s; arithmetic {flop / 1e12:.2f} TFLOP without attention, {kind} matmul rate "
          f"{rate:.0f} GFLOP/s now: {flop / rate / 1e9:.2f} s; ratio {median / (flop / rate / 1e9):.2f}")
finally:
    shutil.rmtree(work)
END

#!/usr/bin/env bash
# Rates of the reader and the writer beside those of dd on the same files, in one run.
#   tests/bench/io.sh FOLDER [GIGABYTES] [RUNS]
# FOLDER lies on the file system to be measured; it gets a few files of GIGABYTES (default 2) and loses them at the end.
# Cold runs drop the file from the page cache first. Prints the median of RUNS (default 3) in GB/s (10^9 bytes).
# The program is build/cpu-release/tests/bench/bitmill_bench_io, or $BITMILL_BENCH_IO.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
root="$(cd "$(dirname "$0")/../.." && pwd)"
export BITMILL_BENCH_IO="${BITMILL_BENCH_IO:-$root/build/cpu-release/tests/bench/bitmill_bench_io}"
export BITMILL_TOOLS="$root/tests/e2e/tools.py"

python3 - "$1" "${2:-2}" "${3:-3}" <<'END'
import os, pathlib, shutil, statistics, subprocess, sys, tempfile, time

work = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]))
size, runs = int(float(sys.argv[2]) * 1e9) // (16 << 20) * (16 << 20), int(sys.argv[3])
program, tools = os.environ["BITMILL_BENCH_IO"], os.environ["BITMILL_TOOLS"]


def forget(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(*arguments):
    begin = time.monotonic()
    subprocess.run(["dd", "bs=16M", "status=none", *arguments], check=True)
    return size / (time.monotonic() - begin) / 1e9, ""


def ours(mode, *arguments):
    text = subprocess.run([program, mode, *map(str, arguments)], check=True, capture_output=True, text=True).stdout.split()
    return float(text[2]), " ".join(text[3:])


def median(name, before, run):
    results = []
    for _ in range(runs):
        before()
        results.append(run())
    rate = statistics.median(r[0] for r in results)
    print(f"{name:44} {rate:7.2f} GB/s  {results[-1][1]}", flush=True)
    return rate


def model():
    """About `size` bytes of linears, all of them holes: what is measured is the conversion and the check."""
    folder, blocks = work / "model", max(1, round(size / 335e6))
    subprocess.run([sys.executable, tools, "sparse", folder, "--hidden", "4096", "--intermediate", "8192", "--blocks",
                    str(blocks), "--vocab", "1024"], check=True, stdout=subprocess.DEVNULL)
    return folder


try:
    real, holes, out = work / "real", work / "holes", work / "out"
    block = os.urandom(16 << 20)
    with open(real, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    with open(holes, "wb") as file:
        file.truncate(size)
    nothing = lambda: None
    for kind, path, before in (("cold file", real, lambda: forget(real)), ("file in the page cache", real, nothing),
                               ("holes", holes, nothing)):
        if kind == "file in the page cache":
            dd(f"if={path}", "of=/dev/null")
        base = median(f"{kind}: dd", before, lambda: dd(f"if={path}", "of=/dev/null"))
        for mode in ("read", "read-ahead"):
            rate = median(f"{kind}: {mode}", before, lambda: ours(mode, path))
            print(f"{'':44} {rate / base:7.2f} of dd")
    folder = model()
    for mode in ("weights", "weights-ahead"):
        median(f"bf16 linears to F32, holes: {mode}", nothing, lambda: ours(mode, folder))
    clear = lambda: [path.unlink(missing_ok=True) for path in (out, work / "bench.safetensors")]
    base = median("write, synced: dd", clear, lambda: dd(f"if={real}", f"of={out}", "conv=fsync"))
    for mode in ("write", "write-behind"):
        rate = median(f"write, synced: {mode}", clear, lambda: ours(mode, work, size))
        print(f"{'':44} {rate / base:7.2f} of dd")
finally:
    shutil.rmtree(work)
END

#!/usr/bin/env bash
# The demo: installs what is missing, builds bitmill, quantizes the trained model of configs/demo over two MPI ranks and
# measures the perplexity of the float and of the quantized model. Leaves everything in out/demo. No arguments.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
begin=$SECONDS

launch/install_deps.sh
echo "building (build/cpu-release)"
configure cpu-release
if ! cmake --build --preset cpu-release --target bitmill -j "$jobs" >build/cpu-release/build.log 2>&1; then
  tail -n 60 build/cpu-release/build.log >&2
  exit 1
fi
built=$SECONDS

bitmill=build/cpu-release/bin/bitmill
results=out/demo-results
rm -rf out/demo "$results"
mkdir -p "$results"

mpirun -n 2 --bind-to none "$bitmill" quantize configs/demo.cfg --json "$results/quantize.json"
echo
mpirun -n 2 --bind-to none "$bitmill" eval configs/demo.cfg --json "$results/float.json"
mpirun -n 2 --bind-to none "$bitmill" eval configs/demo.cfg --model.path=out/demo --json "$results/quantized.json"

python3 - "$results" $((built - begin)) $((SECONDS - begin)) <<'END'
import json, os, sys

results, build_seconds, total_seconds = sys.argv[1:]


def load(name):
    with open(os.path.join(results, name)) as file:
        return json.load(file)


def checkpoint_bytes(folder):
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".safetensors")
               and entry.name.startswith("model"))


quantize, dense, packed = (load(f"{name}.json") for name in ("quantize", "float", "quantized"))
before, after = checkpoint_bytes("configs/demo/model"), checkpoint_bytes("out/demo")
ratio = packed["perplexity"] / dense["perplexity"]
print()
print(f"perplexity   float {dense['perplexity']:.3f}   quantized {packed['perplexity']:.3f}   ({100 * (ratio - 1):+.2f}%)")
print(f"checkpoint   float {before / 1e6:.2f} MB  quantized {after / 1e6:.2f} MB  (the embedding stays in float)")
print(f"time         quantization {quantize['quantize_seconds']:.2f} s, build {build_seconds} s, everything {total_seconds} s")
print("report       out/demo/bitmill/report.json, one line per linear in out/demo/bitmill/layers.csv")
END

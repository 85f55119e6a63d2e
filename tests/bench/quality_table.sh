#!/usr/bin/env bash
# Quality of round to nearest, GPTQ and AWQ (or $ALGORITHMS) at 4, 3 and 2 bits on one model, as a Markdown table: perplexity, KL divergence from
# the float model (nats per prediction) and top-1 agreement by `bitmill eval`, seconds and peak memory of `bitmill quantize`.
#   tests/bench/quality_table.sh MODEL CALIBRATION_TOKENS EVALUATION_TOKENS [EVALUATION_SAMPLES]
# The program is build/cpu-release/bin/bitmill, or $BITMILL.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
model="$1" calibration="$2" evaluation="$3" samples="${4:-0}"
bitmill="${BITMILL:-$(dirname "$0")/../../build/cpu-release/bin/bitmill}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

field() { python3 -c 'import json,sys; v=json.load(open(sys.argv[1])); print(sys.argv[3] % v[sys.argv[2]])' "$@"; }

evaluate() {  # evaluate CHECKPOINT: into $work/eval.json
  "$bitmill" eval --model.path="$1" --evaluate.reference="$model" --evaluate.tokens="$evaluation" \
    --evaluate.samples="$samples" --json "$work/eval.json" >/dev/null 2>&1
}

row() {  # row NAME OPTION...
  local name="$1"
  shift
  rm -rf "$work/out"
  "$bitmill" quantize --model.path="$model" --calibration.tokens="$calibration" --output.path="$work/out" \
    --json "$work/run.json" "$@" >/dev/null 2>&1
  evaluate "$work/out"
  local memory
  memory="$(python3 -c 'import json,sys; print(max(r["peak_resident_bytes"] for r in json.load(open(sys.argv[1]))["ranks"]) // 10**6)' \
    "$work/out/bitmill/report.json")"
  echo "| $name | $(field "$work/run.json" bits_per_weight %.3f) | $(field "$work/eval.json" perplexity %.3f) |" \
    "$(field "$work/eval.json" kl %.4f) | $(field "$work/eval.json" top1 %.4f) |" \
    "$(field "$work/run.json" seconds %.1f) | $memory |"
}

echo "| setting | bits per weight | perplexity | KL | top-1 | seconds | MB |"
echo "|---|---|---|---|---|---|---|"
evaluate "$model"
echo "| float | 16 | $(field "$work/eval.json" perplexity %.3f) | 0 | 1 | | |"
for algorithm in ${ALGORITHMS:-rtn gptq awq awq+gptq}; do
  row "$algorithm, 4 bits symmetric, group 128" --quantize.algorithm=$algorithm
  row "$algorithm, 3 bits asymmetric, group 128" --quantize.algorithm=$algorithm --quantize.bits=3 \
    --quantize.symmetric=false --output.format=gptq_v2
  row "$algorithm, 2 bits asymmetric, group 64" --quantize.algorithm=$algorithm --quantize.bits=2 \
    --quantize.group_size=64 --quantize.symmetric=false --output.format=gptq_v2
done

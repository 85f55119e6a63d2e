#!/usr/bin/env bash
# What a rank needs and what the plan said differ by at most 10%. Small models: the tracked allocator's peak, whatever the
# algorithm, mode and number of ranks. A large one: all memory of the process beyond its start.
#   tests/e2e/memory.sh          the demo
#   tests/e2e/memory.sh base     models/base of BITMILL_FIXTURES, where there is one
#   tests/e2e/memory.sh large    a sparse model of 2 GB; its output needs 0.6 GB of disk space
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# planned NAME RANKS WIDTH OPTION...: a run, and its ranks beside its plan.
planned() {
  local name="$1" count="$2" width="$3"
  shift 3
  must "$count" quantize "${model[@]}" --report.html=false --output.path="$work/out" --run.stage_width="$width" "$@" || return
  echo "$name, $((count / width)) stages of $width:"
  python3 "$tools" memory "$work/out/bitmill/report.json" 0.1 || complain "$name, $count ranks, width $width"
  rm -rf "$work/out"
}

# The ways through a run that need memory in different places. Not rtn: of so small a model it needs little more than what
# happens to wait for the disk.
all_ways() {
  local of="$1"
  planned "$of" 1 1
  planned "$of" 2 1
  planned "$of" 2 2
  planned "$of, full" 1 1 --propagation.mode=full
  planned "$of, full" 2 1 --propagation.mode=full
  planned "$of, full" 2 2 --propagation.mode=full
  planned "$of, whole blocks" 1 1 --quantize.true_sequential=false
  planned "$of, dynamic order" 1 1 --quantize.act_order=dynamic
  planned "$of, 3 bits" 1 1 --quantize.bits=3 --quantize.symmetric=false --output.format=gptq_v2
  planned "$of, awq+gptq" 1 1 --quantize.algorithm=awq+gptq
  planned "$of, awq+gptq" 2 2 --quantize.algorithm=awq+gptq
  planned "$of, gptaq" 1 1 --quantize.algorithm=gptaq
  planned "$of, gptaq" 2 2 --quantize.algorithm=gptaq
  # Few samples: weights and sums decide, not activations.
  planned "$of, 8 samples" 1 1 --calibration.samples=8
  planned "$of, 8 samples" 2 2 --calibration.samples=8
}

if [ "${1:-}" = large ]; then
  model=(--model.path="$work/large" --calibration.tokens="$work/tokens.safetensors" --calibration.samples=0)
  python3 "$tools" sparse "$work/large" --hidden 4096 --intermediate 11008 --blocks 3 --vocab 49152
  python3 "$tools" tokens "$work/tokens.safetensors" --vocab 60 --samples 4 --length 128
  if must 0 quantize "${model[@]}" --report.html=false --output.path="$work/out" --run.threads=2; then
    python3 "$tools" memory "$work/out/bitmill/report.json" 0.1 || complain "tensors of the large model"
    python3 "$tools" memory "$work/out/bitmill/report.json" 0.1 --resident || complain "resident memory of the large model"
  fi
elif [ "${1:-}" = base ]; then
  shared="${BITMILL_FIXTURES:-$root/../shared}"
  if [ -d "$shared/models/base" ]; then
    model=(--model.path="$shared/models/base" --calibration.tokens="$shared/data/calib-base.safetensors")
    all_ways base
  else
    echo "skipped: models/base is no part of BITMILL_FIXTURES"
    exit 77
  fi
else
  model=(configs/demo.cfg)
  all_ways demo
fi
finish

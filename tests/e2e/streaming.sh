#!/usr/bin/env bash
# Host memory follows the largest linear, not the model: sparse checkpoints, most of them holes, pass through a rank whose
# resident memory is bounded far below their size.
#   tests/e2e/streaming.sh          1 GB by plain rounding, 0.3 GB with calibration
#   tests/e2e/streaming.sh large    20 GB by plain rounding in 1.5 GB
# The outputs are not sparse: the small runs need 0.5 GB of disk space, the large one 7 GB.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# stream NAME MEGABYTES OPTION...: quantizes $work/NAME within so much memory.
stream() {
  local name="$1" bound="$2" log="$work/$1.log" begin="$SECONDS"
  shift 2
  if ! python3 "$tools" peak "$bound" "$bitmill" quantize --report.html=false --model.path="$work/$name" \
    --output.path="$work/$name-out" --run.threads=2 "$@" >"$log" 2>&1; then
    complain "$name"
    tail -n 20 "$log"
    return
  fi
  echo "$name: $(tail -n 1 "$log"), $((SECONDS - begin)) s, $(du -sh "$work/$name" | cut -f1) on disk before, $(du -sh "$work/$name-out" | cut -f1) after"
}

if [ "${1:-}" = large ]; then
  # Blocks of a 70B model.
  python3 "$tools" sparse "$work/large" --hidden 8192 --intermediate 28672 --blocks 10 --vocab 32000
  stream large 1500 --quantize.algorithm=rtn
else
  python3 "$tools" sparse "$work/small" --hidden 4096 --intermediate 8192 --blocks 3 --vocab 8192
  stream small 280 --quantize.algorithm=rtn
  must 0 verify "$work/small-out" --against="$work/small"

  python3 "$tools" sparse "$work/calibrated" --hidden 1536 --intermediate 3072 --blocks 5 --vocab 4096
  python3 "$tools" tokens "$work/tokens.safetensors" --vocab 60 --samples 4 --length 64
  stream calibrated 220 --quantize.algorithm=gptq --calibration.tokens="$work/tokens.safetensors" --calibration.samples=0
  # Not against the source: most inputs of a model of zeros are zero, and then no weight matters.
  must 0 verify "$work/calibrated-out"
fi
finish

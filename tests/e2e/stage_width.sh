#!/usr/bin/env bash
# Stages of several ranks, and both modes of propagation: whatever P stages of D ranks share the work, the bytes are the same.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# compare NAME "PxD ..." OPTION...: all runs equal the first. P stages x D ranks.
compare() {
  local name="$1" runs="$2" first="" stages width out
  shift 2
  for run in $runs; do
    stages="${run%x*}"
    width="${run#*x}"
    out="$work/$name-$run"
    must "$((stages * width))" quantize "${demo[@]}" --output.path="$out" --calibration.samples="$samples" --run.threads=1 --run.stage_width="$width" "$@" || continue
    same_as_first "$name" "stages x width $run" "$out"
  done
}

demo=(configs/demo.cfg --report.html=false)
samples=40
all="1x1 2x1 4x1 1x2 2x2 1x4 3x1 1x3"
compare quantized "$all"
compare full "$all" --propagation.mode=full
cmp -s "$work/quantized-1x1/model.safetensors" "$work/full-1x1/model.safetensors" &&
  complain "both modes give the same bytes: full mode did not take the float model's activations"

# Every algorithm. 3 samples in 32 lanes leave ranks without any.
for algorithm in rtn awq awq+gptq; do
  compare "full-$algorithm" "1x1 1x3 2x2" --propagation.mode=full --quantize.algorithm="$algorithm" --quantize.symmetric=false \
    --output.format=gptq_v2
done
for algorithm in rtn awq gptaq awq+gptaq; do
  compare "$algorithm" "1x1 1x3 2x2" --quantize.algorithm="$algorithm" --quantize.symmetric=false --output.format=gptq_v2
done
compare whole "1x1 2x2" --quantize.true_sequential=false
compare dynamic "1x1 1x3" --quantize.act_order=dynamic --quantize.bits=3
compare refit "1x1 2x2" --quantize.act_order=none --quantize.bits=3 --quantize.group_size=64 --quantize.symmetric=false --output.format=gptq_v2
compare head "1x1 2x2" --quantize.lm_head=true --quantize.untie=true
compare head-full "1x1 1x3" --quantize.lm_head=true --quantize.untie=true --propagation.mode=full
samples=3 compare few-samples "1x1 1x5"
# Several ranks of a stage write its shards.
compare shards "1x1 1x3 2x2" --output.shard_size=300KB --output.format=compressed-tensors

must 5 quantize "${demo[@]}" --output.path="$work/idle" --calibration.samples="$samples" --run.stage_width=2 --run.threads=1
grep -qE "1 of 5 ranks stay idle \(ranks 4-4\): 5 is no multiple of run.stage_width=2" "$work/must.log" ||
  complain "5 ranks at width 2: nothing says which rank is idle and why"
checkpoint_hash "$work/idle" | diff - "$work/quantized-1x1.hash" >/dev/null || complain "an idle rank changes the bytes"

refused 2 "run.stage_width=3: expected at most the 2 ranks of this job" 2 quantize "${demo[@]}" --output.path="$work/refused" \
  --run.stage_width=3
refused 2 "run.stage_width" 2 quantize "${demo[@]}" --output.path="$work/refused" --run.stage_width=0
refused 2 "gptaq.*propagation.mode=full" 2 quantize "${demo[@]}" --output.path="$work/refused" --quantize.algorithm=gptaq \
  --propagation.mode=full
no_checkpoint "$work/refused"

# Ranks that disagree: on the options, or on what lies at the model's path (another mount on another node).
two=(quantize "${demo[@]}" --output.path="$work/refused")
together() {  # CODE PATTERN COMMAND...: two ranks, the second through COMMAND
  local code="$1" pattern="$2" log="$work/together.log" seen=0
  shift 2
  timeout 60 mpirun --bind-to none -n 1 "$bitmill" "${two[@]}" : -n 1 "$@" >"$log" 2>&1 || seen=$?
  [ "$seen" = "$code" ] && grep -qE -- "$pattern" "$log" && return
  complain "ranks that disagree: exit $seen instead of $code, or no '$pattern'"
  tail -n 8 "$log"
}
together 2 "rank 1 was started with other options than rank 0" "$bitmill" "${two[@]}" --quantize.bits=3
if unshare -m true 2>/dev/null; then
  cp -r configs/demo/model "$work/other"
  truncate -s -2 "$work/other/model.safetensors"
  elsewhere='mount --bind "$0" configs/demo/model && exec "$@"'
  together 3 "model.safetensors: [0-9]+ bytes on this host, [0-9]+ bytes on rank 0's" \
    unshare -m bash -c "$elsewhere" "$work/other" "$bitmill" "${two[@]}"
  cp configs/demo/model/model.safetensors "$work/other" && sed -i 's/"rope_theta": 10000.0/"rope_theta": 20000.0/' "$work/other/config.json"
  together 3 "config.json: rank 1 sees another one than rank 0" unshare -m bash -c "$elsewhere" "$work/other" "$bitmill" "${two[@]}"
else
  echo "not checked: ranks that see different files (unshare -m is not allowed here)"
fi
no_checkpoint "$work/refused"

finish

#!/usr/bin/env bash
# The bytes of a checkpoint depend on nothing but the job: not on the number of ranks, not on threads.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# compare NAME "RANKS THREADS ..." OPTION...: all runs equal the first; 0 ranks is a run without a launcher.
compare() {
  local name="$1" runs="$2" first="" count threads out
  shift 2
  for run in $runs; do
    count="${run%x*}"
    threads="${run#*x}"
    out="$work/$name-$run"
    must "$count" quantize "${demo[@]}" --output.path="$out" --run.threads="$threads" "$@" || continue
    same_as_first "$name" "ranks x threads $run" "$out"
  done
}

compare symmetric "0x1 1x2 1x3 2x1 2x3 3x2 5x1 6x1"
compare asymmetric "1x1 2x2 3x3 5x2" --quantize.bits=3 --quantize.group_size=64 --quantize.symmetric=false \
  --output.format=gptq_v2
# A second stream of activations crosses ranks beside the first.
compare gptaq "1x1 2x2 3x1" --quantize.algorithm=gptaq --quantize.bits=3 --quantize.symmetric=false --output.format=gptq_v2
compare dynamic "1x1 2x3 3x2" --quantize.act_order=dynamic
compare format-awq "1x1 2x3 5x2" --output.format=awq --quantize.symmetric=false --quantize.group_size=64
# AWQ: the search looks at the first samples, wherever they are computed. Folded tensors differ from the source's on purpose.
for algorithm in awq awq+gptq awq+gptaq; do
  compare "$algorithm" "0x1 2x3 3x2" --quantize.algorithm="$algorithm" --quantize.symmetric=false --output.format=gptq_v2
  must 0 verify "$work/$algorithm-0x1" --against configs/demo/model
  grep -q '"model.layers.0.input_layernorm.weight"' "$work/$algorithm-0x1/bitmill/manifest.json" ||
    complain "$algorithm: the manifest names no folded norm"
done
# Without the manifest's list the folded norms are what they look like: changes.
sed -i 's/"folded"/"forgotten"/' "$work/awq-0x1/bitmill/manifest.json"
refused 3 "input_layernorm.weight differs from the source" 0 verify "$work/awq-0x1" --against configs/demo/model

# Many small shards instead of one file: the cuts must not depend on ranks either.
compare shards "1x1 3x1" --output.shard_size=500KB --output.format=compressed-tensors

# Six ranks for four blocks: the plan says who has nothing to do.
must 0 plan configs/demo.cfg --output.path="$work/none" --ranks=6 --run.stage_width=1
grep -qiE "idle" "$work/must.log" || { complain "the plan of 6 ranks for 4 blocks names no idle rank"; cat "$work/must.log"; }

finish

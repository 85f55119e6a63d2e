#!/usr/bin/env bash
# Failure is a state: what a run with bad numbers says, records and leaves behind.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=tests/data/tiny-llama
python3 "$tools" tokens "$work/tokens.safetensors" --vocab 512 --samples 6
python3 "$tools" tokens "$work/few.safetensors" --vocab 512 --samples 1 --length 4
common=(--report.html=false --quantize.group_size=32)
small=("${common[@]}" --model.path="$model" --calibration.samples=0)
out="$work/out"

# records DIR WANTED...: every row of layers.csv, and every layer of report.json, says column=value; "note~text" looks inside.
records() {
  python3 - "$@" <<'END' || complain "the records of $1"
import csv, json, sys
rows = list(csv.DictReader(open(sys.argv[1] + "/bitmill/layers.csv")))
layers = json.load(open(sys.argv[1] + "/bitmill/report.json"))["layers"]
assert len(rows) == len(layers) == 14, (len(rows), len(layers))
for row, layer in zip(rows, layers):
    for wanted in sys.argv[2:]:
        if "~" in wanted:
            key, text = wanted.split("~")
            assert text in row[key] and text in layer[key], (wanted, row)
        elif ">" in wanted:
            key, low = wanted.split(">")
            assert float(row[key]) > float(low) and layer[key] > float(low), (wanted, row)
        else:
            key, value = wanted.split("=")
            assert row[key] == value and str(layer[key]) in (value, value + ".0"), (wanted, row)
END
}
state() { python3 "$tools" get "$1/bitmill/status.json" "$2"; }

# --- 4 tokens for 128 columns: damping alone makes the Hessians definite ---
must 0 quantize "${small[@]}" --calibration.tokens="$work/few.safetensors" --output.path="$out"
records "$out" method=gptq tokens=4 samples=1 retries=0 damp=0.002 "smallest_pivot>0" note=
rm -rf "$out"

# The same without damping and without a ladder: every factorization fails.
hopeless=("${small[@]}" --calibration.tokens="$work/few.safetensors" --quantize.damp=0 --quantize.damp_max=0)
for count in 0 2; do
  must "$count" quantize "${hopeless[@]}" --quantize.on_failed=rtn --output.path="$out"
  records "$out" method=rtn tokens=4 retries=0 damp=0 smallest_pivot=0 "note~not positive definite"
  grep -q "14 fell back" "$work/must.log" || complain "the run does not say that 14 linears fell back"
  must 0 verify "$out" --against="$model"
  rm -rf "$out"

  refused 5 "14 modules failed" "$count" quantize "${hopeless[@]}" --quantize.on_failed=fail --output.path="$out"
  for block in 0 1; do
    for linear in self_attn.{q,k,v,o} mlp.{gate,up,down}; do
      grep "modules failed" "$work/refused.log" | grep -q "model.layers.$block.${linear}_proj (not positive definite" ||
        complain "ranks $count: exit 5 does not name model.layers.$block.${linear}_proj"
    done
  done
  no_checkpoint "$out"
  [ "$(state "$out" code)" = 5 ] || complain "ranks $count: status.json says $(state "$out" code), not 5"
  records "$out" method=rtn tokens=4 retries=0 "note~not positive definite"
  rm -rf "$out"
done
# A ladder that may climb solves them all.
must 0 quantize "${small[@]}" --calibration.tokens="$work/few.safetensors" --quantize.damp=0 --output.path="$out"
records "$out" method=gptq "retries>0" "damp>0" "smallest_pivot>0" note=
rm -rf "$out"
refused 2 "damp_max" 0 quantize "${small[@]}" --calibration.tokens="$work/few.safetensors" --quantize.damp=0.5 \
  --quantize.damp_max=0.1 --output.path="$out"

# --- weights far out of range ---
for kind in overflow head_overflow; do
  python3 "$tools" damage "$kind" "$model" "$work/$kind" || complain "cannot make $kind"
done
given=("${common[@]}" --calibration.tokens="$work/tokens.safetensors" --calibration.samples=0 --output.path="$out")
for count in 0 2; do
  # An fp16 scale cannot hold them.
  refused 3 "layers.0.self_attn.o_proj.*scale.*F16" "$count" quantize "${given[@]}" --model.path="$work/overflow"
  no_checkpoint "$out"
  rm -rf "$out"
  # bf16 scales (the sweep overflows, a state), or the module left in float: then the activations overflow, and the next
  # module that sees them is named.
  for extra in --output.format=compressed-tensors "--quantize.rule=.*o_proj skip=true"; do
    for compute in float32 bfloat16; do
      refused 3 "layers.0.mlp.gate_proj.*not finite in calibration sample 0 .token" "$count" \
        quantize "${given[@]}" --model.path="$work/overflow" --run.compute="$compute" "$extra"
      no_checkpoint "$out"
      rm -rf "$out"
    done
  done
done
refused 3 "o_proj.*rtn.*the sweep overflowed" 0 quantize "${given[@]}" --model.path="$work/overflow" --output.format=compressed-tensors
rm -rf "$out"
# Also where the module that sees them needs no calibration itself.
refused 3 "layers.0.mlp.gate_proj.*sample 0" 0 quantize "${given[@]}" --model.path="$work/overflow" \
  "--quantize.rule=.*o_proj skip=true" "--quantize.rule=.*layers.0.mlp.* algorithm=rtn"
rm -rf "$out"
# Nobody sees what the last linear overflows into, unless the head is quantized.
must 0 quantize "${given[@]}" --model.path="$work/head_overflow" "--quantize.rule=.*down_proj skip=true"
must 0 verify "$out" --against="$work/head_overflow"
rm -rf "$out"
refused 3 "lm_head.*not finite in calibration sample 0" 2 quantize "${given[@]}" --model.path="$work/head_overflow" \
  "--quantize.rule=.*down_proj skip=true" --quantize.lm_head=true
no_checkpoint "$out"

finish

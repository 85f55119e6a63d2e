#!/usr/bin/env bash
# Every kind of bad input: the documented exit code, one sentence naming the thing, and no partial output.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=tests/data/tiny-llama
good="$work/good.safetensors"
python3 "$tools" tokens "$good" --vocab 512
out="$work/out"

# The good job; options on the command line replace those of the file.
cat >"$work/good.cfg" <<END
[model]
path = $model
[calibration]
tokens = $good
samples = 4
[output]
path = $out
END

# check CODE PATTERN N OPTION...: the good job with one thing wrong.
check() {
  local code="$1" pattern="$2" count="$3"
  shift 3
  refused "$code" "$pattern" "$count" quantize "$work/good.cfg" "$@"
  no_checkpoint "$out"
  rm -rf "$out"
}
# The good job itself works, so the cases below fail for their own reason.
must 0 quantize "$work/good.cfg"
[ -f "$out/config.json" ] || complain "the good job wrote no config.json"
rm -rf "$out"

# --- checkpoints: damage, pattern (exit 3) ---
while IFS='|' read -r kind pattern; do
  python3 "$tools" damage "$kind" "$model" "$work/$kind" || complain "cannot make $kind"
  check 3 "$pattern" 0 --model.path="$work/$kind"
done <<'END'
no_config|config\.json
no_weights|model\.safetensors
config_not_json|config\.json
truncated|model\.safetensors
truncated_shard|model-00002-of-00002\.safetensors
header_length|model\.safetensors.*header|header.*model\.safetensors
overlap|self_attn\.q_proj\.weight
out_of_range|model\.safetensors
duplicate|model\.norm\.weight
index_escapes|elsewhere\.safetensors
missing_tensor|model\.layers\.1\.mlp\.gate_proj\.weight
wrong_shape|mlp\.(gate|up|down)_proj\.weight
unknown_family|perceptron.*llama
integer_weight|model\.layers\.0\.mlp\.up_proj\.weight
unknown_dtype|Q4
nan|model\.layers\.1\.mlp\.down_proj
END
check 3 "$work/nowhere" 0 --model.path="$work/nowhere"
: >"$work/file"
check 3 "$work/file" 0 --model.path="$work/file"

# Every rank leaves with the same code, and mpirun hands it on.
check 3 "model\.layers\.1\.mlp\.down_proj" 2 --model.path="$work/nan"
check 3 "model\.safetensors" 2 --model.path="$work/truncated"

# --- calibration files ---
for kind in float rank1 outside empty; do
  python3 "$tools" tokens "$work/$kind.safetensors" --vocab 512 --kind "$kind"
done
check 3 "outside\.safetensors.*512" 0 --calibration.tokens="$work/outside.safetensors"
check 3 "outside\.safetensors.*512" 2 --calibration.tokens="$work/outside.safetensors"
check 3 "rank1\.safetensors" 0 --calibration.tokens="$work/rank1.safetensors"
check 3 "float\.safetensors" 0 --calibration.tokens="$work/float.safetensors"
check 3 "input_ids" 0 --calibration.tokens="$work/empty.safetensors"
check 3 "gone\.h5" 0 --calibration.tokens="$work/gone.h5"
check 3 "9.*4|4.*9" 0 --calibration.samples=9
check 3 "good\.safetensors.*(64|32)" 0 --calibration.sequence_length=64

# --- settings (exit 2) ---
check 2 'true_sequential' 0 --quantize.algorithm=gptaq --quantize.true_sequential=false
check 2 "group_size.*96|96.*group_size" 0 --quantize.group_size=96
check 2 "quantize\.group_size" 0 --quantize.grup_size=64
check 2 "bits" 0 --quantize.bits=5
check 2 "bits" 0 --quantize.bits=3 --output.format=compressed-tensors
check 2 "gptq_v2" 0 --quantize.symmetric=false --output.format=gptq
for format in compressed-tensors awq; do
  check 2 "act_order=dynamic.*gptq or gptq_v2" 0 --quantize.act_order=dynamic --output.format="$format"
done
check 2 "awq stores 4 bits.*gptq" 0 --quantize.bits=8 --output.format=awq
check 2 "awq.*one scheme" 0 --output.format=awq "--quantize.rule=.*down_proj group_size=64"
check 2 "resum.*not in this version" 0 --run.resume=must
check 2 "gptq" 0 --quantize.algorithm=gptk
check 2 "compressed-tensors" 0 --output.format=compresed-tensors
check 2 "act_order" 0 --quantize.act_order=sideways
check 2 "quantize\.damp" 0 --quantize.damp=much
check 2 "calibration\.tokens" 0 --calibration.tokens=
check 2 "output\.path" 0 --output.path=
check 2 "rule" 0 "--quantize.rule=model.*( bits=4"
refused 2 "quantise" 0 quantise configs/demo.cfg
refused 2 "nowhere\.cfg" 0 quantize "$work/nowhere.cfg"
printf '[quantize]\nbitz = 4\n' >"$work/typo.cfg"
refused 2 "quantize\.bits" 0 quantize "$work/typo.cfg"

# A tied head has no weight of its own to quantize.
refused 2 "lm_head" 0 quantize configs/demo.cfg --output.path="$out" --quantize.lm_head=true
no_checkpoint "$out"

# --- outputs ---
mkdir "$work/foreign" && echo precious >"$work/foreign/thesis.txt"
check 2 "$work/foreign" 0 --output.path="$work/foreign"
[ "$(ls -A "$work/foreign" 2>/dev/null)" = thesis.txt ] || complain "the foreign directory was touched: $(ls -A "$work/foreign")"
# Below a regular file nothing can be created, not even by root. Found before any compute.
check 6 "$work/file/out" 0 --output.path="$work/file/out"
check 6 "$work/file/out" 2 --output.path="$work/file/out"

# Families that can only be planned are refused before anything is read or written.
for count in 0 2; do
  for model in Qwen3-235B-A22B DeepSeek-V3; do
    refused 3 "can be planned in this version, but not computed" "$count" quantize --model.path="configs/models/$model" \
      --calibration.tokens=configs/demo/calib-demo.safetensors --output.path="$work/planned-only"
  done
done
[ ! -e "$work/planned-only" ] || complain "a refused family left an output"

finish

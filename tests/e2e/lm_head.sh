#!/usr/bin/env bash
# quantize.lm_head: the head becomes one more quantized linear, of an untied model and, with quantize.untie, of a tied one.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=tests/data/tiny-llama  # untied, vocabulary 512
python3 "$tools" tokens "$work/tokens.safetensors" --vocab 512 --samples 6
rounded=(--model.path="$model" --quantize.group_size=32 --run.microbatch_tokens=64 --report.html=false)
small=("${rounded[@]}" --calibration.tokens="$work/tokens.safetensors" --calibration.samples=0 --run.reduction_lanes=4)

# value FILE KEY WANTED
value() {
  local seen
  seen="$(python3 "$tools" get "$1" "$2")"
  [ "$seen" = "$3" ] || complain "$1: $2 is $seen, expected $3"
}
# holds DIR NAME...: tensor names of the only file.
holds() {
  python3 - "$here" "$@" <<'END' || complain "tensors of $1"
import sys
sys.path.insert(0, sys.argv[1])
import tools
header, _ = tools.read(sys.argv[2] + "/model.safetensors")
for name in sys.argv[3:]:
    absent = name.startswith("!")
    if (name.lstrip("!") in header) == absent:
        sys.exit(f"{name} in {sorted(n for n in header if 'lm_head' in n or 'embed' in n)}")
END
}

# --- untied: every format, 1 to 3 ranks, the same bytes ---
for format in gptq compressed-tensors; do
  first=""
  for count in 0 1 2 3; do
    out="$work/$format-$count"
    must "$count" quantize "${small[@]}" --quantize.lm_head=true --output.format="$format" --output.path="$out" || continue
    checkpoint_hash "$out" >"$out.hash"
    [ -n "$first" ] || first="$out"
    diff "$first.hash" "$out.hash" >/dev/null || complain "$format: $count ranks give other bytes"
  done
  # With 8 bits next to nothing is lost, so a head read wrongly would show.
  must 2 quantize "${small[@]}" --quantize.lm_head=true --quantize.bits=8 --output.format="$format" --output.path="$first-8"
  must 2 eval --model.path="$first-8" --evaluate.tokens="$work/tokens.safetensors" --evaluate.reference="$model" \
    --json="$work/eval.json"
  python3 - "$work/eval.json" <<'END' || complain "$format: the quantized head is far from the float model"
import json, sys
kl = json.load(open(sys.argv[1]))["kl"]
assert 0 < kl < 0.003, kl
END
  must 0 verify "$first" --against="$model" --json="$work/verify.json"
  value "$work/verify.json" linears 15
  must 0 inspect "$first" --tensor=lm_head --json="$work/inspect.json"
  value "$work/inspect.json" head.quantized True
  value "$work/inspect.json" sizes.quantized_linears 15
done
holds "$work/gptq-0" lm_head.qweight model.embed_tokens.weight '!lm_head.weight'
holds "$work/compressed-tensors-0" lm_head.weight_packed '!lm_head.weight'
value "$work/gptq-0/config.json" quantization_config.lm_head True
value "$work/gptq-0/quantize_config.json" lm_head True
value "$work/compressed-tensors-0/config.json" quantization_config.ignore '[]'
python3 - "$work/gptq-3/bitmill" <<'END' || complain "the head's record"
import csv, json, sys
rows = list(csv.DictReader(open(sys.argv[1] + "/layers.csv")))
head = rows[-1]
assert head["module"] == "lm_head" and head["method"] == "gptq", head
assert (head["out"], head["in"], head["tokens"], head["block"]) == ("512", "128", "192", "2"), head
assert json.load(open(sys.argv[1] + "/report.json"))["layers"][-1]["module"] == "lm_head"
END

# --- rules speak of the module lm_head ---
must 0 quantize "${small[@]}" --quantize.lm_head=true --output.path="$work/rule" "--quantize.rule=lm_head bits=8"
must 0 verify "$work/rule" --against="$model"
python3 - "$work/rule/config.json" <<'END' || complain "the rule of a head with other bits"
import json, sys
rules = json.load(open(sys.argv[1]))["quantization_config"]["dynamic"]
assert rules == {"+:^lm_head$": {"bits": 8, "group_size": 32}}, rules
END
must 0 quantize "${small[@]}" --quantize.lm_head=true --output.path="$work/skip" "--quantize.rule=lm_head skip=true"
holds "$work/skip" lm_head.weight '!lm_head.qweight'
must 0 verify "$work/skip" --against="$model"
refused 2 "lm_head has 8 bits" 0 quantize "${small[@]}" --quantize.lm_head=true --output.format=compressed-tensors \
  --output.path="$work/none" "--quantize.rule=lm_head bits=8"
no_checkpoint "$work/none"

# Loaders of AWQ files keep the head in float.
for count in 0 2; do
  refused 2 "awq.*lm_head.*output.format=gptq" "$count" quantize "${small[@]}" --quantize.lm_head=true --output.format=awq \
    --output.path="$work/none"
done
refused 2 "awq.*lm_head.*output.format=gptq" 0 plan "${small[@]}" --quantize.lm_head=true --output.format=awq
no_checkpoint "$work/none"

# Rounding needs no activations; here only the head's rule does.
must 0 quantize "${rounded[@]}" --quantize.algorithm=rtn --quantize.lm_head=true --output.path="$work/rtn"
must 0 verify "$work/rtn" --against="$model"
must 2 quantize "${small[@]}" --quantize.algorithm=rtn "--quantize.rule=lm_head algorithm=gptq" --quantize.lm_head=true \
  --output.path="$work/only"
grep -q "^2,lm_head,gptq" "$work/only/bitmill/layers.csv" || complain "only the head by gptq: $(tail -n 1 "$work/only/bitmill/layers.csv")"

# --- plan: the head's shard and memory ---
must 0 plan "${small[@]}" --quantize.lm_head=true --output.path="$work/none" --json="$work/plan.json"
grep -q '"lm_head.qweight"\|"head"' "$work/plan.json" || complain "the plan has no shard of the head"

# --- tied: the demo ---
refused 2 "lm_head.*untie" 0 quantize "${demo[@]}" --output.path="$work/none" --quantize.lm_head=true
refused 2 "untie.*lm_head" 0 quantize "${demo[@]}" --output.path="$work/none" --quantize.untie=true
no_checkpoint "$work/none"
tied=(configs/demo.cfg --report.html=false --calibration.samples=8 --quantize.lm_head=true --quantize.untie=true)
for count in 0 2; do
  must "$count" quantize "${tied[@]}" --output.path="$work/tied-$count" || continue
  checkpoint_hash "$work/tied-$count" >"$work/tied-$count.hash"
done
diff "$work/tied-0.hash" "$work/tied-2.hash" >/dev/null || complain "untied: 2 ranks give other bytes"
value "$work/tied-0/config.json" tie_word_embeddings False
holds "$work/tied-0" lm_head.qweight model.embed_tokens.weight '!lm_head.weight'
must 0 verify "$work/tied-0" --against=configs/demo/model
must 0 eval configs/demo.cfg --model.path="$work/tied-0" --evaluate.samples=8 --evaluate.reference=configs/demo/model \
  --json="$work/eval.json"
python3 "$tools" keys "$work/eval.json" kl perplexity || complain "eval of an untied head"
# A config that ties the head again would make loaders use the embedding.
cp -r "$work/tied-0" "$work/retied"
sed -i 's/"tie_word_embeddings": false/"tie_word_embeddings": true/' "$work/retied/config.json"
refused 3 "tie_word_embeddings" 0 verify "$work/retied"

finish

#!/usr/bin/env bash
# What was written, read back from disk: perplexity of every format stays near float, and formats that store the same
# codes and scales give the same number to the last digit.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Bound over float perplexity; about twice what the demo model shows, so that a wrong nibble order or zero point, which
# costs far more, cannot hide below it.
samples=--evaluate.samples=24

# evaluate NAME DIR RANKS
evaluate() {
  must "$3" eval "${demo[@]}" --model.path="$2" "$samples" --json="$work/$1.json"
}
# quantize NAME OPTION...
quantize() {
  local name="$1"
  shift
  must 2 quantize "${demo[@]}" --output.path="$work/$name" "$@" && evaluate "$name" "$work/$name" 1
}
value() { python3 "$tools" get "$work/$1.json" "$2"; }
# near NAME BOUND: perplexity at most BOUND times that of float
near() {
  python3 - "$(value "$1" perplexity)" "$(value float perplexity)" "$2" <<'END' || complain "$1 is not near float"
import sys
packed, dense, bound = map(float, sys.argv[1:])
print(f"{packed:.4f} / {dense:.4f} = {packed / dense:.4f}, allowed 0.97 to {bound}")
sys.exit(not 0.97 <= packed / dense <= bound)
END
}

evaluate float configs/demo/model 1
evaluate float-ranks configs/demo/model 3
[ "$(value float nll)" = "$(value float-ranks nll)" ] || complain "float nll depends on ranks"

quantize gptq4 --output.format=gptq
quantize gptq4v2 --output.format=gptq_v2
quantize ct4 --output.format=compressed-tensors
quantize gptq8 --quantize.bits=8 --output.format=gptq
quantize ct8 --quantize.bits=8 --output.format=compressed-tensors
quantize ct4a --quantize.symmetric=false --output.format=compressed-tensors
quantize gptq3a --quantize.bits=3 --quantize.symmetric=false --output.format=gptq_v2
quantize gptq2a --quantize.bits=2 --quantize.group_size=64 --quantize.symmetric=false --output.format=gptq_v2
quantize gptq4dynamic --quantize.act_order=dynamic
quantize awq4 --output.format=awq
quantize awq4a --output.format=awq --quantize.symmetric=false
quantize awq4row --output.format=awq --quantize.group_size=-1 --quantize.act_order=dynamic
quantize gptq4row --quantize.group_size=-1
quantize rtn4 --quantize.algorithm=rtn

near gptq4 1.06
near ct4 1.06
near ct4a 1.06
near gptq8 1.01
near ct8 1.01
near gptq3a 1.20
near gptq2a 1.80
near gptq4dynamic 1.06
near awq4a 1.06
near awq4row 1.12
near rtn4 1.12

[ "$(value gptq4 nll)" = "$(value gptq4v2 nll)" ] || complain "gptq and gptq_v2 of the same settings differ in nll"
# The codes do not depend on the format, and one group per row has no groups to scatter.
[ "$(value gptq4 nll)" = "$(value awq4 nll)" ] || complain "gptq and awq of the same settings differ in nll"
[ "$(value gptq4row nll)" = "$(value awq4row nll)" ] || complain "the dynamic order of rows differs from the static one"
grep -q '"desc_act": true' "$work/gptq4dynamic/config.json" || complain "act_order=dynamic is not desc_act=true"
[ "$(value gptq4 nll)" != "$(value gptq4dynamic nll)" ] || complain "act_order=dynamic gives what static gives"
# GPTQ against rounding: the reason for all of this.
python3 -c "import sys; sys.exit(not float(sys.argv[1]) < float(sys.argv[2]))" "$(value gptq4 nll)" "$(value rtn4 nll)" ||
  complain "gptq ($(value gptq4 nll)) is not better than rtn ($(value rtn4 nll))"

# The same file evaluated over more ranks: the same number.
evaluate gptq4-ranks "$work/gptq4" 3
[ "$(value gptq4 nll)" = "$(value gptq4-ranks nll)" ] || complain "quantized nll depends on ranks"

for name in gptq4 gptq4v2 ct4 gptq3a gptq2a gptq4dynamic awq4 awq4a awq4row; do
  must 0 verify "$work/$name" --against configs/demo/model
done

finish

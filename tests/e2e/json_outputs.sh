#!/usr/bin/env bash
# What other programs read: --json of every command, and the records beside a checkpoint, hold their documented keys.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out="$work/out"
# keys FILE KEY...
keys() { python3 "$tools" keys "$@" || complain "keys of $1"; }

must 0 plan configs/demo.cfg --output.path="$out" --ranks=2 --json="$work/plan.json"
keys "$work/plan.json" ranks.0.blocks ranks.0.peak_bytes files load_warnings
[ ! -e "$out" ] || complain "plan wrote into the output"

must 2 quantize "${demo[@]}" --output.path="$out" --json="$work/quantize.json"
keys "$work/quantize.json" seconds output
must 2 eval "${demo[@]}" --model.path="$out" --evaluate.samples=4 --json="$work/eval.json"
keys "$work/eval.json" perplexity nll tokens seconds
[ "$(python3 "$tools" get "$work/eval.json" tokens)" = 1020 ] || complain "4 windows of 256 have 1020 predictions"
must 0 inspect "$out" --json="$work/inspect.json"
keys "$work/inspect.json" family tensors
must 0 inspect configs/demo/model --json="$work/inspect-float.json"
keys "$work/inspect-float.json" family tensors
must 0 verify "$out" --json="$work/verify.json"
keys "$work/verify.json" errors warnings
must 0 doctor --json="$work/doctor.json"
keys "$work/doctor.json" version

# --dump-logits: a safetensors file of the stated shape.
python3 "$tools" tokens "$work/few.safetensors" --vocab 1024 --samples 2 --length 16
must 0 eval --model.path=configs/demo/model --evaluate.tokens="$work/few.safetensors" --dump-logits="$work/logits.safetensors"
python3 - "$here" "$work/logits.safetensors" <<'END' || complain "the dumped logits"
import sys
sys.path.insert(0, sys.argv[1])
import tools
header, buffer = tools.read(sys.argv[2])
entry = header["logits"]
assert (entry["dtype"], entry["shape"]) == ("F32", [2, 16, 1024]), entry
assert len(buffer) == 2 * 16 * 1024 * 4, len(buffer)
END

# Records beside the checkpoint.
keys "$out/bitmill/status.json" state
keys "$out/bitmill/report.json" linears
python3 - "$out/bitmill/layers.csv" <<'END' || complain "layers.csv"
import csv, sys
rows = list(csv.DictReader(open(sys.argv[1])))
assert len(rows) == 28, f"{len(rows)} rows, expected 4 blocks x 7 linears"
for column in ("module", "bits", "group_size", "method", "loss", "damp", "tokens", "seconds"):
    assert column in rows[0], f"no column {column} in {list(rows[0])}"
assert {int(row["tokens"]) for row in rows} == {128 * 256}, "every linear saw all calibration tokens"
END
# A failure is recorded too.
refused 3 "nowhere" 0 eval --model.path="$work/nowhere" --evaluate.tokens=configs/demo/eval-demo.safetensors

finish

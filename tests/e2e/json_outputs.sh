#!/usr/bin/env bash
# What other programs read: --json of every command, and the records beside a checkpoint, hold their documented keys.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out="$work/out"
# keys FILE KEY...
keys() { python3 "$tools" keys "$@" || complain "keys of $1"; }

must 0 plan configs/demo.cfg --output.path="$out" --ranks=2 --json="$work/plan.json"
keys "$work/plan.json" ranks.1.first_block ranks.1.end_block ranks.0.peak_bytes ranks.0.peak_by_kind shards.0.file files.0 \
  load_warnings notes output_bytes bits_per_weight compute mode stages width hints estimated_seconds \
  estimated_seconds_by_phase.factor ranks.0.seconds.wait ranks.0.stage ranks.0.waves rates.sweep_flops
[ ! -e "$out" ] || complain "plan wrote into the output"

must 2 quantize "${demo[@]}" --output.path="$out" --json="$work/quantize.json"
keys "$work/quantize.json" state output seconds quantize_seconds source_bytes output_bytes bits_per_weight files.0 report
must 2 eval "${demo[@]}" --model.path="$out" --evaluate.samples=4 --json="$work/eval.json"
keys "$work/eval.json" perplexity nll tokens seconds windows compute
[ "$(python3 "$tools" get "$work/eval.json" tokens)" = 1020 ] || complain "4 windows of 256 have 1020 predictions"
must 0 inspect "$out" --json="$work/inspect.json"
keys "$work/inspect.json" family format files tensors sizes.bits_per_weight block_0.6.bits quantization_config
must 0 inspect configs/demo/model --json="$work/inspect-float.json"
keys "$work/inspect-float.json" family format files tensors sizes.parameters block_0.6.dtype
must 0 verify "$out" --json="$work/verify.json"
keys "$work/verify.json" directory format linears ok violations warnings
must 0 doctor --json="$work/doctor.json"
keys "$work/doctor.json" build.version build.families build.formats ranks.0.threads findings.0.state ok

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
keys "$out/bitmill/status.json" state code rank host phase module message
[ "$(python3 "$tools" get "$out/bitmill/status.json" state)" = complete ] || complain "status.json is not complete"
keys "$out/bitmill/report.json" version config backend quantize_seconds bits_per_weight phases.forward.max \
  phases.solve.planned phases.solve.ratio planned_seconds planned_at run_seconds timeline.0.what timeline.0.end ranks.1.peak_resident_bytes layers.27.module plan.files
python3 - "$out/bitmill/layers.csv" <<'END' || complain "layers.csv"
import csv, sys
rows = list(csv.DictReader(open(sys.argv[1])))
assert len(rows) == 28, f"{len(rows)} rows, expected 4 blocks x 7 linears"
for column in ("block", "module", "method", "bits", "group_size", "loss", "error", "damp", "tokens", "seconds", "rank"):
    assert column in rows[0], f"no column {column} in {list(rows[0])}"
assert {int(row["tokens"]) for row in rows} == {128 * 256}, "every linear saw all calibration tokens"
END
# A failure is recorded too: a NaN in the last block is met when the first ones are done.
python3 "$tools" damage nan tests/data/tiny-llama "$work/nan"
python3 "$tools" tokens "$work/small.safetensors" --vocab 512
for count in 0 2; do
  refused 3 "down_proj" "$count" quantize --model.path="$work/nan" --calibration.tokens="$work/small.safetensors" \
    --calibration.samples=4 --output.path="$work/failed-$count"
  status="$work/failed-$count/bitmill/status.json"
  if [ -e "$work/failed-$count" ]; then
    keys "$status" state code message
    [ "$(python3 "$tools" get "$status" state)" = failed ] || complain "ranks $count: status.json does not say failed"
    [ "$(python3 "$tools" get "$status" code)" = 3 ] || complain "ranks $count: status.json does not say code 3"
  fi
done

finish

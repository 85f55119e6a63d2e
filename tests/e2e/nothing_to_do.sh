#!/usr/bin/env bash
# The same command starts a job or says that it is done; it never overwrites something else unasked.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out="$work/out"
job=(quantize "${demo[@]}" --output.path="$out")

must 2 "${job[@]}"
checkpoint_hash "$out" >"$work/first"

# Again, on any number of ranks: nothing happens, and it says so.
for count in 0 1 3; do
  must "$count" "${job[@]}" && ! grep -qi "nothing to do" "$work/must.log" &&
    { complain "ranks $count: no 'nothing to do'"; tail -n 5 "$work/must.log"; }
done
# Things that do not change the numbers do not make another job.
must 1 "${job[@]}" --run.threads=2 --evaluate.samples=4
grep -qi "nothing to do" "$work/must.log" || complain "run.threads makes another job of it"

# Other settings on the same output: refused, naming what differs, and nothing is touched.
refused 2 "quantize\.bits" 2 "${job[@]}" --quantize.bits=8
refused 2 "quantize\.group_size" 0 "${job[@]}" --quantize.group_size=64
refused 2 "output\.format" 0 "${job[@]}" --output.format=gptq_v2
checkpoint_hash "$out" | diff - "$work/first" >/dev/null || complain "a refused run changed the output"

# Unless asked to.
must 2 "${job[@]}" --quantize.bits=8 --output.overwrite=true
checkpoint_hash "$out" | diff - "$work/first" >/dev/null && complain "overwrite=true left the old checkpoint"
python3 "$tools" get "$out/config.json" quantization_config.bits | grep -qx 8 || complain "config.json does not say 8 bits"
must 1 "${job[@]}" --output.overwrite=true
checkpoint_hash "$out" | diff - "$work/first" || complain "back to the first settings, other bytes"

# A directory that bitmill did not make is never touched, overwrite or not.
mkdir "$work/foreign"
cp configs/demo/model/config.json "$work/foreign/"
for overwrite in false true; do
  refused 2 "$work/foreign" 0 quantize "${demo[@]}" --output.path="$work/foreign" --output.overwrite="$overwrite"
  refused 2 "$work/foreign" 2 quantize "${demo[@]}" --output.path="$work/foreign" --output.overwrite="$overwrite"
done
[ "$(ls -A "$work/foreign")" = config.json ] || complain "the foreign directory was touched: $(ls -A "$work/foreign")"
cmp -s configs/demo/model/config.json "$work/foreign/config.json" || complain "the foreign config.json was changed"

# An output must not be its own source, and a quantized source is refused.
cp -r configs/demo/model "$work/model"
refused 2 "output\.path|model\.path" 0 quantize "${demo[@]}" --model.path="$work/model" --output.path="$work/model"
diff -r configs/demo/model "$work/model" || complain "the source was changed"
refused 3 "quantized" 0 quantize "${demo[@]}" --model.path="$out" --output.path="$work/again"

# Other weights of the same shapes are another job.
must 1 "${job[@]}" --model.path="$work/model" && ! grep -qi "nothing to do" "$work/must.log" &&
  complain "the model's path makes another job of it"
python3 - "$work/model/model.safetensors" <<'END'
import os, sys
with open(sys.argv[1], "r+b") as file:  # the last bytes of the last tensor, sign of one weight
    file.seek(-1, os.SEEK_END)
    last = file.read(1)[0]
    file.seek(-1, os.SEEK_END)
    file.write(bytes([last ^ 0x80]))
END
refused 2 "input\.model" 0 "${job[@]}" --model.path="$work/model"

finish

#!/usr/bin/env bash
# launch/tokenize.py on the demo's text: gives the token ids that ship with the demo, equal bytes for equal inputs, and
# clear refusals. Skipped where the Python package tokenizers is missing (launch/tokenize.sh installs it).
set -uo pipefail
root="${BITMILL_SOURCE_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
cd "$root" || exit 1

python=""
for candidate in "${BITMILL_TOKENIZE_PYTHON:-}" .venv/tokenize/bin/python python3; do
  if [ -n "$candidate" ] && "$candidate" -c "import tokenizers, h5py" 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "SKIPPED: no Python with tokenizers and h5py; run launch/tokenize.sh --help once, or set BITMILL_TOKENIZE_PYTHON"
  exit 77
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failures=0
complain() { echo "FAILED: $*"; failures=$((failures + 1)); }
tokenize() { "$python" launch/tokenize.py --model configs/demo/model "$@"; }

# The shipped calibration tokens are the first 128 windows of the shipped text.
tokenize --output "$work/demo.safetensors" --samples 0 --length 256 --no-separator configs/demo/calib-demo.txt || complain "demo"
python3 - tests/e2e "$work/demo.safetensors" configs/demo/calib-demo.safetensors <<'END' || complain "other ids than the demo's"
import sys
sys.path.insert(0, sys.argv[1])
import tools
(made, made_bytes), (shipped, shipped_bytes) = (tools.read(name) for name in sys.argv[2:])
assert made["input_ids"]["dtype"] == "I32" and made["input_ids"]["shape"][1] == 256, made
assert shipped["input_ids"]["shape"] == [128, 256], shipped
assert made_bytes[:128 * 256 * 4] == shipped_bytes
assert len(made["__metadata__"]["tokenizer_sha256"]) == 64 and made["__metadata__"]["sources"] == "calib-demo.txt"
END

# Documents, shuffle and selection depend on the seed and on nothing else.
python3 - "$work/documents.jsonl" <<'END'
import json, sys
text = open("configs/demo/calib-demo.txt").read()
with open(sys.argv[1], "w") as file:
    for begin in range(0, len(text) - 700, 700):
        file.write(json.dumps({"title": str(begin), "body": text[begin:begin + 700]}) + "\n")
END
for suffix in h5 safetensors; do
  for run in first second; do
    tokenize --output "$work/$run.$suffix" --samples 40 --length 128 --seed 5 --key body "$work/documents.jsonl" || complain "$suffix"
  done
  cmp "$work/first.$suffix" "$work/second.$suffix" || complain "two runs give different $suffix files"
  tokenize --output "$work/other.$suffix" --samples 40 --length 128 --seed 6 --key body "$work/documents.jsonl" || complain "seed"
  cmp -s "$work/first.$suffix" "$work/other.$suffix" && complain "the seed changes nothing in $suffix"
done
"$python" - "$work" tests/e2e <<'END' || complain "h5 and safetensors differ"
import sys
sys.path.insert(0, sys.argv[2])
import h5py, struct, tools
with h5py.File(sys.argv[1] + "/first.h5") as file:
    ids, about = file["input_ids"][:], dict(file["input_ids"].attrs)
header, buffer = tools.read(sys.argv[1] + "/first.safetensors")
assert ids.dtype == "<i4" and list(ids.shape) == header["input_ids"]["shape"] == [40, 128]
assert ids.tobytes() == buffer
assert about["seed"] == 5 and about["separator_id"] == 0 and about["sources"] == "documents.jsonl", about
assert (ids == 0).sum() > 5, "documents are joined with the end-of-text token"
END

# refused PATTERN ARGUMENT...
refused() {
  local pattern="$1" text
  shift
  text="$(tokenize "$@" 2>&1)" && complain "accepted: $*"
  grep -q -- "$pattern" <<<"$text" || complain "no '$pattern' in: $text"
}
refused "nowhere.txt" --output "$work/x.h5" "$work/nowhere.txt"
refused "25 windows of 2048" --output "$work/x.h5" configs/demo/calib-demo.txt
refused "'text'.*body" --output "$work/x.h5" "$work/documents.jsonl"
refused "must end in" --output "$work/x.bin" configs/demo/calib-demo.txt
refused "outside the vocabulary" --output "$work/x.h5" --separator-id 5000 configs/demo/calib-demo.txt
[ ! -e "$work/x.h5" ] || complain "a refused run left an output"

[ "$failures" = 0 ] && echo "all checks passed"
exit $((failures > 0))

#!/usr/bin/env bash
# What the report says of time: the plan beside what was measured, and a timeline in which full mode's stages work at the
# same time and quantized mode's take turns.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# 3 bits in small groups with zero points make the solve long enough to see.
for mode in quantized full; do
  must 2 quantize "${demo[@]}" --output.path="$work/$mode" --propagation.mode="$mode" --run.stage_width=1 --run.threads=1 \
    --calibration.samples=64 --quantize.bits=3 --quantize.group_size=32 --quantize.symmetric=false \
    --output.format=gptq_v2 || continue
  log="$work/$mode.log"
  cp "$work/must.log" "$log"
  grep -qE '^phase +plan s +avg s +ratio +min s +max s' "$log" || complain "$mode: no table of plan against measured"
  grep -qE '^solve( +[0-9]+\.[0-9]+){5} ' "$log" || complain "$mode: no line for solve with plan, average, ratio, min and max"
  grep -q "the plan's seconds are at assumed rates" "$log" || complain "$mode: nothing says where the rates come from"
  grep -qE '^timeline of .*C capture.*S solve' "$log" || complain "$mode: no legend of the timeline"
  for rank in 0 1; do
    grep -qE "^ +$rank \|.{80}\|\$" "$log" || complain "$mode: no line of rank $rank in the timeline"
  done
done

python3 - "$work" <<'END_OF_CHECK' || complain "the timeline in report.json"
import json
import sys


def report(mode):
    return json.load(open(f"{sys.argv[1]}/{mode}/bitmill/report.json"))


def spans(report, rank, what):
    return [(s["start"], s["end"]) for s in report["timeline"] if s["rank"] == rank and s["what"] == what]


def together(report, what):
    """The part of the shorter rank's time in which both do `what`."""
    a, b = spans(report, 0, what), spans(report, 1, what)
    both = sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)
    return both / min(sum(end - start for start, end in side) for side in (a, b))


for mode in ("quantized", "full"):
    said = report(mode)
    for rank in (0, 1):
        own = [s for s in said["timeline"] if s["rank"] == rank]
        assert own[0]["start"] == 0 and abs(own[-1]["end"] - said["run_seconds"]) < 1e-5, "a timeline covers the run"
        assert all(abs(a["end"] - b["start"]) < 1e-5 for a, b in zip(own, own[1:])), "a timeline has no gaps"
        assert len(own) <= 34 + 16 * 2, f"{len(own)} spans for two blocks"
        blocks = {s["block"] for s in own if s["what"] == "solve"}
        assert blocks == {2 * rank, 2 * rank + 1}, f"rank {rank} solved blocks {blocks}"
        seconds = sum(said["ranks"][rank]["phases"].values())
        assert abs(seconds - said["run_seconds"]) < 1e-3, f"phases of rank {rank} sum to {seconds}, not the run's time"
    planned = sum(p["planned"] or 0 for p in said["phases"].values())
    # Transfers may lie behind other work, so the phases may be a little more.
    assert 0.999 <= planned / said["planned_seconds"] <= 1.05, "the planned phases are the plan's time"

full = {what: together(report("full"), what) for what in ("capture", "solve")}
turns = {what: together(report("quantized"), what) for what in ("capture", "solve")}
print("together in mode full", full, "in mode quantized", turns)
assert full["capture"] > 0.3, "mode full: both stages capture at the same time"
# How much of the solves coincides depends on who is ahead; that nobody waits for a solve does not.
begins = min(start for start, _ in spans(report("full"), 1, "capture"))
solves = min(start for start, _ in spans(report("full"), 0, "solve"))
assert begins < solves, "mode full: the second stage captures before the first one solves"
begins = min(start for start, _ in spans(report("quantized"), 1, "solve"))
ends = max(end for _, end in spans(report("quantized"), 0, "solve"))
assert begins > ends, "mode quantized: the second stage solves when the first one has"
# Micro-batches leave one by one, so the next stage's first sums overlap with the last forward before them.
assert turns["capture"] < 0.3, "mode quantized: a stage captures when the one before it is done"
assert turns["solve"] < 0.02, "mode quantized: a stage solves when the one before it is done"
END_OF_CHECK

finish

#!/usr/bin/env python3
"""Estimated run times of the models in configs/models for 8 to 1,024 ranks, from `bitmill plan`: a model, no measurement.

  tests/bench/scaling.py [--rates KEY=VALUE ...] [--check]

Writes the tables between the marks of docs/scaling.md and the curve docs/scaling.svg. --rates replaces assumptions
([machine] without its name: sweep_flops=4e13); --check writes nothing and fails when the page is not what it would write.
The program is build/cpu-release/bin/bitmill, or $BITMILL."""
import argparse, json, math, os, pathlib, subprocess, sys, tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BITMILL = os.environ.get("BITMILL", str(ROOT / "build/cpu-release/bin/bitmill"))
MODELS = ["Llama-3-70B", "Llama-3.1-405B", "Qwen3-235B-A22B", "DeepSeek-V3", "Kimi-K2"]
MODES = ["quantized", "full"]
RANKS = [8, 16, 32, 64, 128, 256, 512, 1024]
TABLE_RANKS = [8, 64, 1024]
COLORS = ["#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#b7791f"]
BEGIN, END = "<!-- tables of tests/bench/scaling.py -->\n", "<!-- end -->\n"


def plan(model, ranks, mode, rates):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [BITMILL, "plan", f"--model.path={ROOT / 'configs/models' / model}", f"--ranks={ranks}", "--ranks_per_node=8",
                   f"--propagation.mode={mode}", f"--json={file.name}", *(f"--machine.{rate}" for rate in rates)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == 4:
            return None  # does not fit
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        return json.load(open(file.name))


def seconds(value):
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"


def row(model, mode, ranks, said):
    if said is None:
        return f"| {model} | {ranks} | {mode} | does not fit | | | | |"
    phases = sorted(said["estimated_seconds_by_phase"].items(), key=lambda phase: -phase[1])
    most = ", ".join(f"{name} {seconds(value)}" for name, value in phases[:3] if value > 0)
    waves = max(len(rank["waves"]) for rank in said["ranks"]) if mode == "full" else ""
    peak = max(rank["peak_bytes"] for rank in said["ranks"]) / 1e9
    return (f"| {model} | {ranks} | {mode} | {said['stages']} x {said['width']} | {waves} | "
            f"{seconds(said['estimated_seconds'])} | {most} | {peak:.1f} GB |")


def tables(plans):
    lines = ["| model | ranks | mode | stages x width | waves | estimate | longest phases | device memory of a rank |",
             "|---|---|---|---|---|---|---|---|"]
    for model in MODELS:
        lines += [row(model, mode, ranks, plans[model, ranks, mode]) for ranks in TABLE_RANKS for mode in MODES]
    return "\n".join(lines) + "\n"


def curve(plans):
    width, height, left, right, top, bottom = 760, 430, 64, 180, 56, 48
    values = [said["estimated_seconds"] for said in plans.values() if said]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    x = lambda ranks: left + (math.log2(ranks) - 3) / 7 * (width - left - right)
    y = lambda value: height - bottom - (math.log10(value) - low) / (high - low) * (height - top - bottom)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{left}" y="22" font-size="15">Estimated time of a run: a model at assumed rates, not a measurement</text>',
           f'<text x="{left}" y="40" fill="#555">128 x 2048 tokens, 4 bits; solid: propagation quantized, dashed: full</text>']
    for power in range(low, high + 1):
        at = y(10 ** power)
        svg.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}" stroke="#ddd"/>')
        svg.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{10 ** power} s</text>')
    for ranks in RANKS:
        svg.append(f'<text x="{x(ranks):.1f}" y="{height - bottom + 18}" text-anchor="middle">{ranks}</text>')
    svg.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">ranks</text>')
    for number, (model, color) in enumerate(zip(MODELS, COLORS)):
        for mode in MODES:
            points = [(x(ranks), y(plans[model, ranks, mode]["estimated_seconds"])) for ranks in RANKS if plans[model, ranks, mode]]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            dash = ' stroke-dasharray="5 4"' if mode == "full" else ""
            svg.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        at = top + 16 + 20 * number
        svg.append(f'<line x1="{width - right + 14}" y1="{at}" x2="{width - right + 38}" y2="{at}" stroke="{color}" stroke-width="2"/>')
        svg.append(f'<text x="{width - right + 44}" y="{at + 4}">{model}</text>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    plans = {(model, ranks, mode): plan(model, ranks, mode, args.rates) for model in MODELS for ranks in RANKS for mode in MODES}
    page, drawing = ROOT / "docs/scaling.md", ROOT / "docs/scaling.svg"
    before, rest = page.read_text().split(BEGIN)
    text = before + BEGIN + tables(plans) + END + rest.split(END)[1]
    if args.check:
        sys.exit(0 if text == page.read_text() and drawing.read_text() == curve(plans) else "docs/scaling.md or .svg is out of date")
    page.write_text(text)
    drawing.write_text(curve(plans))


if __name__ == "__main__":
    main()

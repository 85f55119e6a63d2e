#!/usr/bin/env python3
"""Quality of every algorithm on one model, as Markdown tables: perplexity and KL divergence from the float model (nats per
prediction) by `bitmill eval`, and seconds of `bitmill quantize` as a whole process.

  tests/bench/quality_table.py MODEL CALIBRATION_TOKENS EVALUATION_TOKENS [--windows N] [--bits 4,3,2] [--groups 128,64,32]
                               [--settings gptq,awq+gptq] [--csv FILE]

All grids are asymmetric and stored as gptq_v2. --csv keeps every finished cell, and cells it already holds are not run again.
The program is build/cpu-release/bin/bitmill, or $BITMILL.
"""
import argparse, csv, json, os, shutil, subprocess, tempfile, time

SETTINGS = {
    "rtn": ["--quantize.algorithm=rtn"],
    "gptq, order none": ["--quantize.act_order=none"],
    "gptq, order static": [],
    "gptq, order dynamic": ["--quantize.act_order=dynamic"],
    "gptq, plain ranges": ["--quantize.range_search=false"],
    "gptq, mse": ["--quantize.mse=true"],
    "gptq, full mode": ["--propagation.mode=full"],
    "awq": ["--quantize.algorithm=awq"],
    "awq+gptq": ["--quantize.algorithm=awq+gptq"],
    "gptaq": ["--quantize.algorithm=gptaq"],
    "awq+gptaq": ["--quantize.algorithm=awq+gptaq"],
}
FIELDS = ["setting", "bits", "group", "perplexity", "kl", "seconds"]
BITMILL = os.environ.get("BITMILL", os.path.join(os.path.dirname(__file__), "../../build/cpu-release/bin/bitmill"))


def run(*arguments):
    subprocess.run([BITMILL, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def evaluate(args, checkpoint, work):
    result = os.path.join(work, "eval.json")
    run("eval", f"--model.path={checkpoint}", f"--evaluate.reference={args.model}", f"--evaluate.tokens={args.evaluation}",
        f"--evaluate.samples={args.windows}", "--json", result)
    with open(result) as file:
        return json.load(file)


def measure(args, setting, bits, group, work):
    out = os.path.join(work, "out")
    shutil.rmtree(out, ignore_errors=True)
    begin = time.monotonic()
    run("quantize", f"--model.path={args.model}", f"--calibration.tokens={args.calibration}", f"--output.path={out}",
        f"--quantize.bits={bits}", f"--quantize.group_size={group}", "--quantize.symmetric=false", "--output.format=gptq_v2",
        *SETTINGS[setting])
    seconds = time.monotonic() - begin
    found = evaluate(args, out, work)
    return {"setting": setting, "bits": bits, "group": group, "perplexity": f"{found['perplexity']:.3f}",
            "kl": f"{found['kl']:.4f}", "seconds": f"{seconds:.1f}"}


def known_cells(path):
    if not path or not os.path.exists(path):
        return {}
    with open(path, newline="") as file:
        return {(row["setting"], int(row["bits"]), int(row["group"])): row for row in csv.DictReader(file)}


def keep(path, row):
    if not path:
        return
    new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def print_table(title, args, cells, text):
    columns = [(bits, group) for bits in args.bits for group in args.groups]
    print(f"\n{title}\n")
    print("| setting | " + " | ".join(f"{bits} bits g{group}" for bits, group in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for setting in args.settings:
        print(f"| {setting} | " + " | ".join(text(cells[setting, bits, group]) for bits, group in columns) + " |")


def numbers(text):
    return [int(value) for value in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--windows", type=int, default=0, help="evaluation windows, 0: all")
    parser.add_argument("--bits", type=numbers, default=[4, 3, 2])
    parser.add_argument("--groups", type=numbers, default=[128, 64, 32])
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS), help="names separated by ;")
    parser.add_argument("--csv")
    args = parser.parse_args()
    cells = known_cells(args.csv)
    work = tempfile.mkdtemp()
    try:
        dense = evaluate(args, args.model, work)
        for setting in args.settings:
            for bits in args.bits:
                for group in args.groups:
                    if (setting, bits, group) not in cells:
                        cells[setting, bits, group] = measure(args, setting, bits, group, work)
                        keep(args.csv, cells[setting, bits, group])
    finally:
        shutil.rmtree(work)
    print(f"float: perplexity {dense['perplexity']:.3f}, {dense['tokens']} predictions")
    print_table("KL divergence", args, cells, lambda row: row["kl"])
    print_table("Perplexity", args, cells, lambda row: row["perplexity"])
    print_table("Seconds", args, cells, lambda row: row["seconds"])


if __name__ == "__main__":
    main()

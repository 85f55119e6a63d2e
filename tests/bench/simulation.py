#!/usr/bin/env python3
"""The table of simulated runs in docs/scaling.md, from the test that makes them: virtual time, no measurement.

  tests/bench/simulation.py [--check]

--check writes nothing and fails when the page is not what it would write. Virtual time is the same on every machine. The
test is build/cpu-release/tests/pipeline/simulation_test, or $SIMULATION_TEST."""
import argparse, os, pathlib, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEST = os.environ.get("SIMULATION_TEST", str(ROOT / "build/cpu-release/tests/pipeline/simulation_test"))
BEGIN, END = "<!-- table of tests/bench/simulation.py -->\n", "<!-- end of the simulation -->\n"
HEAD = ["| links | mode | stages x width | micro-batches of a rank | estimate | simulated | difference | busy |",
        "|---|---|---|---|---|---|---|---|"]


def table():
    done = subprocess.run([TEST], stdout=subprocess.PIPE, text=True, env={**os.environ, "BITMILL_SOURCE_DIR": str(ROOT)})
    if done.returncode:
        sys.exit(f"{TEST}: exit code {done.returncode}:\n{done.stdout}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    lines = sorted(dict.fromkeys(lines), key=lambda line: not line.startswith("| free | "))  # stable: the plain ones first
    return "\n".join(HEAD + lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = ROOT / "docs/scaling.md"
    before, rest = page.read_text().split(BEGIN)
    text = before + BEGIN + table() + END + rest.split(END)[1]
    if args.check:
        sys.exit(0 if text == page.read_text() else "docs/scaling.md is out of date")
    page.write_text(text)


if __name__ == "__main__":
    main()

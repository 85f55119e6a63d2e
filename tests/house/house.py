#!/usr/bin/env python3
"""The rules of the house that a machine can check. One subcommand per rule, run from any directory:

  house.py includes    a folder of src/ includes only folders above it in the list FOLDERS
  house.py lengths     no source, script or build file has more than 500 lines
  house.py cuda        no preprocessor condition about CUDA outside the two factory files
  house.py paths       no path of one particular machine, and no unfinished-work markers
  house.py links       relative links and the paths named in `code` of the documents exist
  house.py self-test   every rule above finds the violation that is planted for it

Prints one line per violation and exits 1, or prints what was looked at and exits 0. --root DIR looks at another tree."""
import argparse
import pathlib
import re
import sys
import tempfile

# The reading order of src/: a folder may include itself and everything to its left.
FOLDERS = ["core", "backends", "comm", "io", "models", "algorithms", "formats", "pipeline", "report", "commands"]
FACTORIES = {"src/backends/backend.cc", "src/comm/transport.cc"}  # the only files that know which devices are built
SOURCES = {".h", ".cc", ".cu", ".cuh", ".py", ".sh", ".cmake", ".sbatch"}
TEXTS = SOURCES | {".md", ".txt", ".cfg", ".json", ".ini", ""}
SKIPPED = {".git", "build", "out", ".venv", "__pycache__", ".cache"}
MAX_LINES = 500


def files(root, suffixes, under="."):
    """Files of the tree with one of these suffixes, and CMakeLists.txt; build products and large text data left out."""
    for path in sorted((root / under).rglob("*")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts) or not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        if path.suffix in suffixes or path.name == "CMakeLists.txt":
            yield path, relative.as_posix()


def lines(path):
    return enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)


def includes(root):
    for path, name in files(root, {".h", ".cc", ".cu", ".cuh"}, "src"):
        folder = name.split("/")[1]
        if folder not in FOLDERS:
            if "/" in name[len("src/"):]:
                yield f"{name}: folder {folder} is not in the list of house.py"
            continue  # main.cc sees everything
        for number, line in lines(path):
            match = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not match:
                continue
            target = match.group(1).split("/")[0]
            if target not in FOLDERS:
                yield f'{name}:{number}: "{match.group(1)}" does not start with a folder of src/'
            elif FOLDERS.index(target) > FOLDERS.index(folder):
                yield f"{name}:{number}: {folder}/ includes {match.group(1)}, but {target}/ stands below it"


def lengths(root):
    for path, name in files(root, SOURCES):
        count = sum(1 for _ in lines(path))
        if count > MAX_LINES:
            yield f"{name}: {count} lines, at most {MAX_LINES}: split by area"


def cuda(root):
    for path, name in files(root, {".h", ".cc"}, "src"):
        if name in FACTORIES:
            continue
        for number, line in lines(path):
            if re.match(r"\s*#\s*(if|ifdef|ifndef|elif)\b.*(CUDA|NCCL)", line):
                yield f"{name}:{number}: a condition about CUDA belongs into {' or '.join(sorted(FACTORIES))}"


def paths(root):
    machine = re.compile(r"(?<![\w.}\-])/(" + "work|farm|home/" + r"\w+)/")
    marker = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|HA" + r"CK)\b")
    for path, name in files(root, TEXTS):
        if path.suffix == ".txt" and name.startswith("configs/demo/"):
            continue  # calibration text
        for number, line in lines(path):
            if machine.search(line):
                yield f"{name}:{number}: a path of one machine: {line.strip()[:100]}"
            if path.suffix != ".json" and marker.search(line):
                yield f"{name}:{number}: unfinished work: {line.strip()[:100]}"


def slug(heading):
    """The anchor that code forges derive from a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def anchors(path):
    return {slug(m.group(1)) for _, line in lines(path) if (m := re.match(r"#+\s+(.*)", line))}


def links(root):
    tops = {p.name for p in root.iterdir() if p.is_dir()} - SKIPPED
    for path, name in files(root, {".md"}):
        text = re.sub(r"```.*?```", lambda m: "\n" * m.group(0).count("\n"), path.read_text(), flags=re.S)
        for number, line in enumerate(text.splitlines(), 1):
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                if re.match(r"[a-z]+:", target):
                    continue
                place, _, anchor = target.partition("#")
                file = (path.parent / place) if place else path
                if not file.exists():
                    yield f"{name}:{number}: link to {target}, which does not exist"
                elif anchor and file.suffix == ".md" and slug(anchor) not in anchors(file):
                    yield f"{name}:{number}: {place or name} has no heading #{anchor}"
            for code in re.findall(r"`([\w./\-]+/[\w./\-]*)`", line):
                if "NAME" not in code and code.split("/")[0] in tops and not (root / code).exists():
                    yield f"{name}:{number}: `{code}` does not exist"


RULES = {f.__name__: f for f in (includes, lengths, cuda, paths, links)}

# rule -> (file, content) that must be found
PLANTED = {
    "includes": ("src/core/a.h", '#include "io/json.h"\n'),
    "lengths": ("src/core/a.cc", "//\n" * (MAX_LINES + 1)),
    "cuda": ("src/io/a.cc", "#ifdef BITMILL_CUDA\n"),
    "paths": ("docs/a.md", "see /" + "work/data\n"),
    "links": ("docs/a.md", "[gone](b.md)\n"),
}


def self_test():
    for rule, (name, content) in PLANTED.items():
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / name
            file.parent.mkdir(parents=True)
            file.write_text("fine\n")
            if list(RULES[rule](pathlib.Path(folder))):
                yield f"{rule}: complains about a clean tree"
            file.write_text(content)
            if not list(RULES[rule](pathlib.Path(folder))):
                yield f"{rule}: does not see {content.strip()[:40]!r} in {name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=[*RULES, "self-test"])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2])
    arguments = parser.parse_args()
    found = list(self_test() if arguments.rule == "self-test" else RULES[arguments.rule](arguments.root))
    for line in found:
        print(line)
    print(f"{arguments.rule}: {len(found) or 'no'} violation{'s' if len(found) != 1 else ''}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Makes a token file (calibration or evaluation) for bitmill from text.

  launch/tokenize.sh --model MODEL --output calib.h5 corpus.jsonl          (makes a Python environment first)
  python3 launch/tokenize.py --model MODEL --output calib.h5 a.txt b.txt   (needs tokenizers, numpy, and h5py for .h5)

Inputs are .txt (one document each) and .jsonl (one document per line, in the key given by --key). Documents are shuffled
with --seed, tokenized without special tokens, joined with the model's end-of-text token after each document, and cut into
full windows of --length tokens; a rest shorter than a window is dropped. With more windows than --samples, a seeded
selection of them is kept, in their order. Equal inputs give equal bytes.

The output holds one tensor `input_ids`, int32 [samples, length], and says where it came from: seed, SHA-256 of
tokenizer.json, names of the inputs. HDF5 (.h5) and safetensors (.safetensors) are the same to bitmill."""
import argparse
import hashlib
import json
import pathlib
import random
import struct
import sys


class Refused(Exception):
    """A message for the user; exit 1."""


def need(module):
    try:
        return __import__(module)
    except ImportError:
        raise Refused(f"the Python package {module} is missing: use launch/tokenize.sh, or pip install {module}") from None


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=pathlib.Path, metavar="FILE", help=".txt or .jsonl")
    parser.add_argument("--model", type=pathlib.Path, required=True,
                        help="directory with tokenizer.json (or that file itself)")
    parser.add_argument("--output", type=pathlib.Path, required=True, help=".h5, .hdf5 or .safetensors")
    parser.add_argument("--samples", type=int, default=128, help="windows to keep; 0: all (default 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per window (default 2048)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle and the selection (default 0)")
    parser.add_argument("--key", default="text", help="key of a .jsonl line that holds the text (default text)")
    parser.add_argument("--separator-id", type=int, default=None, help="token after each document (default: eos of the model)")
    parser.add_argument("--no-separator", action="store_true", help="join documents without a token between them")
    parser.add_argument("--no-shuffle", action="store_true", help="keep documents in the order given")
    arguments = parser.parse_args()
    if arguments.samples < 0 or arguments.length < 2:
        raise Refused("--samples must be 0 or more and --length at least 2")
    if arguments.output.suffix not in (".h5", ".hdf5", ".safetensors"):
        raise Refused(f"{arguments.output}: the name must end in .h5, .hdf5 or .safetensors")
    if not arguments.output.parent.is_dir():
        raise Refused(f"{arguments.output.parent}: no such directory for the output")
    return arguments


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 at byte {error.start}") from None


def read_documents(path, key):
    """The texts of one file, in its order."""
    text = read_text(path)
    if path.suffix == ".txt":
        return [text]
    if path.suffix != ".jsonl":
        raise Refused(f"{path}: the name must end in .txt or .jsonl")
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refused(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            found = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
            raise Refused(f"{path}:{number}: no text under the key '{key}' (found: {found}); choose one with --key")
        documents.append(value[key])
    return documents


def optional_json(path):
    return json.loads(read_text(path)) if path.exists() else {}


def separator(arguments, folder, tokenizer):
    """Id of the token after each document, None for no token."""
    if arguments.no_separator:
        return None
    size = tokenizer.get_vocab_size()
    if arguments.separator_id is not None:
        if not 0 <= arguments.separator_id < size:
            raise Refused(f"--separator-id {arguments.separator_id} is outside the vocabulary of {size}")
        return arguments.separator_id
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = optional_json(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token and tokenizer.token_to_id(token) is not None:
            return tokenizer.token_to_id(token)
    eos = optional_json(folder / "config.json").get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if isinstance(eos, int) and 0 <= eos < size:
        return eos
    raise Refused(f"{folder}: no eos token in tokenizer_config.json, special_tokens_map.json or config.json; "
                  "give --separator-id or --no-separator")


def pack(documents, tokenizer, after_each):
    ids = []
    for begin in range(0, len(documents), 1000):  # in parts: progress, and bounded memory in the tokenizer
        for encoding in tokenizer.encode_batch(documents[begin:begin + 1000], add_special_tokens=False):
            ids += encoding.ids
            if after_each is not None:
                ids.append(after_each)
        if sys.stderr.isatty():
            print(f"\r{min(begin + 1000, len(documents))} of {len(documents)} documents", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return ids


def cut(ids, samples, length, shuffle):
    """Full windows; a seeded selection, in order, when there are more than asked."""
    windows = len(ids) // length
    wanted = samples or windows
    if windows < wanted or windows == 0:
        raise Refused(f"the text gives {len(ids)} tokens, {windows} windows of {length}, but {wanted or 'at least one'} "
                      "are asked for: give more text, or lower --samples or --length")
    chosen = sorted(shuffle.sample(range(windows), wanted))
    return [ids[w * length:(w + 1) * length] for w in chosen]


def write_hdf5(path, rows, about):
    h5py, numpy = need("h5py"), need("numpy")
    with h5py.File(path, "w", track_order=False) as file:
        data = file.create_dataset("input_ids", data=numpy.asarray(rows, dtype="<i4"), track_times=False)
        for key, value in about.items():
            data.attrs[key] = value


def write_safetensors(path, rows, about):
    data = b"".join(struct.pack(f"<{len(row)}i", *row) for row in rows)
    header = {"__metadata__": {key: str(value) for key, value in about.items()},
              "input_ids": {"dtype": "I32", "shape": [len(rows), len(rows[0])], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main():
    arguments = parse_arguments()
    tokenizers = need("tokenizers")
    file = arguments.model / "tokenizer.json" if arguments.model.is_dir() else arguments.model
    text = read_text(file)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise Refused(f"{file}: not a tokenizer that the package tokenizers can read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    after_each = separator(arguments, file.parent, tokenizer)
    documents = [d for path in arguments.inputs for d in read_documents(path, arguments.key) if d]
    shuffle = random.Random(arguments.seed)
    if not arguments.no_shuffle:
        shuffle.shuffle(documents)
    ids = pack(documents, tokenizer, after_each)
    rows = cut(ids, arguments.samples, arguments.length, shuffle)

    vocabulary = optional_json(file.parent / "config.json").get("vocab_size")
    largest = max(max(row) for row in rows)
    if vocabulary is not None and largest >= vocabulary:
        raise Refused(f"token id {largest} is outside the model's vocab_size {vocabulary}: wrong tokenizer.json?")
    about = {"seed": arguments.seed, "separator_id": -1 if after_each is None else after_each,
             "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(),
             "sources": ", ".join(path.name for path in arguments.inputs)}

    temporary = arguments.output.with_name(arguments.output.name + ".tmp")
    try:
        (write_safetensors if arguments.output.suffix == ".safetensors" else write_hdf5)(temporary, rows, about)
        temporary.replace(arguments.output)
    except OSError as error:
        raise Refused(f"{arguments.output}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{arguments.output}: {len(rows)} windows of {arguments.length} tokens from {len(documents)} documents "
          f"({len(ids)} tokens)")


if __name__ == "__main__":
    try:
        main()
    except Refused as refusal:
        sys.exit(f"tokenize.py: {refusal}")

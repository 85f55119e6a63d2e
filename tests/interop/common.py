"""Shared by the client checks of this folder: arguments, token windows, perplexity, and the one line of JSON they print."""
import argparse
import json
import logging
import math
import os
import struct
import sys

# No network, no GPU, and threads that sleep while they wait (the machine may be busy with other tests).
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="",
                  OMP_WAIT_POLICY="passive")


def parse_arguments(doc, **choices):
    """OUT and TOKENS, --windows N --threads N, and one option per keyword: (default, allowed values)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="checkpoint directory")
    parser.add_argument("tokens", help="safetensors file with input_ids")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    for name, (default, allowed) in choices.items():
        parser.add_argument(f"--{name}", default=default, choices=allowed)
    return parser.parse_args()


def read_windows(path, count):
    """The first `count` rows of input_ids, as lists."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(size))["input_ids"]
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        raw = file.read(end - begin)
    code = {"I32": "i", "I64": "q"}[entry["dtype"]]
    rows, length = entry["shape"]
    ids = struct.unpack(f"<{rows * length}{code}", raw)
    return [list(ids[r * length:(r + 1) * length]) for r in range(min(rows, count))]


def perplexity(model, windows):
    """exp of the mean negative log-likelihood of each window's predictions, log-softmax in fp32."""
    import torch
    total = predictions = 0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            predictions += len(window) - 1
    return math.exp(total / predictions)


class Complaints(logging.Handler):
    """Loaders say in the log, not by failing, that a tensor was missing or made up: collect such lines as problems."""
    SIGNS = ("newly initialized", "were not used", "not initialized from", "missing key", "unexpected key", "mismatch")

    def __init__(self):
        super().__init__(logging.WARNING)
        self.problems = []
        for name in ("", "transformers", "compressed_tensors", "optimum", "gptqmodel", "accelerate"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record):
        text = record.getMessage()
        if any(sign in text.lower() for sign in self.SIGNS):
            self.problems.append(" ".join(text.split())[:300])


def loading_problems(info):
    """What from_pretrained(output_loading_info=True) found missing, left over or of another shape."""
    get = info.get if isinstance(info, dict) else lambda key, default=None: getattr(info, key, default)
    return [f"{key}: {sorted(map(str, get(key)))[:5]}" for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            if get(key)]


def take_stdout():
    """Loaders print banners: what they print goes to stderr, the returned file is the real stdout."""
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return real


def finish(stdout, client, value, problems, **more):
    if value is None or not math.isfinite(value):
        problems = [*problems, f"perplexity is {value}"]
    print(json.dumps({"client": client, "perplexity": value, "problems": list(dict.fromkeys(problems)), **more}), file=stdout,
          flush=True)
    sys.stderr.flush()
    os._exit(1 if problems else 0)  # not sys.exit: some loaders leave threads behind

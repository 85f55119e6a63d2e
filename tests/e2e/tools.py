#!/usr/bin/env python3
"""Files for the end-to-end tests, with nothing but the standard library.

  tools.py tokens FILE --vocab V [--samples N] [--length L] [--kind good|float|rank1|outside|empty]
  tools.py sparse FOLDER --hidden H --intermediate I --blocks B --vocab V
                                        a bf16 llama of any size that takes no space: nearly all of it is holes
  tools.py peak MEGABYTES COMMAND ...   runs COMMAND; fails if it does, or if its resident memory went above the bound
  tools.py memory REPORT RELATIVE [--resident]
                                        prints what each rank was planned to need and what it needed: tensors, or with
                                        --resident all its memory beyond start-up; fails where the two differ by more
  tools.py damage KIND SOURCE TARGET    copies a checkpoint and breaks it in one way (tools.py damage list)
  tools.py keys FILE KEY ...            fails unless the JSON file holds every KEY (a.b looks inside)
  tools.py get FILE KEY                 prints one value of a JSON file
  tools.py close A B RELATIVE           fails unless |A/B - 1| <= RELATIVE"""
import json
import pathlib
import random
import resource
import shutil
import struct
import subprocess
import sys


def read(path):
    """safetensors -> (header, buffer)"""
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def write(path, header, buffer, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + buffer)


def tokens(file, vocab, samples, length, kind):
    source = random.Random(7)
    # Skewed like text: small ids are frequent.
    ids = [min(vocab - 1, int(vocab * source.random() ** 2)) for _ in range(samples * length)]
    dtype, code, shape = "I32", "i", [samples, length]
    if kind == "float":
        dtype, code = "F32", "f"
    elif kind == "rank1":
        shape = [samples * length]
    elif kind == "outside":
        ids[length + 3] = vocab
    data = struct.pack(f"<{len(ids)}{code}", *ids)
    name = "something_else" if kind == "empty" else "input_ids"
    write(file, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}, data)


def sparse(folder, hidden, intermediate, blocks, vocab):
    """One shard per block, and one for embedding, norm and head. Of each tensor only the first rows, a row in the middle and
    the last row hold values; the rest are holes, which read as zeros."""
    folder.mkdir(parents=True)
    source, index, total = random.Random(11), {}, 0
    bf16 = [struct.pack("<f", source.uniform(-0.05, 0.05))[2:] for _ in range(1 << 16)]

    def shard(name, shapes):
        nonlocal total
        header, at = {}, 0
        for tensor, shape in shapes.items():
            size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            index[tensor] = name
            at += size
        total += at
        write(folder / name, header, b"")
        with open(folder / name, "r+b") as file:
            begin = file.seek(0, 2)
            file.truncate(begin + at)
            for tensor, shape in shapes.items():
                start, width = begin + header[tensor]["data_offsets"][0], shape[-1]
                first = 64 if "embed" in tensor else 4
                rows = range(1) if len(shape) == 1 else [*range(min(first, shape[0])), shape[0] // 2, shape[0] - 1]
                for row in rows:
                    file.seek(start + 2 * width * row)
                    file.write(b"\x80\x3f" * width if len(shape) == 1 else b"".join(source.choices(bf16, k=width)))

    for block in range(blocks):
        at = f"model.layers.{block}."
        shapes = {at + f"{norm}_layernorm.weight": [hidden] for norm in ("input", "post_attention")}
        shapes |= {at + f"self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {at + f"mlp.{name}_proj.weight": [intermediate, hidden] for name in ("gate", "up")}
        shard(f"model-{block + 1:05}-of-{blocks + 1:05}.safetensors",
              shapes | {at + "mlp.down_proj.weight": [hidden, intermediate]})
    shard(f"model-{blocks + 1:05}-of-{blocks + 1:05}.safetensors",
          {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden], "model.norm.weight": [hidden]})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": blocks, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128, "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}))
    print(f"{total / 1e9:.1f} GB of tensors")


def peak(megabytes, command):
    """Megabytes are 10^6 bytes; the kernel counts the memory of the largest of the processes."""
    result = subprocess.run(command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    print(f"peak resident {used:.0f} MB, bound {megabytes} MB")
    sys.exit(result.returncode or (0 if used <= megabytes else "the bound was passed"))


def memory(report, relative, resident):
    far = 0
    for rank in json.loads(report.read_text())["ranks"]:
        if rank["first_block"] == rank["end_block"]:
            continue
        plan, start = rank["planned_peak_bytes"], rank["start_resident_bytes"]
        measured = rank["peak_resident_bytes"] - start if resident else rank["peak_tensor_bytes"]
        beside = f" beside {start / 1e6:.1f} MB at the start" if resident else ""
        print(f"  rank {rank['rank']}: plan {plan / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB{beside}, "
              f"ratio {measured / plan:.3f}, planned at {rank['planned_peak_at']}")
        far += not abs(measured / plan - 1) <= relative
    sys.exit(f"{far} ranks differ from the plan by more than {relative}" if far else 0)


class Damage:
    """One method per way to break a checkpoint directory; each gets a fresh copy."""

    def __init__(self, folder):
        self.folder = folder
        self.model = folder / "model.safetensors"

    def edit_config(self, change):
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config, indent=2))

    def edit_header(self, change):
        header, buffer = read(self.model)
        change(header)
        write(self.model, header, buffer)

    def split(self, shard_of_first="model-00001-of-00002.safetensors"):
        """Two shards and an index; `shard_of_first` is what the index says about the first tensor."""
        header, buffer = read(self.model)
        names = sorted(n for n in header if n != "__metadata__")
        middle, index = len(names) // 2, {}
        for number, part in ((1, names[:middle]), (2, names[middle:])):
            file, entries, data = f"model-0000{number}-of-00002.safetensors", {}, b""
            for name in part:
                begin, end = header[name]["data_offsets"]
                entries[name] = dict(header[name], data_offsets=[len(data), len(data) + end - begin])
                data += buffer[begin:end]
                index[name] = file
            write(self.folder / file, entries, data)
        self.model.unlink()
        index[names[0]] = shard_of_first
        text = {"metadata": {"total_size": len(buffer)}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(text))

    def no_config(self):
        (self.folder / "config.json").unlink()

    def no_weights(self):
        self.model.unlink()

    def config_not_json(self):
        (self.folder / "config.json").write_text('{"model_type": "llama",')

    def truncated(self):
        self.model.write_bytes(self.model.read_bytes()[:-1000])

    def truncated_shard(self):
        self.split()
        shard = self.folder / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-2])

    def header_length(self):
        raw = self.model.read_bytes()
        self.model.write_bytes(struct.pack("<Q", len(raw) * 2) + raw[8:])

    def overlap(self):
        def change(header):
            name = "model.layers.1.self_attn.q_proj.weight"
            begin, end = header["model.layers.0.self_attn.q_proj.weight"]["data_offsets"]
            header[name]["data_offsets"] = [begin, end]
        self.edit_header(change)

    def out_of_range(self):
        def change(header):
            entry = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][1])
            entry["data_offsets"] = [o + 4096 for o in entry["data_offsets"]]
        self.edit_header(change)

    def duplicate(self):
        header, buffer = read(self.model)
        text = json.dumps(header)
        entry = json.dumps(header["model.norm.weight"])
        text = text[:-1] + f', "model.norm.weight": {entry}}}'
        write(self.model, text.encode(), buffer)

    def index_escapes(self):
        shutil.copy(self.model, self.folder.parent / "elsewhere.safetensors")
        self.split(shard_of_first="../elsewhere.safetensors")

    def missing_tensor(self):
        def change(header):
            header["model.layers.1.mlp.gate_proj.weight.gone"] = header.pop("model.layers.1.mlp.gate_proj.weight")
        self.edit_header(change)

    def wrong_shape(self):
        self.edit_config(lambda c: c.update(intermediate_size=c["intermediate_size"] * 2))

    def unknown_family(self):
        self.edit_config(lambda c: c.update(model_type="perceptron", architectures=["PerceptronForCausalLM"]))

    def integer_weight(self):
        self.edit_header(lambda h: h["model.layers.0.mlp.up_proj.weight"].update(dtype="I16"))

    def unknown_dtype(self):
        self.edit_header(lambda h: h["model.layers.0.mlp.up_proj.weight"].update(dtype="Q4"))

    def put(self, name, values):
        """Overwrites the first bfloat16 values of a tensor, from their bytes."""
        header, buffer = read(self.model)
        begin = header[name]["data_offsets"][0]
        write(self.model, header, buffer[:begin] + values + buffer[begin + len(values):])

    def nan(self):
        header, buffer = read(self.model)
        begin = header["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
        nan = b"\xc0\x7f"  # bfloat16
        write(self.model, header, buffer[:begin + 10] + nan + buffer[begin + 12:])

    def overflow(self):
        """Finite weights, 1e38, whose products with the attention output are not."""
        self.put("model.layers.0.self_attn.o_proj.weight", b"\x96\x7e" * (128 * 128))

    def head_overflow(self):
        """3.3e38 in the last linear of the last block: only the final norm's output sees it."""
        self.put("model.layers.1.mlp.down_proj.weight", b"\x78\x7f" * (128 * 256))


KINDS = [name for name in vars(Damage) if not name.startswith("_") and name not in ("edit_config", "edit_header", "put", "split")]


def inside(value, key):
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def option(words, name, default):
    return type(default)(words[words.index(name) + 1]) if name in words else default


def main():
    command, *words = sys.argv[1:]
    if command == "tokens":
        tokens(words[0], option(words, "--vocab", 512), option(words, "--samples", 4), option(words, "--length", 32),
               option(words, "--kind", "good"))
    elif command == "sparse":
        sparse(pathlib.Path(words[0]), *(option(words, f"--{name}", 1) for name in ("hidden", "intermediate", "blocks", "vocab")))
    elif command == "peak":
        peak(int(words[0]), words[1:])
    elif command == "memory":
        memory(pathlib.Path(words[0]), float(words[1]), "--resident" in words)
    elif command == "damage" and words == ["list"]:
        print("\n".join(KINDS))
    elif command == "damage":
        kind, source, target = words[0], pathlib.Path(words[1]), pathlib.Path(words[2])
        target.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, target / name)
        getattr(Damage(target), kind)()
    elif command == "keys":
        value = json.loads(pathlib.Path(words[0]).read_text())
        for key in words[1:]:
            try:
                inside(value, key)
            except (KeyError, IndexError, ValueError, TypeError):
                sys.exit(f"{words[0]} has no {key}; it holds {sorted(value) if isinstance(value, dict) else value}")
    elif command == "get":
        print(inside(json.loads(pathlib.Path(words[0]).read_text()), words[1]))
    elif command == "close":
        a, b, relative = map(float, words)
        if not abs(a / b - 1) <= relative:
            sys.exit(f"{a} and {b} differ by {abs(a / b - 1):.4g}, more than {relative}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()

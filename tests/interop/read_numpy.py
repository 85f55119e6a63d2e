#!/usr/bin/env python3
"""Reads the bytes of OUT (gptq, gptq_v2, compressed-tensors, awq) with numpy alone, as docs of the formats describe them, and
compares with the float checkpoint SRC: every linear within --bound of the source (relative Frobenius norm), every other
tensor equal bit for bit, no tensor missing or left over. usage: read_numpy.py OUT SRC [--bound 0.2]"""
import argparse
import json
import pathlib
import sys

import numpy as np


def read_checkpoint(folder):
    """name -> (dtype name, array); BF16 as uint16."""
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1"}
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("model*.safetensors")):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                tensors[name] = (entry["dtype"], np.frombuffer(raw[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"]))
    return tensors


def floats(tensor):
    dtype, values = tensor
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def unpack_rows(words, bits, count):
    """Little-endian bit stream down each column: uint32 [n, columns] -> codes [count, columns]."""
    stream = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    stream = stream.reshape(-1, words.shape[1])[:count * bits].reshape(count, bits, -1)
    return (stream << np.arange(bits, dtype=np.uint32)[None, :, None]).sum(1).astype(np.int32)


def read_gptq(tensors, module, config, v2):
    """weight [out, in] from qweight [in*bits/32, out], qzeros [groups, out*bits/32], scales [groups, out], g_idx [in]."""
    bits, g_idx = config["bits"], tensors[f"{module}.g_idx"][1]
    codes = unpack_rows(tensors[f"{module}.qweight"][1], bits, len(g_idx))
    scales = floats(tensors[f"{module}.scales"])
    zeros = unpack_rows(np.ascontiguousarray(tensors[f"{module}.qzeros"][1].T), bits, scales.shape[1]).T
    zeros = zeros if v2 else (zeros + 1) & (2 ** bits - 1)
    if config["sym"]:
        assert (zeros == 2 ** (bits - 1)).all(), f"{module}: a symmetric grid with other zero points"
    return ((codes - zeros[g_idx]) * scales[g_idx]).T


def read_compressed(tensors, module, scheme):
    """weight [out, in] from weight_packed [out, in*bits/32], weight_scale [out, groups], weight_zero_point, weight_shape."""
    bits = scheme["num_bits"]
    rows, columns = tensors[f"{module}.weight_shape"][1].tolist()
    offset = 2 ** (bits - 1)
    packed = np.ascontiguousarray(tensors[f"{module}.weight_packed"][1].T)
    codes = unpack_rows(packed, bits, columns).T - offset
    scales = floats(tensors[f"{module}.weight_scale"])
    group = columns // scales.shape[1]
    zeros = np.zeros_like(scales, dtype=np.int32)
    if not scheme["symmetric"]:
        zeros = unpack_rows(tensors[f"{module}.weight_zero_point"][1], bits, rows) - offset
    return (codes - zeros.repeat(group, 1)) * scales.repeat(group, 1)


def unpack_interleaved(words):
    """AWQ words [n, rows/8]: nibble of row 8c + k of word c is (0, 4, 1, 5, 2, 6, 3, 7)[k] -> codes [n, rows]."""
    nibbles = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
    codes = (words.view(np.uint32)[:, :, None] >> (4 * nibbles)) & 15
    return codes.reshape(words.shape[0], -1).astype(np.int32)


def read_awq(tensors, module, config):
    """weight [out, in] from qweight [in, out/8], qzeros [groups, out/8], scales [groups, out]."""
    codes = unpack_interleaved(tensors[f"{module}.qweight"][1])
    zeros = unpack_interleaved(tensors[f"{module}.qzeros"][1])
    scales = floats(tensors[f"{module}.scales"])
    group = len(codes) // len(scales)
    if config["meta"]["symmetric"]:
        assert (zeros == 8).all(), f"{module}: a symmetric grid with other zero points"
    return ((codes - zeros.repeat(group, 0)) * scales.repeat(group, 0)).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("source")
    parser.add_argument("--bound", type=float, default=0.2)
    arguments = parser.parse_args()
    config = json.loads((pathlib.Path(arguments.out) / "config.json").read_text())["quantization_config"]
    out, source = read_checkpoint(arguments.out), read_checkpoint(arguments.source)
    compressed = config["quant_method"] == "compressed-tensors"
    key = ".weight_packed" if compressed else ".qweight"
    modules = [name.removesuffix(key) for name in out if name.endswith(key)]
    problems, worst, read = [], 0.0, set()
    for module in modules:
        if compressed:
            weight = read_compressed(out, module, config["config_groups"]["group_0"]["weights"])
        elif config["quant_method"] == "awq":
            weight = read_awq(out, module, config)
        else:
            weight = read_gptq(out, module, config, config["checkpoint_format"] == "gptq_v2")
        tied = module == "lm_head" and f"{module}.weight" not in source  # a head that bitmill untied
        want = floats(source["model.embed_tokens.weight" if tied else f"{module}.weight"])
        error = float(np.linalg.norm(weight - want) / np.linalg.norm(want)) if weight.shape == want.shape else float("inf")
        worst = max(worst, error)
        if not error <= arguments.bound:
            problems.append(f"{module}: relative difference {error:.4f} from the source")
        read.add(f"{module}.weight")
    # Everything else is the source's, bit for bit.
    parts = {f"{m}.{p}" for m in modules for p in ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale",
                                                   "weight_zero_point", "weight_shape")}
    plain = {name for name in out if name not in parts}
    problems += [f"{name} is in one of the checkpoints only" for name in sorted(plain ^ (set(source) - read))]
    problems += [f"{name} differs from the source" for name in sorted(plain & set(source))
                 if name.endswith((".weight", ".bias")) and (out[name][0] != source[name][0] or not np.array_equal(*(t[name][1] for t in (out, source))))]
    if not modules:
        problems.append("no packed weight in the files")
    print(json.dumps({"client": "numpy", "quantized": len(modules), "worst": worst, "problems": problems}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

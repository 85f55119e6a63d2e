#!/usr/bin/env python3
"""Loads OUT (gptq, gptq_v2 or awq) on the CPU and measures perplexity.
--loader gptqmodel: GPTQModel with its plain torch kernel; transformers: AutoModelForCausalLM over optimum and GPTQModel."""
import json
import os
import pathlib

import common

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default on two cores is one, with which it refuses to start
arguments = common.parse_arguments(__doc__, loader=("gptqmodel", ["gptqmodel", "transformers"]))
stdout = common.take_stdout()
import safetensors
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear

torch.set_num_threads(arguments.threads)
complaints = common.Complaints()
problems = []
method = json.loads((pathlib.Path(arguments.out) / "config.json").read_text())["quantization_config"]["quant_method"]
if arguments.loader == "gptqmodel":
    backend = getattr(BACKEND, f"{method.upper()}_TORCH", None) or BACKEND.TORCH
    model = GPTQModel.load(arguments.out, device="cpu", backend=backend).model
else:
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(arguments.out, device_map="cpu", output_loading_info=True)
    problems += common.loading_problems(info)

# GPTQModel fills in what it does not find, so compare: packed linears of the files = quantized linears of the model, each
# with all its parts, and every float tensor arrived as it is in the file.
quantized = {name for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}
held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
stored = {}
for path in sorted(pathlib.Path(arguments.out).glob("*.safetensors")):
    with safetensors.safe_open(path, "pt") as file:
        stored |= {name: file.get_tensor(name) for name in file.keys()}
packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
problems += [f"{name}: packed in the files but not quantized in the model, or the reverse" for name in sorted(packed ^ quantized)]
parts = ("qzeros", "scales") if method == "awq" else ("qzeros", "scales", "g_idx")
for module in sorted(packed):
    problems += [f"{module}.{part} is missing in the files" for part in parts if f"{module}.{part}" not in stored]
for name, tensor in stored.items():
    if name.rpartition(".")[0] in packed:
        continue
    if name not in held:
        problems.append(f"{name} of the files is not in the model")
    elif not torch.equal(held[name].detach().float(), tensor.to(held[name].dtype).float()):
        problems.append(f"{name} in the model differs from the file")
if not packed:
    problems.append("no packed weight in the files")
value = common.perplexity(model.eval(), common.read_windows(arguments.tokens, arguments.windows))
common.finish(stdout, f"gptqmodel, loader {arguments.loader}", value, problems + complaints.problems, quantized=len(packed))

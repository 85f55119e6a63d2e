#!/usr/bin/env python3
"""Loads OUT with transformers (and compressed-tensors) and measures perplexity on the CPU, in fp32.
--mode decompress unpacks weights at load, compressed keeps them packed, dense is for a float checkpoint."""
import common

arguments = common.parse_arguments(__doc__, mode=("decompress", ["decompress", "compressed", "dense"]))
stdout = common.take_stdout()
import safetensors
import torch
import transformers
from pathlib import Path

torch.set_num_threads(arguments.threads)
complaints = common.Complaints()
options = {}
if arguments.mode != "dense":
    options["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=arguments.mode == "compressed")
model, info = transformers.AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32, output_loading_info=True,
                                                                **options)
problems = common.loading_problems(info)

# Every packed weight of the files is a quantized linear of the model; no parameter was left without data.
modules = dict(model.named_modules())
packed = set()
for path in Path(arguments.out).glob("*.safetensors"):
    with safetensors.safe_open(path, "pt") as file:
        packed |= {name.removesuffix(".weight_packed") for name in file.keys() if name.endswith(".weight_packed")}
problems += [f"{name} is packed but no module of the model" for name in sorted(packed - set(modules))]
if arguments.mode == "compressed":
    problems += [f"{name} was not loaded as a quantized linear" for name in sorted(packed & set(modules))
                 if getattr(modules[name], "quantization_scheme", None) is None]
if arguments.mode != "dense" and not packed:
    problems.append("no packed weight in the files")
problems += [f"{name} has no finite values" for name, value in model.named_parameters()
             if value.device.type == "meta" or (value.is_floating_point() and not value.isfinite().all())]
value = common.perplexity(model.eval(), common.read_windows(arguments.tokens, arguments.windows))
common.finish(stdout, f"transformers {transformers.__version__} {arguments.mode}", value, problems + complaints.problems,
              quantized=len(packed))

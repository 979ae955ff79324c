"""How fast `qtool export` converts, beside `cp` of the same checkpoint on the same disk, and in how
much memory.

`python conversion.py FOLDER --source modelopt --scheme FP8 --to compressed-tensors --gigabytes 8`
makes a random checkpoint with layers of Llama-3.1-8B's shape in FOLDER, then copies and converts it
in turn, each into a folder that did not exist. The source lies in the page cache, or with `--cold`
on the disk alone. `cp` leaves its copy to the page cache; a conversion is on the disk, hashed and
checked when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from qtool.checkpoint.shards import Shards, TensorSpec
from qtool.formats import WRITABLE, QuantizedModule, tensor_name
from qtool.formats.packing import DTYPE_NAMES
from qtool.scheme import SCHEMES
from qtool.weight import Activation, quantize

LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make(folder: Path, source: str, scheme_name: str, gigabytes: float, shard_bytes: int) -> None:
    scheme, format = SCHEMES[scheme_name], WRITABLE[source]
    weights = {}
    for kind, shape in LAYER.items():
        weight = quantize(torch.randn(shape, dtype=torch.bfloat16) / 50, scheme)
        if scheme.activations and not scheme.activations.dynamic:
            weight.__dict__["activation"] = Activation(scheme.activations, torch.tensor(0.01))
        weights[kind] = weight
    variant = "gptq" if source == "gptq" else ""
    written = {
        kind: format.write(QuantizedModule(kind, scheme, weight.shape, {}, variant), weight)
        for kind, weight in weights.items()
    }
    layer_bytes = sum(tensor.nbytes for tensors in written.values() for tensor in tensors.values())
    layers = max(1, round((gigabytes * 1e9 - 2 * 128256 * 4096 * 2) / layer_bytes))
    tensors = {"model.embed_tokens.weight": torch.zeros(128256, 4096, dtype=torch.bfloat16)}
    modules = []
    for layer in range(layers):
        for kind, weight in weights.items():
            module = QuantizedModule(
                f"model.layers.{layer}.{kind}", scheme, weight.shape, {}, variant
            )
            modules.append(module)
            tensors |= {
                tensor_name(module, suffix): tensor for suffix, tensor in written[kind].items()
            }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(4096, dtype=torch.bfloat16)
    tensors |= {
        "model.norm.weight": torch.ones(4096, dtype=torch.bfloat16),
        "lm_head.weight": torch.ones(128256, 4096, dtype=torch.bfloat16),
    }
    specs = [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    folder.mkdir(parents=True)
    with Shards(folder, specs, shard_bytes) as shards:
        for name, tensor in tensors.items():
            shards.write(name, tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    files = format.quantization_config(modules, ["lm_head"], None)
    files["config.json"] = {**CONFIG, "num_hidden_layers": layers, **files["config.json"]}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def timed(command: list[str], source: Path, output: Path, *, cold: bool) -> float:
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for path in source.iterdir() if cold else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    shutil.rmtree(output)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default="modelopt", choices=WRITABLE)
    parser.add_argument("--scheme", default="FP8", choices=SCHEMES)
    parser.add_argument("--to", default="compressed-tensors")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--shard-bytes", type=int, default=2_000_000_000)
    parser.add_argument("--cold", action="store_true", help="read the source from the disk")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    source, output = options.folder / "source", options.folder / "output"
    if not source.exists():
        make(source, options.source, options.scheme, options.gigabytes, options.shard_bytes)
    size = sum(path.stat().st_size for path in source.iterdir())
    export = [
        sys.executable,
        "-m",
        "qtool.cli",
        "export",
        "--model-path",
        str(source),
        "--to",
        options.to,
        "--output",
        str(output),
        "-q",
    ]
    export += ["--max-shard-size", str(options.shard_bytes)]
    copies, durable, exports = [], [], []
    copy_command = ["cp", "-r", str(source), str(output)]
    durable_command = ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(output)]
    timed(copy_command, source, output, cold=False)  # the source comes into the page cache
    for _ in range(options.runs):
        copies.append(timed(copy_command, source, output, cold=options.cold))
        durable.append(timed(durable_command, source, output, cold=options.cold))
        exports.append(timed(export, source, output, cold=options.cold))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"{options.source} {options.scheme} -> {options.to}, {size / 1e9:.2f} GB in shards of "
        f"{options.shard_bytes / 1e9:.1f} GB"
    )
    for name, seconds in (("cp", copies), ("cp && sync", durable), ("export", exports)):
        print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")
    speeds = [
        statistics.median(seconds) / statistics.median(exports) for seconds in (copies, durable)
    ]
    print(
        f"speed {speeds[0]:.2f} of cp, {speeds[1]:.2f} of cp && sync; peak memory "
        f"{peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()

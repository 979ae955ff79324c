"""How long `qtool inspect` takes for a checkpoint of 100,000 tensors in 200 shards, plain and
quantized, and how much memory, against the limits.

    python tests/benchmarks/many_tensors.py [FOLDER]

The shards are holes: they cost no disk. With FOLDER the checkpoints are kept there. Ends with 1
when a limit is passed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

QTOOL = Path(sys.executable).with_name("qtool")
TENSORS, SHARDS, RUNS = 100_000, 200, 3
LIMIT_S, LIMIT_MB = 2.0, 250
BYTES = {"BF16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8}
HIDDEN, INTERMEDIATE, EXPERTS, GROUP = 2048, 768, 256, 128
WEIGHTS = {
    "W4A16": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
    },
    "FP8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}
Entry = tuple[str, str, tuple[int, ...]]


def linear(kind: str, name: str, rows: int, columns: int) -> Iterator[Entry]:
    if kind == "W4A16":
        yield f"{name}.weight_packed", "I32", (rows, columns // 8)
        yield f"{name}.weight_scale", "BF16", (rows, columns // GROUP)
        yield f"{name}.weight_shape", "I64", (2,)
    elif kind == "FP8":
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale", "BF16", (rows, 1)
    else:
        yield f"{name}.weight", "BF16", (rows, columns)


def entries(kind: str, layers: int) -> Iterator[Entry]:
    """The tensors of a mixture of experts, as Qwen3 names them."""
    yield "model.embed_tokens.weight", "BF16", (151_936, HIDDEN)
    for layer in range(layers):
        path = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}.weight", "BF16", (HIDDEN,)
        for name, rows, columns in (
            ("q", 4096, HIDDEN),
            ("k", 512, HIDDEN),
            ("v", 512, HIDDEN),
            ("o", HIDDEN, 4096),
        ):
            yield from linear(kind, f"{path}.self_attn.{name}_proj", rows, columns)
        yield f"{path}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, rows, columns in (
                ("gate", INTERMEDIATE, HIDDEN),
                ("up", INTERMEDIATE, HIDDEN),
                ("down", HIDDEN, INTERMEDIATE),
            ):
                yield from linear(kind, f"{path}.mlp.experts.{expert}.{name}_proj", rows, columns)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (151_936, HIDDEN)


def write(folder: Path, kind: str) -> int:
    """Write the checkpoint to ``folder`` and return how many tensors it has."""
    layers = math.ceil(TENSORS / sum(1 for _ in entries(kind, 1)))
    tensors = list(entries(kind, layers))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
    }
    config |= {
        "vocab_size": 151_936,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
    }
    if kind in WEIGHTS:
        group = {"targets": ["Linear"], "weights": WEIGHTS[kind], "input_activations": None}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*gate$"],
        }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weight_map = {}
    for shard in range(SHARDS):
        file, header, end = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors", {}, 0
        for name, dtype, shape in tensors[
            shard * len(tensors) // SHARDS : (shard + 1) * len(tensors) // SHARDS
        ]:
            start, end = end, end + math.prod(shape) * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(
            {"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")
        ).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    )
    return len(tensors)


def measure(folder: Path) -> tuple[float, float]:
    """Inspect ``folder`` in a process of its own; return its seconds and its peak memory in MB."""
    start = time.perf_counter()
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(
        QTOOL, [str(QTOOL), "inspect", "--model-path", str(folder)], os.environ, file_actions=silent
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"qtool inspect --model-path {folder} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    slow = False
    with tempfile.TemporaryDirectory() as temporary:
        for kind in ("BF16", "W4A16", "FP8"):
            folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary) / kind
            count = TENSORS if folder.exists() else write(folder, kind)
            runs = [measure(folder) for _ in range(RUNS)]
            seconds, megabytes = min(run[0] for run in runs), max(run[1] for run in runs)
            slow |= seconds > LIMIT_S or megabytes > LIMIT_MB
            print(
                f"{kind:6} {count:,} tensors: best {seconds:.2f} s (limit {LIMIT_S} s), "
                f"{megabytes:.0f} MB (limit {LIMIT_MB} MB)"
            )
    sys.exit(slow)


if __name__ == "__main__":
    main()

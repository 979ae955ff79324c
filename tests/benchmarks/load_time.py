"""How long an 8B W4A16 checkpoint of random weights takes to load, from the page cache to the device; and again, with kernels compiled.

python tests/benchmarks/load_time.py [--layers 32] [--device cuda] [--folder /tmp/8b-w4a16]
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
LINEARS = {
    **{"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096)},
    **{"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)},
}


def write_checkpoint(folder: Path, layers: int, device: str) -> None:
    """Write a compressed-tensors W4A16 checkpoint (groups of 128) of Llama-3.1-8B's shape, four layers a file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    quantization = {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}},
    }
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "num_hidden_layers": layers, **SIZES},
        **{"max_position_embeddings": 4096, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, torch.Tensor]] = {}
    embedding = torch.randn(SIZES["vocab_size"], 4096, device=device, dtype=torch.bfloat16)
    ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding * 0.02, "model.norm.weight": torch.ones(4096, dtype=torch.bfloat16)}
    files["model-ends.safetensors"] = {name: tensor.cpu() for name, tensor in ends.items()}
    for layer in range(layers):
        tensors = files.setdefault(f"model-{layer // 4:05d}.safetensors", {})
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(4096, dtype=torch.bfloat16)
        for name, (rows, columns) in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            tensors[f"{module}.weight_packed"] = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, device=device).cpu()
            tensors[f"{module}.weight_scale"] = (torch.rand(rows, columns // 128, device=device) * 0.005).to(torch.bfloat16).cpu()
            tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
    index = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/8b-w4a16"))
    options = parser.parse_args()
    if not (options.folder / "model.safetensors.index.json").exists():
        start = time.perf_counter()
        write_checkpoint(options.folder, options.layers, options.device)
        print(f"written in {time.perf_counter() - start:.1f} s", flush=True)

    from transformers import AutoModelForCausalLM  # noqa: F401  # imports are not counted

    from qtool.checkpoint import open_checkpoint
    from qtool.runtime.linear import QuantizedLinear
    from qtool.runtime.load import materialize, plan_load

    device = torch.device(options.device)
    for attempt in ("first", "second", "third"):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        checkpoint = open_checkpoint(options.folder)
        opened = time.perf_counter()
        plan = plan_load(checkpoint, device)
        planned = time.perf_counter()
        model = materialize(plan)
        if device.type == "cuda":
            torch.cuda.synchronize()
        done = time.perf_counter()
        size = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values())
        kernels = sorted({module.choice.kernel for module in model.modules() if isinstance(module, QuantizedLinear)})
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(8, device=device)[None]).logits
        assert torch.isfinite(logits).all()
        print(
            f"{attempt}: {done - start:.2f} s (headers {opened - start:.2f}, plan {planned - opened:.2f}, weights {done - planned:.2f}), "
            f"model {size / 1e9:.2f} GB, device peak {peak:.2f} GB, {kernels}, source {checkpoint.size_bytes / 1e9:.2f} GB",
            flush=True,
        )
        del model, plan, logits


if __name__ == "__main__":
    main()

"""How long an 8B W4A16 checkpoint of random weights takes to load, from the page cache to the
device; and again, with kernels compiled.

python tests/benchmarks/load_time.py [--layers 32] [--device cuda] [--folder /tmp/8b-w4a16]
"""

import argparse
import time
from pathlib import Path

import torch
from model_8b import write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/8b-w4a16"))
    options = parser.parse_args()
    if not (options.folder / "model.safetensors.index.json").exists():
        start = time.perf_counter()
        write_checkpoint(options.folder, "w4a16", layers=options.layers, device=options.device)
        print(f"written in {time.perf_counter() - start:.1f} s", flush=True)

    from transformers import AutoModelForCausalLM  # noqa: F401  # imports are not counted

    from qtool.checkpoint import open_checkpoint
    from qtool.runtime.linear import QuantizedLinear
    from qtool.runtime.load import materialize
    from qtool.runtime.load_plan import plan_load

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
        size = sum(
            tensor.nbytes
            for tensor in {
                id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]
            }.values()
        )
        kernels = sorted(
            {
                module.choice.kernel
                for module in model.modules()
                if isinstance(module, QuantizedLinear)
            }
        )
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(8, device=device)[None]).logits
        assert torch.isfinite(logits).all()
        print(
            f"{attempt}: {done - start:.2f} s (headers {opened - start:.2f}, plan "
            f"{planned - opened:.2f}, weights {done - planned:.2f}), "
            f"model {size / 1e9:.2f} GB, device peak {peak:.2f} GB, {kernels}, source "
            f"{checkpoint.size_bytes / 1e9:.2f} GB",
            flush=True,
        )
        del model, plan, logits


if __name__ == "__main__":
    main()

"""vLLM's side of `engine.py`: the same work on the same checkpoint, run by vLLM with its defaults.

    python tests/benchmarks/vllm_side.py FOLDER [--requests 512] [--new 256] [--quick]
        [--contexts 1x32000 8x16000] [--kv-cache-dtype fp8]
        [--set gdn_prefill_backend=triton ...]

Runs where vLLM is installed, without qtool.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ["HF_HUB_OFFLINE"] = "1"


def register_text_model() -> None:
    """Let vLLM run Qwen3.5's language model alone: it has the class, as a part of the model that
    sees images.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models import qwen3_5
    from vllm.model_executor.models.interfaces import IsHybrid

    whole = qwen3_5.Qwen3_5MoeForConditionalGeneration
    states = ("dtype_from_config", "shape_from_config", "copy_func")
    methods = {
        f"get_mamba_state_{name}": classmethod(getattr(whole, f"get_mamba_state_{name}").__func__)
        for name in states
    }
    bases = qwen3_5.Qwen3_5MoeForCausalLM, IsHybrid
    ModelRegistry.register_model("Qwen3_5MoeForCausalLM", type("TextModel", bases, methods))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--contexts", nargs="+", default=[])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--start", action="store_true", help="only, to fill its caches")
    parser.add_argument("--memory", type=float, default=0.8)
    parser.add_argument("--set", nargs="*", default=[], help="options of the engine, name=text")
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    register_text_model()
    start = time.perf_counter()
    llm = LLM(
        model=options.folder,
        skip_tokenizer_init=True,
        max_model_len=40960 if options.contexts else 4096,
        gpu_memory_utilization=options.memory,
        kv_cache_dtype=options.kv_cache_dtype,
        enable_prefix_caching=False,
        dtype="bfloat16",
        max_num_seqs=256,
        **dict(item.split("=", 1) for item in options.set),
    )
    found = {"start_s": round(time.perf_counter() - start, 1)}
    random.seed(0)

    def seconds(count: int, size: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [random.randrange(5, 100_000) for _ in range(size)]}
            for _ in range(count)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(1, 64, 8)
    for context in options.contexts:
        batch, size = map(int, context.split("x"))
        short, long = (min(seconds(batch, size, n) for _ in range(2)) for n in (16, 144))
        found[f"decode_ms_{context}"] = round((long - short) / 128 * 1e3, 3)
    alone = options.start or options.contexts
    for batch, tokens in () if alone else ((1, 256), (16, 128), (64, 128)):
        seconds(batch, 128, 4)
        short = seconds(batch, 128, 16)
        both = seconds(batch, 128, 16 + tokens)
        found[f"decode_ms_batch_{batch}"] = round((both - short) / tokens * 1e3, 3)
    if not (options.quick or alone):
        count, new = options.requests, options.new
        took = seconds(count, 512, new)
        found[f"output_tokens_s_{count}x(512+{new})"] = round(count * new / took)
        found["prefill_tokens_s_64x2048"] = round(64 * 2048 / seconds(64, 2048, 1))
    print(f"RESULT vllm {options.folder} {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()

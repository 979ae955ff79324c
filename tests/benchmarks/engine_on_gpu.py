"""Is the engine right on this GPU, and does it keep to its memory?

    python tests/benchmarks/engine_on_gpu.py [--requests 10000] [--only qwen3_next ...] [--dtype float32]
    python tests/benchmarks/engine_on_gpu.py --nextn

The greedy tokens of the tiny model and of tiny random ones against transformers'
`generate`, one by one and together, with prefix hits,
chunked prefill, preemption and drafted tokens: equal, or different from a place on where transformers' own logits
are nearly a tie. Small models whose own layer for multi-token prediction drafts (`--nextn`: these
alone), in f32, with CUDA graphs and without: texts are equal, and accept lengths nearly. In bf16 a random mixture may also send a token to other experts; in f32 every text is
equal. Then the size of the KV cache against arithmetic, and the memory after many
requests. Exits 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from test_engine import ARCHITECTURES, EXAMPLE, GREEDY, prompts_of, random_model  # noqa: E402
from test_mtp import NEXTN, right_about  # noqa: E402

from qtool.engine.engine import Engine  # noqa: E402
from qtool.engine.step import SequenceState  # noqa: E402

TIE = 2.0  # times what rounding to bf16 changes in transformers' own logits there


def reference(model, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def differs(model, exact, prompt: list[int], got: list[int], wanted: list[int]) -> str | None:
    """Return how far from a tie the first difference is, None for equal tokens; ``exact``: the
    model in f32.
    """
    place = next(
        (i for i, (one, other) in enumerate(zip(got, wanted, strict=False)) if one != other), None
    )
    if place is None:
        return None if len(got) == len(wanted) else f"{len(got)} tokens instead of {len(wanted)}"
    ids = torch.tensor([prompt + wanted[:place]], device="cuda")
    logits, right = model(ids).logits[0, -1].float(), exact(ids).logits[0, -1]
    gap, rounding = (
        float(logits[wanted[place]] - logits[got[place]]),
        float((logits - right).abs().max()),
    )
    return (
        "tie"
        if gap <= TIE * rounding
        else (
            f"token {place}: {got[place]} instead of {wanted[place]}, {gap:.3f} below, rounding "
            f"{rounding:.3f}"
        )
    )


def compare(name: str, folder: Path | str, model, dtype: str) -> int:
    """Print how many of the engine's texts are transformers', and how many part at a tie; return
    how many are wrong.
    """
    vocab_size = model.config.vocab_size
    prompts, short = prompts_of(33, vocab_size), prompts_of(20, vocab_size, longest=20)
    wanted, wanted_short = (
        [reference(model, prompt, 20) for prompt in prompts],
        [reference(model, prompt, 40) for prompt in short],
    )
    pairs: list[tuple[str, list[int], list[int], list[int]]] = []
    options = {"skip_tokenizer_init": True, "dtype": dtype, "mem_fraction_static": 0.5}
    with Engine(folder, **options, max_total_tokens=16 * 1024, max_running_requests=40) as engine:
        for _ in range(2):
            got = [
                engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
                for prompt in prompts[:4]
            ]
            pairs += [("alone", *rest) for rest in zip(prompts[:4], got, wanted, strict=False)]
            got = [
                result["output_ids"]
                for result in engine.generate(input_ids=prompts, sampling_params=GREEDY)
            ]
            pairs += [("together", *rest) for rest in zip(prompts, got, wanted, strict=True)]
        graphs, hits = len(engine.loop.runner.graphs.decode), engine.loop.scheduler.prefix_hits
    with Engine(
        folder, **options, max_total_tokens=240, chunked_prefill_size=24, max_running_requests=20
    ) as engine:
        got = [
            result["output_ids"]
            for result in engine.generate(
                input_ids=short, sampling_params={**GREEDY, "max_new_tokens": 40}
            )
        ]
        pairs += [("preempted", *rest) for rest in zip(short, got, wanted_short, strict=True)]
        preemptions = engine.loop.scheduler.preemptions
    pairs += drafted(folder, options, prompts, wanted)
    exact = copy.deepcopy(model).float()
    found = [(how, differs(model, exact, prompt, one, other)) for how, prompt, one, other in pairs]
    wrong = [f"{how}: {what}" for how, what in found if what not in (None, "tie")]
    ties = sum(what == "tie" for _, what in found)
    print(
        f"{name:12s} {len(found)} texts, {ties} part at a tie, {len(wrong)} WRONG {wrong[:3]}; "
        f"{graphs} graphs, {hits} hits, {preemptions} preempted",
        flush=True,
    )
    return len(wrong) + (not preemptions) + (not hits)


def drafted(
    folder: Path | str,
    options: dict[str, object],
    prompts: list[list[int]],
    wanted: list[list[int]],
) -> list[tuple[str, list[int], list[int], list[int]]]:
    """Return the texts of an engine that is given drafts, of which every fifth token is wrong."""
    whole = {tuple(prompt): [*prompt, *one] for prompt, one in zip(prompts, wanted, strict=True)}

    def recall(sequence: SequenceState, room: int) -> list[int]:
        size = len(sequence.tokens)
        known = whole[tuple(sequence.prompt)][size : size + min(room, 7)]
        return [token if (size + i) % 5 else token ^ 1 for i, token in enumerate(known)]

    pairs = []
    for graphs in (True, False):
        with Engine(
            folder,
            **options,
            max_total_tokens=16 * 1024,
            max_running_requests=40,
            speculative_algorithm="NGRAM",
            disable_cuda_graph=not graphs,
        ) as engine:
            engine.loop.scheduler.propose = recall
            alone = [
                engine.generate(input_ids=prompt, sampling_params=GREEDY) for prompt in prompts[:4]
            ]
            together = engine.generate(input_ids=prompts, sampling_params=GREEDY)
            how = f"drafted, {len(engine.loop.runner.graphs.decode)} graphs"
            texts = [result["output_ids"] for result in [*alone, *together]]
            asked = [*prompts[:4], *prompts], [*wanted[:4], *wanted]
            pairs += [(how, *rest) for rest in zip(asked[0], texts, asked[1], strict=True)]
            print(f"{how}: accept length {engine.loop.spec.total.accept_length:.2f}")
    return pairs


def nextn(name: str, share: float) -> int:
    """Print what came of the drafts of the model ``name``, whose layers add ``share`` of what they
    would; return how many texts are wrong.
    """
    prompts, wrong = prompts_of(33, 2000), 0
    options = {"skip_tokenizer_init": True, "dtype": "float32", "mem_fraction_static": 0.5}
    ways = {
        "plain": {},
        "drafts in graphs": NEXTN,
        "drafts, launch by launch": {**NEXTN, "disable_cuda_graph": True},
    }
    wanted, lengths = None, []
    with tempfile.TemporaryDirectory() as folder:
        right_about(name, share, Path(folder))
        for way, chosen in ways.items():
            with Engine(
                folder, **options, **chosen, max_total_tokens=16 * 1024, max_running_requests=40
            ) as engine:
                asked = [*prompts[:4], *([prompts] * 2)]
                made = [engine.generate(input_ids=each, sampling_params=GREEDY) for each in asked]
                runner, spec = engine.loop.runner, engine.loop.spec
                graphs = len(runner.graphs.decode), len(runner._mtp.graphs if spec else ())
            results = [*made[:4], *made[4], *made[5]]
            texts = [result["output_ids"] for result in results]
            wanted = wanted or texts
            differing = sum(one != other for one, other in zip(texts, wanted, strict=True))
            lengths += [round(spec.total.accept_length, 3)] if spec else []
            print(f"{name:16s} {way}: {len(texts)} texts, {differing} differ; {graphs} graphs")
            wrong += differing
            if way == "drafts in graphs" and graphs[0] and not graphs[1]:
                wrong += 1
    print(f"{name:16s} accept lengths {lengths}", flush=True)
    return wrong + (abs(lengths[0] - lengths[1]) > 0.05)  # ties


def many(requests: int) -> int:
    """Print the size of the cache against arithmetic, and the memory before and after ``requests``
    requests.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    with Engine(
        EXAMPLE, skip_tokenizer_init=True, mem_fraction_static=0.3, max_running_requests=256
    ) as engine:
        runner = engine.loop.runner
        weights = sum(
            tensor.nbytes
            for tensor in {
                tensor.data_ptr(): tensor for tensor in runner.model.state_dict().values()
            }.values()
        )
        expected = (total * 0.3 - (total - free) - weights) / (runner.page_bytes / 16)
        most = runner.limits.max_running * runner.limits.context_length
        expected = min(expected, most)
        print(
            f"cache: {runner.page_count * 16} tokens, {expected:.0f} by arithmetic: "
            f"{runner.page_count * 16 / expected:.4f}",
            flush=True,
        )
        prompts = prompts_of(500, 2000, longest=60)
        before = None
        start = time.perf_counter()
        for first in range(0, requests, 500):
            engine.generate(
                input_ids=prompts,
                sampling_params={"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9},
            )
            gc.collect()
            used = (
                torch.cuda.mem_get_info()[0],
                torch.cuda.memory_allocated(),
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            )
            if first == 1000 or before is None:
                before = used
        assert before is not None
        print(
            f"{requests} requests in {time.perf_counter() - start:.1f} s; free, allocated, host "
            f"MB: {before} after {min(requests, 1500)}, {used} at the end",
            flush=True,
        )
        return int(before[:2] != used[:2] or used[2] > before[2] + 50)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--only", nargs="*", choices=list(ARCHITECTURES), help="these models alone")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--nextn", action="store_true", help="the models that draft alone")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    dtype, wrong = getattr(torch, options.dtype), 0
    if not options.only:
        drafting = ("qwen3_5-mtp", 0.01), ("qwen3_5-mtp", 0.1), ("qwen3_next-mtp", 0.01)
        wrong += sum(nextn(name, share) for name, share in drafting)
    if options.nextn:
        return 1 if wrong else 0
    if not options.only:
        model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=dtype).cuda()
        wrong += compare("the example", EXAMPLE, model, options.dtype)
    for model_type in options.only or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(model_type, folder).to(dtype).cuda()
            wrong += compare(model_type, folder, model, options.dtype)
    if not options.only:
        wrong += many(options.requests)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The engine on a CPU: the tokens of transformers' `generate`, whatever else runs; what a request
may ask for; what goes wrong stays with its own.
"""

import asyncio
import gc
import itertools
import queue
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fixed_steps import run_in_fixed_steps
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qtool
from qtool.engine.cuda_graphs import NOTHING, DecodeGraph, PromptShape
from qtool.engine.decoder_layers import FusedLayer
from qtool.engine.detokenizer import TextStream
from qtool.engine.engine import Engine
from qtool.engine.outputs import CompletionError, Output
from qtool.engine.requests import GenerateRequest
from qtool.engine.sglang_names import engine_options
from qtool.engine.step import Chunk, SequenceState, Step
from qtool.errors import ResourceError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

EXAMPLE = "examples/tiny-python-llama"
SIZES = {
    **{
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    **{
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "qwen3": {},
    "gemma2": {"sliding_window": 40},
    "phi3": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere2": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {},
    "hunyuan_v1_dense": {},
    "olmo3": {"sliding_window": 40},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts_per_tok": 2,
    },
    "qwen3_next": {
        **{"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        **{"shared_expert_intermediate_size": 64, "num_hidden_layers": 3},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 32},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **{
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        **{
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    },
}
GREEDY = {"temperature": 0, "max_new_tokens": 20}


def prompts_of(count: int, vocab_size: int, *, longest: int = 150) -> list[list[int]]:
    """Prompts of mixed lengths; every third begins as the one before it."""
    generator = torch.Generator().manual_seed(1)
    prompts: list[list[int]] = []
    for number in range(count):
        size = int(torch.randint(1, longest, (1,), generator=generator))
        ids = torch.randint(3, vocab_size, (size,), generator=generator).tolist()
        prompts.append(prompts[-1] + ids[:40] if number % 3 == 2 else ids)
    return [prompt[: longest + 40] for prompt in prompts]


def expected(model, prompts: list[list[int]], tokens: int = 20) -> list[list[int]]:
    """What transformers generates, each prompt by itself."""
    found = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def ids_of(results) -> list[list[int]]:
    return [result["output_ids"] for result in results]


@pytest.fixture(scope="module", params=[False, True], ids=["", "overlapping"])
def example(request):
    with Engine(EXAMPLE, dtype="float32", max_total_tokens=8192) as engine:
        # True is what a GPU does: a step is launched before the tokens of the one before it are
        # read
        engine.loop.overlap = request.param
        yield engine


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)


def idle(engine: Engine) -> bool:
    """Whether nothing is held any more."""
    scheduler = engine.loop.scheduler
    return (
        not scheduler.running
        and not scheduler.waiting
        and scheduler.pages.free == scheduler.pages.count
        and not engine.loop.requests
    )


def becomes(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def random_model(model_type: str, folder):
    """Write a tiny random model to ``folder``, and return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SIZES | ARCHITECTURES[model_type]), dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        *("deepseek_v3", "gpt_oss", "qwen3_next"),
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in (
                *("cohere2", "gemma2", "glm4", "granite", "hunyuan_v1_dense"),
                *("mixtral", "olmo3", "phi3", "qwen2_moe", "qwen3", "qwen3_moe"),
            )
        ),
    ],
)
def test_tokens_are_those_of_transformers(tmp_path, model_type):
    model = random_model(model_type, tmp_path)
    prompts = prompts_of(9, 320)
    wanted = expected(model, prompts)
    assert len({token for tokens in wanted for token in tokens}) > 8  # not one token over and over
    options = {"skip_tokenizer_init": True, "dtype": "float32"}
    with Engine(tmp_path, **options, max_total_tokens=16 * 1024) as engine:
        layers = engine.loop.runner.model.get_decoder().layers
        is_fused = all(isinstance(layer, FusedLayer) for layer in layers)
        assert is_fused == (model_type != "hunyuan_v1_dense")
        assert ids_of([engine.generate(input_ids=prompts[0], sampling_params=GREEDY)]) == wanted[:1]
        assert ids_of(engine.generate(input_ids=prompts, sampling_params=GREEDY)) == wanted
        assert engine.loop.scheduler.prefix_hits > 0
        # all of the prompts are in the cache now
        assert ids_of(engine.generate(input_ids=prompts, sampling_params=GREEDY)) == wanted
    short = prompts_of(9, 320, longest=20)
    with Engine(
        tmp_path, **options, max_total_tokens=240, chunked_prefill_size=24
    ) as engine:  # three fit with their answers
        engine.loop.overlap = True  # as on a GPU: a step ahead of what is read
        assert ids_of(engine.generate(input_ids=prompts, sampling_params=GREEDY)) == wanted
        assert ids_of(
            engine.generate(input_ids=short, sampling_params={**GREEDY, "max_new_tokens": 40})
        ) == expected(model, short, 40)
        assert engine.loop.scheduler.preemptions > 0
        assert becomes(lambda: idle(engine))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_layers_that_are_not_fused_may_be_compiled(tmp_path):
    model, prompts = random_model("hunyuan_v1_dense", tmp_path), prompts_of(5, 320)
    with Engine(
        tmp_path, skip_tokenizer_init=True, dtype="float32", max_total_tokens=4096, compile="all"
    ) as engine:
        assert ids_of(engine.generate(input_ids=prompts, sampling_params=GREEDY)) == expected(
            model, prompts
        )


def test_text_of_the_example(example, reference):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    texts = ["def fibonacci(n):", "import os\n\nclass", "for i in range(10):\n    print("]
    wanted = [tokenizer.decode(ids) for ids in expected(reference, tokenizer(texts)["input_ids"])]
    assert [result["text"] for result in example.generate(texts, GREEDY)] == wanted
    one = example.generate(texts[0], GREEDY)
    assert one["text"] == wanted[0]
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 20}
    assert one["meta_info"]["prompt_tokens"] == len(tokenizer(texts[0])["input_ids"])
    assert one["meta_info"]["completion_tokens"] == 20


def test_a_stream_ends_as_the_whole(example):
    whole = example.generate("def fibonacci(n):", GREEDY)
    parts = list(example.generate("def fibonacci(n):", GREEDY, stream=True))
    assert parts[-1]["text"] == whole["text"]
    assert [part["meta_info"]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert len(parts) == 20
    assert all(
        after["text"].startswith(before["text"]) for before, after in itertools.pairwise(parts)
    )
    several = list(example.generate(["import os", "def f(x):"], GREEDY, stream=True))
    assert {part["index"] for part in several} == {0, 1}


def test_leaving_a_stream_frees_its_pages(example):
    assert becomes(lambda: idle(example))
    stream = example.generate(
        "def fibonacci(n):",
        {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True},
        stream=True,
    )
    next(stream)
    assert not idle(example)
    stream.close()
    assert becomes(lambda: idle(example))


def test_abort_by_id(example):
    results = []
    run = threading.Thread(
        target=lambda: results.append(
            example.generate(
                "import os",
                {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0},
                rid="mine",
            )
        )
    )
    run.start()
    assert becomes(lambda: "mine" in example.loop.requests)
    example.abort("mine")
    run.join(10)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert becomes(lambda: idle(example))


def test_seeds_repeat_whatever_else_runs(example):
    params = {"temperature": 1.0, "max_new_tokens": 12, "seed": 7, "ignore_eos": True}
    alone = example.generate("def area(", params)
    others = [{"temperature": 1.0, "max_new_tokens": 12}] * 6
    among = example.generate(
        ["x = 1", "y", "import re", "def area(", "class A:", "a = [", "#"],
        [*others[:3], params, *others[3:]],
    )
    assert among[3]["output_ids"] == alone["output_ids"]
    three = example.generate("def area(", {**params, "n": 3})
    assert three[0]["output_ids"] == alone["output_ids"]
    assert len({tuple(result["output_ids"]) for result in three}) == 3
    assert example.generate("def area(", {**params, "seed": 8})["output_ids"] != alone["output_ids"]


def test_an_engine_with_a_seed_repeats():
    def run() -> list[list[int]]:
        with Engine(EXAMPLE, max_total_tokens=1024, random_seed=3) as engine:
            return ids_of(engine.generate(["a", "b"], {"max_new_tokens": 8, "ignore_eos": True}))

    assert run() == run()


def test_stops(example):
    whole = example.generate("def fibonacci(n):", GREEDY)
    stop = whole["text"][12:15]
    cut = example.generate("def fibonacci(n):", {**GREEDY, "stop": [stop]})
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    token = whole["output_ids"][5]
    by_id = example.generate("def fibonacci(n):", {**GREEDY, "stop_token_ids": [token]})
    assert by_id["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert by_id["output_ids"] == whole["output_ids"][: whole["output_ids"].index(token) + 1]
    later = example.generate(
        "def fibonacci(n):", {**GREEDY, "stop_token_ids": [token], "min_new_tokens": 9}
    )
    assert len(later["output_ids"]) >= 9
    assert token not in later["output_ids"][:9]


def test_logprobs_are_the_models(example, reference):
    prompt = "def fibonacci(n):\n    return"
    result = example.generate(
        prompt,
        {"temperature": 0.7, "max_new_tokens": 6, "seed": 1},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
    )
    meta = result["meta_info"]
    ids = example.tokenizer(prompt)["input_ids"] + result["output_ids"]
    with torch.inference_mode():
        wanted = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    size = meta["prompt_tokens"]
    got = [
        (value, token)
        for value, token, _ in meta["input_token_logprobs"] + meta["output_token_logprobs"]
    ]
    assert [token for _, token in got] == ids
    assert got[0][0] is None  # nothing says how likely the first token is
    assert torch.allclose(
        torch.tensor([value for value, _ in got[1:]]),
        wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0],
        atol=1e-4,
    )
    assert [len(top) for top in meta["output_top_logprobs"]] == [3] * len(result["output_ids"])
    for place, top in enumerate(meta["output_top_logprobs"]):
        assert [token for _, token, _ in top] == wanted[size - 1 + place].topk(3).indices.tolist()
    assert len(meta["input_top_logprobs"]) == size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "overlap"), [(0, False), (0, True), (24, True), (25, False), (256, True), (299, True)]
)
def test_logprobs_of_a_prompt_that_is_computed_in_parts(reference, start, overlap):
    prompt = prompts_of(1, 2000, longest=2)[0] + list(range(100, 399))
    prompt = prompt[:300]
    with torch.inference_mode():
        wanted = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with Engine(
        EXAMPLE,
        dtype="float32",
        max_total_tokens=640,
        chunked_prefill_size=24 if start < 100 else None,
    ) as engine:
        engine.loop.overlap = overlap
        others = [[7] * 200] * 2
        options = {"return_logprob": True, "logprob_start_len": start}
        result, *_ = engine.generate(
            input_ids=[prompt, *others], sampling_params={**GREEDY, "max_new_tokens": 2}, **options
        )
    got = result["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in got] == prompt[start:]
    expected_values = wanted[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0][start:]
    assert torch.allclose(
        torch.tensor([value for value, _, _ in got[1:]]), expected_values, atol=1e-3
    )


def test_penalties_and_biases(example, reference):
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    ids = torch.tensor([example.tokenizer("def fibonacci(n):")["input_ids"]])
    wanted = reference.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4)]),
    )[0, ids.shape[1] :].tolist()
    got = example.generate(["def fibonacci(n):", "x"], {**GREEDY, "repetition_penalty": 1.4})[0][
        "output_ids"
    ]
    assert got == wanted
    assert set(
        example.generate("x = ", {**GREEDY, "logit_bias": {"77": 100}, "ignore_eos": True})[
            "output_ids"
        ]
    ) == {77}


def test_arguments_of_sglang_that_ask_for_nothing_are_taken(example):
    nothing = {"lora_path": None, "image_data": None, "return_hidden_states": False}
    answer = example.generate("a", {**GREEDY, "stop_regex": None, "stop": ""}, **nothing)
    assert answer["output_ids"]
    example.flush_cache()
    assert example.get_server_info()["max_total_num_tokens"] > 0
    known = ["quantization", "disable_radix_cache", "compile"]
    neutral = {"tp_size": 1, "trust_remote_code": True, "attention_backend": "triton", "x": None}
    assert engine_options(neutral, known) == {}
    translated = engine_options({"torchao_config": "int8wo", "enable_torch_compile": True}, known)
    assert translated == {"quantization": "int8wo", "compile": "decode"}
    for name, value, says in (
        ("tp_size", 2, "one GPU"),
        ("cpu_offload_gb", 3, "quantization makes"),
        ("lora_paths", ["a"], "--merge-lora"),
        ("disable_radix_cahce", True, "`disable_radix_cache`"),
        ("log_level", "loud", "debug"),
    ):
        with pytest.raises(UsageError) as refused:
            engine_options({name: value}, known)
        assert says in refused.value.hint


def test_requests_that_cannot_be(example):
    for options, code in (
        ({"sampling_params": GREEDY}, "E_PROMPT"),
        ({"prompt": "a", "input_ids": [1]}, "E_PROMPT"),
        ({"prompt": "a", "sampling_params": {"temprature": 1}}, "E_SAMPLING"),
        ({"prompt": "a", "sampling_params": {"temperature": float("nan")}}, "E_SAMPLING"),
        ({"prompt": "a", "top_logprobs_num": 10**6, "return_logprob": True}, "E_LOGPROBS"),
        ({"input_ids": [10**9]}, "E_PROMPT"),
        ({"input_ids": [5] * 5000}, "E_TOO_LONG"),
        ({"input_ids": []}, "E_PROMPT"),
        ({"input_ids": [[]]}, "E_EMPTY_PROMPT"),
        ({"prompt": "\ud800"}, "E_PROMPT"),
        ({"prompt": 3}, "E_PROMPT"),
        ({"prompt": ["a", 3]}, "E_PROMPT"),
        ({"prompt": ["a", "b"], "sampling_params": [{}]}, "E_PROMPT"),
        ({"prompt": ["a", "b"], "return_logprob": [True]}, "E_PROMPT"),
        ({"prompt": "a", "image_data": "x"}, "E_NOT_OFFERED"),
        ({"prompt": "a", "retrun_logprob": True}, "E_UNKNOWN_OPTION"),
    ):
        with pytest.raises(UsageError) as error:
            example.generate(**options)
        assert error.value.code == code, options
    assert idle(example)


@pytest.mark.parametrize(
    "options",
    [
        {"context_length": "100"},
        {"context_length": 10**9},
        {"mem_fraction_static": "x"},
        {"mem_fraction_static": 1.5},
        {"max_total_tokens": 0},
        {"max_running_requests": 10**9},
        {"chunked_prefill_size": 10**9},
        {"kv_cache_dtype": "int3"},
        {"compile": "yes"},
        {"dtype": "int8"},
        {"quantization": "fp7"},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_options_that_cannot_be(options):
    with pytest.raises(UsageError):
        Engine(EXAMPLE, **options)


def test_an_engine_that_nobody_has_any_more_ends():
    engine = Engine(EXAMPLE, max_total_tokens=256)
    engine.generate("a", GREEDY)
    thread = engine.loop._thread
    del engine
    gc.collect()
    assert becomes(lambda: not thread.is_alive())


def test_what_can_never_fit_is_refused():
    with Engine(EXAMPLE, max_total_tokens=64) as engine, pytest.raises(UsageError, match="64"):
        engine.generate(input_ids=[5] * 50, sampling_params={"max_new_tokens": 100})


def test_a_row_that_is_not_finite_fails_alone(example):
    wanted = example.generate("def area(", GREEDY)["output_ids"]
    bad, good = 1999, example.tokenizer("def area(")["input_ids"]
    results: dict[str, object] = {}

    def run(name: str, ids: list[int]) -> None:
        try:
            results[name] = example.generate(input_ids=ids, sampling_params=GREEDY)["output_ids"]
        except ResourceError as error:
            results[name] = error.code

    embedding = example.loop.runner.model.get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda module, args, output: output.masked_fill((args[0] == bad)[..., None], float("nan"))
    )
    try:
        threads = [
            threading.Thread(target=run, args=(name, ids))
            for name, ids in (("good", good), ("bad", [5] * 40 + [bad, 7]), ("too", good))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
    assert results == {"good": wanted, "bad": "E_NOT_FINITE", "too": wanted}
    assert becomes(lambda: idle(example))
    again = example.generate(input_ids=[5] * 40 + [bad, 7], sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] == 0  # its pages are not found again


def test_a_step_that_raises_fails_its_own_requests(example, monkeypatch):
    wanted = example.generate("def area(", GREEDY)["output_ids"]
    launch = example.loop.runner.launch

    def failing(step, *rest):
        if any(chunk.sequence.prompt[0] == 9 for chunk in step.chunks):
            raise RuntimeError("a kernel that fails")
        return launch(step, *rest)

    monkeypatch.setattr(example.loop.runner, "launch", failing)
    with pytest.raises(RuntimeError, match="a kernel that fails"):
        example.generate(input_ids=[9, 9, 9], sampling_params=GREEDY)
    assert example.generate("def area(", GREEDY)["output_ids"] == wanted
    assert becomes(lambda: idle(example))


def test_without_memory_the_newest_fails_and_the_others_are_computed_again(example, monkeypatch):
    prompts = prompts_of(4, 2000, longest=30)
    wanted = ids_of(example.generate(input_ids=prompts, sampling_params=GREEDY))
    launch, calls = example.loop.runner.launch, []

    def failing(step, *rest):
        calls.append(len(step.chunks))
        if len(step.chunks) == 4 and len(calls) < 9:
            raise torch.OutOfMemoryError("no memory")
        return launch(step, *rest)

    monkeypatch.setattr(example.loop.runner, "launch", failing)
    delivered: queue.SimpleQueue[Output] = queue.SimpleQueue()
    example.submit(GenerateRequest(None, GREEDY, prompts, stream=False), delivered.put)
    results = {output.index: output for output in (delivered.get(timeout=60) for _ in prompts)}
    [failed] = [
        number
        for number, result in results.items()
        if isinstance(result, CompletionError)
        and isinstance(result.error, ResourceError)
        and result.error.code == "E_OUT_OF_MEMORY"
    ]
    assert all(
        result.token_ids == wanted[number] for number, result in results.items() if number != failed
    )
    assert becomes(lambda: idle(example))


def test_async(example):
    async def run():
        whole, streamed = await asyncio.gather(
            example.async_generate("import os", GREEDY),
            example.async_generate("import os", GREEDY, stream=True),
        )
        parts = [part async for part in streamed]
        assert parts[-1]["output_ids"] == whole["output_ids"]
        task = asyncio.create_task(
            example.async_generate("import os", {"max_new_tokens": 1500, "ignore_eos": True})
        )
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert becomes(lambda: idle(example))


def test_what_is_submitted_is_delivered_until_it_is_cancelled(example):
    delivered: queue.SimpleQueue[Output] = queue.SimpleQueue()
    requests = example.submit(
        GenerateRequest(["def f(", "import os"], {"max_new_tokens": 3}, None, stream=False),
        delivered.put,
    )
    outputs = {output.index: output for output in (delivered.get(timeout=60) for _ in requests)}
    assert sorted(outputs) == [0, 1]
    assert all(
        0 < output.finish.first_token_s <= output.finish.latency_s for output in outputs.values()
    )
    assert all(request.done for request in requests)
    requests = example.submit(
        GenerateRequest("def f(", {"max_new_tokens": 1000, "ignore_eos": True}, None, stream=True),
        delivered.put,
    )
    delivered.get(timeout=60)
    example.cancel(requests)
    assert becomes(lambda: idle(example))
    with pytest.raises(UsageError):
        example.submit(GenerateRequest("def f(", {"regex": "("}, None, stream=False), delivered.put)
    assert idle(example)


def test_nobody_waits_for_an_engine_that_was_shut_down():
    engine = Engine(EXAMPLE, max_total_tokens=4096)
    ended: list[object] = []

    def run() -> None:
        try:
            while True:
                result = engine.generate("a", {"max_new_tokens": 60, "ignore_eos": True})
                ended.append(result["meta_info"]["finish_reason"]["type"])
        except ResourceError as error:
            ended.append(error.code)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert becomes(lambda: len(engine.loop.requests) == 4)
    engine.shutdown()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert ended.count("E_ENGINE_STOPPED") == 4
    with pytest.raises(ResourceError, match="shut down"):
        engine.generate("a")


def test_a_caller_that_is_gone_harms_nobody(example):
    """An asyncio loop that is closed while its requests run."""

    async def leave():
        tasks = [
            asyncio.create_task(
                example.async_generate("import os", {"max_new_tokens": 1500, "ignore_eos": True})
            )
            for _ in range(3)
        ]
        await asyncio.sleep(0.05)
        del tasks

    wanted = example.generate("def area(", GREEDY)["output_ids"]
    results = []
    beside = threading.Thread(
        target=lambda: results.append(
            example.generate("def area(", {**GREEDY, "max_new_tokens": 300})["output_ids"]
        )
    )
    beside.start()
    asyncio.run(leave())
    beside.join()
    assert results[0][:20] == wanted
    assert becomes(lambda: idle(example))


def test_a_text_that_fails_fails_alone(example, monkeypatch):
    wanted = example.generate("def area(", GREEDY)["output_ids"]
    push = TextStream.push

    def failing(self, token):
        if self.end_ids & {1234}:
            raise ValueError("a tokenizer that fails")
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", failing)
    with pytest.raises(ValueError, match="a tokenizer that fails"):
        example.generate(["def area(", "x"], [GREEDY, {**GREEDY, "stop_token_ids": [1234]}])
    assert example.generate("def area(", GREEDY)["output_ids"] == wanted
    assert becomes(lambda: idle(example))


def test_names_of_requests(example):
    with pytest.raises(UsageError, match="one rid"):
        example.generate(["a", "b"], GREEDY, rid="x")
    assert example.generate(["a", "b"], GREEDY, rid=["x", "y"])[1]["meta_info"]["id"] == "y"
    results: list[object] = []
    params = {"max_new_tokens": 1500, "ignore_eos": True, "n": 2}
    run = threading.Thread(target=lambda: results.extend(example.generate("a", params, rid="mine")))
    run.start()
    assert becomes(lambda: len(example.loop.requests) == 2)
    with pytest.raises(UsageError, match="is running"):
        example.generate("b", GREEDY, rid="mine-0")
    example.abort("mine")
    run.join(10)
    assert [result["meta_info"]["finish_reason"]["type"] for result in results] == [
        "abort",
        "abort",
    ]
    assert becomes(lambda: idle(example))


def test_without_a_limit_a_text_ends_with_the_cache():
    with Engine(EXAMPLE, max_total_tokens=64) as engine:
        result = engine.generate("import os", {"max_new_tokens": None, "ignore_eos": True})
        # the last is sampled, and not kept
        assert result["meta_info"]["prompt_tokens"] + len(result["output_ids"]) == 65


def test_rotary_embeddings_do_not_depend_on_who_else_runs(tmp_path):
    """longrope has other frequencies for sequences that are longer than the first training's;
    transformers looks at the longest of a pass.
    """
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    }
    sizes = SIZES | {"rope_parameters": rope, "original_max_position_embeddings": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("phi3", **sizes), dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(tmp_path)
    long, short = list(range(3, 63)), [5, 6, 7]
    with Engine(
        tmp_path, skip_tokenizer_init=True, dtype="float32", max_total_tokens=2048
    ) as engine:
        alone = engine.generate(input_ids=short, sampling_params=GREEDY)["output_ids"]
        together = ids_of(engine.generate(input_ids=[short, long], sampling_params=GREEDY))
    assert together == [alone, *expected(model, [long])]
    with Engine(tmp_path, skip_tokenizer_init=True, dtype="float32", context_length=32) as engine:
        assert ids_of([engine.generate(input_ids=short, sampling_params=GREEDY)]) == expected(
            model, [short]
        )


@pytest.mark.parametrize("name", ["ct/FP8_DYNAMIC", "ct/W4A16"])
def test_quantized_checkpoints_answer(sample, name):
    with Engine(sample(name), tokenizer_path=EXAMPLE, max_total_tokens=1024) as engine:
        model = qtool.load(sample(name), device="cpu")
        ids = engine.tokenizer("def fibonacci(n):", return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
        assert (
            engine.generate("def fibonacci(n):", {"temperature": 0, "max_new_tokens": 4})[
                "output_ids"
            ]
            == wanted
        )


def test_a_cache_of_8_bits(example):
    with Engine(
        EXAMPLE, dtype="float32", kv_cache_dtype="fp8_e4m3", max_total_tokens=1024
    ) as engine:
        assert engine.loop.runner.layers[0].k.dtype == torch.float8_e4m3fn
        got = engine.generate("def fibonacci(n):", GREEDY, return_logprob=True)
    wanted = example.generate("def fibonacci(n):", GREEDY, return_logprob=True)
    assert got["output_ids"][:4] == wanted["output_ids"][:4]
    pairs = zip(
        got["meta_info"]["output_token_logprobs"][:4],
        wanted["meta_info"]["output_token_logprobs"][:4],
        strict=True,
    )
    assert 0 < max(abs(one[0] - other[0]) for one, other in pairs) < 0.1


class EagerGraph:
    """In place of a CUDA graph: runs what one would replay."""

    def __init__(self, runner, size: int) -> None:
        self.runner = runner
        self.inputs = runner.graphs.fill_decode(NOTHING, size)
        self.logits, self.tokens = runner.decode(self.inputs)

    def replay(self) -> None:
        logits, tokens = self.runner.decode(self.inputs)
        self.logits.copy_(logits)
        self.tokens.copy_(tokens)


@pytest.mark.slow
def test_decode_steps_of_a_fixed_size_compute_the_same(reference, monkeypatch):
    """What CUDA graphs do, by hand: padding, tokens that only the device knows, changes of the page
    table.
    """
    prompts = prompts_of(9, 2000, longest=60)
    wanted = expected(reference, prompts, 40)
    with Engine(EXAMPLE, dtype="float32", max_total_tokens=2048, max_running_requests=8) as engine:
        runner = engine.loop.runner
        with torch.inference_mode():
            graphs = {}
            for size in (2, 4, 8):
                one = EagerGraph(runner, size)
                graphs[size] = DecodeGraph(one, one.logits, one.tokens)
        replayed = []
        replay = runner.graphs.replay_decode
        monkeypatch.setattr(
            runner.graphs,
            "replay_decode",
            lambda *arguments: replayed.append(arguments[1]) or replay(*arguments),
        )
        runner.graphs.decode = graphs
        engine.loop.overlap = True
        assert (
            ids_of(
                engine.generate(input_ids=prompts, sampling_params={**GREEDY, "max_new_tokens": 40})
            )
            == wanted
        )
        assert {2, 8} <= set(replayed)
        greedy, drawn = (
            {**GREEDY, "max_new_tokens": 40},
            {"temperature": 1.0, "seed": 3, "max_new_tokens": 40},
        )
        held = {**greedy, "regex": "[0-9 ]{30,60}"}  # a token of the graph would not be one
        results = engine.generate(
            input_ids=prompts[:4], sampling_params=[greedy, drawn, greedy, held]
        )
        assert results[2]["output_ids"] == wanted[2]
        runner.graphs.decode = {}
        assert ids_of(
            engine.generate(input_ids=prompts[:4], sampling_params=[greedy, drawn, greedy, held])
        ) == ids_of(results)
        assert not results[3]["text"].strip("0123456789 ")


@pytest.mark.slow
def test_prompts_in_steps_of_a_fixed_size_attend_to_latents_or_to_keys_and_values(tmp_path):
    """What CUDA graphs do: with keys and values where prompts begin and are not short, else with
    latents; without a graph where keys and values save more than the launches cost.
    """
    model = random_model("deepseek_v3", tmp_path)
    prompts = prompts_of(12, 320)
    wanted = expected(model, prompts, 6)
    greedy = {**GREEDY, "max_new_tokens": 6}
    options = {"skip_tokenizer_init": True, "dtype": "float32", "max_total_tokens": 4096}
    with Engine(tmp_path, **options, chunked_prefill_size=200) as engine:
        shapes = [
            *(PromptShape(0, 64), PromptShape(12, 64), PromptShape(0, 200, True)),
            *(PromptShape(0, 200), PromptShape(12, 200, True), PromptShape(12, 200)),
        ]
        used = run_in_fixed_steps(engine, [12], shapes)
        assert ids_of(engine.generate(input_ids=prompts, sampling_params=greedy)) == wanted
        assert {PromptShape(0, 200, True), PromptShape(12, 200)} <= {*used}
        assert ids_of(engine.generate(input_ids=prompts, sampling_params=greedy)) == wanted
        assert ids_of([engine.generate(input_ids=prompts[2], sampling_params=greedy)]) == [
            wanted[2]
        ]
        assert PromptShape(0, 64) in used
        graphs, size = engine.loop.runner.graphs, 1000
        sequence = SequenceState([5] * 3000, 1)
        step = Step([Chunk(sequence, 2000, size, False)], 0, [], expands=1)
        graphs.prompts[PromptShape(0, 1000)] = graphs.prompts[PromptShape(0, 64)]
        assert graphs.prompt_shape(step) is None
        step.chunks[0].start, step.chunks[0].count = 300, 400
        assert graphs.prompt_shape(step) == (0, 1000, False)


@pytest.mark.slow
def test_small_steps_with_prompts_of_a_fixed_size_compute_the_same(reference, monkeypatch):
    """As above for steps that have pieces of prompts: several, later chunks, beside sequences that
    decode, more than a shape holds.
    """
    prompts = prompts_of(23, 2000, longest=90)
    wanted = expected(reference, prompts, 12)
    options = {"max_total_tokens": 4096, "max_running_requests": 12, "chunked_prefill_size": 160}
    with Engine(EXAMPLE, dtype="float32", **options) as engine:
        runner = engine.loop.runner
        with torch.inference_mode():
            graphs = runner.graphs
            graphs.kept_logits = torch.empty(20, runner.vocab_size)
            for shape in (PromptShape(*size) for size in ((0, 64), (12, 64), (0, 128), (12, 128))):
                inputs = graphs.fill_prompts(NOTHING, shape)
                run = partial(graphs.keep_logits, runner.prefill, inputs, shape)
                run()
                graphs.prompts[shape] = SimpleNamespace(replay=run)
        replayed = []
        replay = graphs.replay_prompts
        monkeypatch.setattr(
            graphs,
            "replay_prompts",
            lambda *arguments: replayed.append(arguments[1]) or replay(*arguments),
        )
        engine.loop.overlap = True
        assert (
            ids_of(
                engine.generate(input_ids=prompts, sampling_params={**GREEDY, "max_new_tokens": 12})
            )
            == wanted
        )
        for prompt, tokens in zip(prompts[:3], wanted[:3], strict=True):
            assert (
                engine.generate(input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 12})[
                    "output_ids"
                ]
                == tokens
            )
        assert {(0, 64, False), (12, 64, False)} <= set(replayed)
        drawn = {"temperature": 1.0, "seed": 3, "max_new_tokens": 9}
        results = engine.generate(
            input_ids=prompts[:6], sampling_params=drawn, return_logprob=True, logprob_start_len=0
        )
        graphs.prompts = {}
        assert ids_of(engine.generate(input_ids=prompts[:6], sampling_params=drawn)) == ids_of(
            results
        )

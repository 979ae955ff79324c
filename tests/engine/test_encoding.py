"""Embeddings and scores: what transformers and sentence-transformers compute, however prompts are
cut, batched and cached.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from support.encoders import (
    LABELS,
    TEMPLATE,
    classifier,
    cut_and_pad,
    edit_json,
    embedder,
    yes_or_no,
)
from test_engine import prompts_of

from qtool import quantize
from qtool.checkpoint import open_checkpoint
from qtool.engine.engine import Engine
from qtool.errors import CheckpointRefused, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

OPTIONS = {"dtype": "float32", "device": "cpu", "max_total_tokens": 4096}
CUT = {"chunked_prefill_size": 48, "max_running_requests": 5}
VOCABULARY = 320


def hidden_states(model, prompt):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt]), use_cache=False)[0][0].double()


def pooled(states, mode, *, normalize=True):
    """Sentence-transformers' arithmetic for one text."""
    vector = states[-1] if mode == "lasttoken" else states.mean(dim=0)
    return vector / vector.norm() if normalize else vector


def distance(results, wanted):
    found = np.array([result["embedding"] for result in results])
    expected = torch.stack(list(wanted)).numpy()
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("kind", "mode", "normalize"),
    [
        ("qwen3", "lasttoken", True),
        ("qwen3", "mean", True),
        ("llama", "mean", False),
        ("gemma2", "lasttoken", False),
        ("qwen3_moe", "lasttoken", True),
    ],
)
def test_embeddings_are_those_of_sentence_transformers(tmp_path, kind, mode, normalize, cut):
    model = embedder(tmp_path / "model", kind, mode, normalize=normalize)
    prompts = prompts_of(16, 300)
    with Engine(tmp_path / "model", **OPTIONS, **(CUT if cut else {})) as engine:
        results = engine.encode(input_ids=prompts)
        again = engine.encode(input_ids=prompts[5])
    wanted = [pooled(hidden_states(model, prompt), mode, normalize=normalize) for prompt in prompts]
    assert distance(results, wanted) < 1e-4
    assert distance([again], wanted[5:6]) < 1e-4
    cached = sum(result["meta_info"]["cached_tokens"] for result in [*results, again])
    assert (cached > 0) == (mode == "lasttoken")  # the mean needs every token
    assert again["meta_info"]["prompt_tokens"] == len(prompts[5])


@pytest.mark.parametrize("make", [classifier, yes_or_no])
def test_scores_are_those_of_transformers(tmp_path, make):
    model = make(tmp_path / "model")
    prompts = prompts_of(6, 300)
    with Engine(tmp_path / "model", **OPTIONS, **CUT) as engine:
        results = engine.encode(input_ids=prompts)
    wanted = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        if make is yes_or_no:
            logits = logits[-1][LABELS[0]] - logits[-1][LABELS[1]]
        wanted.append(logits.double().sigmoid().reshape(1))
    assert distance(results, wanted) < 1e-4
    assert len({result["embedding"][0] for result in results}) == len(prompts)


QUERY, DOCUMENTS = "Which loops?", ["print(1)\n", "def f(x): pass\n", "while True: pass\n"]


def pair_text(query, document, instruction="Judge."):
    return f"{instruction}\n<Query>: {query}\n<Document>: {document}\nA:"


@pytest.mark.parametrize("make", [classifier, yes_or_no, embedder])
def test_documents_are_scored_and_ranked(tmp_path, make):
    make(tmp_path / "model")
    cut_and_pad(tmp_path / "model")
    with Engine(tmp_path / "model", **OPTIONS) as engine:
        scores = engine.score(QUERY, DOCUMENTS)
        twice = engine.score([QUERY, "x"], DOCUMENTS[:2])
        ranking = engine.rerank(QUERY, DOCUMENTS, top_n=2)
        later = asyncio.run(engine.async_rerank(QUERY, DOCUMENTS, top_n=2))
        texts = [QUERY, *DOCUMENTS]
        if make is yes_or_no:
            assert engine.score(QUERY, DOCUMENTS[0], instruction="Is it?") == pytest.approx(
                [engine.encode(pair_text(QUERY, DOCUMENTS[0], "Is it?"))["embedding"][0]], abs=1e-5
            )
            texts = [pair_text(QUERY, document) for document in DOCUMENTS]
        else:
            with pytest.raises(UsageError, match="do not contain it"):
                engine.rerank(QUERY, DOCUMENTS, instruction="Judge.")
        if make is classifier:
            texts = [QUERY + document for document in DOCUMENTS]
            raw = engine.score(QUERY, DOCUMENTS, use_activation=False)
            assert scores == pytest.approx(1 / (1 + np.exp(-np.array(raw))), abs=1e-5)
        found = np.array([one["embedding"] for one in engine.encode(texts)])
        assert engine.score(QUERY, np.array(DOCUMENTS)) == pytest.approx(scores, abs=1e-5)
    expected = found[1:] @ found[0] if make is embedder else found[:, 0]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert twice[0] == pytest.approx(scores[0], abs=1e-5)
    order = [int(index) for index in np.argsort(-expected)[:2]]
    assert [one["index"] for one in ranking] == order
    assert [one["relevance_score"] for one in ranking] == pytest.approx(
        [scores[index] for index in order], abs=1e-5
    )
    assert [one["index"] for one in later] == order


@pytest.mark.parametrize(
    ("template", "error", "code"),
    [
        ({"tool_use": TEMPLATE}, CheckpointRefused, "E_CHAT_TEMPLATE"),
        ("{{ raise_exception('no') }}" + TEMPLATE, UsageError, "E_CHAT_TEMPLATE_REFUSED"),
    ],
)
def test_a_template_that_makes_no_prompt_is_refused(tmp_path, template, error, code):
    yes_or_no(tmp_path / "model")
    with Engine(tmp_path / "model", **OPTIONS) as engine:
        engine.tokenizer.chat_template = template
        with pytest.raises(error) as refused:
            engine.score(QUERY, DOCUMENTS)
        assert refused.value.code == code


def test_texts_and_options_that_cannot_be_scored_are_refused(tmp_path):
    classifier(tmp_path / "model")
    with Engine(tmp_path / "model", **OPTIONS) as engine:
        for method, query, documents, options in (
            (engine.score, QUERY, [], {}),
            (engine.score, "a", [1], {}),
            (engine.score, ["a", "b"], ["c"] * 3, {}),
            (engine.rerank, [QUERY, "x"], DOCUMENTS[:2], {}),
            (engine.rerank, QUERY, ["\ud800"], {}),
            (engine.rerank, QUERY, DOCUMENTS, {"top_n": -1}),
            (engine.rerank, QUERY, DOCUMENTS, {"top_n": "2"}),
            (engine.rerank, QUERY, DOCUMENTS, {"instruction": 5}),
        ):
            with pytest.raises(UsageError) as refused:
                method(query, documents, **options)
            assert refused.value.code == "E_PROMPT"
        with pytest.raises(UsageError, match="without label_token_ids"):
            engine.score(QUERY, DOCUMENTS, item_first=True)


def test_one_prompt_gives_the_probabilities_of_all_labels(tiny_model):
    texts = ["def add(a, b):\n" + item for item in ("    return", "x = 1\n")]
    sampling = {"max_new_tokens": 1, "temperature": 0}
    with Engine(tiny_model, **OPTIONS) as engine:
        results = engine.generate(texts, sampling, return_logprob=True, top_logprobs_num=20)
        likely = [result["meta_info"]["output_top_logprobs"][0] for result in results]
        labels = [token for best in likely for _, token, _ in best]  # 20 of each text
        asked = engine.loop.scheduler.prefix_queries  # tokens of prompts
        scores = engine.score("def add(a, b):\n", ["    return", "x = 1\n"], labels)
        prompt_tokens = sum(result["meta_info"]["prompt_tokens"] for result in results)
        assert engine.loop.scheduler.prefix_queries - asked == prompt_tokens
        shares = engine.score("    return", "def add(a, b):\n", labels, True, True)
        assert asyncio.run(engine.async_score(texts[0], "", labels[:2])) == [
            pytest.approx(scores[0][:2], abs=1e-5)
        ]
        assert engine.score(texts[0], "", np.array(labels[:2])) == [
            pytest.approx(scores[0][:2], abs=1e-5)
        ]
        for arguments in ([[]], [np.array([])], [[1 << 20]], [["a"]], [5]):
            with pytest.raises(UsageError) as refused:
                engine.score("a", "b", *arguments)
            assert refused.value.code == "E_PROMPT"
        with pytest.raises(UsageError, match="with label_token_ids"):
            engine.score("a", "b", [1], instruction="Judge.")
        with pytest.raises(UsageError, match="`use_activation` means nothing with"):
            engine.score("a", "b", [1], use_activation=False)
        with pytest.raises(UsageError, match="only by label_token_ids"):
            engine.rerank("a", ["b"])
    for found, best in ((scores[0][:20], likely[0]), (scores[1][20:], likely[1])):
        assert found == pytest.approx([np.exp(logprob) for logprob, _, _ in best], abs=1e-5)
    assert shares[0] == pytest.approx(np.array(scores[0]) / sum(scores[0]), abs=1e-5)


def test_a_quantized_model_encodes_with_its_quantized_layers(tmp_path):
    model = embedder(tmp_path / "model")
    prompts = prompts_of(4, 300)
    with Engine(tmp_path / "model", quantization="w8a8_int8", **OPTIONS) as engine:
        off = distance(
            engine.encode(input_ids=prompts),
            [pooled(hidden_states(model, prompt), "lasttoken") for prompt in prompts],
        )
    assert 1e-4 < off < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(  # with tied embeddings, and without a head
    "kind", [pytest.param("qwen3", marks=pytest.mark.exhaustive), "llama"]
)
def test_an_embedding_model_is_quantized_and_encodes(tmp_path, kind):
    model = embedder(tmp_path / "model", kind)
    quantize(tmp_path / "model", method="fp8_dynamic", output=tmp_path / "out", device="cpu")
    before, after = (open_checkpoint(tmp_path / name).tensors for name in ("model", "out"))
    assert before.keys() <= after.keys()
    assert not any("lm_head" in name for name in after)
    prompts = prompts_of(4, 300)
    with Engine(tmp_path / "out", **OPTIONS) as engine:
        results = engine.encode(input_ids=prompts)
    wanted = [pooled(hidden_states(model, prompt), "lasttoken") for prompt in prompts]
    assert 1e-4 < distance(results, wanted) < 0.3


def test_a_language_model_gives_embeddings_when_asked(tmp_path, tiny_model):
    with Engine(tiny_model, is_embedding=True, **OPTIONS) as engine:
        one = engine.encode("import os\n")
        two = asyncio.run(engine.async_encode(["import os\n", "def f():"], rid=["a", "b"]))
        assert one["embedding"] == pytest.approx(two[0]["embedding"], abs=1e-5)
        assert np.linalg.norm(two[1]["embedding"]) == pytest.approx(1)
        assert two[1]["meta_info"]["id"] == "b"
        with pytest.raises(UsageError, match="may be cut"):
            engine.encode("x", dimensions=8)
        with pytest.raises(UsageError, match="generates no text"):
            engine.generate("x")
        longest = engine.context_length
        engine.encode(input_ids=[5] * longest)
        with pytest.raises(UsageError, match=f"holds {longest}"):
            engine.encode(input_ids=[5] * (longest + 1))
    with (
        Engine(tiny_model, **OPTIONS) as engine,
        pytest.raises(UsageError, match="generates text"),
    ):
        engine.encode("x")


def test_vectors_are_cut_where_the_config_says_so(tmp_path):
    folder = tmp_path / "model"
    model = embedder(folder)
    edit_json(folder / "config.json", matryoshka_dimensions=[16, 32])
    prompt = prompts_of(1, 300)[0]
    with Engine(folder, **OPTIONS) as engine:
        cut = engine.encode(input_ids=prompt, dimensions=16)
        with pytest.raises(UsageError) as refused:
            engine.encode(input_ids=prompt, dimensions=8)
    assert "16, 32" in refused.value.hint
    states = hidden_states(model, prompt)
    assert distance([cut], [pooled(states[:, :16], "lasttoken")]) < 1e-4


def _pool(mode):
    return lambda folder: edit_json(folder / "1_Pooling" / "config.json", pooling_mode=mode)


def _modules(text):
    return lambda folder: (folder / "modules.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_pool("cls"), "first token sees no other"),
        (_pool(["mean", "max"]), "`mean`, `max`"),
        (lambda folder: edit_json(folder / "config.json", is_causal=False), "both directions"),
        (
            lambda folder: edit_json(folder / "sentence_bert_config.json", do_lower_case=True),
            "lower case",
        ),
        (_modules('[{"type": "a.Dense", "path": ""}]'), "`Dense`"),
        (_modules('[{"type": 1}]'), "list of modules"),
        (_modules('[{"type": "a.Pooling", "path": "../up"}]'), "list of modules"),
    ],
    ids=["cls", "two", "both-ways", "lower", "dense", "types", "path"],
)
def test_what_is_not_computed_is_refused(tmp_path, change, said):
    folder = tmp_path / "model"
    embedder(folder)
    change(folder)
    with pytest.raises(CheckpointRefused, match=said) as refused:
        Engine(folder, **OPTIONS)
    assert refused.value.code == "E_ENCODING"


def test_classes_are_refused(tmp_path):
    classifier(tmp_path / "model", labels=3)
    with pytest.raises(CheckpointRefused, match="3 classes"):
        Engine(tmp_path / "model", **OPTIONS)


def test_an_encoder_that_sees_both_ways_is_refused(tmp_path):
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointRefused, match="not causal"):
        Engine(tmp_path / "bert", skip_tokenizer_init=True, **OPTIONS)

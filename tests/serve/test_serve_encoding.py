"""Embeddings, scores and ranked documents over HTTP: OpenAI's client, vLLM's and Cohere's shapes."""

from __future__ import annotations

import base64
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
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
from support.server import start_server
from transformers import AutoTokenizer

from qtool.cli.app import run
from qtool.engine.engine import Engine
from qtool.errors import CheckpointRefused, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("encoding")]
TEXTS = ["import os\n", "def add(a, b):\n    return a + b\n", "class Tree:\n"]
DOCUMENTS = ["print(1)\n", "def f(x): pass\n", "import re\n", "while True: pass\n"]
OPTIONS = ("--dtype", "float32", "--max-total-tokens", 4096, "--device", "cpu")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """A served embedding model, and its numbers by transformers."""
    folder = tmp_path_factory.mktemp("embedding")
    model = embedder(folder / "model")
    edit_json(folder / "model" / "config.json", is_matryoshka=True)
    cut_and_pad(folder / "model")
    server = start_server(folder, folder / "model", *OPTIONS, "--max-running-requests", 3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def vector(text):
        ids = text if isinstance(text, list) else tokenizer(text)["input_ids"]
        with torch.inference_mode():
            state = model(input_ids=torch.tensor([ids]), use_cache=False)[0][0, -1]
        return (state / state.norm()).numpy()

    yield server, vector
    server.end()


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    """A served model that answers yes or no, and its numbers by transformers."""
    folder = tmp_path_factory.mktemp("reranker")
    model = yes_or_no(folder / "model")
    server = start_server(folder, folder / "model", *OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def relevance(query, document, instruction="Judge."):
        messages = [("query", query), ("document", document), ("system", instruction)]
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        return float((logits[LABELS[0]] - logits[LABELS[1]]).sigmoid())

    yield server, relevance
    server.end()


def test_openais_client_gets_embeddings(embedding):
    server, vector = embedding
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        one = client.embeddings.create(model="default", input=TEXTS[0])
        many = client.embeddings.create(model="m", input=TEXTS, encoding_format="float")
        tokens = client.embeddings.create(model="m", input=[[5, 6, 7], [8]])
        cut = client.embeddings.create(model="m", input=TEXTS[1], dimensions=16)
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="m", input=TEXTS[1], dimensions=1 << 20)
        assert refused.value.code == "dimensions"
        with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
            client.embeddings.create(model="m", input=[[5] * 5000])
        with pytest.raises(openai.BadRequestError, match="makes embeddings") as refused:
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "Hello"}]
            )
        assert refused.value.code == "task"
    assert one.data[0].embedding == pytest.approx(vector(TEXTS[0]), abs=1e-5)
    assert one.usage.prompt_tokens == one.usage.total_tokens > 0
    assert one.usage.completion_tokens == 0
    for text, found in zip(TEXTS, many.data, strict=True):
        assert found.embedding == pytest.approx(vector(text), abs=1e-5)
    assert tokens.data[0].embedding == pytest.approx(vector([5, 6, 7]), abs=1e-5)
    assert tokens.usage.prompt_tokens == 4
    wanted = vector(TEXTS[1])[:16]
    assert cut.data[0].embedding == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-5)


def test_a_long_list_is_worked_through_in_parts(embedding):
    server, vector = embedding
    prompts = [[3 + number % 300, 4 + number % 200] for number in range(700)]
    body = {"input": prompts, "encoding_format": "base64"}
    response = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    answer = response.json()
    assert response.headers["x-request-id"] == answer["id"]
    assert f" {answer['id']}: 1400 prompt tokens" in server.said()
    assert [one["index"] for one in answer["data"]] == [*range(700)]
    for number in (0, 127, 128, 699):
        found = np.frombuffer(base64.b64decode(answer["data"][number]["embedding"]), "<f4")
        assert found == pytest.approx(vector(prompts[number]), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == 1400


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"input": []}, "value_error"),
        ({"input": ""}, "empty_prompt"),
        ({"input": "x", "encoding_format": "bytes"}, "literal_error"),
        ({"input": "x", "messages": [{"role": "user"}]}, "unsupported_parameter"),
        ({"input": "x", "truncate": "END"}, "unsupported_parameter"),
        ({"input": "x", "input_type": "query"}, "unsupported_parameter"),
        ({"input": "x", "instruction": "Find."}, "unsupported_parameter"),
        ({"input": "x", "stream": True}, "unsupported_parameter"),
        ({"input": "x", "embed_dtype": "float16"}, "unsupported_parameter"),
        ({"input": "x", "dimension": 4}, "unknown_parameter"),
        ({"input": ["x"] * 2049}, "value_error"),
        ({"input": [[1 << 20]]}, "prompt"),
        ({"input": {"a": 1}}, "value_error"),
    ],
    ids=[
        *("none", "empty-list", "empty", "format", "chat", "truncate", "input-type"),
        *("instruction", "stream", "dtype", "typo", "many", "token", "object"),
    ],
)
def test_requests_that_ask_for_something_else_are_refused(embedding, body, code):
    server, _ = embedding
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def test_fields_that_change_nothing_are_taken(embedding):
    server, vector = embedding
    nothing = {"truncate": "NONE", "embed_dtype": "float32", "endianness": "little"}
    nothing |= {"stream": False, "truncate_prompt_tokens": -1, "user": "u", "temperature": 0.5}
    body = {"input": TEXTS[0], **nothing}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()
    assert answer["data"][0]["embedding"] == pytest.approx(vector(TEXTS[0]), abs=1e-5)
    assert "a field `temperature`, which has no effect here" in server.said()


def test_an_embedding_model_scores_by_the_cosine(embedding):
    server, vector = embedding
    query, *documents = (vector(text) for text in (TEXTS[0], *DOCUMENTS))
    wanted = [float(query @ document) for document in documents]
    body = {"text_1": TEXTS[0], "text_2": DOCUMENTS}
    answer = httpx.post(f"{server.url}/v1/score", json=body, timeout=60).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx(wanted, abs=1e-5)
    body = {"query": TEXTS[0], "documents": [*DOCUMENTS, TEXTS[0]]}
    best = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()["results"][0]
    assert (best["index"], best["relevance_score"]) == (4, pytest.approx(1, abs=1e-5))
    body["instruction"] = "Only loops."
    refused = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "instruction")


def test_the_server_says_what_it_serves(embedding):
    server, _ = embedding
    info = httpx.get(f"{server.url}/model_info").json()
    assert info["is_generation"] is False
    assert httpx.get(f"{server.url}/health_generate").status_code == 200
    body = {"model": "m", "input": "x"}
    assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
    metrics = httpx.get(f"{server.url}/metrics").text
    ended = re.search(r'vllm:request_success_total\{finished_reason="length".*\} (\S+)', metrics)
    assert float(ended[1]) >= 1
    assert httpx.get(f"{server.url}/server_info").json()["encoding"]["task"] == "embed"
    assert "/v1/embeddings" in server.out.read_text()


def test_documents_are_ranked(reranker):
    server, relevance = reranker
    wanted = [relevance("Which loops?", text) for text in DOCUMENTS]
    order = sorted(range(4), key=lambda index: -wanted[index])
    body = {"model": "m", "query": "Which loops?", "documents": DOCUMENTS, "top_n": 3}
    answers = {
        path: httpx.post(server.url + path, json=body, timeout=60).json()
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    }
    for path, answer in answers.items():
        assert [one["index"] for one in answer["results"]] == order[:3]
        for one in answer["results"]:
            assert one["relevance_score"] == pytest.approx(wanted[one["index"]], abs=1e-5)
            assert ("document" in one) == (path != "/v2/rerank")
        assert answer["usage"]["total_tokens"] > 4
    first = answers["/rerank"]["results"][0]
    assert first["document"]["text"] == DOCUMENTS[order[0]]
    body |= {"documents": [{"text": text} for text in DOCUMENTS], "instruction": "Only loops."}
    answer = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()
    best = answer["results"][0]
    found = relevance("Which loops?", DOCUMENTS[best["index"]], "Only loops.")
    assert best["relevance_score"] == pytest.approx(found, abs=1e-5)


def test_pairs_are_scored(reranker):
    server, relevance = reranker
    one_many = {"text_1": "Which loops?", "text_2": DOCUMENTS}
    answer = httpx.post(f"{server.url}/v1/score", json=one_many, timeout=60).json()
    wanted = [relevance("Which loops?", text) for text in DOCUMENTS]
    assert [one["score"] for one in answer["data"]] == pytest.approx(wanted, abs=1e-5)
    both = {"queries": TEXTS, "documents": DOCUMENTS[:3], "use_activation": False}
    answer = httpx.post(f"{server.url}/score", json=both, timeout=60).json()
    wanted = [relevance(*pair) for pair in zip(TEXTS, DOCUMENTS[:3], strict=True)]
    raw = [np.log(one / (1 - one)) for one in wanted]
    assert [one["score"] for one in answer["data"]] == pytest.approx(raw, abs=1e-4)
    repeated = {"text_1": "x" * 10_000, "text_2": ["y"] * 2_000}  # 20 MB of prompts
    uneven = {"queries": TEXTS, "items": DOCUMENTS}
    for body in ({"text_1": "x"}, uneven, {**both, "text_1": "x"}, repeated):
        answer = httpx.post(f"{server.url}/v1/score", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt")
    for field in ({"stream": True}, {"truncation": True}, {"chat_template_kwargs": {"a": 1}}):
        answer = httpx.post(f"{server.url}/v1/score", json=one_many | field, timeout=60)
        assert answer.json()["error"]["code"] == "unsupported_parameter"
    answer = httpx.post(f"{server.url}/v1/score", json=one_many | {"label_token_ids": [1]})
    assert answer.json()["error"]["code"] == "task"
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, timeout=60)
    assert answer.status_code == 400
    assert "scores documents" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["embedding", "reranker"])
def test_the_engine_scores_and_ranks_as_the_routes_do(request, name):
    server = request.getfixturevalue(name)[0]
    body = {"query": "Which loops?", "items": DOCUMENTS}
    answer = httpx.post(f"{server.url}/v1/score", json=body, timeout=60).json()
    body = {"query": "Which loops?", "documents": DOCUMENTS, "top_n": 3}
    wanted = httpx.post(f"{server.url}/v2/rerank", json=body, timeout=60).json()["results"]
    with Engine(server.model, device="cpu", dtype="float32", max_total_tokens=4096) as engine:
        scores = engine.score("Which loops?", DOCUMENTS)
        ranking = engine.rerank("Which loops?", DOCUMENTS, top_n=3)
    assert scores == pytest.approx([each["score"] for each in answer["data"]], abs=1e-5)
    assert [each["index"] for each in ranking] == [each["index"] for each in wanted]
    assert [each["relevance_score"] for each in ranking] == pytest.approx(
        [each["relevance_score"] for each in wanted], abs=1e-5
    )


def test_the_engine_gives_the_probabilities_of_labels_as_the_route_does(served):
    given = {
        "query": "Which loops?",
        "items": DOCUMENTS,
        "label_token_ids": [*range(200)],
        "apply_softmax": True,
    }
    answer = httpx.post(f"{served.url}/v1/score", json=given, timeout=60).json()
    with Engine(served.model, device="cpu", dtype="bfloat16", max_total_tokens=4096) as engine:
        scores = engine.score(**given)
        query, *items = engine.tokenizer([given["query"], *DOCUMENTS])["input_ids"]
        of_tokens = engine.score(**given | {"query": query, "items": items})
        with pytest.raises(UsageError, match="the other tokens"):
            engine.score(**given | {"items": items})
    assert np.array(scores) == pytest.approx(np.array(answer["scores"]), abs=2e-3)
    given |= {"query": query, "items": items}
    answer = httpx.post(f"{served.url}/v1/score", json=given, timeout=60).json()
    assert np.array(of_tokens) == pytest.approx(np.array(answer["scores"]), abs=2e-3)


def test_a_classifier_takes_pairs_as_its_tokenizer_puts_them_together(tmp_path):
    model = classifier(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    server = start_server(tmp_path, tmp_path / "model", *OPTIONS)
    try:
        body = {"query": "loops", "documents": DOCUMENTS}
        answer = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()
        body["instruction"] = "Only loops."
        refused = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60)
    finally:
        server.end()
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "instruction")
    for one in answer["results"]:
        ids = tokenizer("loops", DOCUMENTS[one["index"]], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            wanted = model(input_ids=ids, use_cache=False).logits[0, 0].sigmoid()
        assert one["relevance_score"] == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("item_first", [False, True])
def test_a_language_model_gives_the_probabilities_of_labels(served, item_first):
    query, items = "def add(a, b):\n", ["    return a", "x = 1\n", ""]
    sampling = {"max_new_tokens": 1, "temperature": 0}
    texts = [item + query if item_first else query + item for item in items]
    body = {"text": texts, "sampling_params": sampling}
    body |= {"return_logprob": True, "top_logprobs_num": 20}
    likely = [
        {token: np.exp(one) for one, token, _ in each["meta_info"]["output_top_logprobs"][0]}
        for each in httpx.post(f"{served.url}/generate", json=body, timeout=60).json()
    ]
    labels = [*likely[0]][:3]
    body = {"query": query, "items": items, "label_token_ids": labels, "item_first": item_first}
    answer = httpx.post(f"{served.url}/v1/score", json=body, timeout=60).json()
    shares = httpx.post(
        f"{served.url}/v1/score", json=body | {"apply_softmax": True}, timeout=60
    ).json()["scores"]
    assert (answer["object"], len(answer["scores"])) == ("scoring", 3)
    for wanted, scores, parts in zip(likely, answer["scores"], shares, strict=True):
        for label, found in zip(labels, scores, strict=True):
            assert found == pytest.approx(wanted.get(label, found), rel=2e-2)
            assert label in wanted or found <= min(wanted.values()) * 1.02
        assert parts == pytest.approx(np.array(scores) / sum(scores), rel=2e-2)
    tokens = httpx.post(f"{served.url}/tokenize", json={"prompt": texts}, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == sum(tokens["count"])
    first = tokens["tokens"][0]
    sides = {"query": first[:2], "items": [first[2:]]}
    if item_first:
        sides = {"query": first[2:], "items": [first[:2]]}
    again = httpx.post(f"{served.url}/v1/score", json=body | sides, timeout=60).json()
    assert again["scores"][0] == pytest.approx(answer["scores"][0], rel=2e-2)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"label_token_ids": [1 << 20]}, "prompt"),
        ({"label_token_ids": [3] * 257}, "too_long"),
        ({"label_token_ids": None, "item_first": False}, "task"),
        ({"label_token_ids": None, "item_first": True}, "value_error"),
        ({"instruction": "Judge."}, "value_error"),
        ({"use_activation": False}, "value_error"),
        ({"query": [5]}, "value_error"),
        ({"query": [5], "items": [[6]], "label_token_ids": None}, "value_error"),
        ({"query": "", "items": [""]}, "empty_prompt"),
        ({"query": "x " * 3000}, "context_length_exceeded"),
    ],
    ids=[
        *("unknown", "many", "none", "item-first", "instruction", "activation"),
        *("tokens-and-text", "tokens-without-labels", "empty", "long"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(served, changed, code):
    body = {"query": "x", "items": ["y"], "label_token_ids": [3], **changed}
    answer = httpx.post(f"{served.url}/v1/score", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def test_an_abort_ends_what_is_worked_through_in_parts(served):
    body = {"query": "x" * 1000, "items": ["y"] * 2048, "label_token_ids": [*range(64)]}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            httpx.post, f"{served.url}/v1/score", json=body | {"rid": "labels"}, timeout=120
        )
        while not asked.done():  # it would take some minutes
            httpx.post(f"{served.url}/abort_request", json={"rid": "labels"}, timeout=60)
            time.sleep(0.1)
    answer = asked.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "aborted")


def test_a_language_model_is_served_for_embeddings_only_when_asked(served):
    answer = httpx.post(f"{served.url}/v1/embeddings", json={"input": "x"}, timeout=60)
    assert answer.status_code == 400
    assert "--is-embedding" in answer.json()["error"]["message"]


@pytest.mark.exhaustive  # the dry run that follows refuses it by the same check
def test_a_server_of_a_reranker_without_a_template_for_pairs_does_not_start(tmp_path):
    yes_or_no(tmp_path / "model", template=None)
    with pytest.raises(RuntimeError, match="does not show a query and a document"):
        start_server(tmp_path, tmp_path / "model", *OPTIONS)


def test_a_reranker_without_a_template_for_pairs_is_refused(tmp_path):
    yes_or_no(tmp_path / "model", template=None)
    options = ["serve", "--model-path", str(tmp_path / "model"), "--dry-run", "--device", "cpu"]
    with pytest.raises(CheckpointRefused, match="does not show a query and a document") as refused:
        run(options)
    assert refused.value.code == "E_CHAT_TEMPLATE"
    (tmp_path / "pairs.jinja").write_text(TEMPLATE)
    assert run([*options, "--chat-template", str(tmp_path / "pairs.jinja")]) == 0

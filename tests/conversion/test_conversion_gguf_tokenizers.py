"""Tokenizers in GGUF files that `export` writes: llama.cpp cuts text as the model's own does."""

from __future__ import annotations

import json

import pytest
from support.conversion import edit
from support.gguf_models import needs_llama_cpp, publish
from support.llama_cpp import texts_cut_otherwise
from tokenizers import Tokenizer

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_pre_tokenizers import PRE_TOKENIZERS
from qtool.conversion import export
from qtool.conversion.gguf.vocabulary import NAMES, pieces_of, pre_tokenizer_of
from qtool.errors import CheckpointRefused

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]
TEXTS = (
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 23456))",
    "  two  spaces, I'm sure we'LL see\t\ttabs",
    "naïve café 日本語 \U0001f680 (x) ==> 3.14",
    "<|im_start|>user\nhi<|im_end|>",
)


def with_pre_tokenizer(tokenizer, known):
    """A tokenizer.json that cuts text as ``known`` says."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = []
    for piece in pieces_of(known):
        if piece == "digits":
            steps.append({"type": "Digits", "individual_digits": True})
        elif piece == "byte level":
            steps.append({**byte_level, "use_regex": True})
        else:
            split = {"type": "Split", "pattern": {"Regex": piece}, "behavior": "Isolated"}
            steps += [{**split, "invert": False}, {**byte_level, "use_regex": False}]
    model = {**tokenizer["model"], "ignore_merges": known.ignore_merges}
    sequence = {"type": "Sequence", "pretokenizers": steps}
    return {**tokenizer, "pre_tokenizer": sequence, "model": model}


def sentencepiece_tokenizer():
    """A small BPE with bytes and marked spaces, as Llama 2 has it."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    merges = [
        "\u2581 t",
        "h e",
        "\u2581t he",
        "r e",
        "\u2581 a",
        "a d",
        "ad d",
        "re t",
        "\u2581 ret",
    ]
    letters = sorted({letter for merge in merges for letter in merge.split(" ")} | set("indxyz()"))
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *dict.fromkeys([*letters, *joined])]
    added = [
        {"id": number, "content": tokens[number], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number in range(3)
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    start = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, *text],
            "pair": [*start, *text, *text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", [*NAMES.values(), "sentencepiece"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path, name):
    folder = tmp_path / "model"
    publish(folder, "Qwen3")
    if name == "sentencepiece":
        tokenizer = sentencepiece_tokenizer()
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        edit(folder, lambda tensors: None, lambda config: config.update(bos_token_id=1))
    else:
        known = PRE_TOKENIZERS[name]
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer = with_pre_tokenizer(tokenizer, known)
        assert pre_tokenizer_of(open_checkpoint(folder), tokenizer) == name
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(folder, to="gguf", output=tmp_path / "out")
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    texts = {text: encode(text).ids for text in TEXTS}
    assert texts_cut_otherwise(tmp_path / "out" / "out.gguf", texts) == []


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    folder = tmp_path / "model"
    publish(folder, "Qwen2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointRefused, match="Whitespace") as caught:
        export(folder, to="gguf", output=tmp_path / "out")
    assert caught.value.code == "E_GGUF_TOKENIZER"

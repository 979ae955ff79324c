"""The tokenizer files of a GGUF file, from its metadata: what `tokenizers` and transformers read.

Sources: llama.cpp, `llama-vocab.cpp`; transformers 5.17, `convert_slow_tokenizer.py`.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

from qtool.checkpoint.gguf_pre_tokenizers import PRE_TOKENIZERS
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.strict_json import JsonDict, parse_object, refused
from qtool.errors import CheckpointRefused

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What `tokenizer.ggml.token_type` says of a token."""
MAX_PIECE = 64
MAX_PIECE_CHARACTERS = 8 << 20
"""Of all pieces that merges are derived from: the largest public vocabulary has 2 million."""
KNOWN = frozenset(
    {
        *("model", "pre", "tokens", "token_type", "scores", "merges", "token_type_count"),
        *("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"),
        *("remove_extra_whitespaces",),
    }
)
ENDS = ("eot", "eom")
"""Special tokens that are in the generation config alone."""
TOKEN_ID = re.compile("_token_ids?$")


def tokenizer_files(
    file: Path, metadata: Mapping[str, Value], context: int | None
) -> dict[str, str]:
    """Return the texts of the tokenizer's files, by name; none when the file has no tokenizer.

    Args:
        file: the GGUF file, for messages.
        metadata: what its header says.
        context: how many tokens the model takes.
    Raises: CheckpointRefused, for a tokenizer that qtool does not know.
    """
    fields = _Fields(file, metadata)
    templates = dict(_templates(fields))
    if fields.get("model") in (None, "none", "no_vocab"):
        return templates
    if "tokenizer.huggingface.json" in metadata:
        tokenizer = parse_object(
            str(metadata["tokenizer.huggingface.json"]).encode(),
            f"{file}: tokenizer.huggingface.json",
        )
    else:
        tokenizer = _tokenizer(fields)
    config: JsonDict = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **fields.special_tokens(),
    }
    if context:
        config["model_max_length"] = context
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        **templates,
    }


class _Fields:
    """The part of the metadata that describes the tokenizer."""

    def __init__(self, file: Path, metadata: Mapping[str, Value]) -> None:
        self.file = file
        prefix = "tokenizer.ggml."
        self.found = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        template = "tokenizer.chat_template"
        self.templates = {
            key.removeprefix(template): value
            for key, value in metadata.items()
            if key == template or key.startswith(f"{template}.")
        }
        unknown = [key for key in self.found if key not in KNOWN and not TOKEN_ID.search(key)]
        if unknown:
            raise self.refused(f"the key `{prefix}{unknown[0]}` is one that qtool does not know")
        tokens = self.found.get("tokens", ())
        self.tokens: tuple[str, ...] = tokens if isinstance(tokens, tuple) else ()
        self.types = self._types()
        for end in ENDS:
            self.token(end)

    def _types(self) -> list[int]:
        """Return the type of each token."""
        types = self.found.get("token_type")
        if types is None:
            return [NORMAL] * len(self.tokens)
        if not isinstance(types, array) or len(types) != len(self.tokens):
            raise self.refused("token_type must have one entry for each token")
        if types.typecode in "fd":
            raise self.refused("token_type must hold whole numbers")
        return [int(each) for each in types]

    def get(self, key: str) -> Value | None:
        """Return the value of `tokenizer.ggml.KEY`."""
        return self.found.get(key)

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self.found.get(key, default)
        if type(value) is not bool:
            raise self.refused(f"{key} is {value!r:.40}, and must be true or false")
        return value

    def token(self, key: str) -> int | None:
        """Return the id of a special token; None when there is none."""
        value = self.found.get(f"{key}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.refused(f"{key}_token_id is {value!r:.40}, which is none of its tokens")
        return value

    def special_tokens(self) -> JsonDict:
        """Return the special tokens as tokenizer_config.json names them."""
        names = {
            "bos": "bos_token",
            "eos": "eos_token",
            "unknown": "unk_token",
            "padding": "pad_token",
        }
        found = {name: self.token(key) for key, name in names.items()}
        return {name: self.tokens[token] for name, token in found.items() if token is not None}

    def refused(self, what: str) -> CheckpointRefused:
        """Return the error for a tokenizer that cannot be made."""
        return refused(
            "E_GGUF_TOKENIZER",
            f"{self.file}: tokenizer: {what}",
            "llama.cpp may load the file; or take the safetensors version, which has a "
            "tokenizer.json",
        )


def _templates(fields: _Fields) -> Iterator[tuple[str, str]]:
    for suffix, text in fields.templates.items():
        if not isinstance(text, str):
            raise fields.refused("a chat template must be text")
        if not suffix:
            yield "chat_template.jinja", text
        elif re.fullmatch(r"\.[A-Za-z0-9_-]{1,60}", suffix):
            yield f"additional_chat_templates/{suffix[1:]}.jinja", text
        else:
            raise fields.refused(f"a chat template is called {suffix[:60]!r}")


def _tokenizer(fields: _Fields) -> JsonDict:
    if not fields.tokens:
        raise fields.refused("there are no tokens")
    model = fields.get("model")
    if model == "gpt2":
        return _byte_level(fields)
    if model == "llama":
        return _sentencepiece(fields)
    raise fields.refused(f"its kind is {model!r:.60}, and qtool knows `gpt2` and `llama`")


def _byte_level(fields: _Fields) -> JsonDict:
    """Return a BPE over bytes, as of GPT-2, Llama 3 and Qwen."""
    name = fields.get("pre") or "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise fields.refused(
            f"it cuts text as `{name!s:.60}`, and qtool knows {', '.join(PRE_TOKENIZERS)}"
        )
    pre = PRE_TOKENIZERS[name]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    steps: list[JsonDict] = []
    if pre.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if pre.pattern:
        pattern = {"Regex": pre.pattern}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    steps.append({**byte_level, "use_regex": not pre.pattern})
    vocab = _vocab(fields, without=(UNUSED,))
    return _assemble(
        fields,
        normalizer={"type": "NFC"} if pre.is_nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={**byte_level, "use_regex": True},
        model={
            **_BPE,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": _merges(fields, vocab),
        },
        add_bos=pre.add_bos,
    )


def _merges(fields: _Fields, vocab: Mapping[str, int]) -> list[list[str]]:
    merges = fields.get("merges")
    if not isinstance(merges, tuple):
        raise fields.refused("there are no merges")
    pairs = [merge.split(" ") for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or any(part not in vocab for part in (*pair, "".join(pair))):
            raise fields.refused(f"the merge {' '.join(pair)[:60]!r} is none of its tokens")
    return pairs


def _sentencepiece(fields: _Fields) -> JsonDict:
    """Return the BPE that a SentencePiece model with scores stands for, as of Llama 2 and Gemma."""
    scores = fields.get("scores")
    if not isinstance(scores, array) or len(scores) != len(fields.tokens):
        raise fields.refused("scores must have one entry for each token")
    has_prefix = fields.flag("add_space_prefix", default=True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer: JsonDict = space
    if has_prefix:
        prepend = {"type": "Prepend", "prepend": "▁"}
        normalizer = {"type": "Sequence", "normalizers": [prepend, space]}
    decoders: list[JsonDict] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    vocab = _vocab(fields)
    unknown = fields.token("unknown")
    return _assemble(
        fields,
        normalizer=normalizer,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            **_BPE,
            "unk_token": None if unknown is None else fields.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": BYTE in fields.types,
            "vocab": vocab,
            "merges": _merges_by_score(fields, vocab, scores),
        },
        add_bos=True,
    )


def _merges_by_score(
    fields: _Fields, vocab: Mapping[str, int], scores: array[int] | array[float]
) -> list[list[str]]:
    """Return the merges that make each piece of two others, the best score first."""
    pieces = [*_pieces(fields, scores)]
    if sum(len(piece) for piece, _ in pieces) > MAX_PIECE_CHARACTERS:
        raise fields.refused(f"its pieces have more than {MAX_PIECE_CHARACTERS:,} characters")
    found = [(*cut, score) for piece, score in pieces for cut in _cuts(piece, vocab)]
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [[one, two] for one, two, _ in found]


def _pieces(
    fields: _Fields, scores: array[int] | array[float]
) -> Iterator[tuple[str, int | float]]:
    for token, kind, score in zip(fields.tokens, fields.types, scores, strict=True):
        if kind in (NORMAL, USER_DEFINED) and len(token) <= MAX_PIECE:
            yield token, score


def _cuts(piece: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that ``piece`` is made of, those with the lowest ids first."""
    cuts = ((piece[:index], piece[index:]) for index in range(1, len(piece)))
    pairs = [(one, two) for one, two in cuts if one in vocab and two in vocab]
    return sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


_BPE: JsonDict = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _vocab(fields: _Fields, *, without: tuple[int, ...] = ()) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True)):
        if kind in without:
            continue
        if token in vocab:
            raise fields.refused(f"the token {token[:60]!r} appears twice")
        vocab[token] = number
    return vocab


def _assemble(
    fields: _Fields,
    *,
    normalizer: JsonDict | None,
    pre_tokenizer: JsonDict | None,
    decoder: JsonDict,
    model: JsonDict,
    add_bos: bool,
) -> JsonDict:
    """Return tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*_added_tokens(fields)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(fields, add_bos=add_bos),
        "decoder": decoder,
        "model": model,
    }


def _added_tokens(fields: _Fields) -> Iterator[JsonDict]:
    for number, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True)):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and token:
            yield {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }


def _post_processor(fields: _Fields, *, add_bos: bool) -> JsonDict | None:
    """Return what adds BOS and EOS to a text."""
    before = _special(fields, "bos", is_added=fields.flag("add_bos_token", default=add_bos))
    after = _special(fields, "eos", is_added=fields.flag("add_eos_token", default=False))
    if not before and not after:
        return None

    def sequence(name: str, kind: int) -> list[JsonDict]:
        parts = [*before, "", *after]
        return [
            {"SpecialToken": {"id": part, "type_id": kind}}
            if part
            else {"Sequence": {"id": name, "type_id": kind}}
            for part in parts
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in {**before, **after}.items()
        },
    }


def _special(fields: _Fields, key: str, *, is_added: bool) -> dict[str, int]:
    """Return the special token ``key`` and its id, if there is one that is added."""
    number = fields.token(key) if is_added else None
    return {} if number is None else {fields.tokens[number]: number}

"""Whether every token of tokenizer.json has a row in the embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import regular_size
from qtool.formats.layout import refused

MAX_BYTES = 128 << 20
EMBEDDINGS = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")


def check_vocabulary(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer with tokens that the embeddings have no row for.

    Special tokens may be beyond them, since plain text has none: Gemma 3 1B shares the tokenizer of
    the larger models and their image token, and many models have such a pad token.

    Raises: CheckpointRefused.
    """
    table = next((checkpoint.tensors.get(name) for name in EMBEDDINGS), None)
    path = checkpoint.path / "tokenizer.json"
    if table is None or not table.shape or not path.is_file() or regular_size(path) > MAX_BYTES:
        return
    try:
        tokenizer = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # whatever loads the tokenizer says what is wrong with it
    rows = table.shape[0]
    for token, number in _tokens(tokenizer):
        if number >= rows:
            raise refused(
                "E_VOCABULARY",
                f"{checkpoint.origin(path.name)}: the token {token[:100]!r} is number {number:,}, "
                f"and `{table.name}` has {rows:,} rows",
                "take tokenizer and weights from the same place",
            )


def _tokens(tokenizer: object) -> Iterator[tuple[str, int]]:
    """Yield the last token of the vocabulary and the added tokens that a text may have, with their
    ids.
    """
    if not isinstance(tokenizer, Mapping):
        return
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        ids = {name: number for name, number in vocabulary.items() if type(number) is int}
        if ids:
            yield max(ids.items(), key=lambda token: token[1])
    elif isinstance(vocabulary, list) and vocabulary:
        yield str(vocabulary[-1]), len(vocabulary) - 1
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if not isinstance(token, Mapping) or type(token.get("id")) is not int:
            continue
        content = str(token.get("content"))
        if token.get("special") is not True and "pad" not in content.lower():
            yield content, token["id"]

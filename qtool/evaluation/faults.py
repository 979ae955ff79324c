"""Faults of a quantized checkpoint that need no numbers: another tokenizer, a quantized router."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qtool import formats
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused, DataRefused
from qtool.evaluation.texts import Document, TextSpec, read_documents, vocab_size
from qtool.modules import is_router

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def checkpoint_faults(
    quantized: Checkpoint,
    reference: Checkpoint,
    spec: TextSpec,
    documents: Sequence[Document],
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Return what is wrong with ``quantized`` in a sentence each.

    Args:
        quantized: the checkpoint that is evaluated.
        reference: its 16-bit model.
        spec: the texts.
        documents: the texts as the quantized checkpoint's tokenizer cuts them.
        trust_remote_code: whether code that comes with the reference's tokenizer may run.
    """
    return [
        *_tokenizer_faults(quantized, reference, spec, documents, trust_remote_code),
        *_router_faults(quantized, reference),
    ]


def _tokenizer_faults(
    quantized: Checkpoint,
    reference: Checkpoint,
    spec: TextSpec,
    documents: Sequence[Document],
    trust_remote_code: bool,
) -> list[str]:
    if _tokenizer_bytes(quantized) == _tokenizer_bytes(reference):
        return []
    if not has_tokenizer(quantized):
        return ["there is no tokenizer, and the reference has one: engines need it for text"]
    try:
        expected = read_documents(
            spec, reference.path, vocab_size(reference), trust_remote_code=trust_remote_code
        )
    except (CheckpointRefused, DataRefused) as error:
        return [f"the reference's tokenizer cannot be compared: {error.message}"]
    for ours, theirs in zip(documents, expected, strict=False):
        if ours != theirs:
            return [
                f"the tokenizer is not the reference's: {ours.where} begins with tokens "
                f"{list(ours.ids[:4])}, and {list(theirs.ids[:4])} there"
            ]
    return []


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the folder of ``checkpoint`` has a tokenizer."""
    return any((checkpoint.path / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = (checkpoint.path / name for name in TOKENIZER_FILES)
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _router_faults(quantized: Checkpoint, reference: Checkpoint) -> list[str]:
    """Return what is wrong with the routers, whose small errors send tokens to other experts."""
    layout = formats.detect(quantized)
    routers = [name for name in (layout.modules if layout else ()) if is_router(name)]
    if routers:
        return [f"{len(routers)} routers are quantized, e.g. `{routers[0]}`"]
    if _differing(quantized, reference, _is_norm):
        return []  # a method that scales the inputs of layers scales routers too
    changed = _differing(quantized, reference, lambda name: is_router(name.rpartition(".")[0]))
    if not changed:
        return []
    return [
        f"{len(changed)} routers are not the reference's, though no input of theirs is scaled, "
        f"e.g. `{changed[0]}`: they were rounded"
    ]


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[0].rpartition(".")[2]


def _differing(
    quantized: Checkpoint, reference: Checkpoint, chosen: Callable[[str], bool]
) -> list[str]:
    """Return the chosen tensors that both have in one dtype, with other data."""
    return [
        name
        for name, tensor in quantized.tensors.items()
        if chosen(name)
        and name in reference.tensors
        and tensor.dtype == reference.tensors[name].dtype
        and tensor.read() != reference.tensors[name].read()
    ]

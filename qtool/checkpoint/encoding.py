"""What a model returns for a text if it does not continue it: an embedding, or the relevance of a
document for a query.

Sources: sentence-transformers 5: `modules.json`, the `config.json` of its Pooling and LogitScore,
    and its two configs; vLLM 0.33 `model_executor/models/adapters.py`: `classifier_from_token`;
    SGLang 0.5.23 `srt/configs/model_config.py`: `is_matryoshka`, `matryoshka_dimensions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtool.checkpoint.config_values import is_size
from qtool.checkpoint.model import Checkpoint
from qtool.checkpoint.strict_json import Json, parse_object, read_json, refused, regular_size
from qtool.errors import CheckpointRefused, naming

MODULES = "modules.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"
TEXT_CONFIG = "sentence_bert_config.json"
CLASSIFIER = "ForSequenceClassification"
HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
POOLINGS: Mapping[str, Literal["last", "mean"]] = {"lasttoken": "last", "mean": "mean"}
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
SIGMOID = ("torch.nn.modules.activation.Sigmoid", "torch.nn.Sigmoid")
IDENTITY = ("torch.nn.modules.linear.Identity", "torch.nn.Identity")
HAND_OVER = "`--engine vllm` hands the checkpoint to vLLM"
Task = Literal["embed", "score"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a model returns for a text instead of more text."""

    task: Task
    """A vector, or one number: the relevance of a document for a query."""
    pooling: Literal["last", "mean"] = "last"
    """Which hidden states it is made of: that of the last token, or the mean of all."""
    normalize: bool = False
    """Whether vectors have length 1."""
    size: int = 1
    """Numbers that are returned."""
    dimensions: tuple[int, ...] | None = None
    """Lengths that a vector may be cut to; none at all: to any; None: it may not be cut."""
    labels: tuple[int, ...] = ()
    """Of a language model that scores: the token that says yes, and the one that says no; a single
    one: the logit of the token counts.
    """
    sigmoid: bool = True
    """Whether a score is made a number between 0 and 1."""
    max_tokens: int | None = None
    """Tokens of a text that the model was made for; None: its context."""
    prompt: str = ""
    """Instruction that a template shows with a query and a document."""


def find_encoding(checkpoint: Checkpoint, *, is_embedding: bool = False) -> Encoding | None:
    """Return what ``checkpoint`` returns for a text; None for a model that continues it.

    Args:
        checkpoint: the checkpoint.
        is_embedding: embeddings are wanted of a language model that says nothing of them: the
            normalized hidden state of the last token, as in SGLang and vLLM.
    Raises: CheckpointRefused, when it asks for what qtool does not compute.
    """
    found = _said_encoding(checkpoint)
    if found is None and (is_embedding or _has_no_head(checkpoint)):
        found = _embedding(checkpoint, "last", normalize=True)
    if found is not None:
        _check_causal(checkpoint)
    return found


def _said_encoding(checkpoint: Checkpoint) -> Encoding | None:
    """Return the encoding that the files of ``checkpoint`` describe."""
    modules = _modules(checkpoint.path)
    if "LogitScore" in modules:
        return _scoring_tokens(checkpoint, _tokens_of_module(modules["LogitScore"]))
    if checkpoint.config.get("classifier_from_token"):
        return _scoring_tokens(checkpoint, _tokens_of_config(checkpoint))
    if _class(checkpoint).endswith(CLASSIFIER):
        return _classifier(checkpoint)
    return _sentence_embedding(checkpoint, modules) if modules else None


def _class(checkpoint: Checkpoint) -> str:
    return str((checkpoint.config.get("architectures") or [""])[0])


def _has_no_head(checkpoint: Checkpoint) -> bool:
    kind = _class(checkpoint)
    return kind.endswith("Model") and not kind.endswith(HEADS)


def makes_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether ``checkpoint`` says that it makes embeddings: it needs no head then."""
    return "Pooling" in _modules(checkpoint.path)


def _embedding(
    checkpoint: Checkpoint,
    pooling: Literal["last", "mean"],
    *,
    normalize: bool,
    max_tokens: int | None = None,
) -> Encoding:
    return Encoding(
        task="embed",
        pooling=pooling,
        normalize=normalize,
        size=int(checkpoint.text_config.get("hidden_size") or 0),
        dimensions=_dimensions(checkpoint),
        max_tokens=max_tokens,
    )


def _sentence_embedding(checkpoint: Checkpoint, modules: Mapping[str, Path]) -> Encoding:
    """Return what the ``modules`` of sentence-transformers make of the model's hidden states."""
    path = checkpoint.path
    unknown = [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if unknown or "Pooling" not in modules:
        problem = f"has a module `{unknown[0][:100]}`" if unknown else "has no module `Pooling`"
        raise _refused(f"{path / MODULES} {problem}, which qtool does not compute")
    text = _optional(path / TEXT_CONFIG)
    if text.get("do_lower_case"):
        raise _refused(f"{path / TEXT_CONFIG} asks for texts in lower case")
    longest = text.get("max_seq_length")
    return _embedding(
        checkpoint,
        _pooling(modules["Pooling"]),
        normalize="Normalize" in modules,
        max_tokens=longest if is_size(longest) else None,
    )


def _pooling(folder: Path) -> Literal["last", "mean"]:
    """Return the pooling of the module in ``folder``, which old versions write as flags."""
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode", [])
    modes = modes if isinstance(modes, list) else [modes]
    flags = [name for name, value in config.items() if name in POOLING_FLAGS and value is True]
    shown = [str(mode)[:100] for mode in modes] or [POOLING_FLAGS[name] for name in flags]
    if len(shown) == 1 and shown[0] in POOLINGS:
        return POOLINGS[shown[0]]
    raise _refused(
        f"{folder} pools {', '.join(f'`{mode}`' for mode in shown) or 'nothing'}; qtool computes "
        "`lasttoken` and `mean`, and in a causal model the first token sees no other"
    )


def _tokens_of_module(folder: Path) -> list[object]:
    """Return the tokens of sentence-transformers' LogitScore: yes, and no if there is one."""
    said = read_json(folder / "config.json")
    wanted = [said.get("true_token_id"), said.get("false_token_id")]
    return wanted if wanted[1] is not None else wanted[:1]


def _tokens_of_config(checkpoint: Checkpoint) -> list[object]:
    """Return the tokens of vLLM's `classifier_from_token`, yes before no."""
    config = checkpoint.config
    names = config["classifier_from_token"]
    is_original = config.get("is_original_qwen3_reranker")
    method = config.get("method") or ("from_2_way_softmax" if is_original else None)
    counts = {None: 1, "no_post_processing": 1, "from_2_way_softmax": 2}
    if not isinstance(names, list) or len(names) != counts.get(method):
        raise _refused(
            f"{checkpoint.source}: `classifier_from_token` is {str(names)[:100]} and `method` "
            f"{str(method)[:100]}; qtool takes two tokens with from_2_way_softmax, or one without"
        )
    vocabulary = _vocabulary(checkpoint.path)
    return [vocabulary.get(str(name)) for name in reversed(names)]


def _scoring_tokens(checkpoint: Checkpoint, tokens: list[object]) -> Encoding:
    """Return the score of a language model by the logits of ``tokens``, yes and perhaps no."""
    path, size = checkpoint.path, checkpoint.text_config.get("vocab_size") or 0
    ids = [token for token in tokens if isinstance(token, int) and 0 <= token < size]
    if len(ids) != len(tokens):
        raise _refused(f"{path}: the tokens that score are not among the model's {size}")
    return Encoding(
        task="score",
        labels=tuple(ids),
        sigmoid=len(ids) == 2 or _wants_sigmoid(checkpoint.config),
        prompt=_default_prompt(path),
    )


def _vocabulary(path: Path) -> Mapping[str, int]:
    """Return the tokens of the tokenizer in the folder ``path`` by their names."""
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab())
    except Exception as error:  # the library raises no other
        raise _refused(f"{path} has no tokenizer.json that names the tokens that score") from error


def _classifier(checkpoint: Checkpoint) -> Encoding:
    """Return the score of a model with a classification head."""
    path, kind = checkpoint.path, _class(checkpoint)
    head = checkpoint.tensors.get("score.weight")
    if head is None or len(head.shape) != 2:
        raise _refused(f"{path}: {kind} has no head `score` on a decoder")
    if head.shape[0] != 1:
        message = f"{path}: {kind} tells {head.shape[0]} classes apart; scores need one number"
        raise _refused(message)
    sigmoid = _wants_sigmoid(checkpoint.config)
    return Encoding(task="score", sigmoid=sigmoid, prompt=_default_prompt(path))


def _wants_sigmoid(config: Json) -> bool:
    """Whether a score of one number goes through a sigmoid: unless the config says otherwise."""
    own = config.get("sentence_transformers")
    said = own.get("activation_fn") if isinstance(own, Mapping) else None
    said = said or config.get("sbert_ce_default_activation_function")
    if said is None or said in SIGMOID:
        return True
    if said in IDENTITY:
        return False
    raise _refused(f"scores go through `{str(said)[:100]}`, which qtool does not compute")


def _check_causal(checkpoint: Checkpoint) -> None:
    """Raise CheckpointRefused for a model whose tokens see those after them."""
    for config in (checkpoint.config, checkpoint.text_config):
        both = config.get("is_causal") is False or config.get("use_bidirectional_attention")
        if both:
            raise _refused(
                f"{checkpoint.source} attends in both directions, and the engine only to earlier "
                "tokens"
            )


def _dimensions(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Return the lengths that the config lets embeddings be cut to."""
    given = checkpoint.config.get("matryoshka_dimensions")
    if isinstance(given, list) and given and all(map(is_size, given)):
        return tuple(sorted(given))
    return () if checkpoint.config.get("is_matryoshka") else None


def _default_prompt(path: Path) -> str:
    """Return the instruction that sentence-transformers puts before a query and a document."""
    config = _optional(path / SENTENCE_CONFIG)
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    found = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
    return found if isinstance(found, str) else ""


def _modules(folder: Path) -> dict[str, Path]:
    """Return the modules of sentence-transformers in ``folder``, by the name of their class, with
    their folders; empty without `modules.json`.
    """
    path = folder / MODULES
    if not path.exists():
        return {}
    size = regular_size(path)
    with naming(path), path.open("rb") as file:
        # the file is a list, and objects alone are read strictly
        entries = parse_object(b'{"modules":' + file.read(size) + b"}", str(path))["modules"]
    if not isinstance(entries, list) or not all(map(_is_module, entries)):
        raise refused("E_ENCODING", f"{path} is not a list of modules with a type and a path")
    return {entry["type"].rpartition(".")[2]: folder / entry["path"] for entry in entries}


def _is_module(entry: object) -> bool:
    if not isinstance(entry, Mapping):
        return False
    kind, path = entry.get("type"), entry.get("path")
    return isinstance(kind, str) and isinstance(path, str) and Path(path).name == path


def _optional(path: Path) -> Json:
    return read_json(path) if path.exists() else {}


def _refused(message: str) -> CheckpointRefused:
    return CheckpointRefused("E_ENCODING", message, hint=HAND_OVER)

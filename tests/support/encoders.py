"""Small checkpoints that return embeddings or scores, as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.small_models import WEIGHTS, publish

TRANSFORMER = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.models.Transformer",
}
POOLING = "sentence_transformers.models.Pooling"
NORMALIZE = "sentence_transformers.models.Normalize"
LOGIT_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
TEMPLATE = (
    "{% set query = messages | selectattr('role', 'eq', 'query') | first %}"
    "{% set document = messages | selectattr('role', 'eq', 'document') | first %}"
    "{% set asked = messages | selectattr('role', 'eq', 'system') | first %}"
    "{{ asked.content }}\n<Query>: {{ query.content }}\n<Document>: {{ document.content }}\nA:"
)
LABELS = (73, 45)  # yes and no


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of the object in ``path``."""
    value = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value | changes))


def cut_and_pad(folder: Path) -> None:
    """Let the tokenizer of ``folder`` truncate and pad, as sentence-transformers may save it."""
    edit_json(
        folder / "tokenizer.json",
        truncation={
            "max_length": 4,
            "strategy": "LongestFirst",
            "direction": "Right",
            "stride": 0,
        },
        padding={
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 3,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )


def embedder(
    folder: Path, kind: str = "qwen3", mode: str = "lasttoken", *, normalize: bool = True
) -> Any:
    """Write an embedding model, without head and without the prefix of its names, as
    Qwen3-Embedding is published; return transformers' model.
    """
    _, model = publish(kind, folder, torch.float32)
    tensors = load_file(folder / WEIGHTS)
    bare = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("lm_head")
    }
    save_file(bare, folder / WEIGHTS, {"format": "pt"})
    modules = [TRANSFORMER, {"idx": 1, "name": "1", "path": "1_Pooling", "type": POOLING}]
    if normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": NORMALIZE})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {"cls": "cls_token", "mean": "mean_tokens"}
    edit_json(
        folder / "1_Pooling" / "config.json",
        **{f"pooling_mode_{flags.get(mode, mode)}": True, "pooling_mode_max_tokens": False},
    )
    model.set_attn_implementation("eager")  # the only one with Gemma's softcap
    return model.model


def classifier(folder: Path, kind: str = "qwen3", labels: int = 1) -> Any:
    """Write a reranker with a classification head; return transformers' model."""
    import transformers

    _, model = publish(kind, folder, torch.float32)
    name = type(model).__name__.replace("CausalLM", "SequenceClassification")
    model.config.num_labels, model.config.pad_token_id = labels, 0
    torch.manual_seed(1)
    whole = getattr(transformers, name)(model.config)
    whole.model.load_state_dict(model.model.state_dict())
    whole.score.weight.data.normal_(0, 0.3)
    whole.to(torch.bfloat16).save_pretrained(folder)
    return type(whole).from_pretrained(folder, dtype=torch.float32).eval()


def yes_or_no(folder: Path, kind: str = "qwen3", template: str | None = TEMPLATE) -> Any:
    """Write a language model that says yes or no, as Qwen3-Reranker is published; return
    transformers' model.
    """
    _, model = publish(kind, folder, torch.float32)
    score = {"idx": 1, "name": "1", "path": "1_LogitScore", "type": LOGIT_SCORE}
    (folder / "modules.json").write_text(json.dumps([TRANSFORMER, score]))
    edit_json(
        folder / "1_LogitScore" / "config.json", true_token_id=LABELS[0], false_token_id=LABELS[1]
    )
    prompts = {"prompts": {"ask": "Judge."}, "default_prompt_name": "ask"}
    edit_json(folder / "config_sentence_transformers.json", **prompts)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return model

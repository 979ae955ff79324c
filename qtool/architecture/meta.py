"""What transformers makes of a checkpoint: the model is built on the meta device, and tensors
without data are loaded into it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from qtool.architecture.standard import Shape, model_tensors
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.encoding import makes_embeddings
from qtool.errors import CheckpointRefused, one_line
from qtool.formats import Layout
from qtool.modules import ONE_EXPERT, is_mtp_layer, tower_of

REPORTS = {  # what transformers reports after loading -> what that means for a checkpoint
    "missing_keys": "lacks {count} tensors of the model",
    "unexpected_keys": "has {count} tensors that the model lacks",
    "mismatched_keys": "has {count} tensors whose shape is not the model's",
}
OLD_CACHE_SCALE = ".kv_scale"  # that old FP8 checkpoints have for engines
EXPERT_PARTS = {  # parameter that stacks experts -> patterns of the tensors of one expert
    "gate_up_proj": (r"gate_proj\.weight", r"up_proj\.weight"),
    "gate_up_proj_bias": (r"gate_proj\.bias", r"up_proj\.bias"),
    "down_proj": (r"down_proj\.weight",),
    "down_proj_bias": (r"down_proj\.bias",),
}


def check_tensors(
    checkpoint: Checkpoint, layout: Layout | None, shapes: Mapping[str, Shape] | None = None
) -> None:
    """Refuse ``checkpoint`` if transformers would find tensors missing, left over or misshapen.

    Args:
        checkpoint: the checkpoint.
        layout: what `formats.detect` returned.
        shapes: what transformers loads; None: all of the checkpoint but layers for multi-token
            prediction.
    Raises: CheckpointRefused. A class that transformers does not have passes.
    """
    named = class_of(checkpoint)
    if named is None:
        return
    if shapes is None:
        shapes = {
            name: shape
            for name, shape in model_tensors(checkpoint, layout).items()
            if not is_mtp_layer(checkpoint, name)
        }
    _check_experts(checkpoint, shapes)
    with building(checkpoint), torch.device("meta"):
        config = read_config(checkpoint)
        model_class = _class_for(config, named)
        if model_class is None:
            return
        model = model_class._from_config(config, dtype=torch.bfloat16)
        report = _load_without_data(model, config, shapes)
    parameters = {name: each.numel() for name, each in model.named_parameters()}
    missing = {*(report.get("missing_keys") or ())}
    if makes_embeddings(checkpoint):
        missing.discard("lm_head.weight")
    split = _split_experts(parameters, missing, _renamed(model, shapes)) if missing else set()
    left_over = {*(report.get("unexpected_keys") or ())} - split
    report["missing_keys"] = missing - split
    report["unexpected_keys"] = {
        key for key in left_over if not tower_of(key) and not key.endswith(OLD_CACHE_SCALE)
    }
    check_report(checkpoint, report)


def _check_experts(checkpoint: Checkpoint, shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointRefused when one expert lacks a matrix, or has another shape than those
    beside it, which transformers cannot stack.

    Args:
        checkpoint: the checkpoint.
        shapes: its tensors, quantized layers as the matrices they stand for.
    """
    alike: dict[str, dict[Shape, list[str]]] = {}
    matrices: dict[str, dict[str, set[str]]] = {}
    for name, shape in shapes.items():
        if found := ONE_EXPERT.match(name):
            matrix = f"{found[1]}.*.{name[found.end() :]}"
            alike.setdefault(matrix, {}).setdefault(shape, []).append(name)
            matrices.setdefault(found[1], {}).setdefault(name[found.end() :], set()).add(found[0])
    for by_matrix in matrices.values():
        experts = set().union(*by_matrix.values())
        for matrix, present in by_matrix.items():
            if matrix.endswith(".weight") and (missing := sorted(experts - present)):
                raise CheckpointRefused(
                    "E_TENSORS",
                    f"{checkpoint.source} lacks `{missing[0]}{matrix}`, which other experts have",
                    hint="take the weights from the original again",
                )
    for by_shape in alike.values():
        if len(by_shape) > 1:
            usual = max(by_shape, key=lambda shape: len(by_shape[shape]))
            odd = next(shape for shape in by_shape if shape != usual)
            raise CheckpointRefused(
                "E_TENSORS",
                f"{checkpoint.source}: `{by_shape[odd][0]}` is {list(odd)} and "
                f"`{by_shape[usual][0]}` {list(usual)}; the experts of a layer have one shape",
                hint="compare the shape with the original, or take the weights from it again",
            )


def _load_without_data(model: Any, config: object, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Load tensors of ``shapes`` into a model like ``model``, on the meta device.

    Returns: what transformers reports, by the keys of `REPORTS`.
    """
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with quiet_loading():
        _, report = type(model).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return dict(report)


def _split_experts(
    parameters: Mapping[str, int], missing: Collection[str], shapes: Mapping[str, Shape]
) -> set[str]:
    """Return those ``missing`` stacks of experts that the checkpoint has expert by expert, and the
    names of these experts' tensors.

    Quantizers write experts in this way and engines read them, even if transformers reads stacks
    alone.

    Args:
        parameters: of transformers' model -> how many weights each has.
        missing: the parameters that the checkpoint lacks.
        shapes: the tensors of the checkpoint, by transformers' names.
    """
    split: set[str] = set()
    for stack in missing:
        owner, _, kind = stack.rpartition(".")
        parts = EXPERT_PARTS.get(kind, ())
        name = re.compile(rf"{re.escape(owner)}\.(?:0|[1-9][0-9]*)\.(?:{'|'.join(parts)})")
        found = {key: math.prod(shape) for key, shape in shapes.items() if name.fullmatch(key)}
        if parts and sum(found.values()) == parameters.get(stack) and len({*found.values()}) == 1:
            split |= {stack, *found}
    return split


def _renamed(model: Any, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return ``shapes`` by the names that transformers gives their tensors for ``model``."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    return {
        rename_source_key(name, renamings, [], prefix, parameters)[0]: shape
        for name, shape in shapes.items()
    }


def class_of(checkpoint: Checkpoint) -> Any:
    """Return the class that the config names; None when transformers does not have it."""
    names = checkpoint.config.get("architectures") or [""]
    if checkpoint.config.get("auto_map"):
        return None
    with quiet_imports():
        import transformers

        found = getattr(transformers, names[0], None)
    return found if hasattr(found, "_from_config") else None


def _class_for(config: object, named: Any) -> Any:
    """Return the class that ``config`` is loaded as: ``named``, if it is made of such a config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if named is not None and isinstance(config, named.config_class):
        return named
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def build_model(checkpoint: Checkpoint) -> Any:
    """Return the model that the config names, without data, in evaluation mode.

    Raises: CheckpointRefused, when transformers has no such class or cannot build it.
    """
    with building(checkpoint), torch.device("meta"):
        config = read_config(checkpoint)
        model_class = _class_for(config, class_of(checkpoint))
        if model_class is None:
            raise ValueError(f"no class for {type(config).__name__}")
        return model_class._from_config(config, dtype=torch.bfloat16).eval()


@contextlib.contextmanager
def building(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn whatever transformers raises about a config from outside into CheckpointRefused."""
    try:
        with quiet_imports():
            yield
    except Exception as error:  # transformers finds many ways to fail on a config from outside
        message = (
            f"{checkpoint.source}: transformers cannot build a language model from its config "
            f"({one_line(error)})"
        )
        raise CheckpointRefused(
            "E_ARCHITECTURE",
            message,
            hint="qtool runs the causal language models of transformers",
        ) from error


def _is_text_alone(checkpoint: Checkpoint) -> bool:
    """Whether ``checkpoint`` is the language model of Llama 4, by its own names, under the config
    of the whole model, as ModelOpt exported it.

    Source: SGLang 0.5.23, `models/mllama4.py` _has_vision_weights and _transform_weight_name.
    """
    of_whole = ("language_model.", "vision_model.", "multi_modal_projector.")
    is_llama_4 = checkpoint.config.get("model_type") == "llama4"
    return is_llama_4 and not any(name.startswith(of_whole) for name in checkpoint.tensors)


def read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' config of ``checkpoint``, without quantization."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    if _is_text_alone(checkpoint):
        config = config.get_text_config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    layers = checkpoint.text_config.get("num_hidden_layers")
    text = config.get_text_config()
    if isinstance(layers, int):
        # `runtime.mtp` counts its layer among the others: it has full attention
        if (kinds := getattr(text, "layer_types", None)) and layers > text.num_hidden_layers:
            text.layer_types = [*kinds, "full_attention"]
        text.num_hidden_layers = layers
    return config


def check_report(
    checkpoint: Checkpoint, report: Mapping[str, Collection[str | tuple[str, ...]]]
) -> None:
    """Raise CheckpointRefused if transformers reports that tensors are missing or left over."""
    for kind, problem in REPORTS.items():
        keys = report.get(kind) or ()
        if not keys:
            continue
        names = sorted(key[0] if isinstance(key, tuple) else str(key) for key in keys)
        examples = ", ".join(f"`{name}`" for name in names[:3])
        raise CheckpointRefused(
            "E_TENSORS",
            f"{checkpoint.source} {problem.format(count=len(names))}, e.g. {examples}",
            hint="config.json and the weights are of different models: take both from one place",
        )


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence torchao, imported by transformers, about libraries that do not fit this machine."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers while it loads: its bar ignores whether there is a terminal."""
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()

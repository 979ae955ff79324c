"""A LoRA adapter of PEFT, and which tensors of a checkpoint it changes. Imports no torch.

Source: PEFT 0.21, `tuners/lora` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import filecmp
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qtool.architecture import map_names
from qtool.checkpoint import Checkpoint, TensorInfo, resolve_model
from qtool.checkpoint.config_values import is_positive, is_size
from qtool.checkpoint.digests import Digests, digest_files
from qtool.checkpoint.header import read_header
from qtool.checkpoint.strict_json import Json, read_json
from qtool.conversion.adapter_targets import Targets, names_in
from qtool.errors import CheckpointRefused
from qtool.modules import TRANSPOSED, is_embedding, is_head
from qtool.name_map import NameMap
from qtool.patterns import Pattern, PatternCompiler

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {  # end of a tensor's name -> what it is
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FLOATS = ("F32", "F16", "BF16")
MAX_SCALING = 3.4e38
POSITIONS = ("wpe", "embed_positions", "position_embeddings")  # embeddings that no head shares
NO_EFFECT = frozenset(  # fields that say how the adapter was trained, or what its tensors show
    {
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
USED = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix W: ``scaling * B A``; with DoRA, each row of the sum is then
    given the length in ``magnitude``.
    """

    a: TensorInfo
    """[r, K]; of an embedding [r, rows]."""
    b: TensorInfo
    """[N, r]; of an embedding [columns, r]."""
    scaling: float
    magnitude: TensorInfo | None
    """[N] or [N, 1]; None without DoRA."""
    is_transposed: bool
    """Whether the matrix lies as inputs by outputs, as Conv1D and embeddings have it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter and what it does to the tensors of one checkpoint."""

    folder: Path
    config: Json = field(repr=False)
    low_rank: Mapping[str, LowRank]
    """By tensor of the checkpoint."""
    replaced: Mapping[str, TensorInfo]
    """Tensors of the checkpoint that were trained as a whole -> the new ones."""
    digests: Digests = field(repr=False)
    """Of its files, when it was read."""

    @cached_property
    def changed(self) -> frozenset[str]:
        """The tensors of the checkpoint that become others."""
        return frozenset((*self.low_rank, *self.replaced))

    def notes(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Yield what the user should know of merging it into ``checkpoint``."""
        base = self.config.get("base_model_name_or_path")
        if checkpoint.hub_name and base and base != checkpoint.hub_name:
            yield f"the adapter was trained on {base}, and is merged into {checkpoint.hub_name}"
        for name in OF_TOKENIZER:
            own, given = checkpoint.path / name, self.folder / name
            if given.is_file() and not (own.is_file() and filecmp.cmp(own, given, shallow=False)):
                yield f"{name} of the adapter differs from the model's, and is left out"

    def check_unchanged(self) -> None:
        """Raise CheckpointRefused when a file is not what it was when it was read."""
        if digest_files(_files(self.folder)) != self.digests:
            raise CheckpointRefused(
                "E_SOURCE_CHANGED",
                f"{self.folder} was changed during the run",
                hint="nothing was published; run again when nobody writes to the adapter",
            )


def read_adapter(
    path: str | os.PathLike[str], checkpoint: Checkpoint, *, revision: str | None = None
) -> Adapter:
    """Return the adapter in ``path``, a folder or a name on the Hub, for ``checkpoint``.

    Raises: CheckpointRefused, when it changes the model in a way that is not merged here, or a
        tensor of it has no place in ``checkpoint``.
    """
    folder = resolve_model(os.fspath(path), revision=revision)
    for file in _files(folder):
        if not file.is_file():
            raise _refused(
                f"{folder} has no {file.name}",
                "give the folder that PEFT's save_pretrained wrote, with safetensors",
            )
    config = read_json(folder / CONFIG)
    _check_config(folder, config)
    reader = _Reader(folder, config, checkpoint)
    tensors = read_header(folder / WEIGHTS)
    if not tensors:
        raise _refused(f"{folder}: {WEIGHTS} is empty", "compare it with what was published")
    for tensor in tensors.values():
        reader.take(tensor)
    return Adapter(folder, config, reader.low_rank(), reader.replaced, digest_files(_files(folder)))


def _files(folder: Path) -> list[Path]:
    return [folder / CONFIG, folder / WEIGHTS]


def _refused(message: str, hint: str) -> CheckpointRefused:
    return CheckpointRefused("E_ADAPTER", message, hint=hint)


def _check_config(folder: Path, config: Json) -> None:
    if config.get("peft_type") != "LORA":
        raise _refused(
            f"{folder} is an adapter of type {config.get('peft_type')!r}, and only LORA is merged",
            "merge it with PEFT's merge_and_unload",
        )
    for key, value in config.items():
        if value and key not in NO_EFFECT and key not in USED:
            raise _refused(
                f"{folder}: `{key}` of the adapter changes what is merged, and is not offered",
                "merge it with PEFT's merge_and_unload",
            )
    if not is_size(config.get("r")) or not is_positive(config.get("lora_alpha")):
        raise _refused(
            f"{folder}: `r` and `lora_alpha` of the adapter must be positive numbers",
            f"compare {CONFIG} with the one that was published",
        )


class _Reader:
    """Finds the place of each tensor of an adapter."""

    def __init__(self, folder: Path, config: Json, checkpoint: Checkpoint) -> None:
        self.replaced: dict[str, TensorInfo] = {}
        self._folder = folder
        self._config = config
        self._checkpoint = checkpoint
        self._tensors = _tensor_names(map_names(checkpoint), checkpoint)
        self._found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        """Module -> kind -> tensor."""
        self._targets = Targets(config, _refused)
        self._alphas = _numbers_by_pattern(folder, config, "alpha_pattern")
        self._ranks = _numbers_by_pattern(folder, config, "rank_pattern")

    def take(self, tensor: TensorInfo) -> None:
        """Note where ``tensor`` belongs."""
        if not tensor.name.startswith(PREFIX) or tensor.dtype not in FLOATS:
            raise self._unknown(tensor)
        name = tensor.name.removeprefix(PREFIX).replace(".default.", ".")
        ending = next((ending for ending in KINDS if name.endswith(ending)), None)
        if ending is not None:
            parts = self._found[name.removesuffix(ending)]
            if KINDS[ending] in parts:
                raise self._repeated(tensor, parts[KINDS[ending]])
            parts[KINDS[ending]] = tensor
            return
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        target = self._tensors.get(name)
        if target is None:
            raise self._unknown(tensor)
        module = name.removesuffix(".weight")
        saved = names_in(self._config, "modules_to_save")
        if any(module.endswith(one) for one in saved):  # as PEFT chooses them
            self._check_tied(module)
        shape = self._checkpoint.tensors[target].shape
        if shape != tensor.shape:
            raise _refused(
                f"{self._folder}: `{tensor.name}` is {list(tensor.shape)} and `{target}` of the "
                f"model {list(shape)}",
                "the adapter is of another model, or of one whose vocabulary was resized: resize "
                "the model first",
            )
        self.replaced[target] = tensor

    def low_rank(self) -> dict[str, LowRank]:
        """Return what is added to matrices, by tensor of the checkpoint."""
        result = {}
        for module, parts in self._found.items():
            target = self._tensors.get(f"{module}.weight")
            if target is None:
                raise self._unknown(next(iter(parts.values())))
            field = self._targets.reason_left_out(module)
            if field is not None:
                raise _refused(
                    f"{self._folder}: the adapter has tensors of `{module}`, which PEFT leaves out "
                    f"by `{field}` of its config",
                    f"correct `{field}` in {CONFIG}, or remove the tensors",
                )
            result[target] = self._low_rank(module, target, parts)
        return result

    def _low_rank(self, module: str, target: str, parts: Mapping[str, TensorInfo]) -> LowRank:
        missing = {"a", "b"} - parts.keys()
        has_magnitude = "magnitude" in parts
        if missing or has_magnitude != bool(self._config.get("use_dora")):
            raise _refused(
                f"{self._folder}: the adapter has not all tensors of `{module}`, or more than "
                "its config says",
                "the file is damaged, or written by an unknown version of PEFT",
            )
        self._check_tied(module)
        a, b = parts["a"], parts["b"]
        is_embedded = a.name.endswith("lora_embedding_A")
        # PEFT corrects `fan_in_fan_out` for the layer that it finds
        is_conv1d = self._checkpoint.config.get("model_type") in TRANSPOSED and not is_head(module)
        is_transposed = is_embedded or is_conv1d
        sizes = (*b.shape[:1], *a.shape[1:])
        shape = self._checkpoint.tensors[target].shape
        rank = self._number(self._ranks, module, "r")
        is_matrix = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank
        if not is_matrix or shape != (sizes[::-1] if is_transposed else sizes):
            raise _refused(
                f"{self._folder}: {list(a.shape)} and {list(b.shape)} of `{module}` are not of "
                f"rank {rank:g} for `{target}` of {list(shape)}",
                "the adapter is of another model",
            )
        if has_magnitude and (is_embedded or math.prod(parts["magnitude"].shape) != sizes[0]):
            raise _refused(
                f"{self._folder}: DoRA of `{module}` does not fit its matrix",
                "merge it with PEFT's merge_and_unload",
            )
        alpha = self._number(self._alphas, module, "lora_alpha")
        scaling = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        if scaling > MAX_SCALING:
            raise _refused(
                f"{self._folder}: the scaling of `{module}`, {scaling:g}, is no 32-bit number",
                f"compare {CONFIG} with the one that was published",
            )
        return LowRank(a, b, scaling, parts.get("magnitude"), is_transposed)

    def _check_tied(self, module: str) -> None:
        """Refuse what PEFT trains apart from the matrix that it shares with another layer."""
        if not self._checkpoint.tied_embeddings or module.endswith(POSITIONS):
            return
        if is_head(module) or (
            is_embedding(module) and not self._config.get("ensure_weight_tying")
        ):
            raise _refused(
                f"{self._folder}: the adapter changes `{module}` alone, whose matrix is the input "
                "embedding and the output head of this model",
                "a merged checkpoint cannot say that; untie the embeddings of the model first",
            )

    def _number(
        self, patterns: Mapping[str, tuple[Pattern, float]], module: str, key: str
    ) -> float:
        for pattern, value in patterns.values():
            if pattern.match(module):
                return value
        return float(self._config[key])

    def _repeated(self, tensor: TensorInfo, other: TensorInfo) -> CheckpointRefused:
        return _refused(
            f"{self._folder}: `{tensor.name}` and `{other.name}` are for the same matrix",
            "the file is damaged, or holds several adapters",
        )

    def _unknown(self, tensor: TensorInfo) -> CheckpointRefused:
        return _refused(
            f"{self._folder}: `{tensor.name}` ({tensor.dtype}) of the adapter belongs to no matrix "
            f"of {self._checkpoint.source}",
            "the adapter is of another model, or trained in a way that PEFT's merge_and_unload "
            "alone knows",
        )


def _tensor_names(names: NameMap, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensor of ``checkpoint`` for each parameter that an adapter may name: as the model
    calls it, or as the checkpoint does.
    """
    found = {name: name for name in checkpoint.tensors}
    found |= names.renamed
    for linear in (*names.linears.values(), *names.embeddings.values()):
        is_whole = not linear.is_stacked and linear.parts == 1
        if is_whole and not linear.is_transposed:
            found[f"{linear.name}.weight"] = found[f"{linear.layer}.weight"] = linear.tensor
    if checkpoint.tied_embeddings:
        found.setdefault("lm_head.weight", next(iter(_embedding_tensors(names)), ""))
    return {name: tensor for name, tensor in found.items() if tensor in checkpoint.tensors}


def _embedding_tensors(names: NameMap) -> list[str]:
    return [each.tensor for each in names.embeddings.values() if not each.layer.endswith(POSITIONS)]


def _numbers_by_pattern(folder: Path, config: Json, key: str) -> dict[str, tuple[Pattern, float]]:
    """Return the patterns of a field -> the number for the modules that match."""
    given = config.get(key) or {}
    if not isinstance(given, Mapping) or not all(map(is_positive, given.values())):
        raise _refused(
            f"{folder}: `{key}` of the adapter must map patterns to positive numbers",
            f"compare {CONFIG} with the one that was published",
        )
    compiler = PatternCompiler(f"`{key}` of the adapter", _refused)
    return {
        text: (compiler.compile(rf"(.*\.)?({text})$"), float(value))
        for text, value in given.items()
    }

"""A plan says, for every linear module of a checkpoint, what will be done to it or why not, and
what it costs. Made from headers alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from qtool.checkpoint.model import DTYPE_BITS, FLOAT_DTYPES, Checkpoint
from qtool.checkpoint.strict_json import JsonDict
from qtool.errors import CheckpointRefused, RecipeRefused
from qtool.modules import (
    NOT_TEXT,
    is_head,
    is_linear,
    is_router,
    last_part,
    layer_name,
    skip_reason,
)
from qtool.name_map import LinearWeight, NameMap, names_from_headers
from qtool.recipe import Auto, ModulePatterns, Recipe, Rule, check_pattern
from qtool.scheme import Scheme, Weights

USUAL_GROUP_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class PlannedModule:
    """One linear module and what happens to it."""

    name: str
    shape: tuple[int, int]
    """Outputs N and inputs K."""
    layer: str
    """Its name in the loaded model, where the experts of a stack are layers of their own."""
    scheme: Scheme | None
    """None when it stays in 16 bits."""
    reason: str
    """Why it stays in 16 bits."""
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a checkpoint."""

    checkpoint: Checkpoint
    recipe: Recipe
    names: NameMap
    modules: tuple[PlannedModule, ...]

    @property
    def quantized(self) -> tuple[PlannedModule, ...]:
        """The modules that change."""
        return tuple(module for module in self.modules if module.scheme is not None)

    @property
    def left_alone(self) -> tuple[PlannedModule, ...]:
        """The linear modules that stay in 16 bits."""
        return tuple(module for module in self.modules if module.scheme is None)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return self.checkpoint.size_bytes

    @property
    def bytes_after(self) -> int:
        """Estimated bytes of all tensors of the result."""
        return self.bytes_before + sum(
            module.bytes_after - module.bytes_before for module in self.modules
        )

    @cached_property
    def other_matrices(self) -> Mapping[str, str]:
        """Tensors of two or more dimensions that are neither embeddings nor linear layers -> why
        they stay in 16 bits, e.g. experts in a layout that no backend quantizes.
        """
        listed = {f"{module.name}.weight" for module in self.modules}
        reasons = {**self.names.unused, **self.names.not_linear}
        return {
            name: reason
            for name, reason in reasons.items()
            if name not in listed
            and len(self.checkpoint.tensors[name].shape) > 1
            and not name.endswith("bias")
        }

    @property
    def quantized_share(self) -> float:
        """The share of the language model's parameters in matrices that is quantized; embeddings,
        heads, routers and layers for multi-token prediction aside.
        """
        aside = {*self.names.towers, *self.names.unused}
        rest = sum(
            math.prod(self.checkpoint.tensors[name].shape)
            for name in self.other_matrices
            if name not in aside and not is_router(name)
        )
        sizes = {
            module.name: math.prod(module.shape)
            for module in self.modules
            if not (is_head(module.name) or is_router(module.name) or module.reason == NOT_TEXT)
            and f"{module.name}.weight" not in aside
        }
        changed = sum(sizes.get(module.name, 0) for module in self.quantized)
        return changed / max(1, sum(sizes.values()) + rest)

    @property
    def mostly_unquantized(self) -> str:
        """A note when most parameters stay in 16 bits, and why; else empty."""
        if self.quantized_share >= 0.5 or not self.quantized:
            return ""
        sizes: Counter[str] = Counter()
        for module in self.left_alone:
            sizes[module.reason] += math.prod(module.shape)
        for name, reason in self.other_matrices.items():
            sizes[reason] += math.prod(self.checkpoint.tensors[name].shape)
        why = "; ".join(reason for reason, _ in sizes.most_common(3))
        return (
            f"only {self.quantized_share:.0%} of the parameters in matrices are quantized; "
            f"the others stay in 16 bits: {why}"
        )

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of the largest decoder layer."""
        layers: Counter[str] = Counter()
        for name, tensor in self.checkpoint.tensors.items():
            layers[layer_name(name)] += tensor.size_bytes
        layers.pop("", None)
        return max(layers.values(), default=self.bytes_before)

    @property
    def layer_count(self) -> int:
        """Decoder layers, as the config counts them."""
        return _count(self.checkpoint, "num_hidden_layers", 0)

    def peak_memory(self, num_samples: int, seq_len: int) -> tuple[int, int]:
        """Estimate (whole model in memory, layer by layer): peak bytes of weights, activations and
        workspace.
        """
        hidden = _count(self.checkpoint, "hidden_size", 4096)
        # in and out of a layer, 16 bits
        activations = 2 * 2 * num_samples * seq_len * hidden if self.recipe.needs_data else 0
        workspace = 3 * self.layer_bytes  # a layer in float32 and its result
        return self.bytes_before + workspace + activations, workspace + activations

    def to_dict(self) -> JsonDict:
        """Return the plan for ``--json``."""
        return {
            "source": str(self.checkpoint.source),
            "recipe": self.recipe.to_dict(),
            "modules": [
                {
                    "name": module.name,
                    "shape": module.shape,
                    "scheme": module.scheme.name if module.scheme else None,
                    "reason": module.reason,
                }
                for module in self.modules
            ],
            "other_matrices": dict(self.other_matrices),
            "quantized_share": self.quantized_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe, names: NameMap | None = None) -> Plan:
    """Decide for every linear module of ``checkpoint`` what ``recipe`` does to it.

    Args:
        checkpoint: the model in 16 or 32 bits.
        recipe: what to do.
        names: where the layers of the model are; None when each is under its own name.
    Raises: CheckpointRefused for a model that is quantized already; RecipeRefused for a pattern
        that matches nothing, an output head that cannot be quantized apart from the embeddings, a
        group size that does not divide, or a plan that would change nothing.
    """
    _check_unquantized(checkpoint)
    names = names or names_from_headers(checkpoint)
    linears = _linears(checkpoint, names)
    selection = _selection(checkpoint, recipe, linears)
    if recipe.lm_head and checkpoint.tied_embeddings:
        message = (
            f"`lm_head: true`, and the output head of {checkpoint.source} is its embedding matrix, "
            "which stays in 16 bits"
        )
        raise RecipeRefused("E_TIED_HEAD", message, hint="leave it out (--no-lm-head)")
    modules = tuple(_planned(checkpoint, recipe, selection, each) for each in linears.values())
    plan = Plan(checkpoint, recipe, names, modules)
    if not plan.quantized and recipe.kv_cache is None:
        raise _nothing_to_do(plan)
    _check_groups(plan)
    return plan


def _linears(checkpoint: Checkpoint, names: NameMap) -> dict[str, LinearWeight]:
    """Return the linear layers of the model, and matrices that look like one and have a reason to
    stay in 16 bits.
    """
    linears = {
        name: linear
        for name, linear in names.linears.items()
        if checkpoint.tensors[linear.tensor].dtype in FLOAT_DTYPES
    }
    for tensor in checkpoint.tensors.values():
        name = tensor.name.removesuffix(".weight")
        reason = names.unused.get(tensor.name) or names.not_linear.get(tensor.name)
        if reason and is_linear(tensor):
            rows, columns = tensor.shape
            linears[name] = LinearWeight(name, (rows, columns), tensor.name, name, reason=reason)
    return linears


def _check_unquantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.quantization_config
    if config is None:
        return
    producer = config.get("producer")
    if isinstance(producer, Mapping):
        producer = producer.get("name")
    method = config.get("quant_method") or producer
    how = f"by `{method}`" if method else "its config says so"
    raise CheckpointRefused(
        "E_ALREADY_QUANTIZED",
        f"{checkpoint.source} is quantized already ({how})",
        hint="start from the 16-bit model it was made of; where none was published, "
        "`qtool export --to bf16` makes one",
    )


@dataclass(frozen=True)
class _Selection:
    """Which layers the patterns of a recipe match."""

    ignored: tuple[Callable[[str], bool], ...]
    rules: tuple[tuple[Callable[[str], bool], Rule], ...]


def _selection(checkpoint: Checkpoint, recipe: Recipe, linears: Iterable[str]) -> _Selection:
    """Compile the patterns of ``recipe``.

    Raises: RecipeRefused, when one matches no layer, is not a regular expression or takes too long.
    """
    patterns = ModulePatterns()
    ignored = tuple(map(patterns.matcher, recipe.ignore))
    rules = tuple((patterns.matcher(rule.modules), rule) for rule in recipe.rules)
    names = [*linears]
    # a head that is the embedding matrix is a module, though it has no tensor of its own
    ignorable = [*names, "lm_head"] if checkpoint.tied_embeddings else names
    for pattern, matches in zip(recipe.ignore, ignored, strict=True):
        check_pattern(pattern, matches, ignorable)
    for matches, rule in rules:
        check_pattern(rule.modules, matches, names)
    return _Selection(ignored, rules)


def _nothing_to_do(plan: Plan) -> RecipeRefused:
    reasons = Counter(module.reason for module in plan.modules)
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    path = plan.checkpoint.path
    return RecipeRefused(
        "E_NOTHING_TO_DO",
        f"nothing in {path} would be quantized: {why or 'no linear module was found'}",
        hint="ignore fewer modules, or check that this is a language model with linear layers",
    )


def _planned(
    checkpoint: Checkpoint, recipe: Recipe, selection: _Selection, linear: LinearWeight
) -> PlannedModule:
    rows, columns = linear.shape
    tensor = checkpoint.tensors[linear.tensor]
    size_bytes = rows * columns * DTYPE_BITS[tensor.dtype] // 8
    scheme, reason = _decision(checkpoint, recipe, selection, linear)
    stored = stored_weights(scheme, recipe.backend) if scheme else None
    return PlannedModule(
        linear.name,
        (rows, columns),
        linear.layer,
        scheme,
        reason,
        size_bytes,
        stored.size_bytes(rows, columns) if stored else size_bytes,
    )


def _decision(
    checkpoint: Checkpoint, recipe: Recipe, selection: _Selection, linear: LinearWeight
) -> tuple[Scheme | None, str]:
    """Return the scheme of a layer, or None and why it stays in 16 bits."""
    name = linear.name
    if any(matches(name) for matches in selection.ignored):
        return None, "ignored by the recipe"
    if is_head(name) and checkpoint.tied_embeddings:
        return None, "tied to the embeddings"
    if linear.reason:
        return None, skip_reason(checkpoint, name) or linear.reason
    for matches, rule in selection.rules:
        if matches(name):
            return rule.scheme, "" if rule.scheme else f"left alone by the rule `{rule.modules}`"
    return _usual_decision(checkpoint, recipe, name)


def _usual_decision(checkpoint: Checkpoint, recipe: Recipe, name: str) -> tuple[Scheme | None, str]:
    if is_head(name) and recipe.lm_head:
        return recipe.scheme, ""
    if is_head(name):
        return None, "output head (`lm_head: true` quantizes it)"
    if reason := skip_reason(checkpoint, name):
        return None, reason
    return recipe.scheme, "" if recipe.scheme else "the recipe has no weight scheme"


def stored_weights(scheme: Scheme, backend: str) -> Weights:
    """Return how ``backend`` puts the weights of ``scheme`` on disk.

    LLM Compressor stores integer weights that come with integer activations as one int8 each,
    whatever their bits: vLLM's kernel for them takes nothing else.
    """
    weights, activations = scheme.weights, scheme.activations
    if (
        backend == "llmcompressor"
        and activations
        and activations.format.startswith("int")
        and weights.format.startswith("int")
        and weights.bits < 8
    ):
        return replace(weights, format="int8")
    return weights


def _check_groups(plan: Plan) -> None:
    """Raise RecipeRefused when the groups of a scheme do not divide the inputs of a layer."""
    searched = plan.recipe.schemes if plan.recipe.steps(Auto) else None
    for module in plan.quantized:
        for scheme in searched or (module.scheme,):
            group_size = scheme.weights.group_size if scheme else None
            if scheme and group_size and module.shape[1] % group_size:
                raise RecipeRefused(
                    "E_GROUP_SIZE",
                    f"group_size {group_size} does not divide the {module.shape[1]} inputs of "
                    f"`{module.name}`",
                    hint=_group_size_hint(plan, scheme),
                )


def _group_size_hint(plan: Plan, scheme: Scheme) -> str:
    """Return what helps when the groups of ``scheme`` do not divide: a usual size that does."""
    leave_out = "leave the module out with --ignore"
    if scheme != plan.recipe.scheme or not scheme.weights.format.startswith("int"):
        return leave_out
    for size in USUAL_GROUP_SIZES:
        if all(module.shape[1] % size == 0 for module in plan.quantized):
            return f"use --group-size {size}, or {leave_out}"
    return leave_out


def _count(checkpoint: Checkpoint, key: str, default: int) -> int:
    value = checkpoint.text_config.get(key)
    return value if isinstance(value, int) else default


def sizes_by_kind(plan: Plan) -> Mapping[tuple[str, str], tuple[int, int, int]]:
    """Return (last name part, scheme or reason) -> (modules, bytes before, bytes after), for a
    table.
    """
    table: dict[tuple[str, str], tuple[int, int, int]] = {}
    for module in plan.modules:
        key = (
            last_part(module.name),
            module.scheme.name if module.scheme else f"16 bit: {module.reason}",
        )
        count, before, after = table.get(key, (0, 0, 0))
        table[key] = (count + 1, before + module.bytes_before, after + module.bytes_after)
    return table

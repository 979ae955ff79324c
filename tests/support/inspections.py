"""Inspections of models that do not exist, to show in a report."""

from __future__ import annotations

import math
import random

from qtool.inspection import Inspection, Module, Row
from qtool.inspection.comparison import Comparison, Difference
from qtool.inspection.deep import DeepReport, ModuleNumbers
from qtool.inspection.engines import EngineReport, Finding

SHAPES = {
    **{
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
    },
    **{
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    },
}
HOSTILE = "a</script><img src=x onerror=alert(1)>\"'&amp;\u2028\u202e{{ 7*1337 }}ÄÖ漢\ud800"


def linear(
    name: str,
    shape: tuple[int, int],
    scheme: str | None,
    *,
    layer: int | None = None,
    reason: str = "",
) -> Module:
    bits = {None: 16, "FP8": 8, "NVFP4": 4.5}.get(scheme, 4.125)
    count = shape[0] * shape[1]
    return Module(
        name, name.rpartition(".")[2], layer, scheme, reason, shape, count, int(count * bits / 8)
    )


def rows_of(modules: list[Module], *, quantized: bool) -> tuple[Row, ...]:
    found: dict[tuple[str, str], Row] = {}
    for module in modules:
        if (module.scheme is not None) == quantized:
            key = (module.kind, module.scheme or "BF16")
            row = found.get(key, Row(*key, 0, 0, 0))
            found[key] = Row(
                *key,
                row.count + 1,
                row.parameters + module.parameters,
                row.size_bytes + module.size_bytes,
            )
    return tuple(sorted(found.values(), key=lambda row: -row.size_bytes))


def report(modules: list[Module], **parts: object) -> Inspection:
    quantized = rows_of(modules, quantized=True)
    unquantized = rows_of(modules, quantized=False)
    embeddings = Row("embed_tokens", "BF16", 1, 525_336_576, 1_050_673_152)
    parameters = sum(row.parameters for row in (*quantized, *unquantized, embeddings))
    size = sum(row.size_bytes for row in (*quantized, *unquantized, embeddings)) + 100_000
    facts = {
        "name": "Llama-3.1-8B-W4A16",
        "architecture": "LlamaForCausalLM",
        "format": "compressed-tensors",
        "kv_cache": "fp8",
    }
    sums = {"parameters": parameters, "size_bytes": size, "unquantized_bytes": 2 * parameters}
    rest = {
        "quantized": quantized,
        "unquantized": (embeddings, *unquantized),
        "modules": tuple(modules),
        "tied_embeddings": False,
        "warnings": (),
    }
    return Inspection(**{**facts, **sums, **rest, **parts})


def llama(layers: int = 32) -> list[Module]:
    modules = []
    for layer in range(layers):
        for name, shape in SHAPES.items():
            scheme = (
                "FP8" if name.endswith("down_proj") and layer in (0, 1, layers - 1) else "W4A16"
            )
            modules.append(linear(f"model.layers.{layer}.{name}", shape, scheme, layer=layer))
    return [*modules, linear("lm_head", (128256, 4096), None, reason="output head")]


def experts(layers: int = 46, each: int = 87) -> list[Module]:
    """12 006 experts of a mixture, and what else such a model has."""
    modules = []
    for layer in range(layers):
        modules += [
            linear(f"model.layers.{layer}.{name}", shape, "FP8", layer=layer)
            for name, shape in SHAPES.items()
            if "attn" in name
        ]
        modules.append(
            linear(
                f"model.layers.{layer}.mlp.gate",
                (each, 4096),
                None,
                layer=layer,
                reason="router of experts",
            )
        )
        for expert in range(each):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                modules.append(
                    linear(
                        f"model.layers.{layer}.mlp.experts.{expert}.{kind}",
                        (1408, 4096),
                        "NVFP4",
                        layer=layer,
                    )
                )
    return modules


def differences(modules: list[Module]) -> Comparison:
    chance = random.Random(0)
    found = [
        Difference(
            module.name,
            None if module.scheme is None else chance.gauss(22 + (module.layer or 0) / 10, 2),
            chance.random() / 30,
            index % 9 == 0,
        )
        for index, module in enumerate(modules)
    ]
    found.sort(key=lambda one: math.inf if one.sqnr_db is None else one.sqnr_db)
    return Comparison(
        "meta-llama/Llama-3.1-8B",
        tuple(found),
        ("model.extra",),
        ("model.rotary_emb.inv_freq", "lm_head.bias"),
    )


def numbers(modules: list[Module]) -> DeepReport:
    chance = random.Random(1)
    found = []
    for module in modules:
        if module.scheme:
            histogram = tuple(
                (exponent, int(1e5 * math.exp(-((exponent + 9 - chance.random()) ** 2) / 3)) + 1)
                for exponent in range(-14, -3)
            )
            dead = 3 if module.name.endswith("layers.2.self_attn.q_proj") else 0
            found.append(
                ModuleNumbers(
                    module.name, chance.random() / 60, dead, 0, 2**-14 * 1.3, 2**-3 * 0.7, histogram
                )
            )
    return DeepReport(tuple(found), "4 files match the manifest")


def verdict(*, loads: bool = True, native: bool = True) -> EngineReport:
    findings = (
        Finding(
            "V_TP",
            "refused",
            "down_proj cannot be split over 8 ranks",
            "use 4 ranks",
            "vllm/linear.py, https://example.org/x",
            ("model.layers.0",),
            32,
        ),
        Finding(
            "V_EMULATED",
            "warning",
            "W4A16 runs through Marlin on sm_75",
            "prefer W8A8 there",
            "vLLM 0.33, marlin.py",
        ),
        Finding("V_KV", "note", "the KV cache is read as fp8", "", "vLLM documentation"),
    )
    return EngineReport(
        "vLLM",
        "0.33",
        "0.33.0",
        (),
        "sm_90",
        8,
        loads,
        native,
        findings if not loads else findings[1:],
    )


def broken() -> Inspection:
    """Numbers that are no numbers, sizes of nothing, names that are code."""
    modules = [
        linear(
            f"{HOSTILE}.layers.{layer}.{HOSTILE}",
            (4, 4),
            HOSTILE if layer else None,
            layer=layer,
            reason=HOSTILE,
        )
        for layer in range(3)
    ]
    modules.append(Module("", "", None, "W4A16", "", (0, 0), 0, 0))
    names = [module.name for module in modules]
    against = [
        Difference(name, value, math.nan)
        for name, value in zip(names, (math.nan, -math.inf, math.inf, None), strict=True)
    ]
    deep = [
        ModuleNumbers(name, math.nan, 1, 1, math.nan, math.inf, ((-1074, 1), (1023, 2)))
        for name in names
    ]
    engine = EngineReport(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        (HOSTILE,),
        HOSTILE,
        1,
        False,
        False,
        (Finding(HOSTILE, "refused", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), 1),),
    )
    extra = {
        "name": HOSTILE,
        "architecture": HOSTILE,
        "format": HOSTILE,
        "kv_cache": HOSTILE,
        "warnings": (HOSTILE,),
    }
    compared = Comparison(HOSTILE, tuple(against), (HOSTILE,), (HOSTILE,))
    return report(
        modules, deep=DeepReport(tuple(deep), HOSTILE), against=compared, engine=engine, **extra
    )


def empty() -> Inspection:
    return Inspection("empty", "unknown", None, 0, 0, 0, (), (), (), None, False, ())


def without_layers() -> Inspection:
    return report(
        [linear(f"encoder.{kind}", (64, 64), "FP8") for kind in ("query", "key", "value")]
    )

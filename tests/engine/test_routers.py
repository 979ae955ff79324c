"""Routers of transformers beside their replacement."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from qtool.engine.routers import FusedRouter
from qtool.name_map import LinearWeight
from qtool.runtime.experts.gates import gate_of
from qtool.runtime.experts.plan import plan_experts
from qtool.runtime.source import Source
from qtool.scheme import SCHEMES

CONFIG = {
    "hidden_size": 64,
    "num_experts_per_tok": 4,
    "num_experts": 32,
    "num_local_experts": 32,
    "n_routed_experts": 32,
    "moe_intermediate_size": 16,
    "intermediate_size": 16,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "_experts_implementation": "eager",
}
ROUTERS = {
    "qwen3_moe": ("Qwen3MoeTopKRouter", {}),
    "qwen2_moe": ("Qwen2MoeTopKRouter", {"norm_topk_prob": False}),
    "mixtral": ("MixtralTopKRouter", {}),
    "gpt_oss": ("GptOssTopKRouter", {}),
    "deepseek_v3": ("DeepseekV3TopkRouter", {}),
    "glm4_moe": ("Glm4MoeTopkRouter", {"n_group": 1, "topk_group": 1}),
}


def made(model: str, name: str, **values):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    built = getattr(module, name)(SimpleNamespace(**CONFIG | values))
    generator = torch.Generator().manual_seed(0)
    for tensor in [*built.parameters(), *built.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    return built


@pytest.mark.parametrize("model", ROUTERS)
@torch.no_grad()
def test_a_router_is_replaced_by_one_that_chooses_the_same(model):
    name, values = ROUTERS[model]
    router = made(model, name, **values)
    fused = FusedRouter.of(router)
    assert fused is not None
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    (_, weights, experts), (_, expected, wanted) = fused(x), router(x)
    zeros = torch.zeros(50, 32)
    found = zeros.scatter(1, experts, weights)
    torch.testing.assert_close(found, zeros.scatter(1, wanted, expected))


@torch.no_grad()
def test_a_router_with_another_rule_is_left_alone():
    router = made("mixtral", "MixtralTopKRouter")
    plain = router.forward
    router.forward = lambda x: (plain(x)[0], plain(x)[1] ** 2, plain(x)[2])
    assert FusedRouter.of(router) is None
    # returns numbers of another shape
    assert FusedRouter.of(made("granitemoe", "GraniteMoeTopKRouter")) is None


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("qwen3_moe", "Qwen3MoeExperts", ("swiglu", 1.0, None, 0.0, False)),
        ("gpt_oss", "GptOssExperts", ("swiglu", 1.702, 7.0, 1.0, True)),
        ("gemma4", "Gemma4TextExperts", ("gelu_tanh", 1.0, None, 0.0, False)),
    ],
)
def test_what_experts_do_between_their_products_is_seen(model, name, expected):
    values = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    experts = made(model, name, **(values if model == "gemma4" else {}))
    gate = gate_of(experts)
    assert (gate.kind, gate.alpha, gate.limit, gate.offset, gate.is_interleaved) == expected


def test_experts_whose_activation_has_weights_are_left_to_their_own_code():
    experts = made("mixtral", "MixtralExperts", hidden_act="xielu").to("meta")
    skeleton = SimpleNamespace(module={"experts": experts}.__getitem__, dtype=torch.bfloat16)
    sources = [
        Source(
            name,
            LinearWeight(name, shape, name, "experts", name, is_stacked=True),
            (32 * shape[0], shape[1]),
            SCHEMES["W8A16_CHANNEL"],
            experts=32,
        )
        for name, shape in (("gate_up_proj", (32, 64)), ("down_proj", (64, 16)))
    ]
    assert plan_experts(skeleton, sources, torch.device("cpu")) == ({}, [])

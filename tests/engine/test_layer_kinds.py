"""Which layers of a model launch the same kernels, and passes without those that repeat others."""

from __future__ import annotations

import pytest
import torch
from engine.test_engine import ARCHITECTURES
from engine.test_engine import SIZES as ENGINE_SIZES
from torch import nn

from qtool.engine.attention.interface import recording
from qtool.engine.decoder_layers import FusedLayer
from qtool.engine.delta_net import replace_delta_nets
from qtool.engine.fusion import compile_ahead, fuse
from qtool.engine.latent_attention import keep_latents
from qtool.engine.layer_kinds import kind_of, repeats, run_without_repeats, skipping
from qtool.engine.requirements import record_layers

# the layers that run of each model; of two kinds that alternate those of each that follow the other
RUN = {
    "mixtral": ([], [0, 1]),
    "deepseek_v3": ([], [0, 1, 2]),  # the first is dense
    "gemma2": (["sliding_attention", "full_attention"] * 3, [0, 1, 2]),
    "gpt_oss": (["sliding_attention", "full_attention"] * 3, [0, 1, 2]),
    "qwen3_next": ((["linear_attention"] * 2 + ["full_attention"]) * 2, [0, 1, 2, 3]),
    "hunyuan_v1_dense": ([], [0, 1]),  # is not fused
}
# whose queries and keys rotate otherwise than is tried first; or that is not fused
OTHER_ANGLES = ("gpt_oss", "deepseek_v3", "hunyuan_v1_dense")


def model_of(model_type: str, kinds: list[str]):
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"num_hidden_layers": 6} | ({"layer_types": kinds} if kinds else {})
    config = AutoConfig.for_model(model_type, **ENGINE_SIZES | ARCHITECTURES[model_type] | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(6)[None]
    with recording(), torch.no_grad():
        return model(input_ids=ids, position_ids=ids, use_cache=False).logits


def layers_that_run(layers, run) -> list[int]:
    """Their numbers, in order, by the calls of the modules in them."""
    ran: set[int] = set()
    handles = [
        part.register_forward_pre_hook(lambda *_, number=number: ran.add(number))
        for number, layer in enumerate(layers)
        for part in layer.children()
    ]
    run()
    for handle in handles:
        handle.remove()
    return sorted(ran)


@pytest.mark.parametrize("model_type", RUN)
def test_one_layer_of_each_kind_runs(model_type):
    """Before and after fusion, and while kernels are compiled for what fusion will make of it."""
    layer_types, expected = RUN[model_type]
    model = model_of(model_type, layer_types)
    replace_delta_nets(model)
    keep_latents(model)
    record_layers(model, None)
    decoder = model.get_decoder()
    layers, norm, whole = decoder.layers, decoder.norm, logits_of(model)
    ahead = []

    def steps() -> None:
        assert {type(decoder.layers[number]) for number in expected} == {FusedLayer}
        ahead.extend(layers_that_run(decoder.layers, lambda: logits_of(model)))

    kinds = compile_ahead(model, steps)
    assert decoder.layers is layers and decoder.norm is norm
    assert torch.allclose(logits_of(model), whole)
    for is_fused in (False, True):
        if is_fused:
            assert fuse(model) == bool(ahead) == bool(kinds)
            is_guessed = kinds.issuperset(map(kind_of, decoder.layers))
            assert is_guessed == (model_type not in OTHER_ANGLES)
        with skipping(repeats(decoder.layers), decoder.layers):
            assert layers_that_run(decoder.layers, lambda: logits_of(model)) == expected
        assert layers_that_run(decoder.layers, lambda: logits_of(model)) == [*range(6)]
        assert torch.allclose(logits_of(model), whole, atol=1e-4)
    assert ahead in ([], expected)


def test_layers_of_one_kind_differ_in_numbers_alone():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)]
    layers[0].layer_idx, layers[1].layer_idx = 0, 1
    assert kind_of(layers[0]) == kind_of(layers[1]) != kind_of(layers[2])
    for layer, window in zip(layers, (None, 4), strict=False):
        layer.window = window
    assert kind_of(layers[0]) != kind_of(layers[1])


def test_a_model_that_needs_all_layers_runs_them_all(caplog):
    """And one whose layers `torch.compile` runs."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    outputs = []

    def run() -> None:
        x = torch.ones(4)
        outputs.append([layer(x) for layer in layers])
        if outputs[-1][1] is outputs[-1][2]:
            raise ValueError("layer 2 has to run")

    with caplog.at_level("DEBUG", "qtool.engine"):
        run_without_repeats(layers, run)
    assert "layer 2 has to run" in caplog.text
    short, whole = outputs
    assert short[3] is short[1] and len({*map(id, whole)}) == 4
    layers[3].compile()
    assert not repeats(layers)

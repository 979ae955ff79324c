"""Fused decoder layers: the models that are fused, those that must not be, and the kernels, by
Triton's interpreter and compiled for sm_90.

The kernels need a process of their own (`python tests/engine/test_decoder_layers.py
interpret|compile`): triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import copy
import itertools
import re
import sys
from contextlib import contextmanager

import pytest
import torch

from qtool.engine import decoder_layers as fused
from qtool.engine import fused_attention
from qtool.engine.attention.interface import recording, running
from qtool.engine.attention.pages import PAGE, KVPages, Packed
from qtool.engine.fusion import fuse
from qtool.engine.latent_attention import keep_latents
from qtool.engine.norm_kind import NormKind
from qtool.engine.norms import Norm, Sum, add_norm
from qtool.runtime.experts.grouped import GroupedExperts

pytest_plugins = ["support.sample_plugin"]
SIZES = {
    **{
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    **{
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
WINDOWS = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LATENTS = {
    **{"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32},
    **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    **{"n_group": 1, "topk_group": 1},
}
FUSED = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},  # biases of queries, keys and values
    "Qwen3": {"head_dim": 32},  # norms of queries and keys
    # fused in the checkpoint
    "Phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Gemma": {"head_dim": 16},  # norms of 1 + weight, and another activation
    "Mixtral": {"num_local_experts": 4},
    # norms before and after attention and MLP
    "Gemma2": {"head_dim": 16, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 16, **WINDOWS},
    "Glm4": {"head_dim": 16},  # in half of a head, neighbouring channels rotate
    # norms after them alone; those of queries and keys are over all heads
    "Olmo3": WINDOWS,
    # attention and MLP read one LayerNorm; neighbouring channels rotate, in layers with a window
    "Cohere2": WINDOWS,
    "Granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2},
    "Glm4Moe": {
        **{"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        **{"use_qk_norm": True, "head_dim": 16},
    },
    # a shared expert with a gate
    "Qwen2Moe": {
        **{"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        "shared_expert_intermediate_size": 64,
    },
    "Starcoder2": {},  # LayerNorms with a bias, and another MLP
    # latents in place of keys and values; experts beside an MLP for all tokens
    "DeepseekV2": LATENTS | {"topk_method": "greedy", "q_lora_rank": None},
    "DeepseekV3": LATENTS | {"q_lora_rank": 24},
}
FUSED_TOO = {  # as some of these, by other names
    "Apertus": {},
    "DeepseekV3-halves": LATENTS | {"q_lora_rank": 24, "rope_interleave": False},
    "Glm4MoeLite": LATENTS | {"q_lora_rank": 24},
    "Cohere": {"use_qk_norm": True},
    "Ernie4_5": {},
    "Exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "Glm": {"head_dim": 16},
    "GraniteMoe": {"residual_multiplier": 0.3, "num_local_experts": 4},
    "Helium": {"head_dim": 16},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmo2": {},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "StableLm": {},
}
LEFT_ALONE = {
    "HunYuanDenseV1": ({"head_dim": 16}, "has a `key_layernorm`"),
    "Ministral3": ({}, "not what its parts seem to be"),  # attention looks at positions by itself
    "Olmo": ({}, "OlmoLayerNorm is not a norm of one weight"),
    "VaultGemma": ({"head_dim": 16}, "unknown set of norms: `input_layernorm`, `pre_"),
}


def model_of(name: str, dtype: torch.dtype, **options):
    """A model with random weights, norms and biases among them."""
    import transformers

    config = getattr(transformers, f"{name.partition('-')[0]}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = (
        transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="qtool"
        )
        .eval()
        .requires_grad_(False)
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += torch.randn_like(parameter) * 0.3
        else:
            parameter *= 4
    return model


def logits_of(model, ids: torch.Tensor, *, expands: bool = False) -> torch.Tensor:
    """The logits of two sequences in one pass: the new token of one, seven of another, after passes
    over what comes before. With ``expands`` chunks attend to keys and values made of latents.
    """
    with recording() as found, torch.no_grad():
        model(input_ids=ids[:, :1], position_ids=torch.zeros_like(ids[:, :1]), use_cache=False)
    layers = {}
    for layer in found.layers:
        pages = torch.zeros(6, layer.kv_heads, PAGE, layer.head_dim, dtype=model.dtype)
        values = pages[..., : layer.v_head_dim] if layer.keeps_latents else pages.clone()
        layers[layer.layer_idx] = KVPages(pages, values, keeps_latents=layer.keeps_latents)
    table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    result = []
    for rows, positions, decodes, starts in (
        ([0] * 9, [*range(9)], 0, [0, 9]),
        ([0] * 8, [*range(9, 17)], 0, [0, 8]),
        ([0, *[1] * 7], [17, *range(7)], 1, [0, 7]),
        ([0, 1], [18, 7], 2, None),
    ):
        starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
        places = torch.tensor(positions, dtype=torch.int32)
        packed = Packed(
            table, torch.tensor(rows, dtype=torch.int32), places, decodes, starts, longest=17
        )
        if expands and starts is not None:
            packed = packed.expand([(positions[decodes], len(rows) - decodes)])
        with running(packed, layers), torch.no_grad():
            output = model(
                input_ids=ids[:, : len(rows)], position_ids=places[None].long(), use_cache=False
            )
        result.append(output.logits[0].float())
    return torch.cat(result)


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


IDS = torch.arange(1, 18)[None] * 7 % 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [*FUSED, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FUSED_TOO)]
)
def test_a_fused_model_computes_what_it_did(name, dtype):
    model = model_of(name, dtype, **(FUSED | FUSED_TOO)[name])
    keep_latents(model)
    ways = (False, True)[: 1 + hasattr(model.config, "kv_lora_rank")]
    unfused = copy.deepcopy(model)
    expected = [logits_of(unfused, IDS, expands=expands) for expands in ways]
    assert fuse(model)
    assert all(isinstance(layer, fused.FusedLayer) for layer in model.model.layers)
    for expands, wanted in zip(ways, expected, strict=True):
        found = logits_of(model, IDS, expands=expands)
        assert distance(found, wanted) <= (1e-5 if dtype == torch.float32 else 1e-2)
        assert distance(wanted, expected[0]) <= (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_model_of_another_kind_is_left_alone_and_says_why(name, caplog):
    options, reason = LEFT_ALONE[name]
    model = model_of(name, torch.bfloat16, **options)
    expected, layers, norm = (
        logits_of(copy.deepcopy(model), IDS),
        list(model.model.layers),
        model.model.norm,
    )
    with caplog.at_level("INFO", "qtool.engine"):
        assert not fuse(model)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "qtool.engine")
    assert re.search(reason, message)
    assert list(model.model.layers) == layers and model.model.norm is norm
    assert distance(logits_of(model, IDS), expected) <= 1e-3


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda states: states * 1.5, "unsupported operand"),
        (lambda states: getattr(states, "x", states), "something between its layers"),
    ],
    ids=["scaled", "residual dropped"],
)
def test_a_model_that_touches_the_states_between_its_layers_is_left_alone(
    between, reason, monkeypatch, caplog
):
    model = model_of("Llama", torch.float32)
    layers, norm = model.model.layers, model.model.norm

    def forward(self, input_ids, position_ids, use_cache):
        states = self.embed_tokens(input_ids)
        angles = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = between(layer(states, position_embeddings=angles))
        return (self.norm(states),)

    monkeypatch.setattr(type(model.model), "forward", forward)
    with caplog.at_level("INFO", "qtool.engine"):
        assert not fuse(model)
    assert re.search(reason, caplog.text)
    assert model.model.layers is layers and model.model.norm is norm


def test_plain_weights_become_one_matrix_and_take_no_more_memory():
    model = model_of("Qwen2", torch.bfloat16)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    bias = torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias])
    assert fuse(model)
    layer = model.model.layers[0]
    assert torch.equal(layer.mixer.qkv.weight, weight) and torch.equal(layer.mixer.qkv.bias, bias)
    assert (
        attention.k_proj.weight.untyped_storage().data_ptr()
        == layer.mixer.qkv.weight.untyped_storage().data_ptr()
    )
    assert (
        mlp.up_proj.weight.untyped_storage().data_ptr()
        == layer.mlp.gate_up.weight.untyped_storage().data_ptr()
    )
    assert not any(name.endswith("q_proj.weight") for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["DeepseekV3", "Glm4Moe", "Qwen2Moe"])
def test_packed_experts_beside_shared_ones_are_fused(name, tmp_path):
    """Their outputs are large: the comparison of whole models leaves them out on both sides."""
    from qtool.runtime.load import load

    written = model_of(name, torch.bfloat16, **FUSED[name])
    for parameter in written.model.layers[1].mlp.experts.parameters():
        parameter *= 20
    written.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu", quantization="fp8wo")
    model.set_attn_implementation("qtool")
    keep_latents(model)
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp.experts, GroupedExperts)
    assert fuse(model)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = mlp(x[None])[0]
    own = model.model.layers[1].mlp
    assert isinstance(own, fused.Mixture) == (name == "Qwen2Moe")
    assert distance(own(x), expected) <= 1e-2


@pytest.mark.filterwarnings("ignore:.*are dequantized at every step")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", ["ct/FP8_DYNAMIC", "ct/W8A8", "ct/W4A16", "ct/mixed", "gptq/desc_act"]
)
def test_quantized_checkpoints_are_fused(sample, name):
    """They keep keys before queries, give some layers a precision of their own, or ask for another
    order of inputs.
    """
    from qtool.runtime.load import load

    model = load(sample(name), device="cpu")
    model.set_attn_implementation("qtool")
    expected = logits_of(copy.deepcopy(model), IDS)
    assert fuse(model)
    assert distance(logits_of(model, IDS), expected) <= 1e-2


@pytest.mark.parametrize("kernel", ["scaled_mm", "triton_w8a8"])
@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("FP8_DYNAMIC", "fp8"), ("W8A8", "int8"), ("FP8", None), ("W4A8", None)],
)
def test_layers_take_codes_of_tokens_with_a_scale_each(kernel, scheme, expected):
    pytest.importorskip("triton")
    from qtool.runtime.kernels import Choice, FewTokens, LinearSpec, codes_taken
    from qtool.scheme import SCHEMES

    spec = LinearSpec(
        SCHEMES[scheme],
        (64, 128),
        torch.bfloat16,
        bool(SCHEMES[scheme].activations and not SCHEMES[scheme].activations.dynamic),
    )
    assert codes_taken(spec, Choice(kernel, {})) == (expected if scheme != "W4A8" else "int8")
    assert codes_taken(spec, Choice(kernel, {}, FewTokens("reference", 4))) is None
    assert codes_taken(spec, Choice("reference", {})) is None


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_codes_give_what_the_rounded_input_gives_bit_for_bit(scheme):
    from qtool.runtime.kernels import Choice, LinearSpec, scaled_mm
    from qtool.runtime.linear import QuantizedLinear
    from qtool.scheme import SCHEMES
    from qtool.weight import quantize

    torch.manual_seed(0)
    inner, outer = 96, 64
    norm = Norm(torch.nn.Parameter(torch.rand(64) + 0.5), NormKind(1e-6)).to(torch.bfloat16)

    def linear(rows: int, columns: int) -> QuantizedLinear:
        spec = LinearSpec(SCHEMES[scheme], (rows, columns), torch.bfloat16)
        weight = quantize((torch.randn(rows, columns) * 0.1).bfloat16(), spec.scheme)
        return QuantizedLinear(spec, Choice("scaled_mm", {}), weight, torch.randn(rows))

    mlp = fused.GatedMLP(linear(2 * inner, outer), [0, inner], inner, linear(outer, inner), "silu")
    assert mlp.gate_up.takes_codes == ("fp8" if scheme == "FP8_DYNAMIC" else "int8")
    states = Sum(torch.randn(20, outer).bfloat16(), torch.randn(20, outer).bfloat16())
    normed, _, total = add_norm(states, norm)
    codes, scale, same_total = add_norm(states, norm, mlp.codes)
    assert codes.dtype == scaled_mm.rounded_rows(normed, SCHEMES[scheme].activations)[
        0
    ].dtype and torch.equal(total, same_total)
    gate, up = mlp.gate_up(normed).chunk(2, dim=-1)
    expected = mlp.down(torch.nn.functional.silu(gate) * up)
    assert torch.equal(mlp(codes, scale), expected) and torch.equal(mlp(normed), expected)


# Triton


def test_the_kernels_compute_what_torch_does_and_round_as_row_quantize(run_here):
    assert "compared" in run_here("interpret")


@pytest.mark.exhaustive
def test_the_kernels_compile_for_hopper_without_spills(run_here):
    assert "compiled" in run_here("compile")


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@contextmanager
def taken_for_cuda():
    """Tensors say that they are on a GPU, so that functions launch their kernels."""
    torch.Tensor.is_cuda = property(lambda self: True)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


@torch.no_grad()
def interpret() -> None:
    import triton.language as tl
    from support import triton_cpu

    from qtool.engine import elementwise
    from qtool.runtime.triton import row_quantize

    triton_cpu.repair()
    elementwise._share = lambda x: 1.0 / (1.0 + tl.exp2(x))  # the interpreter knows no assembly
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-6}

    def same(
        result: torch.Tensor,
        expected: torch.Tensor,
        dtype: torch.dtype,
        what: object,
        atol: float = 3e-6,
    ) -> None:
        assert result.dtype == expected.dtype and result.shape == expected.shape, what
        assert torch.allclose(result.float(), expected.float(), rtol=2 * ulp[dtype], atol=atol), (
            what
        )
        # a sum in another order is rounded the other way now and then
        differ = float((result.float() != expected.float()).float().mean())
        assert dtype == torch.float32 or differ < 0.15, what

    def compare_norm(
        dtype: torch.dtype, shape: tuple[int, int], kind: tuple[bool, ...], parts: str = "residual"
    ) -> None:
        """``parts``: what there is beside the output, among them ``norm`` where it is missing."""

        def norm_of() -> Norm:
            weight, bias = (torch.nn.Parameter(torch.randn(shape[1]).to(dtype)) for _ in range(2))
            return Norm(weight, NormKind(1e-3, *kind), bias if "bias" in parts else None)

        x, residual, other = (torch.randn(shape).to(dtype) for _ in range(3))
        norm = None if "no norm" in parts else norm_of()
        states = Sum(
            x,
            residual if "residual" in parts else None,
            norm_of() if "after" in parts else None,
            0.22 if "factor" in parts else 1.0,
            other if "other" in parts else None,
        )
        with taken_for_cuda():
            result, scale, total = add_norm(states, norm)
        what = ("norm", dtype, shape, kind, parts)
        # a norm that is rounded the other way is then added
        same(total, states.total(), dtype, what, 4 * ulp[dtype] if states.after else 0.0)
        assert scale is None and (states.after or torch.equal(total, states.total())), what
        same(result, norm.normalize(total) if norm else total, dtype, what)
        for codes in ("fp8", "int8"):
            with taken_for_cuda():
                own, own_scale, _ = add_norm(states, norm, codes)
            wanted, wanted_scale = row_quantize.quantize_rows(result, codes)
            assert own.dtype == wanted.dtype and torch.equal(bits_of(own), bits_of(wanted)), what
            assert torch.equal(own_scale, wanted_scale), what

    def compare_gated(dtype: torch.dtype, width: int, activation: str, piece: int) -> None:
        elementwise.PIECE = piece
        x, at = torch.randn(3, 2 * width + 10).to(dtype) * 3, (width + 5, 3)
        compare_codes(dtype, fused.gated, x, at, width, activation)

    def compare_gated_heads(dtype: torch.dtype, heads: int, width: int) -> None:
        qkv = torch.randn(3, 2 * heads * width + 10).to(dtype) * 3
        x = torch.randn(3, heads * width).to(dtype)
        compare_codes(dtype, fused_attention.gate_heads, x, qkv, 5, heads)

    def compare_codes(dtype: torch.dtype, function, *arguments) -> None:
        expected, _ = function(*arguments)
        with taken_for_cuda():
            result, _ = function(*arguments)
        same(result, expected, dtype, (function.__name__, dtype, *arguments))
        for codes in ("fp8", "int8"):
            with taken_for_cuda():
                own, own_scale = function(*arguments, codes)
            wanted, wanted_scale = row_quantize.quantize_rows(result, codes)
            assert (
                own.dtype == wanted.dtype
                and torch.equal(bits_of(own), bits_of(wanted))
                and torch.equal(own_scale, wanted_scale)
            )

    def compare_rotation(
        dtype, heads, kv_heads, width, rotated, normed, eight_bits, angles, kind
    ) -> None:
        """``normed``: over each "head", "each" with its own weights, over the "whole", or not;
        ``angles``: their dtype.
        """
        at = (kv_heads * width, 0, (kv_heads + heads) * width)
        qkv = torch.randn(5, (heads + 2 * kv_heads) * width).to(dtype)
        weights = [torch.nn.Parameter(torch.randn(width).to(dtype)) for _ in range(2)]
        if normed in ("each", "whole"):
            both = (torch.randn(count, width).to(dtype) for count in (heads, kv_heads))
            weights = [
                torch.nn.Parameter(part.flatten() if normed == "whole" else part) for part in both
            ]
        norm_kind = NormKind(1e-3, late=normed == "each", centered=normed == "each")
        q_norm, k_norm = (Norm(weight, norm_kind) if normed else None for weight in weights)
        halves = [torch.randn(5, rotated // 2).to(angles) for _ in range(2)]
        if kind == "repeated":
            halves = [half.repeat_interleave(2, dim=1) for half in halves]
        elif kind != "once":
            halves = [half.repeat(1, 2) for half in halves]
        rotary = fused_attention.Rotary(*halves, kind) if rotated else None
        table = torch.tensor([[1, 2], [3, 4], [0, 0]], dtype=torch.int32)
        rows, positions = (
            torch.tensor(numbers, dtype=torch.int32)
            for numbers in ([0, 1, 1, 1, 2], [17, 14, 15, 16, 0])
        )
        packed = Packed(table, rows, positions, 5)
        pages = torch.zeros(
            2, 5, kv_heads, PAGE, width, dtype=torch.float8_e4m3fn if eight_bits else dtype
        )
        scales = (0.01, 0.005) if eight_bits else (1.0, 1.0)
        cache, own_cache = (KVPages(pages[0].clone(), pages[1].clone(), *scales) for _ in range(2))
        q = fused_attention.rotate_and_write(
            qkv, at, heads, width, q_norm, k_norm, rotary, cache, packed
        )
        before = qkv.clone()
        with taken_for_cuda():
            own_q = fused_attention.rotate_and_write(
                qkv, at, heads, width, q_norm, k_norm, rotary, own_cache, packed
            )
        what = ("rotation", dtype, heads, width, rotated, normed, eight_bits, angles, kind)
        same(own_q, q, dtype, what)
        assert torch.equal(qkv, before), what
        assert cache.k.float().any() and torch.equal(bits_of(own_cache.v), bits_of(cache.v)), what
        if eight_bits:
            assert float((bits_of(own_cache.k) != bits_of(cache.k)).float().mean()) < 1e-3, what
        else:
            same(own_cache.k, cache.k, dtype, what)

    count = 0
    for index, dtype in enumerate(dtypes):
        plain, gemma, late = (False, False, False), (True, True, False), (False, True, False)
        centered = (False, True, True)
        kinds, shapes = (plain, gemma, late), ((35, 64), (3, 100), (2, 1200))
        for shape, kind in zip(shapes, kinds[index:] + kinds[:index], strict=True):
            compare_norm(dtype, shape, kind, "" if kind is gemma else "residual")
        others = (
            (gemma, "residual after"),
            (centered, "residual other bias"),
            (late, "residual after no norm"),
            (plain, "residual after factor"),
        )
        for kind, parts in others[index % 2 :: 2]:
            compare_norm(dtype, shapes[index], kind, parts)
            count += 1
        pieces = itertools.product(("silu", "gelu_tanh"), ((40, 16384), (1500, 512), (1500, 16384)))
        for activation, (width, piece) in list(pieces)[index % 2 :: 2]:
            compare_gated(dtype, width, activation, piece)
            count += 1
        compare_gated_heads(dtype, *((3, 40), (6, 256))[index % 2])
        count += 1
        turning = (
            (6, 2, 64, 64, "head", False, dtype, "twice"),
            (5, 1, 80, 32, "", True, torch.float32, "once"),
            (20, 10, 128, 0, "head", False, dtype, "twice"),
            (2, 2, 96, 96, "", True, dtype, "once"),
        )
        others = (
            (6, 2, 64, 32, "whole", True, dtype, "interleaved"),
            (10, 5, 96, 64, "each", False, dtype, "repeated"),
        )
        for case in (*turning, others[index % 2]):
            compare_rotation(dtype, *case)
            count += 1
    print(f"{count} compared")


def compile_all() -> None:
    from support import triton_cpu

    from qtool.engine import elementwise

    compiled: list = []
    triton_cpu.compile_only(compiled)
    elementwise._starts_early = lambda device: True

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for width, inner, heads, kv_heads, head_dim in (
        (4096, 14336, 32, 8, 128),
        (16384, 53248, 128, 8, 128),
        (2880, 2880, 64, 8, 80),
    ):
        for codes in (None, "fp8", "int8"):
            x, weights = empty(8, width), (empty(width), None)
            elementwise.add_norm(x, x, weights, 1e-5, False, False, False, codes=codes)
            elementwise.gated(empty(8, 2 * inner), (0, inner), inner, "silu", codes)
            queries, qkv = heads * head_dim, empty(8, 2 * heads * head_dim + 512)
            elementwise.gate_heads(empty(8, queries), qkv, 0, heads, codes)
        for dtype, norms in (
            (torch.bfloat16, None),
            (torch.float8_e4m3fn, (empty(head_dim), empty(head_dim), 1e-6, False, False, False)),
        ):
            for start in (0, 1):  # of 16 bytes, or not
                elementwise.rotate_and_write(
                    empty(8, (heads + 2 * kv_heads) * head_dim),
                    (0, heads * head_dim, (heads + kv_heads) * head_dim),
                    heads,
                    head_dim,
                    norms,
                    (empty(8, head_dim), empty(8, head_dim)),
                    head_dim,
                    *(empty(9, kv_heads, PAGE, head_dim, dtype=dtype) for _ in range(2)),
                    (1.0, 1.0),
                    empty(4, 64, dtype=torch.int32),
                    *(empty(9, dtype=torch.int32)[start : start + 8] for _ in range(2)),
                )
            assert compiled[-1] is compiled[-2], (
                "rotate_and_write is compiled anew for other numbers of tokens"
            )
    for width, kind, parts in (
        (3840, (True, True, False), {"after": True}),
        (5376, (True, True, False), {"after": True}),
        (5120, (False, True, False), {"after": True, "norm": False}),
        (4096, (False, False, False), {"factor": 0.22}),
        (12288, (False, True, True), {"other": True}),
        (6144, (False, True, True), {"bias": True}),
    ):
        for codes in (None, "fp8"):
            x = empty(8, width)
            weights = empty(width), empty(width) if "bias" in parts else None
            elementwise.add_norm(
                *(x, x, weights if parts.get("norm", True) else None, 1e-6, *kind),
                after=weights if "after" in parts else None,
                factor=parts.get("factor", 1.0),
                other=x if "other" in parts else None,
                codes=codes,
            )
    for heads, kv_heads, head_dim, rotated, normed, step in (
        (16, 8, 256, 256, "head", 0),
        (40, 8, 128, 128, "whole", 0),
        (32, 2, 128, 64, "", 1),
        (96, 8, 128, 128, "each", 2),
    ):
        shapes = {
            "head": ((head_dim,), (head_dim,)),
            "whole": ((heads * head_dim,), (kv_heads * head_dim,)),
            "each": ((heads, head_dim), (kv_heads, head_dim)),
        }.get(normed, ())
        kind = (False, True, True) if normed == "each" else (True, True, False)
        elementwise.rotate_and_write(
            empty(8, (heads + 2 * kv_heads) * head_dim),
            (0, heads * head_dim, (heads + kv_heads) * head_dim),
            heads,
            head_dim,
            (*(empty(*shape) for shape in shapes), 1e-6, *kind) if normed else None,
            (empty(8, rotated), empty(8, rotated)),
            rotated,
            *(empty(9, kv_heads, PAGE, head_dim) for _ in range(2)),
            (1.0, 1.0),
            empty(4, 64, dtype=torch.int32),
            *(empty(8, dtype=torch.int32) for _ in range(2)),
            interleaved=step > 0,
            angle_step=max(step, 1),
        )
    for kernel in compiled:
        used = triton_cpu.resources(kernel)
        assert used["stack"] == 0, f"{kernel.metadata.name} spills registers: {used}"
        assert "griddepcontrol.wait" in kernel.asm["ptx"], kernel.metadata.name
    print(f"{len(compiled)} compiled")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()

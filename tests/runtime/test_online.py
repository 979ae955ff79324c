"""What the names of `--quantization` and `--torchao-config` stand for, and that torchao's mean what
torchao does.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qtool.checkpoint import open_checkpoint
from qtool.codes import unpack_pairs
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import detect
from qtool.formats.packing import read_tensor
from qtool.modules import is_linear
from qtool.runtime.online import ONLINE, TORCHAO, flag_named, schemes_to_run, skip_reasons
from qtool.weight import dequantize, fake_quantize_input, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

MEANINGS = {
    "fp8": "fp8 channel, activations fp8 token",
    "w8a8_fp8": "fp8 channel, activations fp8 token",
    "w8a8_int8": "int8 channel, activations int8 token",
    "fp8_block": "fp8 128x128, activations fp8 g128",
    "nvfp4": "nvfp4 g16",
    "mxfp4": "mxfp4 g32",
    "bitsandbytes": "nf4 g64",
    "int8wo": "int8 channel",
    "int8dq": "int8 channel, activations int8 token",
    "int4wo-32": "int4 g32 asym",
    "int4wo-64": "int4 g64 asym",
    "int4wo-128": "int4 g128 asym",
    "int4wo-256": "int4 g256 asym",
    "fp8wo": "fp8 channel",
    "fp8dq-per_tensor": "fp8 tensor, activations fp8 tensor",
    "fp8dq-per_row": "fp8 channel, activations fp8 token",
}
EXPERTS = {
    "model.embed_tokens.weight": (512, 128),
    "model.layers.0.self_attn.q_proj.weight": (128, 128),
    "model.layers.0.mlp.gate.weight": (2, 128),
    "model.layers.0.mlp.experts.0.up_proj.weight": (96, 128),
    "model.layers.0.mlp.experts.1.up_proj.weight": (96, 128),
    "model.layers.0.mlp.experts.1.down_proj.weight": (128, 96),
    "model.layers.0.linear_attn.conv1d.weight": (128, 1, 4),
    "model.layers.1.mlp.experts.gate_up_proj": (2, 192, 128),
    "model.layers.1.mlp.experts.down_proj": (2, 128, 96),
    "visual.blocks.0.attn.qkv.weight": (384, 128),
    "lm_head.weight": (512, 128),
}


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return open_checkpoint(tiny_model)


@pytest.fixture
def experts(make_model):
    return open_checkpoint(make_model(EXPERTS, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def matrices(tiny):
    """Weights of a trained model, and a random one in which rows are of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(256, 512, generator=generator) * torch.logspace(-4, 2, 256)[:, None]
    names = [
        name for name, tensor in tiny.tensors.items() if is_linear(tensor) and ".layers.1." in name
    ]
    return [random.bfloat16(), *(read_tensor(tiny, name) for name in names)]


@pytest.fixture(scope="module")
def inputs():
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    return (x * torch.logspace(-2, 2, 256)[:, None]).bfloat16()


# --- plain checkpoints


def test_every_name_means_the_scheme_in_the_table():
    assert {name: str(scheme) for name, scheme in ONLINE.items()} == MEANINGS


def test_torchaos_names_are_those_of_sglang():
    groups = [f"int4wo-{size}" for size in (32, 64, 128, 256)]
    assert set(TORCHAO) == {
        "int8wo",
        "int8dq",
        "fp8wo",
        "fp8dq-per_tensor",
        "fp8dq-per_row",
        *groups,
    }


def test_a_plain_checkpoint_without_a_flag_stays_plain(tiny):
    assert schemes_to_run(tiny, None, None) == {}


@pytest.mark.parametrize("name", ONLINE)
def test_a_name_quantizes_all_projections_and_nothing_else(tiny, name):
    projections = {
        tensor.removesuffix(".weight") for tensor in tiny.tensors if tensor.endswith("_proj.weight")
    }
    assert schemes_to_run(tiny, None, name) == dict.fromkeys(projections, ONLINE[name])
    assert skip_reasons(tiny, None, name) == ()


def test_experts_are_quantized_and_routers_heads_and_towers_are_not(experts):
    prefix = "model.layers.0"
    up, down = (f"{prefix}.mlp.experts.1.{part}_proj" for part in ("up", "down"))
    assert set(schemes_to_run(experts, None, "fp8")) == {
        f"{prefix}.self_attn.q_proj",
        f"{prefix}.mlp.experts.0.up_proj",
        up,
        down,
    }


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("int4wo-32", True),
        ("int4wo-64", False),
        ("int4wo-128", False),
        ("nvfp4", True),
        ("fp8_block", True),
    ],
)
def test_a_layer_whose_inputs_the_groups_do_not_divide_stays_plain(experts, name, fits):
    assert ("model.layers.0.mlp.experts.1.down_proj" in schemes_to_run(experts, None, name)) == fits


def test_what_stays_plain_is_reported_by_reason(experts):
    assert skip_reasons(experts, None, "int4wo-128") == (
        "groups of 128 do not divide the inputs of layers, which stay in 16 bits: "
        "`model.layers.0.mlp.experts.1.down_proj`",
        "experts are stacked in tensors of three dimensions, which stay in 16 bits: "
        "`model.layers.1.mlp.experts.gate_up_proj`, `model.layers.1.mlp.experts.down_proj`",
    )


def test_a_report_names_two_layers_and_counts_the_others(make_model):
    checkpoint = open_checkpoint(
        make_model({f"model.layers.{number}.mlp.up_proj.weight": (8, 24) for number in range(5)})
    )
    with pytest.raises(CheckpointRefused) as raised:
        schemes_to_run(checkpoint, None, "mxfp4")
    assert raised.value.code == "E_NOTHING_TO_DO"
    assert raised.value.hint.endswith(
        "`model.layers.0.mlp.up_proj`, `model.layers.1.mlp.up_proj` and 3 more"
    )


def test_a_model_of_conv1d_layers_is_refused(make_model):
    checkpoint = open_checkpoint(
        make_model({"h.0.attn.c_attn.weight": (64, 192)}, model_type="gpt2")
    )
    with pytest.raises(CheckpointRefused, match="has no layer that `fp8` quantizes") as raised:
        schemes_to_run(checkpoint, None, "fp8")
    assert "Conv1D" in raised.value.hint


# --- names


def test_capitals_do_not_matter(tiny):
    assert schemes_to_run(tiny, None, "FP8dq-Per_Row") == schemes_to_run(
        tiny, None, "fp8dq-per_row"
    )


@pytest.mark.parametrize(
    ("wrong", "right"), [("int4wo-100", "int4wo-128"), ("w8a8-fp8", "w8a8_fp8")]
)
def test_an_unknown_name_is_answered_with_the_nearest(tiny, wrong, right):
    with pytest.raises(UsageError, match=f"unknown quantization `{wrong}`") as raised:
        schemes_to_run(tiny, None, wrong)
    assert raised.value.code == "E_QUANTIZATION"
    assert f"`{right}`" in raised.value.hint


def test_a_name_like_no_other_is_answered_with_all(tiny):
    with pytest.raises(UsageError) as raised:
        schemes_to_run(tiny, None, "zzz")
    assert all(name in raised.value.hint for name in ONLINE)
    assert "gptq" not in raised.value.hint  # which is for checkpoints that say so themselves


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((None, None), None),
        (("fp8", None), "fp8"),
        (("gptq", ""), "gptq"),
        ((None, "INT8wo"), "int8wo"),
    ],
)
def test_two_flags_give_one_name(flags, name):
    assert flag_named(*flags) == name


def test_torchaos_flag_takes_torchaos_names_only():
    with pytest.raises(UsageError, match="unknown torchao config `fp8`") as raised:
        flag_named(None, "fp8")
    assert "`fp8wo`" in raised.value.hint


def test_two_flags_at_once_are_refused():
    with pytest.raises(UsageError, match="--quantization fp8 and --torchao-config int8wo"):
        flag_named("fp8", "int8wo")


def test_a_method_of_quantized_checkpoints_is_refused_on_a_plain_one(tiny):
    with pytest.raises(UsageError, match="`gptq` is for checkpoints quantized with it") as raised:
        schemes_to_run(tiny, None, "gptq")
    assert "int4wo-128" in raised.value.hint


def test_the_names_are_there_without_torch(run_python):
    assert run_python("import sys, qtool.runtime.online; print('torch' in sys.modules)") == "False"


# --- quantized checkpoints


@pytest.fixture
def of_sample(sample):
    """A function: a sample and a flag to (the schemes that run, those of the checkpoint)."""

    def get(name, flag):
        checkpoint = open_checkpoint(sample(name))
        layout = detect(checkpoint)
        assert skip_reasons(checkpoint, layout, flag) == ()
        return schemes_to_run(checkpoint, layout, flag), {
            layer: module.scheme for layer, module in layout.modules.items()
        }

    return get


AGREEING = [
    ("ct/mixed", None),
    ("ct/W4A16", "compressed-tensors"),
    ("gptq/rtn4", "gptq"),
    ("gptq/rtn4", "GPTQ_Marlin"),
    ("gptq/rtn_gemm", "gptq"),  # what its config says
    ("gptq/rtn_gemm", "awq_marlin"),  # what its tensors are
    ("gptq/rtn4", "marlin"),  # a kernel that takes both
    ("gptq/rtn_gemm", "marlin"),
    ("modelopt/FP8", "modelopt"),
    ("modelopt/FP8", "modelopt_fp8"),
    ("modelopt/NVFP4", "modelopt_fp4"),
    ("modelopt/MIXED", "modelopt_mixed"),
]
CONTRADICTING = [
    ("ct/FP8", "fp8", "compressed-tensors"),
    ("ct/FP8_DYNAMIC", "w8a8_int8", "compressed-tensors"),
    ("ct/FP8_BLOCK", "w8a8_fp8", "compressed-tensors"),
    ("ct/W8A16", "w8a8_int8", "compressed-tensors"),
    ("ct/mixed", "w8a8_fp8", "compressed-tensors"),
    ("gptq/rtn4", "awq", "gptq"),
    ("gptq/rtn4", "int4wo-128", "gptq"),
    ("ct/W4A16", "marlin", "compressed-tensors"),
    ("modelopt/NVFP4", "modelopt_fp8", "modelopt"),
    ("modelopt/MIXED", "modelopt_fp4", "modelopt"),
]
OVERRIDDEN = [
    ("ct/FP8", "w8a8_fp8"),
    ("ct/FP8_DYNAMIC", "w8a8_fp8"),
    ("ct/fp8_weight_only", "w8a8_fp8"),
    ("modelopt/FP8", "w8a8_fp8"),
    ("ct/W8A8_STATIC_ASYM", "w8a8_int8"),
    ("modelopt/INT8_WO", "w8a8_int8"),
]


@pytest.mark.parametrize(("name", "flag"), AGREEING)
def test_a_quantized_checkpoint_runs_as_it_is(of_sample, name, flag):
    run, own = of_sample(name, flag)
    assert run == own


@pytest.mark.parametrize(("name", "flag"), OVERRIDDEN)
def test_w8a8_on_8_bit_weights_rounds_inputs_per_token(of_sample, name, flag):
    run, own = of_sample(name, flag)
    assert {layer: scheme.weights for layer, scheme in run.items()} == {
        layer: scheme.weights for layer, scheme in own.items()
    }
    assert {scheme.activations for scheme in run.values()} == {ONLINE[flag].activations}


@pytest.mark.parametrize(("name", "flag", "found"), CONTRADICTING)
def test_another_method_is_an_error_that_names_the_one_found(of_sample, name, flag, found):
    with pytest.raises(
        UsageError, match=f"`{flag}` does not fit .* quantized already: `{found}`"
    ) as raised:
        of_sample(name, flag)
    assert (raised.value.code, raised.value.exit_code) == ("E_QUANTIZATION", 2)
    assert "leave the flag out" in raised.value.hint


def test_an_unknown_name_is_unknown_on_a_quantized_checkpoint_too(of_sample):
    for wrong, right in (("compressed", "compressed-tensors"), ("gptq_marlim", "gptq_marlin")):
        with pytest.raises(UsageError, match=f"unknown quantization `{wrong}`") as raised:
            of_sample("ct/W4A16", wrong)
        assert f"`{right}`" in raised.value.hint


def test_a_name_that_says_what_is_there_is_no_contradiction(of_sample):
    for name, flag in (
        ("ct/FP8_DYNAMIC", "fp8"),
        ("ct/W8A8", "int8dq"),
        ("ct/FP8_BLOCK", "fp8_block"),
    ):
        assert of_sample(name, flag) == of_sample(name, None)


@pytest.mark.parametrize("flag", [None, "fp8", "fp8_block"])
def test_deepseeks_blocks_are_called_fp8(make_model, flag):
    name = "model.layers.0.mlp.up_proj.weight"
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    checkpoint = open_checkpoint(make_model({name: (256, 256)}, folder="values", dtype="F8_E4M3"))
    scales = open_checkpoint(
        make_model({f"{name}_scale_inv": (2, 2)}, folder="scales", dtype="F32")
    )
    both = type(checkpoint)(
        checkpoint.path,
        {**checkpoint.config, "quantization_config": config},
        {**checkpoint.tensors, **scales.tensors},
    )
    assert {str(scheme) for scheme in schemes_to_run(both, detect(both), flag).values()} == {
        MEANINGS["fp8_block"]
    }


# --- torchao. Weights and inputs are bf16, as they are in models; `quantize_` runs where torchao
# has it for a CPU.


def torchaos(weight, config):
    """Return ``weight`` as torchao's `quantize_` leaves it in a layer."""
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, config)
    return layer.weight


def codes_of(weight):
    """Return the codes of a QuantizedWeight as signed numbers, those of fp8 as their bytes."""
    if weight.data.dtype == torch.uint8:
        return unpack_pairs(weight.data).int() - 8
    return (
        weight.data.int()
        if weight.data.dtype == torch.int8
        else weight.data.view(torch.uint8).int()
    )


def assert_equal_but_at_ties(ours, theirs, quotient):
    """Torchao multiplies by the reciprocal of the scale, so a quotient half way between two codes
    may fall to either.
    """
    apart = ours != theirs.int()
    assert ((ours - theirs.int()).abs() <= 1).all()
    assert ((quotient - quotient.floor() - 0.5).abs()[apart] < 1e-5).all()
    assert apart.float().mean() < 1e-3


@pytest.mark.parametrize("name", ["int8wo", "int8dq"])
def test_int8_weights_are_torchaos(matrices, name):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    config = Int8WeightOnlyConfig() if name == "int8wo" else Int8DynamicActivationInt8WeightConfig()
    for matrix in matrices:
        ours, theirs = quantize(matrix, ONLINE[name]), torchaos(matrix, config)
        assert torch.equal(ours.scale.float(), theirs.scale)
        assert not theirs.zero_point.any()
        assert_equal_but_at_ties(codes_of(ours), theirs.qdata, matrix.float() / theirs.scale)
        same = ours.data == theirs.qdata
        assert torch.equal(dequantize(ours, torch.bfloat16)[same], theirs.dequantize()[same])


def test_fp8wo_weights_are_torchaos(matrices):
    from torchao.quantization import Float8WeightOnlyConfig

    for matrix in matrices:
        ours, theirs = quantize(matrix, ONLINE["fp8wo"]), torchaos(matrix, Float8WeightOnlyConfig())
        assert torch.equal(ours.scale.float(), theirs.scale)
        assert torch.equal(codes_of(ours), theirs.qdata.view(torch.uint8).int())
        assert torch.equal(dequantize(ours, torch.bfloat16), theirs.dequantize())


@pytest.mark.parametrize(
    ("name", "granularity"), [("fp8dq-per_tensor", "PerTensor"), ("fp8dq-per_row", "PerRow")]
)
def test_fp8dq_weights_are_torchaos(matrices, name, granularity):
    from torchao import quantization

    for matrix in matrices:
        # the config refuses a CPU
        theirs = quantization.Float8Tensor.from_hp(
            matrix, granularity=getattr(quantization, granularity)()
        )
        ours = quantize(matrix, ONLINE[name])
        assert torch.equal(ours.scale.float(), theirs.scale.expand(ours.scale.shape))
        assert torch.equal(codes_of(ours), theirs.qdata.view(torch.uint8).int())
        assert torch.equal(dequantize(ours, torch.bfloat16), theirs.dequantize())


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_int4wo_is_torchaos_rounding_to_whole_zero_points(matrices, size):
    """In f32, for given bf16 torchao subtracts and divides in bf16 and rounds twice."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(size), mapping_type=MappingType.ASYMMETRIC
    )
    for matrix in matrices:
        ours, theirs = (
            quantize(matrix.float(), ONLINE[f"int4wo-{size}"]),
            torchaos(matrix.float(), config),
        )
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.zero, theirs.zero_point)
        assert_equal_but_at_ties(
            codes_of(ours),
            theirs.qdata,
            matrix.float() / theirs.scale.repeat_interleave(size, dim=1),
        )


@pytest.mark.parametrize("size", [32, 128])
def test_int4wo_is_within_a_step_of_torchaos_float_zero_points_and_nearly_as_exact(matrices, size):
    """`Int4WeightOnlyConfig` needs a GPU; this is the arithmetic of its algorithm, tinygemm, whose
    zero points are floats.

    It puts the least and the largest of each group on a code exactly, qtool 0.0: that costs the
    more, the smaller the group.
    """
    from torchao.quantization import quant_primitives as torchao

    kinds = {"scale_dtype": torch.bfloat16, "zero_point_dtype": torch.bfloat16}
    for matrix in matrices:
        block = (1, size)
        scale, zero = torchao._choose_qparams_affine_tinygemm(
            matrix, torchao.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, **kinds
        )
        codes = torchao._quantize_affine_tinygemm(matrix, block, scale, zero, torch.int32, 0, 15)
        theirs = torchao._dequantize_affine_tinygemm(
            codes, block, scale, zero, torch.int32, 0, 15, output_dtype=torch.bfloat16
        ).float()
        weight = quantize(matrix, ONLINE[f"int4wo-{size}"])
        ours = dequantize(weight)
        step = weight.scale.float().repeat_interleave(size, dim=1)
        assert (
            (weight.scale.float() - scale.float().reshape(weight.scale.shape)).abs()
            <= weight.scale.float() / 128
        ).all()  # one bf16 step
        assert ((codes_of(weight) + 8 - codes).abs() <= 1).all()
        assert (
            (ours - theirs).abs() / step
        ).max() < 1.2  # one code, and what bf16 rounds off zero points and products
        assert ((ours - matrix.float()) / step).square().mean() < 1.08 * (
            (theirs - matrix.float()) / step
        ).square().mean()


def test_int8dq_inputs_are_symmetric_per_token_and_within_a_code_of_torchaos(inputs):
    """Torchao scales by amax / 127.5 in bf16, qtool by amax / 127 in f32, as engines do."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor

    kwargs = torchaos(
        torch.ones(32, 32, dtype=torch.bfloat16), Int8DynamicActivationInt8WeightConfig()
    ).act_quant_kwargs
    theirs = Int8Tensor.from_hp(
        inputs, granularity=kwargs.granularity, mapping_type=kwargs.mapping_type
    )
    assert theirs.scale.shape == (inputs.shape[0], 1)
    assert not theirs.zero_point.any()
    scale = inputs.float().abs().amax(-1, keepdim=True) / 127
    codes = fake_quantize_input(inputs.float(), ONLINE["int8dq"].activations) / scale
    assert ((codes - theirs.qdata).abs() < 1.01).all()


@pytest.mark.parametrize(
    ("name", "granularity"), [("fp8dq-per_tensor", "PerTensor"), ("fp8dq-per_row", "PerRow")]
)
def test_fp8dq_inputs_are_within_a_code_of_torchaos(inputs, name, granularity):
    """Torchao rounds the scale, amax / 448, to bf16."""
    from torchao import quantization

    theirs = quantization.Float8Tensor.from_hp(
        inputs, granularity=getattr(quantization, granularity)()
    )
    amax = (
        inputs.float().abs().amax()
        if granularity == "PerTensor"
        else inputs.float().abs().amax(-1, keepdim=True)
    )
    ours = fake_quantize_input(inputs.float(), ONLINE[name].activations) / (amax / 448)
    codes = ours.to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert ((codes - theirs.qdata.view(torch.uint8).int()).abs() <= 1).all()

"""What qtool writes is what vLLM, SGLang and transformers look for: names, shapes, dtypes, config
keys, and in transformers the same logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.samples import token_sequences

from qtool.checkpoint import open_checkpoint
from qtool.evaluation.perplexity import load_dequantized
from qtool.formats import WRITABLE, QuantizedModule, tensor_name
from qtool.scheme import SCHEMES, Scheme, Weights
from qtool.weight import Activation, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

N, K = 256, 384
SCALAR = (
    (),
    (1,),
    # a shard of a per-tensor parameter takes both: PerTensorScaleParameter._load_into_shard_id, in
    # both
    # engines
)
# parameters of these are filled by copy_, which converts
FLOAT = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)
FP8, BYTE, WORD = torch.float8_e4m3fn, torch.uint8, torch.int32
# of vLLM 0.33, `vllm/model_executor/`, and of SGLang 0.5.23, `python/sglang/srt/`
QUANTIZATION = "layers/quantization"


@dataclass(frozen=True)
class Loader:
    """What a linear layer of N outputs and K inputs is loaded from, as one engine's
    ``create_weights`` registers it.

    ``tensors``: suffix -> (dtype, shapes); FLOAT stands for any that is converted. ``keys``: paths
        in the config that ``from_config`` reads without a default, or with one that is wrong here.
    """

    scheme: str
    source: tuple[str, ...]  # file: class of create_weights, class of from_config
    tensors: dict[str, tuple[object, tuple[tuple[int, ...], ...]]]
    keys: tuple[str, ...]


NVFP4 = {
    "weight": (BYTE, ((N, K // 2),)),
    "weight_scale": (FP8, ((N, K // 16),)),
    "weight_scale_2": (FLOAT, SCALAR),
}
MODELOPT = [
    Loader(
        "FP8",
        (
            f"vLLM {QUANTIZATION}/modelopt.py: KFp8StaticTensor, ModelOptQuantConfigBase",
            f"SGLang {QUANTIZATION}/modelopt_quant.py: ModelOptFp8LinearMethod, ModelOptFp8Config",
        ),
        {
            "weight": (FP8, ((N, K),)),
            "weight_scale": (FLOAT, SCALAR),
            "input_scale": (FLOAT, SCALAR),
        },
        ("quant_method=modelopt", "quant_algo=FP8", "ignore"),
    ),
    Loader(
        "NVFP4",
        (
            f"vLLM {QUANTIZATION}/modelopt.py: KNvfp4Static and KNvfp4Dynamic, "
            "ModelOptNvFp4Config (inputs of null would make it W4A16_NVFP4)",
            f"SGLang {QUANTIZATION}/modelopt_quant.py: ModelOptFp4LinearMethod, ModelOptFp4Config",
        ),
        {**NVFP4, "input_scale": (FLOAT, SCALAR)},
        (
            *("quant_method=modelopt", "quant_algo=NVFP4", "ignore"),
            *(
                "config_groups.group_0.weights.group_size=16",
                "config_groups.group_0.input_activations.group_size=16",
            ),
        ),
    ),
    Loader(
        "NVFP4A16",
        (
            f"vLLM {QUANTIZATION}/modelopt.py: KNvfp4Static (and _DropInputScale for old files), "
            "ModelOptNvFp4Config",
            f"SGLang {QUANTIZATION}/modelopt_quant.py: ModelOptNvFp4A16LinearMethod (and an "
            "input_scale that is discarded), ModelOptFp4Config",
        ),
        NVFP4,
        (
            "quant_method=modelopt",
            "quant_algo=W4A16_NVFP4",
            "ignore",
            "config_groups.group_0.weights.group_size=16",
        ),
    ),
    Loader(
        "FP8_DYNAMIC",
        (f"vLLM {QUANTIZATION}/modelopt.py: KFp8StaticChannel, ModelOptQuantConfigBase",),
        {"weight": (FP8, ((N, K),)), "weight_scale": (FLOAT, ((N,),))},
        ("quant_method=modelopt", "quant_algo=FP8_PER_CHANNEL_PER_TOKEN", "ignore"),
    ),
    Loader(
        "FP8_BLOCK_W8A16",  # the config's name is upper-cased; both round inputs in groups of 128
        (f"vLLM {QUANTIZATION}/modelopt.py: KFp8Block128, ModelOptQuantConfigBase",),
        {"weight": (FP8, ((N, K),)), "weight_scale": (FLOAT, ((N // 128, 1, K // 128, 1),))},
        ("quant_method=modelopt", "quant_algo=fp8_pb_wo", "ignore"),
    ),
    Loader(
        "MXFP8",
        (f"vLLM {QUANTIZATION}/modelopt.py: KMxfp8Static, ModelOptMxFp8Config",),
        {"weight": (FP8, ((N, K),)), "weight_scale": (BYTE, ((N, K // 32),))},
        ("quant_method=modelopt", "quant_algo=MXFP8", "ignore"),
    ),
]
GROUP = "config_groups.group_0"
COMMON = (
    "quant_method=compressed-tensors",
    "ignore",
    f"{GROUP}.targets",
    f"{GROUP}.weights.num_bits",
    f"{GROUP}.weights.strategy",
)
PACKED = {
    "weight_packed": (WORD, ((N, K // 8),)),
    "weight_scale": (FLOAT, ((N, K // 128),)),
    "weight_shape": (torch.int64, ((2,),)),
}
SCHEMES_OF = f"{QUANTIZATION}/compressed_tensors/schemes/compressed_tensors"
BOTH = "vLLM and SGLang"
COMPRESSED = [
    Loader(
        "W4A16",
        (f"{BOTH} {SCHEMES_OF}_wNa16.py",),
        PACKED,
        (*COMMON, "format=pack-quantized", f"{GROUP}.weights.group_size=128"),
    ),
    Loader(
        "W4A16_ASYM",
        (f"{BOTH} {SCHEMES_OF}_wNa16.py",),
        {**PACKED, "weight_zero_point": (WORD, ((N // 8, K // 128),))},
        (*COMMON, "format=pack-quantized", f"{GROUP}.weights.symmetric=False"),
    ),
    Loader(
        "FP8_DYNAMIC",
        (f"{BOTH} {SCHEMES_OF}_w8a8_fp8.py",),
        {"weight": (FP8, ((N, K),)), "weight_scale": (FLOAT, ((N, 1),))},
        (
            *COMMON,
            "format=float-quantized",
            f"{GROUP}.input_activations.strategy=token",
            f"{GROUP}.input_activations.dynamic=True",
        ),
    ),
    Loader(
        "FP8",
        (f"{BOTH} {SCHEMES_OF}_w8a8_fp8.py",),
        {
            "weight": (FP8, ((N, K),)),
            "weight_scale": (FLOAT, SCALAR),
            "input_scale": (FLOAT, SCALAR),
        },
        (
            *COMMON,
            "format=float-quantized",
            f"{GROUP}.input_activations.strategy=tensor",
            f"{GROUP}.input_activations.dynamic=False",
        ),
    ),
    Loader(
        "FP8_BLOCK",
        (f"{BOTH} {SCHEMES_OF}_w8a8_fp8.py",),
        {"weight": (FP8, ((N, K),)), "weight_scale": (FLOAT, ((N // 128, K // 128),))},
        (
            *COMMON,
            "format=float-quantized",
            f"{GROUP}.weights.block_structure=[128, 128]",
            f"{GROUP}.input_activations.group_size=128",
        ),
    ),
    Loader(
        "NVFP4",
        (f"{BOTH} {SCHEMES_OF}_w4a4_nvfp4.py",),
        {
            **{"weight_packed": (BYTE, ((N, K // 2),)), "weight_scale": (FP8, ((N, K // 16),))},
            **{"weight_global_scale": (FLOAT, SCALAR), "input_global_scale": (FLOAT, SCALAR)},
        },
        (
            *COMMON,
            "format=nvfp4-pack-quantized",
            f"{GROUP}.weights.strategy=tensor_group",
            f"{GROUP}.input_activations.dynamic=local",
        ),
    ),
    Loader(
        "NVFP4A16",
        (f"vLLM {SCHEMES_OF}_w4a4_nvfp4.py with use_a16", f"SGLang {SCHEMES_OF}_w4a16_nvfp4.py"),
        {
            "weight_packed": (BYTE, ((N, K // 2),)),
            "weight_scale": (FP8, ((N, K // 16),)),
            "weight_global_scale": (FLOAT, SCALAR),
        },
        (*COMMON, "format=nvfp4-pack-quantized", f"{GROUP}.weights.strategy=tensor_group"),
    ),
    Loader(
        "MXFP4A16",
        (f"vLLM {SCHEMES_OF}_w4a4_mxfp4.py",),
        {"weight_packed": (BYTE, ((N, K // 2),)), "weight_scale": (BYTE, ((N, K // 32),))},
        (*COMMON, "format=mxfp4-pack-quantized", f"{GROUP}.weights.group_size=32"),
    ),
    Loader(
        "MXFP8",
        (f"vLLM {SCHEMES_OF}_w8a8_mxfp8.py",),
        {"weight": (FP8, ((N, K),)), "weight_scale": (BYTE, ((N, K // 32),))},
        (*COMMON, "format=mxfp8-quantized", f"{GROUP}.weights.group_size=32"),
    ),
    Loader(
        "W8A8",
        (f"{BOTH} {SCHEMES_OF}_w8a8_int8.py",),
        {"weight": (torch.int8, ((N, K),)), "weight_scale": (FLOAT, ((N, 1),))},
        (*COMMON, "format=int-quantized", f"{GROUP}.input_activations.strategy=token"),
    ),
]
FP8_METHOD = [
    Loader(
        "FP8_BLOCK",
        (f"{BOTH} {QUANTIZATION}/fp8.py: Fp8LinearMethod, Fp8Config",),
        {"weight": (FP8, ((N, K),)), "weight_scale_inv": (FLOAT, ((N // 128, K // 128),))},
        (
            "quant_method=fp8",
            "activation_scheme=dynamic",
            "weight_block_size=[128, 128]",
            "modules_to_not_convert",
        ),
    ),
    Loader(
        "FP8",
        (f"{BOTH} {QUANTIZATION}/fp8.py: Fp8LinearMethod, Fp8Config",),
        {
            "weight": (FP8, ((N, K),)),
            "weight_scale": (FLOAT, SCALAR),
            "input_scale": (FLOAT, SCALAR),
        },
        ("quant_method=fp8", "activation_scheme=static", "modules_to_not_convert"),
    ),
]
LOADERS = [
    (format, loader)
    for format, loaders in (
        ("modelopt", MODELOPT),
        ("compressed-tensors", COMPRESSED),
        ("fp8_block", FP8_METHOD),
    )
    for loader in loaders
]


@pytest.fixture(params=LOADERS, ids=lambda case: f"{case[0]}-{case[1].scheme}")
def case(request):
    """A loader, and what qtool writes for it: the tensors of a layer and the content of the JSON
    files.
    """
    format, loader = request.param
    weight, module = layer(
        "model.layers.0.mlp.down_proj",
        torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16(),
        loader.scheme,
    )
    assert WRITABLE[format].unsupported_reason(module, weight) is None
    return (
        loader,
        WRITABLE[format].write(module, weight),
        WRITABLE[format].quantization_config([module], ["lm_head"], None),
    )


def layer(name, tensor, scheme, variant=""):
    """Return (weight, module) of ``tensor`` rounded to nearest, its inputs as if calibrated to 0.01
    a step.
    """
    scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    weight = quantize(tensor, scheme)
    if scheme.activations and scheme.activations.needs_data:
        zero = None if scheme.activations.symmetric else torch.tensor(3.0)
        weight = replace(
            weight, activation=Activation(scheme.activations, torch.tensor(0.01), zero)
        )
    return weight, QuantizedModule(name, scheme, weight.shape, {}, variant)


def test_outputs_have_exactly_the_tensors_that_the_loaders_of_vllm_and_sglang_register(case):
    loader, tensors, _ = case
    assert tensors.keys() == loader.tensors.keys()
    for suffix, (dtype, shapes) in loader.tensors.items():
        assert tuple(tensors[suffix].shape) in shapes, suffix
        assert tensors[suffix].dtype in (dtype if isinstance(dtype, tuple) else (dtype,)), suffix


def test_configs_have_the_keys_that_the_loaders_of_vllm_and_sglang_read(case):
    loader, _, files = case
    for requirement in loader.keys:
        path, _, wanted = requirement.partition("=")
        value = files["config.json"]["quantization_config"]
        for key in path.split("."):
            assert key in value, requirement
            value = value[key]
        assert not wanted or str(value) == wanted, requirement
    assert "lm_head" in json.dumps(files)


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("modelopt", "FP8"),
        ("modelopt", "NVFP4"),
        ("compressed-tensors", "FP8"),
        ("compressed-tensors", "NVFP4"),
        ("fp8_block", "FP8"),
    ],
)
def test_a_weight_that_lacks_the_static_scale_of_its_inputs_is_objected_to(format, scheme):
    """Engines register the parameter and compute with what stands in it before: a sentinel in
    vLLM's FP8, memory as it was in its NVFP4.
    """
    weight = quantize(torch.randn(N, K), SCHEMES[scheme])
    assert WRITABLE[format].unsupported_reason(
        QuantizedModule("layer", SCHEMES[scheme], (N, K), {}), weight
    )


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_the_sidecar_of_nvfp4_names_its_group_cache_and_exclusions(scheme):
    """Source: vLLM 0.33, `modelopt.py`, ModelOptNvFp4Config._from_config; SGLang 0.5.23,
    `modelopt_quant.py`, ModelOptFp4Config.from_config.
    """
    _, module = layer("model.layers.0.mlp.down_proj", torch.randn(N, K), scheme)
    nested = WRITABLE["modelopt"].quantization_config([module], ["lm_head"], None)[
        "hf_quant_config.json"
    ]["quantization"]
    assert nested["group_size"] == 16
    assert nested["exclude_modules"] == ["lm_head"]
    assert nested["kv_cache_quant_algo"] is None


def test_a_mixed_modelopt_config_names_the_algorithm_of_every_layer():
    """Source: vLLM, `modelopt.py`, ModelOptMixedPrecisionConfig._from_config; SGLang,
    `modelopt_quant.py`, class and method of the same name.
    """
    modules = [
        layer(f"model.layers.0.mlp.{name}", torch.randn(N, K), scheme)[1]
        for name, scheme in (("up_proj", "NVFP4"), ("down_proj", "FP8"))
    ]
    for config in (files := WRITABLE["modelopt"].quantization_config(modules, [], "fp8")).values():
        config = config.get("quantization_config") or config["quantization"]
        assert config["quant_algo"] == "MIXED_PRECISION"
        layers = config["quantized_layers"]
        assert {name: options["quant_algo"] for name, options in layers.items()} == {
            modules[0].name: "NVFP4",
            modules[1].name: "FP8",
        }
        assert layers[modules[0].name]["group_size"] == 16
    assert files["config.json"]["quantization_config"]["kv_cache_scheme"] == {
        "dynamic": False,
        "num_bits": 8,
        "type": "float",
    }


# transformers


@pytest.fixture
def export(tmp_path):
    """A function that writes the first two layers of the tiny model in a format and a scheme, with
    scales of some dtype.
    """

    def write(format, scheme, scales=torch.bfloat16, dtype=torch.bfloat16, variant=""):
        whole = load_file(EXAMPLE / "model.safetensors")
        state = {
            name: tensor.to(dtype)
            for name, tensor in whole.items()
            if not any(f"layers.{i}." in name for i in range(2, 6))
        }
        modules = []
        for name in [name for name in state if name.endswith("_proj.weight")]:
            weight, module = layer(
                name.removesuffix(".weight"), state.pop(name).to(scales), scheme, variant
            )
            assert WRITABLE[format].unsupported_reason(module, weight) is None
            state |= {
                tensor_name(module, suffix): tensor.clone()
                for suffix, tensor in WRITABLE[format].write(module, weight).items()
            }
            modules.append(module)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        files = WRITABLE[format].quantization_config(modules, ["lm_head"], None)
        config = json.loads((EXAMPLE / "config.json").read_text()) | {
            "num_hidden_layers": 2,
            "dtype": str(dtype).removeprefix("torch."),
        }
        for name, content in (files | {"config.json": config | files["config.json"]}).items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def prompt():
    return torch.tensor(token_sequences("evaluation.jsonl", 1, 32))


def load(folder, dtype):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def difference(folder, prompt, dtype):
    """Return by how much transformers' logits differ from those of the dequantized model, relative
    to their size.
    """
    with torch.inference_mode():
        ours, theirs = (
            model(prompt, use_cache=False).logits.float()
            for model in (
                load_dequantized(open_checkpoint(folder), dtype=dtype),
                load(folder, dtype),
            )
        )
    assert theirs.isfinite().all()
    return ((ours - theirs).norm() / ours.norm()).item()


WEIGHT_ONLY = ["W4A16", "W4A16_ASYM", "W8A16_CHANNEL", "W3A16", "FP8_W8A16", "FP8_BLOCK_W8A16"]
ROUNDED_INPUTS = ["FP8_DYNAMIC", "FP8", "FP8_BLOCK"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ROUNDED_INPUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_transformers_computes_the_same_logits_from_compressed_tensors(export, prompt, name, dtype):
    found = difference(export("compressed-tensors", name, dtype, dtype), prompt, dtype)
    # there the library finds the scales of inputs in 16 bits
    if dtype == torch.float16 and name in ROUNDED_INPUTS:
        assert found < 0.04
    else:
        assert found == 0


SCALES_IN_16_BITS = [*WEIGHT_ONLY, "NVFP4A16", "MXFP4A16", "MXFP8A16", "MXFP4", "MXFP8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scales"),
    [
        *((name, torch.bfloat16) for name in SCALES_IN_16_BITS[::3]),
        *((name, torch.float16) for name in SCALES_IN_16_BITS[::2]),
        *((name, torch.float32) for name in SCALES_IN_16_BITS[1::2]),
    ],
    ids=str,
)
def test_transformers_loads_scales_of_any_dtype_into_a_bf16_model(export, prompt, name, scales):
    found = difference(export("compressed-tensors", name, scales), prompt, torch.bfloat16)
    if (scales == torch.bfloat16 and not name.startswith("NVFP4")) or name.startswith("MX"):
        assert found == 0
    # transformers rounds other scales to bf16 when it loads them, and qtool the product; the
    # divisor of NVFP4 costs a rounding
    else:
        assert found < 0.01


@pytest.mark.parametrize(
    ("name", "at_most"),
    # it takes amax / 127.5 for inputs, or finds their scales in bf16
    [
        ("W8A8", 0.03),
        ("W8A8_STATIC", 0.001),
        ("NVFP4", 0.15),
    ],
)
def test_transformers_rounds_inputs_about_as_qtool_simulates(export, prompt, name, at_most):
    dtype = torch.bfloat16 if name == "NVFP4" else torch.float32
    assert difference(export("compressed-tensors", name, dtype, dtype), prompt, dtype) < at_most


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_transformers_computes_fp4_and_mx_weights_in_bf16_models_only(export, prompt, name):
    """Compressed-tensors 0.19 decompresses these to bf16 whatever the model is: a limit of the
    library that users of float16 models meet.
    """
    with pytest.raises(RuntimeError, match="same dtype"):
        difference(
            export("compressed-tensors", name, torch.float16, torch.float16), prompt, torch.float16
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "variant", "symmetric"),
    [
        (2, "gptq", True),
        (3, "gptq", False),
        (8, "gptq", True),
        (8, "gptq_v2", False),
        (4, "gptq", False),
    ],
)
def test_transformers_computes_the_same_logits_from_gptq(
    export, prompt, bits, variant, symmetric, monkeypatch
):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    scheme = Scheme(Weights(f"int{bits}", "group", 128, symmetric=symmetric))
    # its kernels round to 16 bits
    assert (
        difference(
            export("gptq", scheme, torch.float16, torch.float16, variant), prompt, torch.float16
        )
        < 0.01
    )

"""Every architecture of transformers' causal language models that stands on `nn.Linear`: a tiny
random one, quantized, loaded, compared.
"""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qtool
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.evaluation.perplexity import load_dequantized
from qtool.runtime.experts.grouped import KERNELS as EXPERTS_KERNELS
from qtool.runtime.experts.grouped import GroupedExperts
from qtool.runtime.experts.per_expert import ExpertStack
from qtool.runtime.kernels import KERNELS, Choice, LinearSpec, cached_choice
from qtool.runtime.linear import QuantizedLinear
from qtool.runtime.load import load
from qtool.scheme import SCHEMES
from qtool.weight import dequantize, fake_quantize_input, quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*are dequantized at every step"),
]
pytest_plugins = ["support.sample_plugin"]

SIZES = {
    **{
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    **{
        "vocab_size": 320,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
USUAL = (  # those that differ in their norms, biases, rotations or fused layers
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "granite"),
    *("starcoder2", "cohere2", "glm4", "nemotron", "apertus", "gpt_neox"),
)
DENSE: dict[str, dict[str, object]] = {
    **{model_type: {} for model_type in USUAL},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "falcon": {"head_dim": None},
    "bloom": {"n_head": 4},
}
EXPERTS: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 8},
    "minimax": {"num_local_experts": 8},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 128, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8},
    "glm4_moe": {"n_routed_experts": 8, "moe_intermediate_size": 128, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_intermediate_size": 128},
    "deepseek_v3": {
        **{
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        **{
            "kv_lora_rank": 128,
            "q_lora_rank": 128,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    },
}
IDS = torch.arange(3, 27)[None] * 7 % 317


def make(folder, model_type: str, sizes: dict[str, object]):
    """Write a random model of ``model_type`` whose logits depend on all of its layers; return its
    folder.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{key: value for key, value in (SIZES | sizes).items() if value is not None}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.06)
    model.save_pretrained(folder / "plain")
    return folder / "plain"


@torch.inference_mode()
def distance(model, reference) -> float:
    """Relative distance of the logits of two models."""
    got, expected = model(input_ids=IDS).logits.float(), reference(input_ids=IDS).logits.float()
    assert torch.isfinite(expected).all()
    return float((got - expected).norm() / expected.norm())


@contextlib.contextmanager
def only_plain():
    """Let the plain kernel multiply, which is exact: another order of a sum moves a code of the
    next input, or sends a token to another expert.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "cpu", ("reference",))
        patch.setitem(EXPERTS_KERNELS, "cpu", ("reference",))
        cached_choice.cache_clear()
        yield
    cached_choice.cache_clear()


@pytest.fixture
def plain_kernel():
    with only_plain():
        yield


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", DENSE)
def test_dense_models_equal_their_dequantized_form(tmp_path, model_type):
    plain = make(tmp_path, model_type, DENSE[model_type])
    for format, scheme in (("compressed-tensors", "FP8_DYNAMIC"), ("gptq", "W4A16")):
        qtool.export(plain, output=tmp_path / scheme, to=format, requantize=True, scheme=scheme)
        reference = load_dequantized(open_checkpoint(tmp_path / scheme))
        with only_plain():
            model = load(tmp_path / scheme, device="cpu")
        # q|k|v, o, gate|up, down
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2 * 4
        assert distance(model, reference) < 1e-3
        # which sees whether anything was quantized
        assert distance(reference, load(plain, device="cpu")) > 0.02
    assert distance(load(tmp_path / "W4A16", device="cpu"), reference) < 0.02


@pytest.mark.parametrize("model_type", EXPERTS)
@pytest.mark.usefixtures("plain_kernel")
def test_mixtures_of_experts_equal_their_dequantized_form(tmp_path, model_type):
    plain = make(tmp_path, model_type, EXPERTS[model_type])
    for format, scheme in (("compressed-tensors", "FP8_W8A16"), ("gptq", "W8A16")):
        qtool.export(plain, output=tmp_path / scheme, to=format, requantize=True, scheme=scheme)
        model = load(tmp_path / scheme, device="cpu")
        packed = [module for module in model.modules() if isinstance(module, GroupedExperts)]
        assert {experts.spec.count for experts in packed} == {8}
        assert distance(model, load_dequantized(open_checkpoint(tmp_path / scheme))) < 0.02


def test_a_mixture_of_experts_is_quantized_while_it_loads(tmp_path):
    plain = make(tmp_path, "mixtral", EXPERTS["mixtral"])
    online = load(plain, device="cpu", quantization="fp8wo")
    qtool.export(
        plain, output=tmp_path / "out", to="compressed-tensors", requantize=True, scheme="FP8_W8A16"
    )
    assert distance(online, load(tmp_path / "out", device="cpu")) == 0


@pytest.mark.usefixtures("plain_kernel")
def test_experts_of_which_some_are_plain_are_right(tmp_path):
    """Of each expert w1 is quantized, w3, whose outputs lie beside those of w1, is not."""
    from safetensors.torch import load_file, save_file

    plain = make(tmp_path, "mixtral", EXPERTS["mixtral"])
    qtool.export(
        plain, output=tmp_path / "out", to="compressed-tensors", requantize=True, scheme="FP8_W8A16"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in [name for name in tensors if ".w3." in name]:
        del tensors[name]
    originals = load_file(plain / "model.safetensors")
    save_file(
        tensors | {name: tensor for name, tensor in originals.items() if ".w3." in name},
        tmp_path / "out" / "model.safetensors",
    )
    (tmp_path / "out" / "qtool-manifest.json").unlink(missing_ok=True)
    assert (
        distance(
            load(tmp_path / "out", device="cpu"),
            load_dequantized(open_checkpoint(tmp_path / "out")),
        )
        < 0.02
    )


@pytest.mark.parametrize("missing", ["experts.3.", "experts.7.", "experts.3.w3"])
def test_an_expert_that_is_missing_is_missed(tmp_path, missing):
    from safetensors.torch import load_file, save_file

    plain = make(tmp_path, "mixtral", EXPERTS["mixtral"])
    qtool.export(
        plain, output=tmp_path / "out", to="compressed-tensors", requantize=True, scheme="FP8_W8A16"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not ("layers.0." in name and missing in name)
    }
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointRefused) as error:
        load(tmp_path / "out", device="cpu")
    assert error.value.code == "E_TENSORS"
    assert f"expert {missing.split('.')[1]}" in error.value.message


@pytest.mark.usefixtures("plain_kernel")
def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    from safetensors.torch import load_file, save_file

    plain = make(tmp_path, "deepseek_v3", EXPERTS["deepseek_v3"])
    expected = load(plain, device="cpu", quantization="fp8wo")
    tensors = load_file(plain / "model.safetensors")
    more = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    save_file(tensors | more, plain / "model.safetensors")
    with pytest.warns(RuntimeWarning, match="multi-token prediction"):
        model = load(plain, device="cpu", quantization="fp8wo")
    assert distance(model, expected) == 0


def test_layers_whose_weights_the_model_multiplies_with_itself_stay_plain(tmp_path):
    plain = make(
        tmp_path, "mamba", {"state_size": 8, "time_step_rank": 8, "expand": 2, "head_dim": None}
    )
    with pytest.warns(RuntimeWarning, match="the model reads directly"):
        model = load(plain, device="cpu", quantization="int8wo")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert distance(model, load(plain, device="cpu")) < 0.1


def test_a_model_that_needs_data_to_run_is_not_fused(tmp_path, monkeypatch):
    from qtool.runtime.skeleton import Skeleton

    plain = make(tmp_path, "llama", {})
    expected = load(plain, device="cpu", quantization="fp8wo")

    def trace(self):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(Skeleton, "trace", trace)
    with pytest.warns(RuntimeWarning, match="not fused"):
        model = load(plain, device="cpu", quantization="fp8wo")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2 * 7
    assert distance(model, expected) < 0.01


@pytest.mark.usefixtures("plain_kernel")
def test_stacked_mxfp4_experts_are_right(tmp_path):
    """gpt-oss: transposed in the model, with biases, all experts of a layer in one tensor of the
    file.
    """
    from safetensors.torch import load_file, save_file

    sizes = {"num_local_experts": 8, "layer_types": ["sliding_attention", "full_attention"]}
    plain = make(tmp_path, "gpt_oss", sizes)
    tensors = load_file(plain / "model.safetensors")
    rounded, packed = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        weight = quantize(tensors[name].transpose(1, 2).reshape(-1, inputs), SCHEMES["MXFP4A16"])
        rounded[name] = (
            dequantize(weight, torch.bfloat16)
            .reshape(experts, outputs, inputs)
            .transpose(1, 2)
            .contiguous()
        )
        del packed[name]
        packed[f"{name}_blocks"] = weight.data.reshape(experts, outputs, inputs // 32, 16)
        packed[f"{name}_scales"] = weight.scale.view(torch.uint8).reshape(
            experts, outputs, inputs // 32
        )
    config = (plain / "config.json").read_text()
    for folder, content, extra in (
        ("rounded", rounded, ""),
        ("packed", packed, '"quantization_config": {"quant_method": "mxfp4"},'),
    ):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(config.replace("{", "{" + extra, 1))
    assert (
        distance(load(tmp_path / "packed", device="cpu"), load(tmp_path / "rounded", device="cpu"))
        < 0.01
    )
    assert distance(load(tmp_path / "packed", device="cpu"), load(plain, device="cpu")) > 0.01


def test_an_expert_rounds_its_input_as_its_scheme_says():
    scheme, weight = SCHEMES["FP8_DYNAMIC"], torch.randn(64, 96, dtype=torch.bfloat16)
    rounded = quantize(weight, scheme)
    spec = LinearSpec(scheme, (64, 96), torch.bfloat16)
    stack = ExpertStack([[QuantizedLinear(spec, Choice("reference", {}), rounded)]])
    x, bias = torch.randn(5, 96, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(
        fake_quantize_input(x, scheme.activations), dequantize(rounded, torch.bfloat16)
    )
    assert torch.equal(torch.nn.functional.linear(x, stack[0]), expected)
    assert torch.equal(x @ stack[torch.tensor(0)], expected)
    assert torch.equal(torch.nn.functional.linear(x, stack[0], bias), expected + bias)
    with pytest.raises(TypeError):
        torch.add(x, stack[0])

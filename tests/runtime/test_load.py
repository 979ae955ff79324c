"""Checkpoints as models that run: what is fused, what kernels get, what memory it takes, and that
the numbers are those of the dequantized model.
"""

import copy
import io
import json
import subprocess
import sys
import threading
import warnings
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.samples import token_sequences
from transformers import AutoModelForCausalLM

import qtool
from qtool.checkpoint import open_checkpoint
from qtool.cli import output
from qtool.cli.app import run
from qtool.errors import CheckpointRefused, ResourceError, UsageError
from qtool.evaluation.perplexity import load_dequantized, perplexity
from qtool.runtime import load as loading
from qtool.runtime.kernels import KERNELS, cached_choice
from qtool.runtime.linear import FusedLinear, QuantizedLinear
from qtool.runtime.load import load
from qtool.runtime.load_plan import plan_load
from qtool.scheme import SCHEMES
from qtool.weight import quantize

pytest_plugins = ["support.sample_plugin"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*are dequantized at every step"),
]

TEXTS = token_sequences("evaluation.jsonl", 2, 256)
IDS = torch.tensor([TEXTS[0][:48]])
CPU = torch.device("cpu")


def fused(model) -> Counter[int]:
    """How many quantized matrices serve how many layers each."""
    owners = Counter(
        id(module.shared.whole) for module in model.modules() if isinstance(module, FusedLinear)
    )
    alone = sum(isinstance(module, QuantizedLinear) for module in model.modules()) - len(owners)
    return Counter(owners.values()) + Counter({1: alone})


@torch.inference_mode()
def distance(model, reference) -> float:
    """Relative distance of the logits of two models."""
    got, expected = model(input_ids=IDS).logits.float(), reference(input_ids=IDS).logits.float()
    return float((got - expected).norm() / expected.norm())


SAMPLES = {
    "ct": [
        "W8A8",
        "W4A16_ASYM",
        "W3A16",
        "FP8_BLOCK",
        "NVFP4",
        "MXFP8",
        "mixed",
    ],
    "gptq": ["rtn4"],
    "modelopt": ["FP8_KV", "INT8_SQ", "W4A8_AWQ"],
}


@pytest.mark.parametrize(
    "name", [f"{library}/{name}" for library, names in SAMPLES.items() for name in names]
)
def test_real_checkpoints_have_the_perplexity_of_their_dequantized_form(sample, name):
    folder = sample(name)
    checkpoint = open_checkpoint(folder)
    expected = perplexity(load_dequantized(checkpoint), TEXTS)
    rounds_inputs = any(
        group.spec.scheme.activations for group in plan_load(checkpoint, CPU).groups
    )
    # where a sum is rounded another way, codes of the next input fall to the other side
    tolerance = 0.01 if rounds_inputs else 2e-3
    assert perplexity(load(folder, device="cpu"), TEXTS) == pytest.approx(expected, rel=tolerance)


def test_layers_that_share_an_input_are_one_matrix(sample):
    model = load(sample("ct/W4A16"), device="cpu")
    layers = model.config.num_hidden_layers
    assert fused(model) == {3: layers, 2: layers, 1: 2 * layers}


def test_layers_of_different_precision_are_not_fused(sample):
    plan = plan_load(open_checkpoint(sample("ct/mixed")), CPU)
    assert {len({source.scheme for source in group.sources}) for group in plan.groups} == {1}
    assert len({group.spec.scheme for group in plan.groups}) > 1


def test_an_unknown_device_and_a_missing_one_are_refused():
    for device, kind, code in (
        ("gpu", UsageError, "E_DEVICE"),
        ("mps", UsageError, "E_DEVICE"),
        ("cuda:7", ResourceError, "E_NO_DEVICE"),
    ):
        with pytest.raises(kind) as error:
            load(EXAMPLE, device=device)
        assert error.value.code == code


def test_a_plain_model_loads_as_transformers_loads_it():
    model = qtool.load(EXAMPLE, device="cpu")
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16)(
            input_ids=IDS
        ).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization", ["fp8", "w8a8_int8", "int8wo", "int4wo-32", "nvfp4", "mxfp4", "fp8_block"]
)
def test_a_plain_model_is_quantized_while_it_loads(quantization):
    model = qtool.load(EXAMPLE, device="cpu", quantization=quantization)
    assert fused(model)[3] == model.config.num_hidden_layers
    assert 1e-3 < distance(model, qtool.load(EXAMPLE, device="cpu")) < 0.25


def test_generate_works_on_the_model(sample):
    model = qtool.load(sample("ct/W4A16"), device="cpu")
    out = model.generate(IDS[:, :8], max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 14)
    assert torch.equal(
        out,
        load_dequantized(open_checkpoint(sample("ct/W4A16"))).generate(
            IDS[:, :8], max_new_tokens=6, do_sample=False
        ),
    )


def test_the_model_compiles_whole(sample):
    model = load(sample("ct/W4A16"), device="cpu")
    torch._dynamo.reset()
    decoder = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="eager")
    x = torch.randn(1, 4, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(decoder(x), model.model.layers[0].mlp(x))


def test_a_layer_that_no_kernel_takes_is_told_of_once(sample, monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", ("int4pack", "reference"))
    cached_choice.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(sample("ct/MXFP4"), device="cpu")
    mine = [
        str(warning.message)
        for warning in said
        if "dequantized at every step" in str(warning.message)
    ]
    cached_choice.cache_clear()
    assert len(mine) == 1
    assert "MXFP4" in mine[0]


def test_layers_keep_their_bias(tmp_path, sample):
    """q_proj gets a bias; those of k_proj and v_proj, fused with it, are zeros."""
    source = sample("ct/W8A16")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"attention_bias": True}
    layers = [
        name.removesuffix(".weight_packed")
        for name in tensors
        if "self_attn" in name and name.endswith("weight_packed")
    ]
    zeros = {
        f"{name}.bias": torch.zeros(int(tensors[f"{name}.weight_shape"][0]), dtype=torch.bfloat16)
        for name in layers
    }
    biases = {
        name: torch.randn_like(zero) * 0.5 for name, zero in zeros.items() if "q_proj" in name
    }
    assert distance_from(tmp_path / "all", tensors | zeros | biases, config, source) > 0.01


def distance_from(folder, tensors, config, other) -> float:
    """Write a checkpoint, and return how far its logits are from those of another."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return distance(load(folder, device="cpu"), load(other, device="cpu"))


def test_tensors_that_the_model_has_no_place_for_are_refused(tmp_path, sample):
    folder = tmp_path / "odd"
    folder.mkdir()
    tensors = load_file(sample("ct/W8A16") / "model.safetensors")
    tensors["model.layers.0.mlp.fourth_proj.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((sample("ct/W8A16") / "config.json").read_text())
    with pytest.raises(CheckpointRefused) as error:
        load(folder, device="cpu")
    assert error.value.code == "E_TENSORS"
    assert "fourth_proj" in error.value.message


def test_an_architecture_that_transformers_does_not_know_is_refused(tiny_copy):
    config = json.loads((tiny_copy / "config.json").read_text()) | {
        "model_type": "llamma",
        "architectures": ["LlammaForCausalLM"],
    }
    (tiny_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused) as error:
        load(tiny_copy, device="cpu")
    assert error.value.code == "E_ARCHITECTURE"


def test_gradients_may_be_on(sample):
    """As they are when nobody thinks of turning them off."""
    model = load(sample("ct/W8A8"), device="cpu")
    assert not model(input_ids=IDS).logits.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["ct/NVFP4A16", "ct/W8A8", "ct/FP8", "ct/W4A16"])
def test_casts_leave_quantized_layers_as_they_are(sample, name):
    model = load(sample(name), device="cpu")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    x = torch.randn(3, layers[0].in_features, dtype=torch.bfloat16)
    expected = layers[0](x)
    for cast in (
        lambda: model.to(torch.bfloat16),
        lambda: model.to("cpu"),
        model.half,
        model.float,
    ):
        cast()
        assert torch.equal(layers[0](x), expected)
    assert torch.equal(copy.deepcopy(layers[0])(x), expected)
    assert layers[0](x.float()).dtype == torch.float32
    assert distance(model, load(sample(name), device="cpu")) < 0.05


def test_a_packed_model_cannot_be_saved_or_moved_to_another_kind_of_device(sample, tmp_path):
    model = load(sample("ct/W4A16"), device="cpu")
    for action in (lambda: model.save_pretrained(tmp_path / "saved"), lambda: model.to("meta")):
        with pytest.raises(UsageError) as error:
            action()
        assert error.value.code == "E_PACKED"
        assert error.value.hint


def test_generation_settings_come_along(tiny_copy):
    (tiny_copy / "generation_config.json").write_text(
        '{"eos_token_id": [5, 6], "temperature": 0.3, "do_sample": true}'
    )
    settings = load(tiny_copy, device="cpu").generation_config
    assert (settings.eos_token_id, settings.temperature, settings.do_sample) == ([5, 6], 0.3, True)


def test_code_of_the_checkpoint_is_not_run(tiny_copy, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = json.loads((tiny_copy / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig"},
    }
    (tiny_copy / "config.json").write_text(json.dumps(config))
    (tiny_copy / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(CheckpointRefused) as error:
        load(tiny_copy, device="cpu")
    assert error.value.code == "E_ARCHITECTURE"


def test_scales_of_a_kv_cache_are_said_not_to_be_used(sample):
    with pytest.warns(RuntimeWarning, match="KV cache"):
        load(sample("modelopt/FP8_KV"), device="cpu")


def test_a_quantized_head_of_tied_embeddings_is_a_head_of_its_own(tmp_path):
    qtool.export(
        EXAMPLE,
        output=tmp_path / "out",
        to="compressed-tensors",
        requantize=True,
        scheme="FP8_W8A16",
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = quantize(embedding, SCHEMES["FP8_W8A16"])
    tensors |= {"lm_head.weight": head.data, "lm_head.weight_scale": head.scale}
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    for tied in (True, False):
        (tmp_path / "out" / "config.json").write_text(
            json.dumps(config | {"tie_word_embeddings": tied})
        )
        model = load(tmp_path / "out", device="cpu")
        assert isinstance(model.lm_head, QuantizedLinear)
        assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_layers_are_built_while_a_large_unquantized_tensor_is_read(monkeypatch):
    read, built = loading.read_checked, threading.Event()

    def read_late(plan, name):
        if name == "model.embed_tokens.weight":
            assert built.wait(60)
        return read(plan, name)

    def on_progress(done: int, _: int) -> None:
        if done == 3:
            built.set()

    monkeypatch.setattr(loading, "read_checked", read_late)
    monkeypatch.setattr(loading, "READERS", 2)
    options = {"device": "cpu", "quantization": "fp8wo"}
    model = load(EXAMPLE, **options, on_progress=on_progress)
    again = load(EXAMPLE, **options)
    assert built.is_set() and fused(model) == fused(again)
    assert distance(model, again) == 0


MEMORY = """
import sys, torch, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from qtool.checkpoint import open_checkpoint
from qtool.runtime.load import materialize
from qtool.runtime.load_plan import plan_load

def status(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

warm_up = materialize(plan_load(open_checkpoint(Path(sys.argv[1])), torch.device("cpu")))
plan = plan_load(open_checkpoint(Path(sys.argv[2])), torch.device("cpu"))
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = status("VmRSS")
model = materialize(plan)
tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
size = sum(tensor.nbytes for tensor in tensors.values())
layers = plan.layout.modules
group = max(
    sum(layers[source.name].size_bytes for source in group.sources) for group in plan.groups
)
print(status("VmHWM") - before, size, group)
"""


@pytest.mark.exhaustive
def test_loading_holds_the_model_a_tenth_more_and_one_group(tmp_path, sample):
    """Measured in a process of its own, on a model of 150 to 200 MB."""
    scheme = "W4A16"
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=128)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    model.save_pretrained(tmp_path / "plain")
    del model
    qtool.export(
        tmp_path / "plain",
        output=tmp_path / "quantized",
        to="compressed-tensors",
        requantize=True,
        scheme=scheme,
    )
    command = [sys.executable, "-c", MEMORY, sample("ct/W4A16"), tmp_path / "quantized"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, size, group = map(int, said.split())
    assert size > 150e6
    assert peak < 1.1 * size + group


# The command


def test_serve_shows_the_kernel_of_each_layer_and_who_refused_it(run_cli, sample, monkeypatch):
    result = run_cli(
        "serve",
        "--model-path",
        sample("ct/MXFP4"),
        "--dry-run",
        "--skip-tokenizer-init",
        "--device",
        "cpu",
        "--json",
        env={"CC": "false"},
    )
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["device"] == "cpu"
    assert {group["kernel"] for group in found["groups"]} == {"reference"}
    assert all(group["refused"] for group in found["groups"])
    assert "dequantized at every step" in result.stderr
    path = str(sample("ct/W4A16"))
    shown = io.StringIO()
    monkeypatch.setattr(output, "_outcome", output.Outcome(shown))
    options = ["--dry-run", "--device", "cpu", "--skip-tokenizer-init"]
    assert run(["serve", "--model-path", path, *options]) == 0
    assert "gate_proj | up_proj" in shown.getvalue()

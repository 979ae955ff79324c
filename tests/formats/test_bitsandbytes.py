"""What bitsandbytes and transformers write is read as they mean it, and what is wrong is refused."""

import json
import logging

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.published import PUBLISHED
from support.published.bnb import config, four_bits, int8
from support.published.models import llama, qwen3_moe, write
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qtool
from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.evaluation.perplexity import load_dequantized, perplexity
from qtool.inspection import inspect
from qtool.weight import dequantize

SAVED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4 as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
LAYER = "model.layers.0.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: the name of a config in `SAVED` to the example as transformers saves it."""
    folders = {}

    def save(name):
        if name not in folders:
            model = AutoModelForCausalLM.from_pretrained(
                EXAMPLE,
                quantization_config=BitsAndBytesConfig(**SAVED[name]),
                dtype=torch.bfloat16,
            )
            folders[name] = tmp_path_factory.mktemp("saved") / "model"
            model.save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.mark.parametrize("name", SAVED)
def test_weights_equal_those_that_bitsandbytes_dequantizes(saved, name):
    checkpoint = open_checkpoint(saved(name))
    layout = formats.detect(checkpoint)
    assert len(layout.modules) == 42 and formats.check_values(checkpoint, layout) == []
    tensors = load_file(saved(name) / "model.safetensors")
    for layer in layout.modules:
        weight = formats.read(checkpoint, layout, layer)
        codes = tensors[f"{layer}.weight"]
        if name == "int8":
            expected = bnb.int8_vectorwise_dequant(codes, tensors[f"{layer}.SCB"])
            in_16_bits = expected.bfloat16()
        else:
            parts = {
                key.removeprefix(f"{layer}.weight."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{layer}.weight.")
            }
            state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
            in_16_bits = bnb.dequantize_4bit(codes, state)
            state.dtype = torch.float32
            expected = bnb.dequantize_4bit(codes, state)
        assert torch.equal(dequantize(weight), expected)
        assert torch.equal(dequantize(weight, torch.bfloat16), in_16_bits)


@pytest.mark.parametrize("name", ["nf4 double", "int8"])
def test_perplexity_is_that_of_transformers(saved, name, caplog):
    caplog.set_level(logging.ERROR)  # bitsandbytes warns of each cast
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    lines = (EXAMPLE / "evaluation.jsonl").read_text().splitlines()[:8]
    tokens = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    theirs = AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.bfloat16).eval()
    ours = load_dequantized(open_checkpoint(saved(name)))
    assert perplexity(ours, tokens, 256) == pytest.approx(perplexity(theirs, tokens, 256), rel=1e-3)


@pytest.mark.parametrize(("rows", "columns", "block"), [(48, 96, 64), (6, 100, 64), (4, 64, 4096)])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_may_reach_over_rows(tmp_path, rows, columns, block, nested):
    """The definition is compared: with AVX512, bitsandbytes 0.50 begins a block with each row."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(
        x, blocksize=block, quant_type="nf4", compress_statistics=nested
    )
    parts = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    tensors = {f"{LAYER}.{key}": part for key, part in {"weight": packed, **parts}.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "of its own", "quantization_config": config()})
    )
    checkpoint = open_checkpoint(tmp_path)
    layout = formats.detect(checkpoint)
    found = dequantize(formats.read(checkpoint, layout, LAYER))
    scale = state.absmax
    if nested:
        scale = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.cat((packed >> 4, packed & 15), dim=1).flatten().int()
    expected = state.code[codes] * scale.repeat_interleave(block)[: codes.numel()]
    assert torch.equal(found, expected.reshape(rows, columns))


def test_experts_that_transformers_leaves_in_16_bits_stay_there(tmp_path):
    """transformers 5 stacks experts, and bitsandbytes takes linear layers alone."""
    write(tmp_path / "plain", qwen3_moe(), {}, None)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=BitsAndBytesConfig(**SAVED["nf4 double"]),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(tmp_path / "model")
    layout = formats.detect(open_checkpoint(tmp_path / "model"))
    assert {name.rpartition(".")[2] for name in layout.modules} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    x = torch.arange(20)[None]
    ours = load_dequantized(open_checkpoint(tmp_path / "model"))(input_ids=x).logits
    theirs = model.eval()(input_ids=x).logits
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


# --- what is wrong


def broken(folder, change):
    """A Llama with NF4 layers whose quantized scales are read, after ``change`` of its tensors."""
    write(folder, llama(), {LAYER: lambda weight: four_bits(weight, nested=True)}, config())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def state(**fields):
    """A change of the JSON of the layer; a field of ... is left out."""

    def change(tensors):
        found = json.loads(bytes(tensors[STATE].tolist())) | fields
        found = {key: value for key, value in found.items() if value is not ...}
        tensors[STATE] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def tensor(suffix, value):
    def change(tensors):
        tensors.pop(f"{LAYER}.{suffix}")
        if value is not None:
            tensors[f"{LAYER}.{suffix}"] = value

    return change


def text(content):
    return tensor(
        "weight.quant_state.bitsandbytes__nf4", torch.tensor(list(content), dtype=torch.uint8)
    )


WRONG = {
    "type": (state(quant_type="nf5"), "E_QUANT_STATE", "quant_type"),
    "type of another name": (state(quant_type="fp4"), "E_QUANT_STATE", "fp4"),
    "type that is a list": (state(quant_type=[]), "E_QUANT_STATE", "quant_type"),
    "block of 0": (state(blocksize=0), "E_QUANT_STATE", "blocksize"),
    "block of 2^63": (state(blocksize=1 << 63), "E_QUANT_STATE", "blocksize"),
    "block that is true": (state(blocksize=True), "E_QUANT_STATE", "blocksize"),
    "no shape": (state(shape=None), "E_QUANT_STATE", "shape"),
    "shape of 2^40": (state(shape=[1 << 40, 1]), "E_QUANT_STATE", "shape"),
    "shape of three": (state(shape=[1, 384, 256]), "E_QUANT_STATE", "shape"),
    "shape of another matrix": (state(shape=[384, 512]), "E_TENSOR_SHAPE", "384 x 512"),
    "odd inputs": (state(shape=[32768, 3]), "E_KERNEL_LAYOUT", "3 inputs"),
    "offset that is NaN": (state(nested_offset=float("nan")), "E_", ""),
    "offset beyond float32": (state(nested_offset=10**400), "E_QUANT_STATE", "nested_offset"),
    "dtype that is a list": (state(dtype=[1]), "E_QUANT_STATE", "dtype"),
    "offset that is text": (state(nested_offset="0"), "E_QUANT_STATE", "nested_offset"),
    "half of the nested keys": (state(nested_offset=...), "E_QUANT_STATE", "keys"),
    "another key": (state(rank=1), "E_QUANT_STATE", "rank"),
    "another dtype of scales": (state(nested_dtype="float16"), "E_QUANT_STATE", "nested_dtype"),
    "no JSON": (text(b"{"), "E_JSON_SYNTAX", ""),
    "a key twice": (text(b'{"shape": 1, "shape": 2}'), "E_", "shape"),
    "a list": (text(b"[]"), "E_", ""),
    "JSON of a megabyte": (text(b" " * (1 << 20)), "E_TENSOR_SHAPE", "4096"),
    "no state": (
        tensor("weight.quant_state.bitsandbytes__nf4", None),
        "E_MISSING_TENSOR",
        "quant_state",
    ),
    "no scales": (tensor("weight.absmax", None), "E_MISSING_TENSOR", "absmax"),
    "scales of floats": (
        tensor("weight.absmax", torch.ones(1536)),
        "E_TENSOR_DTYPE",
        "quantized",
    ),
    "scales that are too few": (
        tensor("weight.absmax", torch.zeros(1535, dtype=torch.uint8)),
        "E_SCALE_SHAPE",
        "1536",
    ),
    "no nested scales": (
        tensor("weight.nested_absmax", torch.ones(5)),
        "E_SCALE_SHAPE",
        "6 floats",
    ),
    "another codebook": (
        tensor("weight.quant_map", torch.linspace(-1, 1, 16)),
        "E_QUANT_STATE",
        "nf4",
    ),
    "a codebook of NaN": (
        tensor("weight.quant_map", torch.full((16,), torch.nan)),
        "E_QUANT_STATE",
        "nf4",
    ),
    "no codes": (tensor("weight", None), "E_MISSING_TENSOR", "weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_is_wrong_is_refused_by_name(tmp_path, name):
    change, code, words = WRONG[name]
    with pytest.raises(CheckpointRefused) as caught:
        formats.detect(broken(tmp_path / "model", change))
    assert caught.value.code.startswith(code) and words in caught.value.message
    assert caught.value.exit_code == 3 and caught.value.hint


def test_two_states_of_one_layer_are_refused(tmp_path):
    def change(tensors):
        tensors[STATE.replace("nf4", "fp4")] = tensors[STATE].clone()

    with pytest.raises(CheckpointRefused, match="2 states"):
        formats.detect(broken(tmp_path / "model", change))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"weight_format": torch.ones((), dtype=torch.uint8)}, "E_KERNEL_LAYOUT"),
        ({"SCB": torch.ones(383)}, "E_SCALE_SHAPE"),
        ({"SCB": None}, "E_MISSING_TENSOR"),
    ],
    ids=["order of a GPU", "scales that are too few", "no scales"],
)
def test_int8_that_is_wrong_is_refused(tmp_path, change, code):
    folder = tmp_path / "model"
    write(folder, llama(), {LAYER: int8}, config(load_in_4bit=False, load_in_8bit=True))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{LAYER}.{suffix}": part for suffix, part in change.items()}
    present = {name: part for name, part in tensors.items() if part is not None}
    save_file(present, folder / "model.safetensors")
    with pytest.raises(CheckpointRefused) as caught:
        formats.detect(open_checkpoint(folder))
    assert caught.value.code == code


def test_scales_that_are_negative_or_not_finite_are_damage(tmp_path):
    folder = tmp_path / "model"
    write(folder, llama(), {LAYER: four_bits}, config())
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight.absmax"][:2] = torch.tensor([-1.0, torch.inf])
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    (problem,) = formats.check_values(checkpoint, formats.detect(checkpoint))
    assert f"`{LAYER}.weight.absmax`" in problem


def test_states_without_a_config_are_refused(tmp_path):
    write(tmp_path / "model", llama(), {LAYER: four_bits}, None)
    with pytest.raises(CheckpointRefused) as caught:
        formats.detect(open_checkpoint(tmp_path / "model"))
    assert caught.value.code == "E_NO_QUANT_CONFIG"


@pytest.mark.parametrize(("engine", "loads"), [("vllm", False), ("sglang", True)])
def test_engines_that_still_load_it_are_named(tmp_path, engine, loads):
    PUBLISHED["unsloth-bnb-4bit"](tmp_path / "model")
    found = inspect(open_checkpoint(tmp_path / "model"), engine=engine, gpu="sm_70")
    assert found.engine.loads == loads


def test_an_engine_answers_from_nf4_as_from_the_16_bit_model_that_it_rounds(saved):
    """The same codes by two ways, so the same tokens: of transformers' file, and rounded by us."""
    answers = []
    for folder, quantization in ((saved("nf4"), None), (EXAMPLE, "bitsandbytes")):
        with qtool.Engine(
            folder,
            device="cpu",
            quantization=quantization,
            load_format="bitsandbytes",
            skip_tokenizer_init=True,
        ) as engine:
            params = {"max_new_tokens": 12, "temperature": 0}
            answers.append(engine.generate(input_ids=[5, 6, 7], sampling_params=params))
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert len(answers[0]["output_ids"]) == 12

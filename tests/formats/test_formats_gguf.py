"""GGUF: what its blocks stand for, in every architecture that is read, and where they go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import EXAMPLE, llama_cpp
from support.gguf_files import TYPES, write_gguf
from support.gguf_models import needs_llama_cpp
from support.small_models import publish

import qtool
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_names import ARCHITECTURES, EXPERTS, MODEL_TYPES, target_of
from qtool.errors import CheckpointRefused, UsageError
from qtool.events import NoteEvent
from qtool.formats import detect, problem_in, read
from qtool.formats.packing import read_tensor
from qtool.inspection import inspect
from qtool.weight import dequantize

MODELS = {  # name in `small_models` -> what a GGUF file cannot say, and what is said besides
    "llama-tied": ({}, {}),
    "mistral": ({"sliding_window": None}, {}),  # llama.cpp has no window there
    "mixtral": ({}, {}),
    "qwen2": ({}, {}),
    "qwen2_moe": ({}, {}),
    "qwen3": ({}, {}),
    "qwen3_moe": ({"norm_topk_prob": True}, {}),
    "gemma2": ({}, {}),
    "gemma3_text": ({}, {"gemma3.attention.sliding_window_pattern": 2}),
    "phi3": ({}, {}),
    "gpt_oss": ({}, {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that returns the folder of a small model with random norms."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            publish(name, folder)
            weights = load_file(folder / "model.safetensors")
            generator = torch.Generator().manual_seed(1)
            for tensor in weights.values():
                if tensor.dim() == 1:
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor += (noise * 0.2).to(tensor.dtype)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text()) | MODELS[name][0]
            (folder / "config.json").write_text(json.dumps(config))
            made[name] = folder
        return made[name]

    return make


def rotated_halves(name: str, values: np.ndarray) -> np.ndarray:
    """Undo what llama.cpp's converter does to the rows of q and k."""
    heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(name.rpartition("blk.")[2][2:], 0)
    if not heads:
        return values
    return values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)


@pytest.mark.slow
@pytest.mark.parametrize("type", TYPES)
def test_every_type_stands_for_what_gguf_dequantizes(tmp_path, type):
    expected = write_gguf(EXAMPLE, tmp_path / "model.gguf", type)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    layout = detect(checkpoint)
    assert (layout is None) == (type in ("F32", "F16", "BF16"))
    for name, values in expected.items():
        target = target_of(ARCHITECTURES["llama"], name)
        layer = target.name.removesuffix(".weight")
        if layout and layer in layout.modules:
            assert layout.modules[layer].variant == type
            found = dequantize(read(checkpoint, layout, layer))
        else:
            found = read_tensor(checkpoint, target.name).float()
        assert torch.equal(found, torch.from_numpy(rotated_halves(name, values).copy())), name


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did_before_it_was_a_gguf_file(tmp_path, models, name):
    source = models(name)
    write_gguf(source, tmp_path / "model.gguf", "F32", extra=MODELS[name][1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ours = qtool.load(tmp_path / "model.gguf", device="cpu", dtype="float32")
    tokens = torch.randint(0, 200, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
@needs_llama_cpp
def test_perplexity_of_a_file_of_llama_cpps_quantizer_is_its_own(tmp_path):
    """Q4_K_M. llama.cpp rounds inputs to 8 bits, which moves the mean of so many tokens by some
    0.3 %; with files in 16 bits it comes within 0.01 %.
    """
    types = {"attn_v|ffn_down|token_embd": "Q6_K"}
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "Q4_K", types=types, rounding=llama_cpp.quantized)
    model = qtool.load(tmp_path / "model.gguf", device="cpu", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(EXAMPLE)
    with (EXAMPLE / "evaluation.jsonl").open() as file:
        tokens = tokenizer(json.loads(file.readline())["text"][:600]).input_ids[:128]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    ours = logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).mean().item()
    theirs = np.mean(llama_cpp.log_probabilities(tmp_path / "model.gguf", tokens))
    assert len(tokens) == 128
    assert math.exp(theirs - ours) == pytest.approx(1, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K"])
def test_logits_are_those_of_transformers_own_loading(tmp_path, type):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", type)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ours = qtool.load(tmp_path / "model.gguf", device="cpu", dtype="float32")
    tokens = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("name", "type"), [("gpt_oss", "MXFP4"), ("gpt_oss", "Q8_0"), ("qwen3_moe", "Q4_0")]
)
def test_quantized_experts_are_those_of_the_file(tmp_path, models, name, type):
    expected = write_gguf(models(name), tmp_path / "model.gguf", type)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    layout = detect(checkpoint)
    gate, up, down = (torch.from_numpy(expected[f"blk.1.{stem}.weight"].copy()) for stem in EXPERTS)
    module = "model.layers.1.mlp.experts"
    if name == "gpt_oss":
        rows = torch.stack((gate, up), dim=2).flatten(0, 2)
        both = dequantize(read(checkpoint, layout, f"{module}.gate_up_proj"))
        assert torch.equal(both, rows)
        assert torch.equal(
            dequantize(read(checkpoint, layout, f"{module}.down_proj")), down.flatten(0, 1)
        )
        return
    for kind, values in (("gate", gate), ("up", up), ("down", down)):
        found = dequantize(read(checkpoint, layout, f"{module}.3.{kind}_proj"))
        assert torch.equal(found, values[3])


def test_experts_of_early_files_are_those_of_later_ones(tmp_path, models):
    for name, experts_apart in (("old", True), ("new", False)):
        file = tmp_path / f"{name}.gguf"
        write_gguf(models("mixtral"), file, "Q8_0", experts_apart=experts_apart)
    old, new = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("old", "new"))
    assert old.config == new.config
    assert old.tensors.keys() == new.tensors.keys()
    assert all(old.read(name) == new.read(name) for name in new.tensors)


def test_the_names_are_those_of_the_package():
    for architecture in MODEL_TYPES.values():
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        names = gguf.get_tensor_name_map(arch, 3)
        for stem in (*architecture.layer, *architecture.model):
            prefix = "" if stem in architecture.model else "blk.2."
            target = target_of(architecture, f"{prefix}{stem}.weight")
            module = target.name.removesuffix(".weight")
            if stem == "output" and architecture.name.startswith("gemma"):
                continue  # the package does not name the head of Gemma, which is tied
            assert names.get_name(module) == f"{prefix}{stem}", (architecture.name, module)


@pytest.mark.parametrize(
    ("type", "to"),
    [
        ("Q4_0", "awq"),
        ("Q4_0", "gptq"),
        ("Q8_0", "compressed-tensors"),
        ("Q6_K", "compressed-tensors"),
    ],
)
def test_types_with_a_scale_go_into_other_formats_as_they_are(tmp_path, type, to):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", type)
    result = qtool.export(tmp_path / "model.gguf", to=to, output=tmp_path / "out")
    before, after = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(result.output)
    layouts = detect(before), detect(after)
    assert len(layouts[1].modules) == 42
    for name in layouts[1].modules:
        one, other = (
            dequantize(read(checkpoint, layout, name))
            for checkpoint, layout in zip((before, after), layouts, strict=True)
        )
        assert torch.equal(one, other), name
    assert after.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert after.tensors["model.norm.weight"].dtype == "BF16"
    assert "quantization_config" in after.config


def test_a_type_with_a_minimum_is_requantized_only_when_asked(tmp_path):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "Q4_K")
    with pytest.raises(CheckpointRefused, match="offset"):
        qtool.export(tmp_path / "model.gguf", to="awq", output=tmp_path / "out")
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, NoteEvent):
            notes.append(event.text)

    result = qtool.export(
        tmp_path / "model.gguf", to="awq", output=tmp_path / "out", requantize=True, on_event=listen
    )
    schemes = {
        module.scheme.name for module in detect(open_checkpoint(result.output)).modules.values()
    }
    assert schemes == {"int4 g32 asym"}
    assert any("`model.embed_tokens` becomes 16 bits" in note for note in notes)


def test_export_to_bf16_rounds_what_the_file_stands_for(tmp_path):
    expected = write_gguf(EXAMPLE, tmp_path / "model.gguf", "Q6_K")
    result = qtool.export(tmp_path / "model.gguf", to="bf16", output=tmp_path / "out")
    written = load_file(Path(result.output) / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert len(written) == len(expected)
    for name, values in expected.items():
        target = target_of(ARCHITECTURES["llama"], name)
        values = torch.from_numpy(rotated_halves(name, values).copy())
        assert torch.equal(written[target.name], values.bfloat16()), name
    transformers.AutoTokenizer.from_pretrained(result.output)


def test_quantize_asks_for_safetensors(tmp_path):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "F16")
    with pytest.raises(CheckpointRefused) as error:
        qtool.quantize(tmp_path / "model.gguf", method="fp8_dynamic", output=tmp_path / "out")
    assert error.value.code == "E_GGUF"
    assert "export --to bf16" in error.value.hint


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        ("vllm", "E_ENGINE_GGUF"),
        ("sglang", "N_ENGINE_GGUF"),
        ("transformers", "N_ENGINE_GGUF"),
    ],
)
def test_inspect_says_who_loads_it(tmp_path, engine, code):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "Q4_K")
    found = inspect(open_checkpoint(tmp_path / "model.gguf"), engine=engine)
    assert code in {each.code for each in found.engine.findings}


@pytest.mark.slow
@pytest.mark.parametrize("type", [type for type in TYPES if type not in ("F32", "F16", "BF16")])
def test_a_scale_that_is_no_number_is_found(tmp_path, type):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", type)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    tensor = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    data = np.frombuffer(tensor.read(), np.uint8).copy()
    assert problem_in(tensor, data, None) is None
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][1]
    last = {"MXFP4": b"\xff"}.get(type, b"\x00\x7c")
    at = {"MXFP4": 0, "Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(type, 0)
    start = len(data) - size + at
    data[start : start + len(last)] = np.frombuffer(last, np.uint8)
    assert "NaN" in problem_in(tensor, data, None)


def test_an_engine_generates_from_a_file_and_checks_what_it_is_said_to_be(tmp_path):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "Q8_0")
    path = tmp_path / "model.gguf"
    for options, code in (
        ({"load_format": "safetensors"}, "E_LOAD_FORMAT"),
        ({"load_format": "ggml"}, "E_LOAD_FORMAT"),
        ({"quantization": "awq"}, "E_QUANTIZATION"),
    ):
        with pytest.raises(UsageError) as error:
            qtool.Engine(path, device="cpu", **options)
        assert error.value.code == code
    with pytest.raises(UsageError, match="holds safetensors"):
        qtool.Engine(EXAMPLE, device="cpu", load_format="gguf")
    options = {"max_new_tokens": 12, "temperature": 0}
    with qtool.Engine(path, device="cpu", load_format="gguf", quantization="gguf") as engine:
        found = engine.generate("def f(x):", options)["text"]
    with qtool.Engine(EXAMPLE, device="cpu") as engine:
        assert engine.generate("def f(x):", options)["text"] == found

"""GGUF files that `export` writes: what they hold, what llama.cpp makes of them, and what is
refused.
"""

from __future__ import annotations

import json
import math
import shutil

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import EXAMPLE, gguf_models
from support.conversion import AWQ, CT, edit
from support.gguf_models import MODELS, SIZES, needs_llama_cpp
from support.llama_cpp import log_probabilities

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_header import MAX_SPLITS
from qtool.conversion import export
from qtool.conversion.gguf.plan import check_file_count
from qtool.conversion.gguf.types import FILE_TYPES, ModelShape, tensor_type
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import detect, read
from qtool.inspection import inspect
from qtool.weight import dequantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]
TOKENS = (0, 300, 301, 500, 45, 67, 1000, 7, 9, 2000, 412, 90, 91, 13, 14, 55)


@pytest.fixture
def publish(tmp_path):
    """A function: the name of a class to a small random model of it, and its folder."""

    def published(name, **changes):
        folder = tmp_path / "model"
        return gguf_models.publish(folder, name, **changes), folder

    return published


def tensors_of(folder):
    """The tensors of the GGUF file in ``folder``: name -> (type, values f32)."""
    reader = gguf.GGUFReader(folder / f"{folder.name}.gguf")
    return {
        tensor.name: (
            tensor.tensor_type.name,
            torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()),
        )
        for tensor in reader.tensors
    }


def types_of(folder):
    return {name: type for name, (type, _) in tensors_of(folder).items()}


def in_order_of_ggml(weight, heads):
    """Rows of q or k, the two halves of each head alternating."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_probabilities_of_transformers(publish, tmp_path, name):
    model, folder = publish(name)
    export(folder, to="gguf", type="F32", output=tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None]).flatten()
    found = torch.tensor(log_probabilities(tmp_path / "out" / "out.gguf", TOKENS))
    assert (found - expected).abs().max() < 0.03
    assert math.exp((expected - found).mean().item()) == pytest.approx(1, abs=0.005)


def test_a_16_bit_model_stays_what_it_is(publish, tmp_path):
    model, folder = publish("Llama")
    result = export(folder, to="gguf", output=tmp_path / "out")
    found = tensors_of(result.output)
    assert {type for type, _ in found.values()} == {"BF16", "F32"}
    state = model.state_dict()
    layer = "model.layers.1.self_attn"
    for ours, theirs in (
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output.weight", state["lm_head.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
        ("blk.1.attn_q.weight", in_order_of_ggml(state[f"{layer}.q_proj.weight"], 4)),
        ("blk.1.attn_k.weight", in_order_of_ggml(state[f"{layer}.k_proj.weight"], 2)),
        ("blk.1.attn_q.bias", in_order_of_ggml(state[f"{layer}.q_proj.bias"], 4)),
        ("blk.1.attn_v.weight", state[f"{layer}.v_proj.weight"]),
        ("blk.1.ffn_down.weight", state["model.layers.1.mlp.down_proj.weight"]),
    ):
        assert torch.equal(found[ours][1], theirs), ours
    assert result.rounded_layers == 0
    manifest = json.loads((result.output / "qtool-manifest.json").read_text())
    assert "out.gguf" in manifest["files"]
    assert inspect(open_checkpoint(result.output), verify=True).manifest.matches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "scheme", "types"),
    [
        (CT, "W4A16", {"Q4_0"}),
        (CT, "W8A8", {"Q8_0"}),
        (CT, "W2A16", {"Q4_0"}),
        (CT, "W5A16", {"Q5_0"}),
        (CT, "MXFP4A16", {"MXFP4"}),
        (AWQ, "W4A16_ASYM", {"Q4_1", "Q5_0"}),
        ("gptq", "W4A16", {"Q4_0"}),
    ],
)
def test_codes_and_scales_are_kept_where_blocks_hold_them(publish, tmp_path, to, scheme, types):
    _, folder = publish("Llama")
    export(folder, to=to, requantize=True, scheme=scheme, output=tmp_path / "source")
    result = export(tmp_path / "source", to="gguf", output=tmp_path / "out")
    assert result.rounded_layers == 0
    source = open_checkpoint(tmp_path / "source")
    layout = detect(source)
    found = tensors_of(result.output)
    names = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up"}
    for theirs, ours in names.items():
        type, values = found[f"blk.1.{ours}.weight"]
        expected = dequantize(read(source, layout, f"model.layers.1.{theirs}"))
        expected = in_order_of_ggml(expected, 4) if ours == "attn_q" else expected
        assert torch.equal(values, expected), ours
        assert type in types
    assert found["token_embd.weight"][0] == "BF16"


def test_experts_of_gpt_oss_keep_their_blocks(gpt_oss, tmp_path):
    for file in EXAMPLE.glob("*token*"):
        shutil.copy(file, gpt_oss)
    export(gpt_oss, to="gguf", output=tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    source = open_checkpoint(gpt_oss)
    layout = detect(source)
    both = dequantize(read(source, layout, "model.layers.0.mlp.experts.gate_up_proj"))
    down = dequantize(read(source, layout, "model.layers.0.mlp.experts.down_proj"))
    for name, expected in (("gate", both[::2]), ("up", both[1::2]), ("down", down)):
        type, values = found[f"blk.0.ffn_{name}_exps.weight"]
        assert type == "MXFP4"
        assert torch.equal(values.flatten(0, 1), expected)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Gemma3", "Phi3", "GptOss"])
def test_tensors_come_back_as_they_were(publish, tmp_path, name):
    _, folder = publish(name)
    export(folder, to="gguf", type="BF16", output=tmp_path / "there")
    export(tmp_path / "there", to="bf16", output=tmp_path / "back")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        # Gemma's norms are stored with 1 added, in f32
        assert torch.allclose(after[key].float(), tensor.float(), rtol=2**-8, atol=2**-23), key


def test_a_file_is_not_split_into_more_files_than_are_read():
    check_file_count(MAX_SPLITS)
    with pytest.raises(UsageError) as caught:
        check_file_count(MAX_SPLITS + 1)
    assert caught.value.code == "E_SHARD_SIZE"


@needs_llama_cpp
@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_a_file_that_is_split_is_read_as_one(publish, tmp_path, name):
    _, folder = publish(name)
    export(folder, to="gguf", type="Q8_0", output=tmp_path / "whole")
    result = export(folder, to="gguf", type="Q8_0", max_shard_size="1MiB", output=tmp_path / "out")
    files = sorted(path.name for path in result.output.glob("*.gguf"))
    assert files == [
        f"out-{part:05}-of-{result.files:05}.gguf" for part in range(1, result.files + 1)
    ]
    assert result.files > 1
    whole, split = (open_checkpoint(tmp_path / path) for path in ("whole", "out"))
    assert whole.config == split.config
    assert {name: whole.read(name) for name in whole.tensors} == {
        name: split.read(name) for name in split.tensors
    }
    for file in files:
        held = [tensor for tensor in split.tensors.values() if tensor.file.name == file]
        assert len(held) == 1 or sum(tensor.size_bytes for tensor in held) <= 1 << 20
    assert files[0] in (result.output / "README.md").read_text()
    expected = log_probabilities(tmp_path / "whole" / "whole.gguf", TOKENS[:4])
    assert log_probabilities(result.output / files[0], TOKENS[:4]) == expected


@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_the_rotary_embedding_comes_back_as_it_was(publish, tmp_path, name):
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    _, folder = publish(name, **(changes if name == "GptOss" else {}))
    export(folder, to="gguf", output=tmp_path / "there")
    export(tmp_path / "there", to="bf16", output=tmp_path / "back")
    before, after = (
        transformers.AutoConfig.from_pretrained(path).rope_parameters
        for path in (folder, tmp_path / "back")
    )
    assert before == after


def test_metadata_say_how_answers_are_drawn(publish, tmp_path):
    _, folder = publish("Qwen3")
    drawn = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05}
    settings = {"do_sample": True, **drawn, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    export(folder, to="gguf", output=tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "out.gguf").fields
    assert fields["general.sampling.penalty_repeat"].contents() == pytest.approx(1.05)
    folder = open_checkpoint(tmp_path / "out").path
    found = json.loads((folder / "generation_config.json").read_text())
    assert drawn.items() <= found.items()
    assert (
        fields["tokenizer.chat_template"].contents()
        == (EXAMPLE / "chat_template.jinja").read_text()
    )


def test_blocks_of_a_gguf_file_are_copied(publish, tmp_path):
    _, folder = publish("Llama")
    export(folder, to="gguf", type="Q4_K_M", output=tmp_path / "one")
    result = export(tmp_path / "one", to="gguf", output=tmp_path / "two")
    assert result.rounded_layers == 0
    one, two = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / path).tensors}
        for path in ("one/one.gguf", "two/two.gguf")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.tensor_type == two[name].tensor_type
        assert (tensor.data == two[name].data).all(), name
    with pytest.raises(CheckpointRefused, match="Q8_0 does not"):
        export(tmp_path / "one", to="gguf", type="Q8_0", output=tmp_path / "three")
    with pytest.raises(UsageError, match="one inside the other"):  # it would replace its source
        export(tmp_path / "one", to="bf16", output=tmp_path / "one", overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_type_is_written_and_comes_near(publish, tmp_path, file_type):
    model, folder = publish("Qwen3")
    export(folder, to="gguf", type=file_type, output=tmp_path / "out")
    type, values = tensors_of(tmp_path / "out")["blk.0.ffn_up.weight"]
    expected = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert type == FILE_TYPES[file_type][1]
    error = (values - expected).square().mean().sqrt() / expected.std()
    assert error < {"F": 1e-3, "B": 1e-6, "Q2": 0.35, "Q3": 0.2}.get(
        file_type[0] if file_type[0] in "FB" else file_type[:2], 0.13
    )


LLAMA_8B = ModelShape("llama", 32, 32, 8, 0, has_tied_embeddings=False)


@pytest.mark.parametrize(
    ("file_type", "tensor", "types"),
    [  # of llama.cpp's own files of Llama 3.1 8B, for layers 0, 4, 5, 6, 29
        ("Q4_K_M", "attn_v", ("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K")),
        ("Q4_K_M", "ffn_down", ("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K")),
        ("Q4_K_M", "attn_q", ("Q4_K",) * 5),
        ("Q4_K_S", "attn_v", ("Q5_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K")),
        ("Q3_K_M", "attn_v", ("Q5_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K")),
        ("Q3_K_M", "ffn_down", ("Q5_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K")),
        ("Q3_K_M", "attn_output", ("Q4_K",) * 5),
        ("Q2_K", "attn_v", ("Q4_K",) * 5),
        ("Q6_K", "attn_v", ("Q6_K",) * 5),
    ],
)
def test_a_mix_gives_important_layers_more_bits(file_type, tensor, types):
    found = tuple(
        tensor_type(file_type, f"blk.{layer}.{tensor}.weight", 4096, LLAMA_8B)
        for layer in (0, 4, 5, 6, 29)
    )
    assert found == types
    assert tensor_type(file_type, "output.weight", 4096, LLAMA_8B) == "Q6_K"


def test_rows_that_fill_no_block_get_another_type():
    assert tensor_type("Q4_K_M", "blk.0.attn_q.weight", 4096 + 32, LLAMA_8B) == "Q5_0"
    assert tensor_type("Q4_0", "blk.0.attn_q.weight", 4096 + 16, LLAMA_8B) == "F16"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"hidden_act": "gelu"}, "E_GGUF_CONFIG", "`gelu`"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "E_GGUF_CONFIG",
            "`dynamic`",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(publish, tmp_path, changes, code, words):
    _, folder = publish("Llama", attention_bias=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointRefused, match=words) as caught:
        export(folder, to="gguf", output=tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("FP8_DYNAMIC", "fp8"), ("W6A16", None), ("W8A16", None)],
)
def test_what_blocks_do_not_hold_needs_requantize(publish, tmp_path, scheme, words):
    _, folder = publish("Qwen3")
    export(folder, to=CT, requantize=True, scheme=scheme, output=tmp_path / "source")
    if words is None:
        return
    with pytest.raises(CheckpointRefused, match=words) as caught:
        export(tmp_path / "source", to="gguf", output=tmp_path / "out")
    assert caught.value.code == "E_CANNOT_HOLD"
    result = export(tmp_path / "source", to="gguf", requantize=True, output=tmp_path / "out")
    assert result.rounded_layers == 14
    assert types_of(result.output)["blk.0.attn_q.weight"] == "Q8_0"


def test_an_architecture_without_rules_is_refused_by_name(tmp_path):
    values = {**SIZES, "tie_word_embeddings": True}
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**values))
    model.bfloat16().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointRefused, match="Olmo2ForCausalLM") as caught:
        export(tmp_path / "model", to="gguf", output=tmp_path / "out")
    assert caught.value.code == "E_GGUF_ARCHITECTURE"


def test_scales_are_rounded_and_codes_kept_with_requantize(publish, tmp_path):
    _, folder = publish("Qwen3")
    export(folder, to=CT, requantize=True, scheme="W4A16", output=tmp_path / "source")
    edit(
        tmp_path / "source",
        lambda tensors: tensors.update(
            {
                name: tensor.float() * 1.0001
                for name, tensor in tensors.items()
                if name.endswith("weight_scale")
            }
        ),
    )
    (tmp_path / "source" / "qtool-manifest.json").unlink()
    with pytest.raises(CheckpointRefused, match=r"float16, .* cannot hold"):
        export(tmp_path / "source", to="gguf", output=tmp_path / "out")
    result = export(tmp_path / "source", to="gguf", requantize=True, output=tmp_path / "out")
    assert result.rounded_layers == 0
    assert any("scales rounded to 16 bits" in note for note in result.notes)
    source = open_checkpoint(tmp_path / "source")
    expected = dequantize(read(source, detect(source), "model.layers.0.mlp.up_proj"))
    _, values = tensors_of(result.output)["blk.0.ffn_up.weight"]
    assert torch.allclose(values, expected, rtol=2**-10)


def test_a_damaged_number_is_refused_and_nothing_is_left(publish, tmp_path):
    _, folder = publish("Qwen3")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file_type in ("BF16", "Q4_K_M", "MXFP4"):
        with pytest.raises(CheckpointRefused) as caught:
            export(folder, to="gguf", type=file_type, output=tmp_path / "out")
        assert caught.value.code == "E_VALUES"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_tensor_without_a_place_is_refused_by_name(publish, tmp_path):
    _, folder = publish("Qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointRefused, match="q_norm"):
        export(folder, to="gguf", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"to": "gguf", "type": "Q4_K_X"}, "E_GGUF_FILE_TYPE"),
        ({"to": "gguf", "scheme": "W4A16"}, "E_SCHEME_UNUSED"),
        ({"to": "gguf", "output": "model-00001-of-00002"}, "E_OUTPUT_PLACE"),
        ({"to": "bf16", "type": "Q4_0"}, "E_TYPE_UNUSED"),
    ],
)
def test_options_that_do_not_go_together_are_refused(publish, tmp_path, options, code):
    _, folder = publish("Qwen2")
    with pytest.raises(UsageError) as caught:
        export(folder, **{"output": tmp_path / "out"} | options)
    assert caught.value.code == code

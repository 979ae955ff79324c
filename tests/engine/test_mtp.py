"""A checkpoint's own layer drafts tokens: those that it says, and answers stay the same."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.fixed_steps import run_in_fixed_steps
from support.published import PUBLISHED
from support.published.floats import fp8_block
from support.small_models import WEIGHTS, publish
from test_speculation import ASKED, GREEDY, REPEATED, answers, essence

from qtool.checkpoint import open_checkpoint
from qtool.cli.app import app
from qtool.engine import loop
from qtool.engine.config import EngineConfig, Speculation
from qtool.engine.cuda_graphs import PromptShape
from qtool.engine.engine import Engine
from qtool.errors import CheckpointRefused, UsageError
from qtool.inspection import inspect
from qtool.options import QuantizeOptions
from qtool.quantization.request import prepare
from qtool.runtime.experts.grouped import GroupedExperts
from qtool.runtime.linear import QuantizedLinear
from qtool.runtime.load import materialize
from qtool.runtime.load_plan import plan_load

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

OPTIONS = {"dtype": "float32", "device": "cpu", "max_total_tokens": 4096}
NEXTN = {"speculative_algorithm": "NEXTN"}
AFTER = tuple(
    f"model.layers.2.{name}" for name in ("enorm", "hnorm", "shared_head.norm", "eh_proj")
)
APART = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "mtp.fc")
CASES = [
    *(("import os\n", {**GREEDY, "max_new_tokens": count}) for count in (50, 48)),
    *((REPEATED[number % 3], params) for number, params in enumerate(ASKED)),
]
CPU = torch.device("cpu")
ADDED = ("o_proj", "out_proj", "down_proj")  # layers whose outputs are added to the residual


def parts_of(name):
    """The norms of embeddings, of hidden states and before the head, and the projection."""
    return APART if "qwen" in name else AFTER


def rewrite(folder, change):
    """Replace each tensor of a checkpoint by what ``change`` makes of its name and data."""
    tensors = load_file(folder / WEIGHTS)
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, folder / WEIGHTS, {"format": "pt"})


def right_about(model, share, folder):
    """Publish a ``model`` whose layers add ``share`` of what they would, and an MTP layer that
    draws the next token from the last alone: it is right where this decides.
    """
    publish(model, folder)

    def change(name, tensor):
        if name == f"{parts_of(model)[3]}.weight":
            size = len(tensor)
            return torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1).to(tensor.dtype)
        if name.removesuffix(".weight").endswith(ADDED):
            return tensor * (0.0 if name.startswith(("mtp.", "model.layers.2.")) else share)
        return tensor

    rewrite(folder, change)
    return folder


@pytest.fixture(scope="module", params=["deepseek_v3-mtp", "qwen3_5_moe-mtp"])
def mostly_right(request, tmp_path_factory):
    return right_about(request.param, 0.01, tmp_path_factory.mktemp("mtp") / "model")


@pytest.fixture(scope="module")
def wanted(mostly_right):
    """What decoding gives token by token."""
    with Engine(mostly_right, **OPTIONS) as engine:
        return answers(engine, CASES)


@pytest.fixture(scope="module")
def drafting(mostly_right):
    with Engine(mostly_right, **OPTIONS, **NEXTN) as engine:
        yield engine


def dense_drafts(model, joint, tokens, count):
    """What the MTP layer says after ``tokens``, computed by transformers without a cache: the layer
    is a copy of the model's last, behind the norms and the projection ``joint``.
    """
    decoder = model.get_decoder()
    block, *norms = decoder.layers[-1], *(copy.deepcopy(decoder.norm) for _ in joint[:3])
    for norm, weight in zip(norms, joint[:3], strict=True):
        norm.weight.data = weight.float()
    before, behind, last = norms
    grids = 3 if hasattr(decoder.rotary_emb, "mrope_section") else 1
    tokens, drafts = list(tokens), []
    hidden = decoder(torch.tensor([tokens[:-1]])).last_hidden_state
    for _ in range(count):
        embedded = decoder.embed_tokens(torch.tensor([tokens[1:]]))
        x = torch.cat([before(embedded), behind(hidden)], dim=-1)
        x = x @ joint[3].float().T
        positions = torch.arange(x.shape[1]).expand(grids, 1, -1)
        angles = decoder.rotary_emb(x, positions if grids > 1 else positions[0])
        made = last(block(x, attention_mask=None, position_embeddings=angles))[:, -1:]
        drafts.append(int(model.lm_head(made).argmax()))
        hidden = torch.cat([hidden, made], dim=1)
        tokens.append(drafts[-1])
    return drafts


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deepseek_v3-mtp", "glm4_moe-mtp", "qwen3_next-mtp", "qwen3_5-mtp"]
)
def test_drafts_are_those_of_a_dense_pass(name, tmp_path, monkeypatch):
    """Also with prompts in chunks, beside others, and behind a prefix from the cache."""
    folder, model = publish(name, tmp_path / "model", torch.float32)
    generator = torch.Generator().manual_seed(0)
    parts = [f"{part}.weight" for part in parts_of(name)]

    def change(name, tensor):
        if name in parts[:3]:
            return (1 + 0.3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        return tensor

    rewrite(folder, change)
    stored = load_file(folder / WEIGHTS)
    joint = [stored[part] for part in parts]
    seen = []

    def note(drafts, gained):
        for (chunk, _), row in zip(gained, drafts.tolist(), strict=True):
            seen.append((list(chunk.sequence.tokens), row))
        keep(drafts, gained)

    keep = loop._keep_drafts
    monkeypatch.setattr(loop, "_keep_drafts", note)
    with Engine(folder, **OPTIONS, **NEXTN, chunked_prefill_size=20) as engine:
        for texts in (REPEATED[:2], "".join(REPEATED), "".join(REPEATED)):
            engine.generate(texts, {**GREEDY, "max_new_tokens": 4})
        assert engine.loop.scheduler.prefix_hits > 0
    assert len(seen) == 4 * 4
    with torch.no_grad():
        for tokens, row in seen:
            drafts = list(itertools.takewhile(lambda token: token >= 0, row))
            assert drafts
            assert drafts == dense_drafts(model, joint, tokens, len(drafts))
    assert sum(row[-1] >= 0 for _, row in seen) > 8  # few end with the pages of a prompt


@pytest.mark.parametrize("model", ["deepseek_v3-mtp", "qwen3_next-mtp"])
def test_a_layer_that_is_right_is_accepted_nearly_always(model, tmp_path):
    folder = right_about(model, 0.0, tmp_path / "model")
    counts = []
    for options in ({}, {**NEXTN, "speculative_num_steps": 5}):
        with Engine(folder, **OPTIONS, **options) as engine:
            counts.append(engine.generate(REPEATED[0], {**GREEDY, "max_new_tokens": 31}))
    plain, five = counts
    assert essence(plain) == essence(five)
    assert five["meta_info"]["spec_accept_length"] == 6.0


@pytest.mark.slow
def test_answers_are_those_without_drafts(wanted, drafting):
    assert answers(drafting, CASES) == wanted
    total = drafting.loop.spec.total
    assert total.accept_length > 1.3
    assert total.correct < total.proposed  # some were wrong
    alone = [drafting.generate(text, params) for text, params in CASES[3:6]]
    assert [essence(result) for result in alone] == wanted[3:6]
    assert drafting.loop.scheduler.prefix_hits > 0


def test_answers_in_chunks_and_with_preemptions_are_the_same(mostly_right, wanted):
    small = {"max_total_tokens": 128, "chunked_prefill_size": 20, "disable_radix_cache": True}
    with Engine(mostly_right, **{**OPTIONS, **small}, **NEXTN) as engine:
        assert answers(engine, CASES[:6]) == wanted[:6]
        assert engine.loop.scheduler.preemptions > 0
        assert engine.loop.spec.total.accept_length > 1.2
        pages = engine.loop.scheduler.pages
        assert pages.free == pages.count


@pytest.mark.slow
def test_steps_of_a_fixed_size_draft_the_same(mostly_right, wanted, drafting):
    """What CUDA graphs do: hidden states lie where a padded step leaves them, and sequences that
    have fewer drafts than others are padded.
    """
    small = {"chunked_prefill_size": 64, "max_running_requests": 6}
    lengths = []
    for shapes in ([], [PromptShape(0, 64), PromptShape(24, 64)]):
        with Engine(mostly_right, **OPTIONS, **NEXTN, **small) as engine:
            used = run_in_fixed_steps(engine, [8, 24], shapes, [2, 6]) if shapes else []
            assert answers(engine, CASES[:5]) == wanted[:5]
            assert len({*used}) == 3 * len(shapes)
            lengths.append(engine.loop.spec.total)
    assert lengths[0] == lengths[1]


def test_a_grammar_holds_drafts_too(drafting):
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    held = {"temperature": 1.0, "seed": 3, "max_new_tokens": 60, "regex": "(import [a-z]{2}\n){4}"}
    found = drafting.generate(REPEATED[0], held, return_logprob=True)
    assert len(found["meta_info"]["output_token_logprobs"]) == len(found["output_ids"])
    drafter, drafting.loop.scheduler.propose = drafting.loop.scheduler.propose, None
    assert essence(drafting.generate(REPEATED[0], held)) == essence(found)
    drafting.loop.scheduler.propose = drafter


@pytest.mark.parametrize("model", ["deepseek_v3-mtp", "qwen3_next-mtp"])
def test_a_quantized_layer_runs_as_the_others_do(model, tmp_path):
    """DeepSeek-V3's and Qwen3-Next's own releases: FP8 blocks, also in the MTP layer."""
    folder, _ = publish(model, tmp_path / "model")
    models = [materialize(plan_load(open_checkpoint(folder), CPU, mtp=True))]
    stored = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if name.endswith("_proj.weight"):
            parts, _ = fp8_block(tensor.float())
            stored |= {f"{name.removesuffix('.weight')}.{part}": parts[part] for part in parts}
        else:
            stored[name] = tensor
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    models.append(materialize(plan_load(open_checkpoint(folder), CPU, mtp=True)))
    kinds = {type(module) for module in models[1].mtp.block.modules()}
    assert {GroupedExperts, QuantizedLinear} <= kinds
    assert len(models[1].model.layers) == models[1].config.num_hidden_layers == 2
    ids = torch.arange(30)
    with torch.no_grad():
        hidden = models[0].model(ids[None]).last_hidden_state[0]
        one, other = (model.mtp(ids + 1, hidden, ids) for model in models)
    # of single tokens other experts are chosen
    assert ((one - other).norm(dim=1) / one.norm(dim=1)).median() < 0.12


def test_experts_in_16_bits_beside_quantized_ones_run_together(tmp_path):
    """NVIDIA's releases of Qwen3.6: a CUDA graph cannot ask which experts have tokens."""
    PUBLISHED["nvidia-qwen3.6-35b-a3b-nvfp4"](tmp_path / "model")
    model = materialize(plan_load(open_checkpoint(tmp_path / "model"), CPU, mtp=True))
    experts = [layer.mlp.experts for layer in (*model.model.language_model.layers, model.mtp.block)]
    assert [isinstance(each, GroupedExperts) for each in experts] == [True, True, False]
    own, x = experts[2], torch.randn(5, 256).bfloat16()
    assert own.config._experts_implementation == "grouped_mm"
    chosen = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3], [3, 1]])
    shares = torch.rand(5, 2).bfloat16()
    together = own(x, chosen, shares)
    own.config._experts_implementation = "eager"
    alone = own(x, chosen, shares)
    torch.testing.assert_close(together, alone, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deepseek_v3", "has no MTP layer: `model.layers.2.enorm.weight` is missing"),
        ("qwen3_5", "has no MTP layer: `mtp.pre_fc_norm_embedding.weight` is missing"),
    ],
)
def test_a_model_without_a_known_layer_is_refused(name, said, tmp_path):
    folder, _ = publish(name, tmp_path / "model")
    with pytest.raises(CheckpointRefused, match=said) as refused:
        plan_load(open_checkpoint(folder), CPU, mtp=True)
    assert refused.value.code == "E_SPECULATION"


@pytest.mark.parametrize(
    ("model", "part", "rows", "code"),
    [
        ("qwen3_next-mtp", "mtp.fc.weight", 240, "E_SPECULATION"),
        ("qwen3_next-mtp", "mtp.norm.weight", 240, "E_SPECULATION"),
        ("qwen3_next-mtp", "mtp.layers.0.self_attn.q_proj.weight", 256, "E_TENSORS"),
        ("qwen3_next-mtp", "mtp.layers.0.self_attn.k_norm.weight", 0, "E_TENSORS"),
        ("deepseek_v3-mtp", "model.layers.2.eh_proj.weight", 240, "E_SPECULATION"),
        ("deepseek_v3-mtp", "model.layers.2.mlp.experts.1.up_proj.weight", 0, "E_TENSORS"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_before_it_is_read(model, part, rows, code, tmp_path):
    """Without it, the model is inspected and quantized, with a line that says so."""
    folder, _ = publish(model, tmp_path / "model")
    plan_load(open_checkpoint(folder), CPU, mtp=True)
    assert not any("NEXTN" in each for each in inspect(open_checkpoint(folder), deep=True).warnings)
    stored = load_file(folder / WEIGHTS)
    whole = stored.pop(part)
    save_file(stored | ({part: whole[:rows].clone()} if rows else {}), folder / WEIGHTS)
    with pytest.raises(CheckpointRefused) as refused:
        plan_load(open_checkpoint(folder), CPU, mtp=True)
    assert refused.value.code == code
    problem = f"speculative_algorithm NEXTN would be refused: {refused.value.message}"
    assert problem in inspect(open_checkpoint(folder), deep=True).warnings
    assert code != "E_SPECULATION" or problem in inspect(open_checkpoint(folder)).warnings
    options = QuantizeOptions(method="fp8_dynamic", output=str(tmp_path / "output"))
    assert problem in prepare(folder, options).notes


@pytest.mark.parametrize(
    ("field", "code"), [("num_hidden_layers", "E_SPECULATION"), ("hidden_size", "E_TENSORS")]
)
def test_a_config_without_a_field_is_refused(field, code, tmp_path):
    folder, _ = publish("qwen3_next-mtp", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused) as refused:
        plan_load(open_checkpoint(folder), CPU, mtp=True)
    assert refused.value.code == code


def test_a_dry_run_says_that_there_is_no_layer():
    dry = ["--dry-run", "--device", "cpu", "--speculative-algorithm", "NEXTN"]
    with pytest.raises(CheckpointRefused, match="this is LlamaForCausalLM"):
        app(["serve", "--model-path", str(EXAMPLE), *dry], standalone_mode=False)


def test_names_of_other_engines_mean_the_same():
    for name in ("NEXTN", "EAGLE", "mtp", "deepseek_mtp", "glm4_moe_mtp", "qwen3_next_mtp"):
        config = EngineConfig(speculative_algorithm=name, speculative_num_steps=2)
        assert config.speculation == Speculation(2, 0, 0, mtp=True)
    assert EngineConfig(**NEXTN).speculation == Speculation(3, 0, 0, mtp=True)
    with pytest.raises(UsageError, match="speculative_algorithm is `nextn`"):
        EngineConfig(speculative_algorithm="nextn")

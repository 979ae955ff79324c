"""What the engine runs of models with more than attention and text, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.small_models import publish

from qtool.checkpoint import open_checkpoint
from qtool.engine import requirements
from qtool.engine.engine import Engine
from qtool.errors import CheckpointRefused
from qtool.runtime.load_plan import plan_load

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
OPTIONS = {"skip_tokenizer_init": True, "max_total_tokens": 512, "dtype": "float32"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:only the language model is loaded")
@pytest.mark.parametrize(
    "architecture",
    [
        "gemma3",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
    ],
)
def test_a_container_answers_text_without_its_towers(architecture, tmp_path):
    folder, model = publish(architecture, tmp_path / "model", torch.float32)
    prompts = [[*range(8, 30)], [*range(30, 45)]]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(8):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        wanted.append(ids[0, len(prompt) :].tolist())
    with Engine(folder, **OPTIONS) as engine:
        found = engine.generate(input_ids=prompts, sampling_params=GREEDY)
        parameters = [name for name, _ in engine.loop.runner.model.named_parameters()]
    assert [each["output_ids"] for each in found] == wanted
    assert parameters and not [name for name in parameters if "vision" in name or "visual" in name]


@pytest.mark.parametrize(
    ("architecture", "code", "reason"),
    [
        ("jamba", "E_ATTENTION", "JambaForCausalLM has layers of `linear_attention`"),
        ("falcon_h1", "E_ATTENTION", "FalconH1ForCausalLM has layers of `hybrid`"),
        ("qwen3_seqcls", "E_ARCHITECTURE", "does not continue a text"),
        ("qwen3_embedding", "E_ARCHITECTURE", "Qwen3Model does not continue a text"),
    ],
)
def test_what_the_engine_lacks_is_refused_by_name_before_anything_is_loaded(
    architecture, code, reason, tmp_path
):
    folder, _ = publish(architecture, tmp_path / "model")
    plan = plan_load(open_checkpoint(folder), torch.device("cpu"))
    with pytest.raises(CheckpointRefused, match=reason) as refused:
        requirements.check_by_name(plan)
    assert refused.value.code == code


def test_a_layer_that_keeps_a_state_is_found_by_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(requirements, "ATTENTION", requirements.ATTENTION | {"hybrid"})
    folder, _ = publish("falcon_h1", tmp_path / "model")
    with pytest.raises(CheckpointRefused, match="keeps a state beside the KV cache"):
        Engine(folder, **OPTIONS)

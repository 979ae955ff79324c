"""Tokens that experts get while calibration data runs through a model."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_checkpoints import plain_model, random_weight
from support.small_models import publish

from qtool.architecture import map_names
from qtool.backends import Job, Work
from qtool.backends.expert_tokens import chosen_experts, counting_expert_tokens
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.expert_tokens import ExpertTokens, read_expert_tokens
from qtool.errors import CheckpointRefused
from qtool.inspection import inspect
from qtool.plan import make_plan
from qtool.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]
SAMPLES = [list(range(20, 44)), list(range(100, 108))]
CHOSEN = torch.tensor([[0, 2], [2, 1]])
SCORES = torch.tensor([[4.0, 0.0, 3.0], [0.0, 2.0, 3.0]])


class Counts:
    """Takes the counts."""

    def expert_tokens(self, counts):
        self.counts = counts


@pytest.mark.parametrize("model", ["granitemoe", "llama4"])
def test_each_router_is_counted_until_all_tokens_were_seen_once(model, tmp_path):
    folder, loaded = publish(model, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, load_recipe("w4a16_gptq"), map_names(checkpoint))
    report = Counts()
    job = Job(str(folder), {}, "", "", "cpu", None)
    work = Work(job, plan, SAMPLES, "cpu", report)
    with counting_expert_tokens(work, loaded), torch.no_grad():
        for sample in SAMPLES * 2:
            loaded(input_ids=torch.tensor([sample]))
    top_k = checkpoint.text_config["num_experts_per_tok"]
    assert len(report.counts) == 2
    assert all(stack.endswith("experts") for stack in report.counts)
    assert {sum(counts) for counts in report.counts.values()} == {32 * top_k}


@pytest.mark.parametrize(
    "output", [(SCORES, SCORES, CHOSEN), (CHOSEN, SCORES), SCORES, (SCORES.T, SCORES)]
)
def test_the_choice_is_found_in_what_routers_return(output):
    found = chosen_experts(output, 3, 2)
    assert sorted(found[0].tolist()) == [0, 2]
    assert sorted(found[1].tolist()) == [1, 2]


def test_what_is_no_choice_is_not_counted():
    assert chosen_experts((torch.zeros(2, 5), None), 3, 2) is None


def test_the_summary_names_experts_with_few_tokens():
    tokens = ExpertTokens({"layers.0.mlp.experts": (900, 3, 64), "layers.1.mlp.experts": (0, 70)})
    assert tokens.summary() == (
        "experts: 0 to 900 calibration tokens each; 2 of 5 below 64: layers.1.mlp.experts.0 (0), "
        "layers.0.mlp.experts.1 (3)"
    )


def test_inspect_reads_the_counts_and_warns_of_others(tmp_path):
    folder = plain_model(tmp_path / "model", up=random_weight())
    manifest = {"files": {}, "expert_tokens": {"mlp.experts": [5, 900]}}
    (folder / "qtool-manifest.json").write_text(json.dumps(manifest))
    found = inspect(open_checkpoint(folder))
    assert found.to_dict()["expert_tokens"] == {"mlp.experts": (5, 900)}
    (folder / "qtool-manifest.json").write_text('{"files": {}, "expert_tokens": {"experts": [-1]}}')
    with pytest.raises(CheckpointRefused, match="a number of tokens"):
        read_expert_tokens(folder)
    assert "expert_tokens" in inspect(open_checkpoint(folder)).warnings[0]

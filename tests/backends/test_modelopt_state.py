"""The sequence of SGLang's ModelOpt page: quantize and save, restore and export, export only. And
that a state can run no code.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support import EXAMPLE

import qtool
from qtool.backends.modelopt_state import check_state, restore_state
from qtool.checkpoint import open_checkpoint
from qtool.errors import StateRefused
from qtool.evaluation.perplexity import load_dequantized
from qtool.plan import make_plan
from qtool.recipe import load_recipe

MODEL = EXAMPLE
pytestmark = pytest.mark.xdist_group("modelopt state")  # one process, so that `saved` runs once
DATA = {
    "calibration": str(MODEL / "calibration.jsonl"),
    "num_samples": 2,
    "seq_len": 128,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, two_layers):
    """A run that kept its state, with the scales that AWQ searched: a folder with `out` and
    `state`.
    """
    folder = tmp_path_factory.mktemp("saved")
    qtool.quantize(
        two_layers,
        method="modelopt_int4_awq",
        output=folder / "out",
        checkpoint_save_path=folder / "state",
        **DATA,
    )
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_dequantized(open_checkpoint(folder))(input_ids=torch.arange(64)[None]).logits


def test_a_restored_state_is_exported_with_equal_logits(saved, two_layers, tmp_path):
    exported = qtool.export(
        two_layers,
        checkpoint_restore_path=saved / "state",
        output=tmp_path / "exported",
        device="cpu",
    )
    assert torch.equal(logits(exported.output), logits(saved / "out"))


def test_a_state_is_json_and_safetensors(saved):
    assert {path.name for path in (saved / "state").iterdir()} == {
        "qtool-state.json",
        "model.safetensors",
    }


def refusal(model=MODEL, **options) -> qtool.QtoolError:
    with pytest.raises(qtool.QtoolError) as caught:
        qtool.export(model, device="cpu", **options)
    return caught.value


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_foreign_pickle_is_refused_unless_trusted(tmp_path):
    (tmp_path / "state.pt").write_bytes(pickle.dumps(_Payload(str(tmp_path / "ran"))))
    error = refusal(checkpoint_restore_path=tmp_path / "state.pt", output=tmp_path / "out")
    assert (error.code, error.exit_code) == ("E_STATE_PICKLE", 3)
    assert "--trust-pickle" in error.hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_even_a_trusted_pickle_runs_no_code(tmp_path):
    torch.save(_Payload(str(tmp_path / "ran")), tmp_path / "state.pt")
    plan = make_plan(open_checkpoint(MODEL), load_recipe("modelopt_fp8"))
    path = str(tmp_path / "state.pt")
    check_state(path, plan, trust_pickle=True)
    with pytest.raises(StateRefused) as caught:  # in the worker of a run
        restore_state(torch.nn.Linear(1, 1), path, plan)
    assert (caught.value.code, caught.value.exit_code) == ("E_STATE", 3)
    assert not (tmp_path / "ran").exists()


@pytest.mark.exhaustive
def test_a_state_of_another_model_is_refused(saved, two_layers, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(two_layers, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    norm = min(
        open_checkpoint(other).tensors.values(), key=lambda tensor: (tensor.size_bytes, tensor.name)
    )
    data[norm.offset] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(qtool.QtoolError) as caught:
        qtool.export(
            other, checkpoint_restore_path=saved / "state", output=tmp_path / "out", device="cpu"
        )
    assert caught.value.code == "E_STATE_MODEL"


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", [{"modelopt_version": "0.1.0"}, {"state_version": 99}])
def test_a_state_of_another_version_is_refused(saved, two_layers, tmp_path, change):
    shutil.copytree(saved / "state", tmp_path / "state")
    file = tmp_path / "state" / "qtool-state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    error = refusal(two_layers, checkpoint_restore_path=tmp_path / "state", output=tmp_path / "out")
    assert error.code == "E_STATE_VERSION"


@pytest.mark.parametrize(
    "change", [{"method": "modelopt_fp4"}, {"method": "modelopt_int4_awq", "kv_cache": "fp8"}]
)
def test_a_state_made_by_another_recipe_is_refused_before_any_work(
    saved, two_layers, tmp_path, change
):
    with pytest.raises(qtool.QtoolError) as caught:
        qtool.quantize(
            two_layers,
            output=tmp_path / "out",
            checkpoint_restore_path=saved / "state",
            device="cpu",
            **change,
        )
    assert (caught.value.code, caught.value.exit_code) == ("E_STATE_RECIPE", 3)


def test_a_missing_state_is_refused(tmp_path):
    assert (
        refusal(checkpoint_restore_path=tmp_path / "none", output=tmp_path / "out").code
        == "E_STATE"
    )

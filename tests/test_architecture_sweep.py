"""A slice of `tests/benchmarks/architectures.py`: what dry runs say of models of every kind, and two
that are quantized and tried in every way.
"""

from __future__ import annotations

import pytest
from benchmarks.architectures import METHODS, Cell, try_method
from support import EXAMPLE
from support.small_models import publish

from qtool.errors import QtoolError
from qtool.options import QuantizeOptions
from qtool.quantization.request import prepare

pytest_plugins = ["support.sample_plugin"]
MODELS = ("deepseek_v3-mtp", "gpt_oss", "llama4", "qwen2_5_vl", "qwen3_5_moe-mtp")
MORE_MODELS = ("gemma3", "glm4_moe-mtp", "minimax_m2", "mixtral", "qwen3_vl_moe")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [*MODELS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE_MODELS)]
)
def test_a_dry_run_plans_the_text_model_or_names_a_way(model, tmp_path):
    folder, _ = publish(model, tmp_path / "model")
    ways = 0
    for method in METHODS:
        options = QuantizeOptions(
            method=method, calibration=str(EXAMPLE / "calibration.jsonl"), device="cpu"
        )
        try:
            request = prepare(folder, options)
        except QtoolError as error:
            assert error.exit_code in (2, 3)
            assert error.hint and "download" not in error.hint
            continue
        ways += 1
        assert request.plan.quantized_share >= 0.95, (method, request.plan.mostly_unquantized)
    assert ways >= 3


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", ["gpt_oss", "qwen3_vl"])
def test_a_model_is_quantized_and_right_in_every_use(model, tmp_path):
    publish(model, tmp_path / "models" / model)
    cell = try_method(model, "fp8_dynamic", tmp_path)
    assert isinstance(cell, Cell) and cell.state == "right", cell.what
    assert cell.share is not None and cell.share >= 0.95

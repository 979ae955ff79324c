"""How an inspection is shown: the tree of layers, and the command."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import EXAMPLE
from support.small_checkpoints import (
    plain_model,
    printed,
    random_weight,
    stored,
)

from qtool.checkpoint import open_checkpoint
from qtool.inspection import inspect
from qtool.scheme import SCHEMES, Scheme, Weights
from qtool.weight import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


def test_the_tree_joins_layers_that_are_alike_and_shows_the_one_that_is_not(tmp_path):
    four, eight = SCHEMES["W4A16"], Scheme(Weights("int8", "group", 128))
    layers = {
        f"model.layers.{number}.mlp.up_proj": eight if number == 2 else four for number in range(6)
    }
    folder = stored(
        tmp_path / "model",
        {name: (quantize(random_weight(), scheme), scheme) for name, scheme in layers.items()},
    )
    text = printed(inspect(open_checkpoint(folder)), modules=True)
    branches = [line.strip(" │├└─") for line in text[text.index("linear layers") :].splitlines()]
    assert [branch for branch in branches if re.match(r"\d", branch)] == ["0 to 1", "2", "3 to 5"]
    assert [branch.split("  ")[1] for branch in branches if branch.startswith("up_proj")] == [
        "W4A16",
        "W8A16",
        "W4A16",
    ]
    assert "32 x 128, 4.1" in text


def test_without_modules_there_is_no_tree_and_with_it_every_kind_is_there(sample):
    found = inspect(open_checkpoint(sample("gptq/dynamic")))
    assert "linear layers" not in printed(found)
    text = printed(found, modules=True)
    assert "0 to 1" in text
    assert re.search(r"down_proj +int8 g64", text)
    assert re.search(r"o_proj +16 bit", text)


def test_an_engine_that_cannot_load_it_gives_exit_code_3_and_the_whole_report(run_cli, sample):
    result = run_cli(
        "inspect",
        "--model-path",
        sample("gptq/desc_act"),
        "--engine",
        "vllm",
        "--gpu",
        "h100",
        "--json",
    )
    data = json.loads(result.stdout)
    assert (result.exit_code, data["format"], data["engine"]["loads"]) == (3, "gptq", False)
    assert [finding["code"] for finding in data["engine"]["findings"]] == ["E_ENGINE_GPTQ_ORDER"]
    assert result.stderr == ""


def test_an_engine_that_loads_it_gives_exit_code_0(run_cli, sample):
    result = run_cli(
        "inspect",
        "--model-path",
        sample("ct/W4A16"),
        "--engine",
        "sglang",
        "--gpu",
        "sm_90",
        "--tp",
        "2",
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(r"SGLang .* on sm_90, tensor parallel 2: loads", result.stdout, re.IGNORECASE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "question", [["--gpu", "sm_90"], ["--tp", "2"], ["--engine-version", "0.33"]]
)
def test_a_question_to_an_engine_needs_its_name(run_cli, question):
    result = run_cli("inspect", "--model-path", EXAMPLE, *question)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_NO_ENGINE]" in result.stderr
    assert "--engine vllm" in result.stderr


def test_the_page_is_written_beside_what_is_printed(run_cli, sample, tmp_path):
    options = ["--deep", "--against", EXAMPLE, "--html", "report.html", "--json"]
    result = run_cli("inspect", "--model-path", sample("ct/mixed"), *options)
    data = json.loads(result.stdout)
    assert (result.exit_code, len(data["deep"]["modules"]), len(data["against"]["modules"])) == (
        0,
        36,
        42,
    )
    assert data["against"]["modules"][0]["sqnr_db"] < 22
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert all(part in page for part in ("model.layers.5.mlp.gate_proj", "FP8_DYNAMIC", "W4A16"))


def test_a_place_that_cannot_be_written_is_an_error_and_no_traceback(run_cli, sample):
    result = run_cli(
        "inspect", "--model-path", sample("ct/W4A16"), "--html", "no/such/folder/report.html"
    )
    assert result.exit_code == 4
    assert re.match(
        r"error\[E_OUTPUT_PLACE\]: no/such/folder/report\.html: cannot write there", result.stderr
    )


def test_a_base_of_another_shape_is_refused_by_the_command(run_cli, sample, tmp_path):
    plain_model(tmp_path / "base", up=torch.ones(3, 5))
    result = run_cli(
        "inspect", "--model-path", sample("ct/W4A16"), "--against", tmp_path / "base", "--json"
    )
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (3, "E_NOT_COMPARABLE")

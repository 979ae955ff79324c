"""The model card says what the manifest and the headers say, in the Hub's format."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from qtool.checkpoint import digest_files, open_checkpoint
from qtool.checkpoint.manifest import check_manifest
from qtool.inspection.model_card import record_evaluation, render_card, source_metadata

pytest_plugins = ["support.sample_plugin"]

MANIFEST = {
    "model": "tiny-python-llama",
    "source": {"base_model": "org/tiny-python-llama", "license": "apache-2.0"},
    "recipe": {"name": "w4a16_gptq", "summary": "INT4 weights", "backend": "llmcompressor"},
    "calibration": {"source": "texts.jsonl", "used": 32, "tokens": 16384},
    "versions": {"qtool": "0.1.0", "llmcompressor": "0.14"},
}
EVALUATION = {
    "measures": {"ppl_ratio": {"value": 1.0234, "low": 1.01, "high": 1.04}},
    "data": {"tokens": 12345, "documents": 26},
    "tasks": [{"name": "gsm8k", "reference": 0.8, "quantized": 0.76, "ratio": 0.95}],
    "speed": [{"name": "ms a token, batch 1", "reference": 8.0, "quantized": 4.0, "ratio": 2.0}],
}


def card_of(folder, manifest):
    """Return the metadata and the text of a card."""
    card = render_card(open_checkpoint(folder), "tiny-int4", manifest)
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_how_and_where(sample):
    metadata, text = card_of(sample("ct/W4A16"), MANIFEST)
    assert metadata == {
        "base_model": "org/tiny-python-llama",
        "license": "apache-2.0",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["qtool", "compressed-tensors", "w4a16"],
    }
    for part in (
        "# tiny-int4",
        "[org/tiny-python-llama](https://huggingface.co/org/tiny-python-llama) in W4A16",
        "| W4A16 | 42 layers: `",
        "32 samples, 16,384 tokens, from `texts.jsonl`",
        "backend: llmcompressor",
        "qtool serve --model-path ./tiny-int4",
        "vllm serve ./tiny-int4",
        "python -m sglang.launch_server --model-path ./tiny-int4",
        "It was not measured",
    ):
        assert part in text


def test_the_card_says_how_good_and_how_fast_when_that_was_measured(sample):
    _, text = card_of(sample("ct/W4A16"), {**MANIFEST, "evaluation": EVALUATION})
    for part in (
        "on 12,345 tokens of 26 texts",
        "| ratio of the perplexities | 1.023 | 1.01 to 1.04 |",
        "| gsm8k | 0.8 | 0.76 | 0.95 |",
        "| ms a token, batch 1 | 8 | 4 | 2 |",
    ):
        assert part in text
    assert "not measured" not in text


def test_the_card_names_the_engines_that_do_not_load_it(sample):
    _, text = card_of(sample("modelopt/INT4_AWQ"), {})
    assert "vllm serve" not in text
    assert "does not load it: " in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "license: llama3.1\nlanguage: [en, de]\ntags: [x]",
            {"license": "llama3.1", "language": ["en", "de"]},
        ),
        ("license_link: /home/me/LICENSE\nlicense: 7", {}),
        ("license_link: https://example.org/l", {"license_link": "https://example.org/l"}),
        ("license: &a mit\nlicense_name: *a", {}),
        ("- a\n- b", {}),
        ("license: 'a\n\n  b'", {}),
    ],
)
def test_only_sound_metadata_of_the_source_is_carried(given, expected, tiny_copy):
    (tiny_copy / "README.md").write_text(f"---\n{given}\n---\n# A model\n")
    assert source_metadata(open_checkpoint(tiny_copy)) == expected


def test_a_model_in_the_cache_of_the_hub_is_the_base_model(tiny_copy, tmp_path):
    folder = tmp_path / "models--org--a-model" / "snapshots" / "c0ffee"
    folder.parent.mkdir(parents=True)
    shutil.move(tiny_copy, folder)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.hub_name) == ("a-model", "org/a-model")
    assert source_metadata(checkpoint) == {"base_model": "org/a-model"}


@pytest.mark.parametrize("edited", [False, True])
def test_an_evaluation_goes_into_the_manifest_and_into_a_card_that_nobody_edited(edited, tiny_copy):
    card = tiny_copy / "README.md"
    files = digest_files(list(tiny_copy.iterdir()))
    (tiny_copy / "qtool-manifest.json").write_text(json.dumps({**MANIFEST, "files": files}))
    if edited:
        card.write_text("mine")
    record_evaluation(tiny_copy, EVALUATION)
    assert json.loads((tiny_copy / "qtool-manifest.json").read_text())["evaluation"] == EVALUATION
    assert (card.read_text() == "mine") == edited
    assert ("1.01 to 1.04" in card.read_text()) != edited
    assert check_manifest(tiny_copy).matches

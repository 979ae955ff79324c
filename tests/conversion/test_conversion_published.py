"""Published layouts go to the formats that hold them, and stay the same numbers."""

import pytest
import torch
from support.published import PUBLISHED

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.errors import CheckpointRefused
from qtool.formats import detect, read
from qtool.modules import is_embedding, is_head
from qtool.weight import with_one_scale

FEW = {  # what was once refused or read wrongly -> the formats that hold it
    "deepseek-v4-flash": ("compressed-tensors",),
    "gguf-moe-mxfp4": ("compressed-tensors",),
    "intel-int2-mixed-autoround": ("compressed-tensors",),
    "mistral-small-4-fp8": ("compressed-tensors", "modelopt"),
    "neuralmagic-llama-3-fp8-kv": ("compressed-tensors", "modelopt"),
    "nvidia-llama-4-fp8": ("compressed-tensors", "modelopt"),
    "nvidia-llama-4-nvfp4": ("compressed-tensors", "modelopt"),
    "nvidia-qwen3.6-35b-a3b-nvfp4": ("compressed-tensors", "modelopt"),
    "nvidia-minimax-m3-nvfp4": ("compressed-tensors", "modelopt"),
    "nvidia-qwen3.8-flash-next-nvfp4": ("compressed-tensors", "modelopt"),
    "g_idx-of-minus-one": ("compressed-tensors", "modelopt"),
    "minimax-m3-w4a16-embedding": ("compressed-tensors",),
    "transformers-fp8-experts": ("compressed-tensors", "modelopt"),
}
TARGETS = ("compressed-tensors", "modelopt")
PARTS = ("data", "scale", "scale2", "zero", "perm", "pre_scale")


def held_by(name, tmp_path):
    """The targets that hold a layout; each has the same bytes, and reads without a warning."""
    PUBLISHED[name](tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    layout = detect(source)
    found = []
    for to in TARGETS:
        output = tmp_path / to
        try:
            export(tmp_path / "model", to=to, output=output)
        except CheckpointRefused as error:
            assert error.code in ("E_CANNOT_HOLD", "E_SAME_FORMAT"), error
            continue
        other = open_checkpoint(output)
        converted = detect(other)
        assert [each for each in converted.warnings if "KV cache" not in each] == []
        tables = {each for each in layout.modules if layout.format == "gguf" and is_table(each)}
        assert set(converted.modules) == set(layout.modules) - tables  # which become 16 bits
        for module in converted.modules:
            one = with_one_scale(read(source, layout, module))
            two = read(other, converted, module)
            for part in PARTS:
                assert_same(getattr(one, part), getattr(two, part))
        found.append(to)
    return tuple(found)


def is_table(name):
    return is_embedding(name) or is_head(name)


def assert_same(one, two):
    if one is None or two is None:
        assert one is two
        return
    assert one.dtype == two.dtype
    assert torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8))


@pytest.mark.parametrize("name", FEW)
def test_a_layout_goes_to_the_formats_that_hold_it(tmp_path, name):
    assert held_by(name, tmp_path) == FEW[name]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layout_keeps_its_bytes_in_the_formats_that_hold_it(tmp_path, name):
    held_by(name, tmp_path)

"""Every layout in `support.published` reads as its publisher means it."""

import pytest
import torch
from support.published import PUBLISHED

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.runtime.load import cache_scales
from qtool.weight import dequantize


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_layer_of_a_published_layout_is_the_matrix_that_its_publisher_means(tmp_path, name):
    expected = PUBLISHED[name](tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    layout = formats.detect(checkpoint)
    assert set(layout.modules) == set(expected)
    left_out = ["activation_scale_ub"] if "fbgemm" in name else []
    assert [warning.split("`")[1] for warning in layout.warnings] == left_out
    assert formats.check_values(checkpoint, layout) == []
    for module, weight in expected.items():
        found = dequantize(formats.read(checkpoint, layout, module))
        assert torch.equal(found, weight), module


@pytest.mark.parametrize(
    "name", ["neuralmagic-llama-3-fp8-kv", "autofp8-kv-output-scale", "amd-llama-3.1-fp8-kv"]
)
def test_scales_of_the_kv_cache_count_by_whatever_name(tmp_path, name):
    PUBLISHED[name](tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert formats.detect(checkpoint).kv_cache == "fp8"
    assert cache_scales(checkpoint) == {
        layer: (pytest.approx(0.02), pytest.approx(0.02)) for layer in (0, 1)
    }

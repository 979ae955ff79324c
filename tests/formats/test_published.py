"""Every layout in `support.published` reads as its publisher means it."""

import pytest
import torch
from support.published import PUBLISHED

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.weight import dequantize


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_layer_of_a_published_layout_is_the_matrix_that_its_publisher_means(tmp_path, name):
    expected = PUBLISHED[name](tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    layout = formats.detect(checkpoint)
    assert set(layout.modules) == set(expected)
    assert layout.warnings == ()
    assert formats.check_values(checkpoint, layout) == []
    for module, weight in expected.items():
        found = dequantize(formats.read(checkpoint, layout, module))
        assert torch.equal(found, weight), module

"""Every layout in `support.published.not_read` is refused by its name, with a way on."""

import pytest
from support.published.not_read import NOT_READ

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.inspection import inspect


@pytest.mark.parametrize("name", NOT_READ)
def test_a_layout_that_is_not_read_is_called_by_its_name(tmp_path, name):
    case = NOT_READ[name]
    case.write(tmp_path / "model")
    with pytest.raises(CheckpointRefused) as error:
        formats.detect(open_checkpoint(tmp_path / "model"))
    assert error.value.code == case.code
    said = f"{error.value.message} {error.value.hint}"
    assert not [word for word in case.words if word not in said], said
    assert "download" not in said


@pytest.mark.parametrize("name", ["awq-gemv", "mlx-community-4bit", "torchao-before-0.10"])
def test_inspect_still_says_what_an_engine_does_with_it(tmp_path, name):
    NOT_READ[name].write(tmp_path / "model")
    found = inspect(open_checkpoint(tmp_path / "model"), engine="vllm")
    assert "N_ENGINE_NOT_READ" in {each.code for each in found.engine.findings}
    assert len(found.warnings) == 1

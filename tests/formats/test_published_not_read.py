"""Every layout in `support.published.not_read` is refused by its name, with a way on."""

import pytest
from support.published.not_read import NOT_READ

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused


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

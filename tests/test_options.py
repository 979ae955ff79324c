"""Options as frozen dataclasses: each is documented, bounded and known by its name."""

from __future__ import annotations

from dataclasses import fields

import pytest

from qtool.engine.config import EngineConfig
from qtool.errors import UsageError
from qtool.options import field_docs, make_options

OPTIONS = (EngineConfig,)


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_has_its_meaning_under_it(kind):
    docs = field_docs(kind)
    assert [field.name for field in fields(kind) if not docs.get(field.name)] == []
    assert all("\n" not in text for text in docs.values())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"compile": "yes"}, "E_COMPILE"),
        ({"mem_fraction_static": 1.0}, "E_FRACTION"),
        ({"mem_fraction_static": True}, "E_FRACTION"),
        ({"context_length": 0}, "E_LIMIT"),
        ({"context_length": "100"}, "E_LIMIT"),
        ({"max_running_requests": True}, "E_LIMIT"),
        ({"random_seed": -1}, "E_LIMIT"),
        ({"context_lenght": 5}, "E_UNKNOWN_OPTION"),
    ],
    ids=str,
)
def test_an_engine_is_not_configured_with_what_cannot_be(options, code):
    with pytest.raises(UsageError) as caught:
        make_options(EngineConfig, options)
    assert caught.value.code == code


def test_an_unknown_option_is_answered_with_the_nearest_name():
    with pytest.raises(UsageError) as caught:
        make_options(EngineConfig, {"context_lenght": 5})
    assert "`context_length`" in caught.value.hint

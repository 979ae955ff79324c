"""Options as frozen dataclasses: each is documented, bounded and known by its name."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import qtool
from qtool.engine.config import EngineConfig
from qtool.engine.engine import Engine
from qtool.engine.scoring import RerankArguments, ScoreArguments
from qtool.errors import UsageError
from qtool.options import ExportOptions, QuantizeOptions, field_docs, make_options
from qtool.serve.settings import ServeOptions, ServeSettings, make_settings

OPTIONS = (EngineConfig, QuantizeOptions, ExportOptions, ServeOptions, ServeSettings)


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


@pytest.mark.parametrize(
    "options",
    [
        {"port": 0},
        {"port": 65536},
        {"max_queued_requests": -1},
        {"drain_timeout_s": -0.5},
        {"drain_timeout_s": "5"},
        {"tp": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [ServeOptions, ServeSettings])
def test_a_server_has_the_bounds_of_the_command_line_in_python_too(kind, options):
    with pytest.raises(UsageError) as caught:
        kind(model_path="M", **options)
    assert caught.value.code == "E_LIMIT"


def test_what_only_qtools_own_engine_refuses_may_be_given_to_another():
    options = ServeOptions(model_path="M", mem_fraction_static=1.0, context_length=1 << 21)
    with pytest.raises(UsageError):
        make_settings(options)


def test_options_that_were_not_given_have_the_servers_defaults():
    settings = make_settings(ServeOptions(model_path="M", port=8000, enable_torch_compile=True))
    assert (settings.host, settings.port, settings.log_level) == ("127.0.0.1", 8000, "info")
    assert (settings.compile, settings.engine_config.compile) == ("decode", "decode")


def test_what_clients_see_of_the_settings_has_no_key_and_no_option_of_other_engines():
    shown = make_settings(ServeOptions(model_path="M", api_key="secret")).to_dict()
    assert "secret" not in shown.values()
    assert not {"api_key", "tp", "torchao_config", "trust_remote_code"} & shown.keys()
    assert shown["drain_timeout_s"] == 20.0


@pytest.mark.parametrize("given", [{"quantization": "FP8"}, {"torchao_config": "FP8wo"}])
def test_two_flags_name_one_quantization_in_lower_case(given):
    options = ServeOptions(model_path="M", **given)
    assert options.quantization == next(iter(given.values())).lower()
    assert options.torchao_config is None


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (qtool.quantize, QuantizeOptions),
        (qtool.export, ExportOptions),
        (Engine.score, ScoreArguments),
        (Engine.async_rerank, RerankArguments),
    ],
    ids=["quantize", "export", "score", "async_rerank"],
)
def test_help_of_a_function_shows_its_options(function, kind):
    shown = inspect.signature(function).parameters
    assert {field.name for field in fields(kind)} <= shown.keys()
    assert "options" not in shown

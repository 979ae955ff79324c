"""The rules of engines: each fires on a checkpoint made for it, and says what is true."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest
from pydantic import ValidationError
from support.engine_findings import ENGINES, FIRES, check
from support.headers_only import (
    EXPERTS,
    HEAD,
    MLP,
    MODEL,
    Awq,
    Fp8,
    Gptq,
    ModelOpt,
    build,
    fp8,
    nvfp4,
    packed,
    plain,
)

from qtool.checkpoint.reader import open_checkpoint
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import detect
from qtool.inspection.engines import check_engine, engines
from qtool.inspection.engines.names import matcher
from qtool.inspection.engines.rules import FOLDER, SHARED, Rule, Ruleset, load_rules

RULES = [(engine, rule.code) for engine in ENGINES for rule in load_rules(engine).rules]


@pytest.mark.parametrize(
    ("engine", "code"), RULES, ids=[f"{engine}-{code}" for engine, code in RULES]
)
def test_every_rule_can_fire(engine, code, tmp_path):
    make, options = FIRES.get(f"{engine} {code}") or FIRES[code]
    report = check(make(tmp_path / "model"), engine, **options)
    found = next((finding for finding in report.findings if finding.code == code), None)
    assert found, [finding.code for finding in report.findings]
    assert report.loads == all(finding.severity != "refused" for finding in report.findings)
    if found.severity == "refused":
        assert not report.loads and not report.native
    rule = next(rule for rule in load_rules(engine).rules if rule.code == code)
    assert (found.count > 0) == (rule.about != "checkpoint")
    assert len(found.modules) == min(found.count, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rule_says_where_it_comes_from(engine):
    assert engines() == ENGINES
    for rule in load_rules(engine).rules:
        assert len(rule.source) > 5 and rule.message[-1] != "."
        assert rule.severity != "refused" or rule.hint or "GPU" in rule.code, rule.code


RULE = {
    "code": "E_ENGINE_X",
    "severity": "refused",
    "when": {"ranks": 2},
    "message": "no",
    "source": "here",
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"when": {"rank": 2}}, "did you mean `ranks`"),
        ({"when": {"ranks": {"under": 2}}}, "unknown operator `under`"),
        ({"when": {"format": "gtpq"}}, "`format` is never 'gtpq'"),
        ({"when": {"group_size": 128}}, "unknown input `group_size`"),
        ({"when": {"ranks": {"has": [2]}}}, "does not fit `ranks`"),
        ({"when": {"order": "group"}}, "does not fit `order`"),
        ({"when": {}}, "an empty condition"),
        ({"when": []}, "an empty condition"),
        ({"message": "{rank} ranks"}, "unknown input `rank`"),
        ({"severity": "note"}, "begins with another letter"),
        ({"code": "E_OTHER"}, "should match pattern"),
        ({"source": ""}, "at least 1 character"),
        ({"hints": "x"}, "Extra inputs are not permitted"),
        ({"tests": ()}, "made from the conditions"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(change, complaint):
    Rule.model_validate(RULE)
    with pytest.raises(ValidationError, match=complaint):
        Rule.model_validate(RULE | change)


def test_a_code_stands_for_one_rule():
    with pytest.raises(ValidationError, match="E_ENGINE_X is there twice"):
        Ruleset.model_validate({"engine": "x", "version": "1", "rules": [RULE, RULE]})


def test_a_rule_holds_since_one_version_and_until_another():
    rule = Rule.model_validate(RULE | {"since": "0.9", "until": "0.33"})
    assert [rule.is_of(version) for version in ((0, 8), (0, 9), (0, 32, 1), (0, 33), None)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_no_yaml_file_is_left_unread():
    read = {name for engine in ENGINES for name in (engine, *load_rules(engine).include)} | {
        "gpus",
        "layers",
    }
    assert {path.stem for path in FOLDER.glob("*.yaml")} == read == {*ENGINES, *SHARED}


# --- what a report says


def codes(report):
    return {finding.code for finding in report.findings}


def test_a_plain_checkpoint_loads_everywhere(tiny_model):
    for engine in ENGINES:
        report = check(open_checkpoint(tiny_model), engine)
        assert report.loads and report.native and report.findings == ()


def test_a_report_crosses_json(tmp_path):
    report = check(build(tmp_path, packed(3)), "sglang", gpu="H100", tensor_parallel=2)
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["engine"], data["version"], data["gpu"], data["tensor_parallel"]) == (
        "sglang",
        "0.5.23",
        "sm_90",
        2,
    )
    assert data["findings"][0]["count"] == 7 and len(data["findings"][0]["modules"]) == 3


@pytest.mark.parametrize("gpu", ["sm_90", "90", "9.0", "sm_90a", "h100", "H200", "NVIDIA H100"])
def test_a_gpu_has_many_names(gpu, tmp_path):
    assert check(build(tmp_path, packed()), "vllm", gpu=gpu).gpu == "sm_90"


@pytest.mark.parametrize(
    ("engine", "options", "hint"),
    [
        ("vlm", {}, "did you mean `vllm`"),
        ("fusion", {}, ""),
        ("vllm", {"gpu": "h10"}, "h100"),
        ("vllm", {"gpu": "sm_9"}, ""),
        ("vllm", {"gpu": ""}, "sm_90"),
        ("vllm", {"version": "latest"}, "0.33.0"),
        ("vllm", {"tensor_parallel": 0}, ""),
    ],
)
def test_what_does_not_exist_is_a_usage_error(engine, options, hint, tmp_path):
    with pytest.raises(UsageError) as error:
        check(build(tmp_path, packed()), engine, **options)
    assert hint in error.value.hint


def test_another_version_is_noted_and_its_rules_apply(tmp_path):
    checkpoint = build(tmp_path, Gptq(desc_act=True))
    assert (
        codes(check(checkpoint, "vllm"))
        == codes(check(checkpoint, "vllm", version="0.33.0"))
        == {"E_ENGINE_GPTQ_ORDER"}
    )
    assert codes(check(checkpoint, "vllm", version="0.20.0")) == {"N_ENGINE_VERSION"}


@pytest.mark.parametrize(
    ("gpu", "native"), [(None, True), ("b200", True), ("h100", False), ("a100", False)]
)
def test_nvfp4_is_native_on_blackwell_alone(gpu, native, tmp_path):
    for engine in ("vllm", "sglang"):
        report = check(build(tmp_path / engine, nvfp4()), engine, gpu=gpu)
        assert (report.loads, report.native) == (True, native)


def test_an_engine_that_dequantizes_is_not_native(tmp_path):
    report = check(build(tmp_path, fp8()), "transformers")
    assert report.loads and not report.native


# --- names


@pytest.mark.parametrize(
    ("kind", "entry", "name", "matches"),
    [
        ("exact", "a.b", "a.b", True),
        ("exact", "b", "a.b", False),
        ("regex", "re:.*b", "a.bc", True),
        ("regex", ".*b", "a.b", False),
        ("regex", "re:(", "a.b", False),
        ("suffix", "b.c", "a.b.c", True),
        ("suffix", "b.c", "a.xb.c", False),
        ("ending", "c1", "a.fc1", True),
        ("substring", "gate", "mlp.gate_proj", True),
        ("component", "mlp.gate", "a.mlp.gate.b", True),
        ("component", "mlp.gate", "a.mlp.gate_up_proj", False),
        ("glob", "a.b*", "a.bc.d", True),
        ("glob", "a.b", "a.b.c", False),
        ("part_glob", "mtp*", "a.mtp_layers.b", True),
        ("start", "a", "ab", True),
        ("start", "b", "ab", False),
    ],
)
def test_engines_compare_names_in_their_own_ways(kind, entry, name, matches):
    assert matcher([kind], [entry])(name) is matches


def test_gate_hides_gate_proj_where_awq_compares_substrings(tmp_path):
    checkpoint = build(tmp_path, Awq(modules_to_not_convert=["gate"]))
    for engine in ("vllm", "sglang"):
        assert "E_ENGINE_SKIPS" in codes(check(checkpoint, engine))
    assert check(checkpoint, "transformers").loads


def test_a_dynamic_pattern_for_q_proj_never_meets_the_fused_layer(tmp_path):
    eight = Gptq(8)
    others = dict.fromkeys(("q_proj", "k_proj", "v_proj"), eight)
    apart = build(
        tmp_path / "apart", Gptq(dynamic={r".*\.(q|k|v)_proj": {"bits": 8}}), others=others
    )
    fused = build(
        tmp_path / "fused", Gptq(dynamic={r".*\.(q|k|v|qkv)_proj": {"bits": 8}}), others=others
    )
    for engine in ("vllm", "sglang"):
        assert codes(check(apart, engine)) == {"E_ENGINE_OTHER_WEIGHTS"}
        assert check(fused, engine).loads


def test_gptq_layers_left_in_16_bits_are_seen_by_vllm_and_not_by_sglang(tmp_path):
    checkpoint = build(tmp_path, Gptq(), but=["o_proj"])
    assert check(checkpoint, "vllm").loads
    assert codes(check(checkpoint, "sglang")) == {"E_ENGINE_EXPECTS"}


def test_a_quantized_head_must_be_named_by_a_target(tmp_path):
    by_class = build(tmp_path / "class", packed(ignore=[]), shapes=MODEL | HEAD)
    by_name = build(
        tmp_path / "name",
        packed(ignore=[], targets=["Linear", "re:.*lm_head"]),
        shapes=MODEL | HEAD,
    )
    for engine in ("vllm", "sglang"):
        assert codes(check(by_class, engine)) == {"E_ENGINE_SKIPS"}
        assert check(by_name, engine).loads


def test_the_first_target_in_order_wins_in_engines_and_the_smallest_regex_in_the_library(tmp_path):
    eight, four = (
        packed(8, targets=["re:.*self_attn.*"]),
        packed(4, targets=["re:.*attn.*", "re:.*mlp.*"]),
    )
    groups = {"a": eight.config["config_groups"]["g"], "b": four.config["config_groups"]["g"]}
    four.config["config_groups"] = groups
    report = check(build(tmp_path / "overlapping", four), "vllm")
    # for each kind of layer
    assert codes(report) == {"E_ENGINE_OTHER_WEIGHTS"} and report.findings[0].count == 1
    four.config["config_groups"] = {"b": groups["b"], "a": groups["a"]}
    assert check(build(tmp_path / "in_order", four), "vllm").loads


def test_a_short_name_is_skipped_by_sglang_and_not_by_vllm(tmp_path):
    checkpoint = build(tmp_path, Fp8(modules_to_not_convert=["self_attn.o_proj"]), but=["o_proj"])
    assert codes(check(checkpoint, "vllm")) == {"E_ENGINE_EXPECTS"}
    for engine in ("sglang", "transformers"):
        assert check(checkpoint, engine).loads


# --- shapes and scales


def test_the_last_of_merged_layers_may_end_in_part_of_a_block(tmp_path):
    inputs = {"type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
    last = {"model.layers.0.mlp.gate_proj": (512, 256), "model.layers.0.mlp.up_proj": (448, 256)}
    first = {"model.layers.0.mlp.gate_proj": (448, 256), "model.layers.0.mlp.up_proj": (512, 256)}
    assert check(build(tmp_path / "last", fp8("block", inputs), shapes=last), "vllm").loads
    assert codes(check(build(tmp_path / "first", fp8("block", inputs), shapes=first), "vllm")) == {
        "E_ENGINE_BLOCKS_CUT"
    }


def test_key_value_heads_are_repeated_for_more_ranks_than_heads(tmp_path):
    shapes = MODEL | {
        "model.layers.0.self_attn.k_proj": (64, 256),
        "model.layers.0.self_attn.v_proj": (64, 256),
    }
    checkpoint = build(tmp_path, fp8(), shapes=shapes, model={"num_key_value_heads": 2})
    assert check(checkpoint, "vllm", tensor_parallel=8).loads


def test_equal_global_scales_are_not_warned_of(tmp_path):
    assert check(build(tmp_path, nvfp4()), "vllm").findings == ()


def test_experts_of_one_scheme_load_with_their_router_in_16_bits(tmp_path):
    router = plain("model.layers.0.mlp.gate", (2, 256))
    for engine in ("vllm", "sglang"):
        assert check(build(tmp_path / engine, Gptq(), shapes=EXPERTS, tensors=router), engine).loads


# --- speed


def test_checking_and_loading_need_no_torch(tiny_model):
    code = f"""
        import sys
        from pathlib import Path
        from qtool.checkpoint import open_checkpoint
        from qtool.inspection.engines import check_engine
        check_engine(open_checkpoint(Path({str(tiny_model)!r})), None, "vllm")
        print("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_twelve_thousand_layers_get_one_verdict(tmp_path):
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}": (64, 64)
        for layer in range(32)
        for expert in range(125)
        for kind in MLP
    }
    checkpoint = build(
        tmp_path,
        nvfp4(ignore=[f"model.layers.{layer}.mlp.gate" for layer in range(32)]),
        shapes=shapes,
    )
    layout = detect(checkpoint)
    assert len(layout.modules) == 12_000
    assert check_engine(checkpoint, layout, "vllm", gpu="b200").loads


NONSENSE = [
    None,
    True,
    7,
    "x\x1b[2J",
    [],
    [7],
    [[]],
    {},
    {"x": 7},
    {"x": {"weights": 7, "targets": 7, "apply": 7}},
]
KEYS = (
    "quant_method",
    "quant_algo",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "transform_config",
    "sparsity_config",
    "quantization",
    "dynamic",
)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_a_config_of_any_shape_gets_a_report(key, value, tmp_path):
    for format in (packed(), Gptq(), ModelOpt("FP8"), Awq(), Fp8()):
        checkpoint = build(tmp_path / type(format).__name__, format)
        nonsense = {
            "quantization_config": {**format.config, key: value},
            "num_attention_heads": value,
            "tie_word_embeddings": value,
        }
        broken = replace(checkpoint, config=nonsense)
        layouts = [detect(checkpoint)]
        with suppress(CheckpointRefused):
            layouts.append(detect(broken))
        for engine, layout in product(ENGINES, layouts):
            report = check_engine(broken, layout, engine, tensor_parallel=2)
            assert "\x1b" not in "".join(finding.message for finding in report.findings)

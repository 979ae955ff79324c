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
from support.engine_findings import ENGINES, FIRES, check, mixed_precision, with_weights
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
    fp8_group,
    int8,
    mxfp4,
    nvfp4,
    packed,
    plain,
)

from qtool.checkpoint.reader import open_checkpoint
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import detect
from qtool.inspection.engines import (
    check_engine,
    check_engines,
    engines,
    shown_verdicts,
    verdicts_dict,
)
from qtool.inspection.engines.names import matcher
from qtool.inspection.engines.rules import (
    FOLDER,
    SHARED,
    Rule,
    Ruleset,
    load_rules,
    numbers,
)

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
    versions = ((0, 8), (0, 9), (0, 32, 1), (0, 33), ())
    assert [rule.is_of(version) for version in versions] == [False, True, True, False, False]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rule_was_seen_where_it_holds_and_ends_before_it_was_read(engine):
    ruleset = load_rules(engine)
    read = numbers(ruleset.version)
    for rule in ruleset.rules:
        assert all(rule.is_of(numbers(version)) for version in rule.seen), rule.code
        for version in filter(None, (rule.since, rule.until)):
            assert not read or numbers(version) <= read, rule.code


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
    assert (data["read"], data["findings"][0]["read"]) == ("0.5.23", "0.5.23")
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
    ("engine", "code", "version", "make"),
    [
        ("vllm", "E_ENGINE_GPTQ_ORDER", "0.30.0", Gptq(desc_act=True)),
        ("vllm", "E_ENGINE_ORDER", "0.30.0", with_weights(packed(), actorder="group")),
        ("vllm", "E_ENGINE_GPTQ_BITS", "0.22.0", Gptq(8, sym=False)),
    ],
)
def test_since_is_the_first_version_that_does_it(engine, code, version, make, tmp_path):
    major, minor, _ = version.split(".")
    before = f"{major}.{int(minor) - 1}.0"
    checkpoint = build(tmp_path, make)
    for later in (version, "0.32.0", "0.32.0+cpu", load_rules(engine).version):
        assert code in codes(check(checkpoint, engine, version=later))
    assert code not in codes(check(checkpoint, engine, version=before))


def test_a_version_that_was_run_needs_no_warning(tmp_path):
    checkpoint = build(tmp_path, packed())
    assert codes(check(checkpoint, "vllm", version="0.32.0+cpu")) == set()
    report = check(checkpoint, "vllm")
    assert (report.read, "0.32.0" in report.seen) == ("0.33.0", True)
    refused = check(build(tmp_path / "order", Gptq(desc_act=True)), "vllm").findings[0]
    assert (refused.read, refused.seen) == ("0.33.0", ("0.32.0",))


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


# --- transformers 5: experts are one tensor a layer, and GPTQ replaces whole decoder layers

BLOCKS = {"type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
REFUSED_EXPERTS = {
    "gptq": Gptq(),
    "gptq 8": Gptq(8),
    "awq": Awq(),
    "asymmetric": packed(symmetric=False),
    "int8": int8(),
    "int8 static": int8(inputs={"strategy": "tensor", "dynamic": False}),
    "codes in bytes": int8(4, group=128),
    "blocks": fp8("block", BLOCKS),
    "nvfp4": nvfp4(),
    "nvfp4a16": nvfp4(inputs=False),
    "mxfp8": fp8_group(),
}
LOADED_EXPERTS = {
    "mxfp4": mxfp4(),
    "w4a16": packed(),
    "w8a16": packed(8),
    "w3a16": packed(3),
    "fp8 channel": fp8(),
    "fp8 tensor": fp8("tensor"),
}


@pytest.mark.parametrize("name", REFUSED_EXPERTS | LOADED_EXPERTS)
def test_transformers_reads_experts_in_two_ways_only(name, tmp_path):
    format = (REFUSED_EXPERTS | LOADED_EXPERTS)[name]
    report = check(build(tmp_path / "experts", format, shapes=EXPERTS), "transformers")
    assert report.loads == (name in LOADED_EXPERTS)
    old = check(build(tmp_path / "old", format, shapes=EXPERTS), "transformers", version="4.57.0")
    assert old.loads
    shared = {f"model.layers.0.mlp.shared_experts.{kind}": shape for kind, shape in MLP.items()}
    assert check(build(tmp_path / "shared", format, shapes=shared), "transformers").loads


def test_transformers_reads_all_experts_by_one_group(tmp_path):
    eight, four = packed(8, targets=["re:.*self_attn.*"]), packed(4, targets=["re:.*mlp.*"])
    groups = {"a": eight.config["config_groups"]["g"], "b": four.config["config_groups"]["g"]}
    attention = {name: shape for name, shape in MODEL.items() if "self_attn" in name}
    shapes = EXPERTS | attention
    for targets, loads in (["re:.*mlp.*"], False), (["re:.*experts.*"], True), (["Linear"], True):
        groups["b"] = groups["b"] | {"targets": targets}
        four.config["config_groups"] = groups
        folder = tmp_path / targets[0].strip("re:.*")
        checkpoint = build(folder, four, shapes=shapes, others={"self_attn": eight})
        assert check(checkpoint, "transformers").loads == loads


def test_experts_in_16_bits_load_in_transformers_unless_others_are_packed(tmp_path):
    shapes = EXPERTS | MODEL
    for name, format, loads in ("fp8", fp8(), True), ("int4", packed(), False):
        checkpoint = build(tmp_path / name, format, shapes=shapes, but=["experts"])
        assert check(checkpoint, "transformers").loads == loads


@pytest.mark.parametrize(
    ("format", "options", "code"),
    [
        (Gptq(lm_head=True), {"shapes": MODEL | HEAD}, "E_ENGINE_SKIPS"),
        (Gptq(dynamic={"-:.*down_proj": {}}), {"but": ["down_proj"]}, "E_ENGINE_EXPECTS"),
        (
            Gptq(dynamic={".*down_proj": {"bits": 8}}),
            {"others": {"down_proj": Gptq(8)}},
            "E_ENGINE_OTHER_WEIGHTS",
        ),
        (
            Gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]]),
            {"but": ["k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]},
            None,
        ),
        (Gptq(), {"tensors": plain("lm_head", (512, 256))}, None),
    ],
)
def test_gptq_in_transformers_replaces_whole_decoder_layers(format, options, code, tmp_path):
    report = check(build(tmp_path, format, **options), "transformers")
    assert codes(report) == {"N_ENGINE_PACKAGE", *([code] if code else [])}


# --- the line that `quantize` ends with


def test_all_engines_are_asked_in_one_line(tmp_path):
    reports = check_engines(build(tmp_path, Gptq(desc_act=True)))
    assert shown_verdicts(reports) == (
        "loads in sglang, transformers; not in tensorrt-llm (E_ENGINE_METHOD), vllm "
        "(E_ENGINE_GPTQ_ORDER)"
    )
    assert verdicts_dict(reports)["vllm"] == {
        "version": "0.33.0",
        "loads": False,
        "refused": ["E_ENGINE_GPTQ_ORDER"],
    }
    unknown = [report for report in reports if not report.loads]
    assert shown_verdicts(unknown).startswith("loads in none of the known engines; not in tensorrt")


# --- ModelOpt, mixed

READ_MIXED = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_NVFP4", "MXFP8", "FP8_PB_WO"}


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "MXFP4", *sorted(READ_MIXED)])
def test_each_layer_of_a_mixed_checkpoint_needs_a_method(algorithm, tmp_path):
    checkpoint = build(tmp_path, mixed_precision(algorithm))
    unknown = READ_MIXED - {"FP8_PER_CHANNEL_PER_TOKEN"}
    for engine, known in (("vllm", READ_MIXED), ("sglang", unknown)):
        refused = "E_ENGINE_MODELOPT_LAYER" in codes(check(checkpoint, engine))
        assert refused == (algorithm not in known)
    assert check(checkpoint, "tensorrt-llm").loads or algorithm in ("MXFP4", "FP8_PB_WO")

"""Recipes: those that ship, what a file may say, names and patterns, and the way to plain data and
back.
"""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_scheme import schemes as all_schemes

from qtool.backends import check_backend
from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError, RecipeRefused, UsageError
from qtool.plan import make_plan
from qtool.recipe import (
    BACKEND_NAMES,
    RECIPES_FOLDER,
    STEPS,
    Gptq,
    ModulePatterns,
    Recipe,
    Rtn,
    catalogue,
    check_pattern,
    load_recipe,
    recipe_from,
)
from qtool.scheme import CODEBOOKS, SCHEMES, Scheme

SHIPPED = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
] + ["lm_head"]


@pytest.fixture
def read(tmp_path):
    """A function that writes a recipe file and loads it."""

    def read(text: str | bytes, name: str = "mine.yaml") -> Recipe:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(str(path))

    return read


@pytest.fixture
def refused(read):
    """A function that returns the refusal of a recipe file, which always names the file and always
    has a hint.
    """

    def refused(text: str | bytes, name: str = "mine.yaml") -> RecipeRefused:
        with pytest.raises(RecipeRefused) as caught:
            read(text, name)
        assert name in caught.value.message
        assert caught.value.hint
        assert len(caught.value.message) < 1000
        return caught.value

    return refused


# What ships


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_by_name_and_by_file(name):
    by_name = load_recipe(name)
    assert by_name.name == name
    assert by_name == load_recipe(str(RECIPES_FOLDER / f"{name}.yaml"))
    assert by_name.summary and not by_name.summary.endswith(".")
    assert by_name.scheme or by_name.kv_cache


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_plans_the_tiny_model_and_its_backend_takes_the_plan(name, tiny_model):
    plan = make_plan(open_checkpoint(tiny_model), load_recipe(name))
    check_backend(plan)
    if plan.recipe.scheme:
        assert len(plan.quantized) == 6 * 7
        assert plan.bytes_after < plan.bytes_before
    else:
        assert plan.quantized == ()


def test_the_catalogue_holds_every_file_once_and_no_name_means_two():
    assert sorted(catalogue()) == SHIPPED
    names = [name for recipe in catalogue().values() for name in (recipe.name, *recipe.aliases)]
    assert len(set(names)) == len(names)


def test_the_catalogue_has_every_backend_and_every_algorithm():
    assert {recipe.backend for recipe in catalogue().values()} == set(BACKEND_NAMES)
    assert {step.name for recipe in catalogue().values() for step in recipe.algorithm} == set(
        STEPS
    ) - {"mse"}


@pytest.mark.parametrize("name", SHIPPED)
def test_data_is_needed_by_static_inputs_caches_and_algorithms_that_look_at_activations(name):
    recipe = load_recipe(name)
    rounding = {step.name for step in recipe.algorithm} <= {"rtn", "mse", "spinquant"}
    inputs = recipe.scheme.activations if recipe.scheme else None
    static = inputs is not None and (not inputs.dynamic or inputs.scale == "e4m3")
    assert recipe.needs_data == (not rounding or static or recipe.kv_cache is not None)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("FP8_DYNAMIC", "fp8_dynamic"),
        ("W4A16", "w4a16_gptq"),
        ("NVFP4", "nvfp4"),
        ("W8A8-FP8", "fp8_dynamic"),
        ("Modelopt-FP8", "modelopt_fp8"),
    ],
)
def test_names_of_the_libraries_and_engines_are_accepted_in_any_case(alias, name):
    assert load_recipe(alias).name == name


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("modelopt_fp9", "modelopt_fp8"), ("gptq_int5", "gptq_int4"), ("FP8DYNAMIC", "fp8_dynamic")],
)
def test_a_wrong_name_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(UsageError, match=f"`{wrong}`") as caught:
        load_recipe(wrong)
    assert f"`{right}`" in caught.value.hint


def test_a_name_near_to_nothing_is_answered_with_where_to_look():
    with pytest.raises(UsageError) as caught:
        load_recipe("§§§")
    assert "--list" in caught.value.hint


# What a file may say


def test_a_small_file_is_enough_and_is_named_after_itself(read):
    recipe = read("summary: mine\nbackend: modelopt\nscheme: FP8\n", "Qwen3-8B v2.1.yaml")
    assert recipe.name == "qwen3_8b_v2_1"
    assert recipe.algorithm == (Rtn(),)
    assert recipe.scheme == SCHEMES["FP8"]
    assert (
        recipe.calibration.num_samples,
        recipe.calibration.seq_len,
        recipe.seed,
        recipe.lm_head,
    ) == (512, 2048, 0, False)


def test_a_full_file_says_everything(read):
    recipe = read("""
        name: full
        summary: all of it
        aliases: [everything]
        backend: llmcompressor
        scheme: {weights: {format: int4, granularity: group, group_size: 64, symmetric: false}}
        algorithm: [{smoothquant: {strength: 0.5}}, {gptq: {dampening: 0.1}}]
        kv_cache: fp8
        lm_head: true
        rules: [{modules: down_proj, scheme: W8A8}, {modules: "re:.*o_proj", scheme: null}]
        ignore: ["*.k_proj"]
        calibration: {source: data.jsonl, text_column: body, num_samples: 3, seq_len: 99, batch_size: 2, pack: true}
        seed: 7
        runs_on: [cuda]
        experimental: true
    """)
    assert [step.name for step in recipe.algorithm] == ["smoothquant", "gptq"]
    assert recipe.steps(Gptq)[0].dampening == 0.1
    assert recipe.schemes == (recipe.scheme, SCHEMES["W8A8"])
    assert recipe.rules[1].scheme is None
    assert recipe.calibration.pack


schemes = all_schemes.filter(lambda scheme: scheme.weights.format not in CODEBOOKS)
HEAD = "summary: mine\nbackend: modelopt\n"
REFUSED = {
    "unknown key": (HEAD + "scheme: FP8\nschema: FP8\n", "`schema`", "`scheme`"),
    "unknown key of calibration": (
        HEAD + "scheme: FP8\ncalibration: {samples: 3}\n",
        "`calibration.samples`",
        "`num_samples`",
    ),
    "unknown key of a rule": (
        HEAD + "scheme: FP8\nrules: [{module: x, scheme: FP8}]\n",
        "`rules.0.module`",
        "`modules`",
    ),
    "unknown key of a step": (
        HEAD + "scheme: W4A16\nalgorithm: [{gptq: {damping: 1}}]\n",
        "`damping`",
        "`dampening`",
    ),
    "unknown key of a scheme": (
        HEAD + "scheme: {weights: {format: int4, bits: 4}}\n",
        "`bits`",
        "",
    ),
    "unknown scheme": (HEAD + "scheme: FP88\n", "`FP88`", "`FP8`"),
    "codebook": (HEAD + "scheme: NF4\n", "NF4", "bitsandbytes"),
    "unknown backend": (
        "summary: mine\nbackend: model-opt\nscheme: FP8\n",
        "`backend`",
        "`modelopt`",
    ),
    "unknown step": (HEAD + "scheme: W4A16\nalgorithm: [gptqq]\n", "'gptqq'", "`gptq`"),
    "unknown KV cache": (HEAD + "scheme: FP8\nkv_cache: fp9\n", "`kv_cache`", "`fp8`"),
    "no backend": ("summary: mine\nscheme: FP8\n", "`backend`", ""),
    "no summary": ("backend: modelopt\nscheme: FP8\n", "`summary`", ""),
    "nothing to do": (HEAD, "nothing would be quantized", ""),
    "key twice": (HEAD + "scheme: FP8\nscheme: FP8_DYNAMIC\n", "`scheme` appears twice", ""),
    "inner key twice": (
        HEAD + "scheme: {weights: {format: int4, format: int8}}\n",
        "`format` appears twice",
        "",
    ),
    "two steps in one": (
        HEAD + "scheme: W4A16\nalgorithm: [{awq: {}, gptq: {}}]\n",
        "unknown algorithm step",
        "",
    ),
    "step with a name for options": (
        HEAD + "scheme: W4A16\nalgorithm: [{gptq: fast}]\n",
        "gptq",
        "",
    ),
    "algorithm that is a word": (HEAD + "scheme: W4A16\nalgorithm: gptq\n", "`algorithm`", ""),
    "step option out of range": (
        HEAD + "scheme: W4A16\nalgorithm: [{gptq: {dampening: 2}}]\n",
        "`dampening`",
        "",
    ),
    "seed that is text": (HEAD + "scheme: FP8\nseed: zero\n", "`seed`", ""),
    "seed too large": (HEAD + "scheme: FP8\nseed: 4294967296\n", "`seed`", ""),
    "too few tokens": (
        HEAD + "scheme: FP8\ncalibration: {seq_len: 1}\n",
        "`calibration.seq_len`",
        "",
    ),
    "name with a slash": (HEAD + "scheme: FP8\nname: ../evil\n", "`name`", ""),
    "number for a key": (HEAD + "scheme: FP8\n1: 2\n", "mine.yaml", ""),
    "scheme that is a number": (HEAD + "scheme: 4\n", "a scheme is a name or a mapping", "W4A16"),
    "list": ("- summary\n", "a recipe is a mapping", ""),
    "empty": ("", "a recipe is a mapping", ""),
    "no YAML": ("summary: [\n", "not YAML", ""),
    "binary": (b"\x00\x01\xff", "not YAML", ""),
    "not UTF-8": (b"summary: caf\xe9\n", "not YAML", ""),
    "two documents": ("a: 1\n---\nb: 2\n", "not YAML", ""),
    "Python object": ("summary: !!python/object/apply:os.system ['true']\n", "not YAML", ""),
    "nested deeply": ("[" * 100_000, "nested more than", ""),
    "90,000 keys": ("".join(f"k{i}: 1\n" for i in range(90_000)), "too large", ""),
    "12,000 values": ("a: [" + "1, " * 12_000 + "]", "keys and values", ""),
    "10,000 keys": ("".join(f"k{i}: 1\n" for i in range(4_900)) + "k7: 1", "appears twice", ""),
    "too large": ("#" * (1 << 20) + "\n", "too large", ""),
    "millions of laughs": (
        "a: &a [l, l, l, l, l, l, l, l, l, l]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
            for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "`*` makes an alias",
        "",
    ),
    "pattern that YAML takes for an alias": (
        HEAD + "scheme: FP8\nignore: [*k_proj]\n",
        "`*` makes an alias",
        "quotes",
    ),
    "day that is none": (HEAD + "scheme: FP8\ncalibration: {source: 2024-13-45}\n", "not YAML", ""),
    "number of 5000 digits": (HEAD + f"scheme: FP8\nseed: {'9' * 5000}\n", "not YAML", ""),
    "wrong tag": (HEAD + "scheme: FP8\nseed: !!bool maybe\n", "not YAML", ""),
    "long value": (HEAD + f"scheme: FP8\nseed: {'x' * 100_000}\n", "longer than 10,000", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_file_is_refused_with_what_is_wrong_and_the_nearest_right_thing(refused, case):
    text, message, hint = REFUSED[case]
    error = refused(text)
    assert message in error.message
    assert hint in error.hint


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name in ("missing.yaml", "folder.yaml"):
        with pytest.raises(RecipeRefused) as caught:
            load_recipe(str(tmp_path / name))
        assert caught.value.code == "E_NO_RECIPE"


# Patterns


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("lm_head", 1),
        ("down_proj", 11),
        ("mlp.down_proj", 11),
        ("*_proj", 33),
        ("model.layers.1.*", 3),
        ("model.layers.[01].*", 6),
        ("layers.1.mlp.down_proj", 1),
        ("re:.*down_proj", 11),
        (r"re:model\.layers\.1\.", 3),
        ("re:down_proj", 0),
        ("proj", 0),
        ("DOWN_PROJ", 0),
        ("", 0),
    ],
)
def test_a_pattern_is_a_name_a_glob_or_an_anchored_expression_for_a_whole_name_or_its_end(
    pattern, count
):
    assert sum(map(ModulePatterns().matcher(pattern), MODULES)) == count


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("down_prj", "`down_proj`"),
        ("re:.*q_prj$", "`q_proj`"),
        ("*.experts.*", "modules are called"),
        ("", "called"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern, hint):
    with pytest.raises(RecipeRefused, match="matches no linear module") as caught:
        check_pattern(pattern, ModulePatterns().matcher(pattern), MODULES)
    assert caught.value.code == "E_PATTERN"
    assert hint in caught.value.hint


@pytest.mark.parametrize("expression", ["(", "[", "*", "(?P<x>a)(?P<x>b)", "(?R)?x", "(" * 900])
def test_an_expression_that_is_none_is_refused(expression):
    with pytest.raises(RecipeRefused, match="not a regular expression") as caught:
        ModulePatterns().matcher(f"re:{expression}")
    assert caught.value.code == "E_PATTERN"


HOSTILE_NAME = "model.layers.10.self_attn.x_proj" * 20


@pytest.mark.parametrize(
    "pattern",
    [
        "re:([a-z._0-9]+)+x$",
        "re:(.|..)*(.|..)*x$",
        "re:(((((((.*)*)*)*)*)*)*)*x$",
        "re:" + ".*" * 900 + "x$",
        "re:(?:" + "a?" * 400 + ".?)*x$",
        "re:a{99999999999}",
        "re:(a{1,1000}){1,1000}",
        "re:((.?){200}){200}x$",
        "re:(" + "ab|" * 300 + "c){1000}",
        "re:" + "(?:)" * 1_000,
        "re:" + "x" * 2_001,
    ],
)
def test_no_pattern_takes_much_time_or_memory(pattern, monkeypatch):
    monkeypatch.setattr("qtool.patterns.BUDGET_S", 0.5)
    start = time.thread_time()
    with pytest.raises(RecipeRefused) as caught:
        matches = ModulePatterns().matcher(pattern)
        for number in range(10_000):
            matches(f"{HOSTILE_NAME}.{number}")
    assert caught.value.code == "E_PATTERN"
    assert time.thread_time() - start < 2


def test_all_patterns_of_a_recipe_share_their_limits(monkeypatch):
    monkeypatch.setattr("qtool.patterns.BUDGET_S", 0.5)
    patterns = ModulePatterns()
    slow = [patterns.matcher(f"re:(?:{'a?' * 150}){{1,{n}}}.*x$") for n in range(50, 60)]
    start = time.thread_time()
    with pytest.raises(RecipeRefused, match="took too long"):
        for number in range(10_000):
            for matches in slow:
                matches("a" * 40 + f"x{number}")
    assert time.thread_time() - start < 2
    patterns = ModulePatterns()
    with pytest.raises(RecipeRefused, match="more than 200 patterns"):
        for number in range(201):
            patterns.matcher(f"re:{number}")


def test_many_ordinary_patterns_over_many_layers_are_allowed():
    patterns = ModulePatterns()
    matchers = [
        patterns.matcher(rf"re:.*layers\.{n}\.mlp\.experts\.\d{{1,3}}\.down_proj$")
        for n in range(40)
    ]
    names = [f"model.layers.{n}.mlp.experts.{e}.down_proj" for n in range(60) for e in range(60)]
    assert sum(sum(map(matches, names)) for matches in matchers) == 40 * 60


# To plain data and back


def json_round_trip(recipe: Recipe) -> Recipe:
    return recipe_from(json.loads(json.dumps(recipe.to_dict())))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_survives_the_way_to_a_worker(name):
    recipe = load_recipe(name)
    assert json_round_trip(recipe) == recipe.model_copy(update={"aliases": ()})


steps = st.sampled_from(
    (
        *("rtn", "mse", "gptq", "awq", "spinquant", "autoround", "smoothquant"),
        *(
            {"gptq": {"dampening": 0.25, "act_order": True}},
            {"awq": {"search": "full"}},
            {"smoothquant": {"strength": 0}},
            {"autoround": {"iterations": 5}},
        ),
        {
            "auto": {
                "effective_bits": 4.5,
                "candidates": [
                    "W4A16",
                    {"weights": {"format": "fp8", "granularity": "block", "block": [64, 32]}},
                ],
            }
        },
    )
)
recipes = st.fixed_dictionaries(
    {
        "name": st.just("made"),
        "summary": st.text(max_size=20),
        "backend": st.sampled_from(BACKEND_NAMES),
        "scheme": schemes.map(Scheme.to_dict),
        "algorithm": st.lists(steps, max_size=3),
        "rules": st.lists(
            st.fixed_dictionaries(
                {"modules": st.text(max_size=9), "scheme": st.none() | schemes.map(Scheme.to_dict)}
            ),
            max_size=2,
        ),
        "ignore": st.lists(st.text(max_size=9), max_size=2),
    },
    optional={
        "kv_cache": st.sampled_from((None, "fp8", "nvfp4")),
        "checkpoint_format": st.sampled_from((None, "gptq", "gptq_v2")),
        "lm_head": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
        "runs_on": st.lists(st.sampled_from(("cpu", "cuda")), max_size=2),
        "calibration": st.fixed_dictionaries(
            {},
            optional={
                "num_samples": st.integers(1, 9999),
                "source": st.text(max_size=9),
                "pack": st.booleans(),
            },
        ),
    },
)


@given(recipes)
def test_any_recipe_survives_the_way_to_a_worker(data):
    recipe = recipe_from(data)
    assert json_round_trip(recipe) == recipe
    assert recipe.changed() == recipe


@given(recipes)
def test_any_recipe_can_be_written_as_yaml_and_read_again(data):
    recipe = recipe_from(data)
    assert recipe_from(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_changes_are_checked_as_a_file_is_and_none_changes_nothing():
    recipe = load_recipe("modelopt_fp8")
    assert recipe.changed(backend=None, seed=3).seed == 3
    with pytest.raises(RecipeRefused, match="`backend`") as caught:
        recipe.changed(backend="modelop")
    assert "`modelopt`" in caught.value.hint


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(("gptq", "W4A16", "FP8", "auto", "modelopt")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("weights", "format", "gptq", "auto", "modules", "scheme", "candidates")
            )
            | st.text(max_size=3),
            inner,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(sorted(Recipe.model_fields)) | st.text(max_size=4), values, max_size=4
    )
)
def test_any_other_data_is_a_recipe_or_refused(data):
    try:
        recipe_from({"name": "made", "summary": "", "backend": "modelopt", "scheme": "FP8", **data})
    except QtoolError as error:
        assert error.exit_code == 3


def test_a_gate_is_one_limit_or_several(tmp_path):
    file = tmp_path / "mine.yaml"
    start = "summary: s\nbackend: llmcompressor\nscheme: FP8_DYNAMIC\n"
    for text, expected in (
        ("gate: default", ("default",)),
        ("gate: ['mean_kl<=0.05', 'top1>=0.9']", ("mean_kl<=0.05", "top1>=0.9")),
    ):
        file.write_text(start + text)
        assert load_recipe(str(file)).gate == expected
    file.write_text(start + "gate: 3")
    with pytest.raises(RecipeRefused):
        load_recipe(str(file))

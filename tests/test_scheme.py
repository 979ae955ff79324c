"""Schemes: what they may say, what they cost, and how they are named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import QtoolError, RecipeRefused
from qtool.scheme import CODEBOOKS, FORMAT_BITS, SCHEMES, Activations, Scheme, Weights, scheme_from


def groups(granularity):
    return st.integers(1, 4096) if granularity == "group" else st.none()


def scales(format):
    return st.sampled_from(("float", "e4m3", "e8m0") if format.startswith("fp") else ("float",))


@st.composite
def weights(draw):
    granularity = draw(st.sampled_from(("tensor", "channel", "group", "block")))
    format = draw(st.sampled_from(sorted(FORMAT_BITS)))
    return Weights(
        format,
        granularity,
        draw(groups(granularity)),
        draw(st.tuples(st.integers(1, 512), st.integers(1, 512)))
        if granularity == "block"
        else None,
        not format.startswith("int") or granularity == "block" or draw(st.booleans()),
        draw(scales(format)),
    )


@st.composite
def activations(draw):
    granularity = draw(st.sampled_from(("tensor", "token", "group")))
    format = draw(st.sampled_from(sorted(FORMAT_BITS.keys() - CODEBOOKS.keys())))
    return Activations(
        format,
        granularity,
        draw(groups(granularity)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(scales(format)),
    )


schemes = st.builds(Scheme, weights(), st.none() | activations())


@pytest.mark.parametrize("name", SCHEMES)
def test_a_named_scheme_is_found_by_its_name_in_any_case_and_keeps_it(name):
    assert scheme_from(name) == scheme_from(name.lower()) == SCHEMES[name]
    assert SCHEMES[name].name == name


def test_no_two_names_mean_the_same_scheme():
    assert len(set(SCHEMES.values())) == len(SCHEMES)


@given(schemes)
def test_a_scheme_comes_back_from_its_dictionary(scheme):
    assert scheme_from(scheme.to_dict()) == scheme


@given(schemes)
def test_a_scheme_without_a_name_says_what_it_is(scheme):
    assert scheme.name
    assert scheme.native_gpu.startswith("sm_")


@given(weights(), st.integers(1, 600), st.integers(1, 600))
def test_size_is_never_less_than_the_codes_and_one_scale(weights, rows, columns):
    assert weights.size_bytes(rows, columns) >= math.ceil(rows * columns * weights.bits / 8) + 1
    assert 1 <= weights.scale_count(rows, columns) <= rows * columns


# Counted by hand for a weight of [4096, 4096]: codes, then scales, then zero points.
BITS_PER_WEIGHT = {
    "FP8": 8 + 16 / 4096**2,
    "FP8_DYNAMIC": 8 + 16 / 4096,
    "FP8_BLOCK": 8 + 16 / 128**2,
    "W4A16": 4 + 16 / 128,
    "W4A16_ASYM": 4 + 16 / 128 + 4 / 128,
    "NVFP4": 4 + 8 / 16 + 32 / 4096**2,
    "MXFP4": 4 + 8 / 32,
    "MXFP8": 8 + 8 / 32,
    "W8A8": 8 + 16 / 4096,
}


@pytest.mark.parametrize(("name", "bits"), BITS_PER_WEIGHT.items())
def test_bits_per_weight_count_scales_and_zero_points(name, bits):
    assert SCHEMES[name].bits_per_weight == pytest.approx(bits, abs=1e-9)


def test_a_rest_of_a_group_or_block_has_a_scale_of_its_own():
    assert Weights("int4", "group", 128).scale_count(2, 129) == 4
    assert Weights("fp8", "block", block=(128, 128)).scale_count(129, 128) == 2


def test_native_gpu_is_the_first_that_multiplies_in_the_formats():
    names = ("W4A16", "NVFP4A16", "FP8", "W8A8", "W4AFP8", "NVFP4", "MXFP8")
    assert [SCHEMES[name].native_gpu for name in names] == [
        "sm_75",
        "sm_75",
        "sm_89",
        "sm_75",
        "sm_90",
        "sm_100",
        "sm_100",
    ]


def test_group_size_changes_groups_and_minus_one_means_one_scale_a_row():
    assert SCHEMES["W4A16"].with_group_size(32).weights == Weights("int4", "group", 32)
    assert SCHEMES["W4A16_ASYM"].with_group_size(-1).weights == Weights(
        "int4", "channel", symmetric=False
    )
    assert SCHEMES["W8A16_CHANNEL"].with_group_size(128) == SCHEMES["W8A16"]


@pytest.mark.parametrize("name", ["FP8", "FP8_BLOCK", "NVFP4", "MXFP4"])
def test_group_size_of_a_scheme_with_fixed_scales_is_refused(name):
    with pytest.raises(RecipeRefused, match=f"scheme {name}") as caught:
        SCHEMES[name].with_group_size(64)
    assert caught.value.code == "E_GROUP_SIZE"
    assert caught.value.hint


@pytest.mark.parametrize("size", [0, -2])
def test_group_size_must_be_positive(size):
    with pytest.raises(RecipeRefused, match="positive whole number"):
        SCHEMES["W4A16"].with_group_size(size)


REFUSED = {
    "unknown name": ("W4A17", "did you mean `W4A16"),
    "number": (4, "known names"),
    "list": (["W4A16"], "known names"),
    "no weights": ({"activations": {"format": "fp8"}}, ""),
    "weights by name": ({"weights": "int4"}, ""),
    "unknown key": ({"weights": {"format": "int4"}, "activation": None}, "`activations`"),
    "unknown key inside": ({"weights": {"format": "int4", "groupsize": 128}}, "`group_size`"),
    "no format": ({"weights": {"granularity": "channel"}}, "one of"),
    "unknown format": ({"weights": {"format": "int44"}}, "`int4`"),
    "format that is a number": ({"weights": {"format": 4}}, "str"),
    "format that is a list": ({"weights": {"format": ["int4"]}}, "str"),
    "unknown granularity": ({"weights": {"format": "int4", "granularity": "groups"}}, "`group`"),
    "granularity that is a number": ({"weights": {"format": "int4", "granularity": 1}}, "str"),
    "unknown scale": ({"weights": {"format": "fp4", "scale": "e5m2"}}, "one of"),
    "groups without size": ({"weights": {"format": "int4", "granularity": "group"}}, ""),
    "size without groups": ({"weights": {"format": "int4", "group_size": 128}}, ""),
    "size of zero": (
        {"weights": {"format": "int4", "granularity": "group", "group_size": 0}},
        "usual sizes",
    ),
    "size that is true": (
        {"weights": {"format": "int4", "granularity": "group", "group_size": True}},
        "int",
    ),
    "size that is text": (
        {"weights": {"format": "int4", "granularity": "group", "group_size": "128"}},
        "int",
    ),
    "symmetry that is text": ({"weights": {"format": "int4", "symmetric": "no"}}, "true"),
    "dynamic that is text": (
        {"weights": {"format": "int8"}, "activations": {"format": "int8", "dynamic": "false"}},
        "true",
    ),
    "block that is a number": (
        {"weights": {"format": "fp8", "granularity": "block", "block": 128}},
        "[128, 128]",
    ),
    "block of one": ({"weights": {"format": "fp8", "granularity": "block", "block": [128]}}, ""),
    "block of zero": (
        {"weights": {"format": "fp8", "granularity": "block", "block": [128, 0]}},
        "",
    ),
    "block of text": (
        {"weights": {"format": "fp8", "granularity": "block", "block": ["a", "b"]}},
        "",
    ),
    "block without blocks": ({"weights": {"format": "fp8", "block": [128, 128]}}, ""),
    "float with zero point": ({"weights": {"format": "fp8", "symmetric": False}}, ""),
    "weights by token": ({"weights": {"format": "int8", "granularity": "token"}}, ""),
    "activations by channel": (
        {
            "weights": {"format": "int8"},
            "activations": {"format": "int8", "granularity": "channel"},
        },
        "",
    ),
    "activations by name": ({"weights": {"format": "int8"}, "activations": "int8"}, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_scheme_is_refused_with_the_nearest_right_thing(case):
    value, hint = REFUSED[case]
    with pytest.raises(RecipeRefused) as caught:
        scheme_from(value)
    assert caught.value.code == "E_SCHEME"
    assert hint in caught.value.hint


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("int4", "group", "fp8", "block")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("weights", "activations", "format", "granularity", "group_size", "block")
            )
            | st.text(max_size=4),
            inner,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_other_value_is_a_scheme_or_refused(value):
    try:
        assert isinstance(scheme_from(value), Scheme)
    except QtoolError as error:
        assert error.exit_code == 3

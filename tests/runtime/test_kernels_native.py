"""The compiled CPU kernel: against the plain one and float64 over random layers, with AMX and
without; compiling, caching, and failing to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels_cpu import CPU, check, exact, relative_error, run, sample, spec_of

from qtool.runtime.kernels import choose, native
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import CODEBOOKS, SCHEMES, Activations, Scheme, Weights
from qtool.weight import QuantizedWeight

needs_native = pytest.mark.skipif(
    native.unsupported_reason(spec_of("W4A16"), CPU) is not None,
    reason=f"native: {native.unsupported_reason(spec_of('W4A16'), CPU)}",
)
INTEGERS = [f"int{bits}" for bits in range(2, 9)]
TAKEN = [name for name in SCHEMES if name not in ("W8A8", "W8A8_STATIC", "W4A8")]


@pytest.fixture(params=["amx", "without amx"])
def path(request, monkeypatch):
    """Take one of the two paths; hypothesis runs all its examples under it."""
    library = native.native_library()
    assert not isinstance(library, str)
    if request.param == "amx" and not library.amx:
        pytest.skip("this CPU has no AMX, or Linux does not let this process use it")
    monkeypatch.setattr(library, "amx", int(request.param == "amx"))


def weights() -> st.SearchStrategy[Weights]:
    groups = st.integers(1, 20).map(lambda size: 16 * size)
    blocks = st.tuples(st.integers(1, 80), groups)
    return st.one_of(
        st.builds(
            Weights, st.sampled_from([*INTEGERS, "fp8"]), st.sampled_from(["channel", "tensor"])
        ),
        st.builds(
            Weights,
            st.sampled_from(INTEGERS),
            st.sampled_from(["channel", "tensor"]),
            symmetric=st.just(False),
        ),
        st.builds(
            Weights, st.sampled_from(INTEGERS), st.just("group"), groups, symmetric=st.booleans()
        ),
        st.builds(Weights, st.sampled_from([*INTEGERS, "fp8"]), st.just("block"), block=blocks),
        st.builds(Weights, st.just("fp8"), st.just("group"), groups),
        st.builds(
            Weights,
            st.just("fp4"),
            st.just("group"),
            groups,
            scale=st.sampled_from(["e4m3", "e8m0"]),
        ),
        st.builds(Weights, st.just("fp8"), st.just("group"), groups, scale=st.just("e8m0")),
    )


inputs_rounded = st.none() | st.sampled_from(
    [
        SCHEMES[name].activations
        for name in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8")
    ]
    + [Activations("int8", "group", 32)]
)
sizes = st.integers(1, 160) | st.sampled_from([256, 384, 500])
tokens = st.integers(1, 34) | st.integers(1, 300)
NVFP4A16 = SCHEMES["NVFP4A16"].weights


@pytest.mark.slow
@needs_native
@pytest.mark.usefixtures("path")
@settings(max_examples=50)
@example(NVFP4A16, None, 70, 4300, 300, True, 0)  # more inputs than are decoded at a time
@example(SCHEMES["W4A16_ASYM"].weights, None, 33, 8200, 33, False, 1)
@example(SCHEMES["FP8_BLOCK"].weights, SCHEMES["FP8_BLOCK"].activations, 65, 4224, 129, True, 2)
@given(weights(), inputs_rounded, sizes, sizes, tokens, st.booleans(), st.integers(0, 1000))
def test_native_multiplies_as_the_definition_says(
    weights, activations, outputs, inputs, tokens, has_bias, seed
):
    spec = spec_of(
        Scheme(weights, activations),
        (outputs, inputs + inputs % 2 if weights.bits == 4 else inputs),
    )
    if native.unsupported_reason(spec, CPU) is None:  # integers with integers go to oneDNN
        check("native", spec.scheme, spec.shape, tokens, has_bias, seed)


@needs_native
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code_stands_for_its_value(scale_dtype):
    """The product with the identity is the weight, rounded to bfloat16: every code under several
    scales and zero points, nothing near it.
    """
    shape = (48, 256)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(256), indexing="ij")
    scale = (0.01 + torch.rand(48, 16, generator=torch.Generator().manual_seed(0))).to(scale_dtype)
    zero = torch.arange(48 * 16).view(48, 16).sub(300).remainder(200).sub(100).to(torch.int8)
    codes = (rows * 37 + columns).to(torch.uint8)
    fp8 = torch.where((codes & 127) == 127, 0, codes).view(torch.float8_e4m3fn)
    weights = {
        Weights("int8", "group", 16, symmetric=False): QuantizedWeight(
            codes.view(torch.int8), scale, zero=zero
        ),
        Weights("int4", "group", 16, symmetric=False): QuantizedWeight(
            codes[:, :128], scale, zero=zero // 13
        ),
        Weights("fp8", "group", 16): QuantizedWeight(fp8, scale),
        Weights("fp8"): QuantizedWeight(fp8, torch.ones(48, 1, dtype=scale_dtype)),
        Weights("int8"): QuantizedWeight(
            codes.view(torch.int8), torch.ones(48, 1, dtype=scale_dtype)
        ),
        NVFP4A16: QuantizedWeight(
            codes[:, :128], scale.to(torch.float8_e4m3fn), torch.full((48,), 0.5)
        ),
        **{
            Weights(name, "group", 16): QuantizedWeight(
                codes[:, :128], scale, codebook=torch.tensor(values)
            )
            for name, values in CODEBOOKS.items()
        },
    }
    for kind, weight in weights.items():
        spec = spec_of(Scheme(kind), shape)
        identity = torch.eye(256, dtype=torch.bfloat16)
        assert torch.equal(
            run("native", spec, identity, weight, None),
            run("reference", spec, identity, weight, None),
        ), str(kind)


@needs_native
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["W4A16", "NVFP4A16", "FP8_DYNAMIC"])
def test_few_threads_or_many_change_nothing(name):
    spec = spec_of(name, (200, 300))
    x, weight = sample(spec, 70)
    expected, before = run("native", spec, x, weight, None), torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(run("native", spec, x, weight, None), expected)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.usefixtures("path")
def test_a_bfloat16_product_in_between_changes_nothing():
    """oneDNN configures the same tiles for itself."""
    spec = spec_of("W4A16", (96, 256))
    x, weight = sample(spec, 20)
    dense, packed = torch.randn(96, 256).to(torch.bfloat16), native.pack(spec, weight)
    expected, expected_dense = (
        native.apply(spec, x, packed, None),
        torch.nn.functional.linear(x, dense),
    )
    for _ in range(3):
        assert torch.equal(torch.nn.functional.linear(x, dense), expected_dense)
        assert torch.equal(native.apply(spec, x, packed, None), expected)


@pytest.mark.slow
@needs_native
def test_the_compiled_graph_has_the_same_outputs():
    spec = spec_of("NVFP4A16", (80, 256))
    x, weight = sample(spec, 5)
    choice = choose(spec, CPU)
    assert choice.kernel == "native"
    layer = QuantizedLinear(spec, choice, weight, torch.linspace(-1, 1, 80))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@needs_native
def test_an_unaligned_input_and_a_token_of_zeros_harm_nothing():
    spec = spec_of("W4A16", (80, 250))
    x, weight = sample(spec, 3)
    x[1] = 0
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    y = run("native", spec, shifted, weight, None)
    assert not y[1].any() and relative_error(y, exact(spec, x, weight, None)) <= 1e-2


@needs_native
def test_each_scheme_goes_to_native_but_integers_with_integers():
    left = () if torch.cpu._is_avx512_bf16_supported() else ("W8A16_CHANNEL",)
    assert [name for name in SCHEMES if choose(spec_of(name), CPU).kernel == "native"] == [
        name for name in TAKEN if name not in left
    ]
    leaves = "inputs int8 token: leaves integers with integers to onednn"
    assert native.unsupported_reason(spec_of("W8A8"), CPU) == leaves
    by_group = Scheme(Weights("int8"), Activations("int8", "group", 128))
    assert choose(spec_of(by_group), CPU).kernel == "native"  # onednn does not take those


def test_an_unsupported_reason_says_what_was_found_and_what_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert (
        native.unsupported_reason(spec_of("W4A16", dtype=torch.float16), CPU)
        == "float16: supports bfloat16 only"
    )
    odd = spec_of(Scheme(Weights("int4", "group", 40)))
    assert (
        native.unsupported_reason(odd, CPU)
        == "weights int4 g40: supports groups of a multiple of 16 inputs"
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert native.unsupported_reason(spec_of("W4A16"), CPU) == "needs a CPU with AVX512"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled yet, and the cache folder is empty; afterwards the usual library is
    loaded again.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    native.native_library.cache_clear()
    yield tmp_path / "qtool"
    native.native_library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C compiler: install gcc or clang, or set CC"),
        ("false", "the C compiler `false` failed: no message"),
    ],
)
def test_without_a_compiler_that_works_another_kernel_takes_the_layer(
    fresh, monkeypatch, compiler, reason
):
    monkeypatch.setenv("CC", compiler)
    choice = choose(spec_of("W4A16"), CPU)
    assert choice.refused["native"] == reason and choice.kernel != "native"


def test_source_that_does_not_compile_is_an_unsupported_reason(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    source = tmp_path / "broken.c"
    source.write_text("int main(void) { return nothing; }")
    monkeypatch.setattr(native, "SOURCE", source)
    assert "nothing" in str(native.unsupported_reason(spec_of("W4A16"), CPU))
    assert not list(fresh.glob("*"))


@needs_native
def test_a_cache_folder_that_cannot_be_written_is_done_without(fresh):
    fresh.write_text("a file, where the folder would be")
    assert native.unsupported_reason(spec_of("W4A16"), CPU) is None


SCRIPT = """
import torch
from test_kernels_cpu import exact, relative_error, run, sample, spec_of
from qtool.runtime.kernels import native
spec = spec_of("W4A16")
x, weight = sample(spec, 5)
assert relative_error(run("native", spec, x, weight, None), exact(spec, x, weight, None)) <= 1e-2
print(native.native_library().amx)
"""


@pytest.mark.slow
@needs_native
def test_two_processes_compile_at_once_and_a_variable_turns_amx_off(fresh):
    environment = os.environ | {
        "QTOOL_NO_AMX": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["0", "0"]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]

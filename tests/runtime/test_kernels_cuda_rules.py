"""The CUDA kernels as far as a machine without a GPU can tell: who takes which layer, what is
handed to humming, and what the sums mean.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT, TESTS

from qtool.formats.packing import unpack_bits
from qtool.runtime import kernels
from qtool.runtime.compiling import warn_of_version
from qtool.runtime.kernels import KERNELS, Device, LinearSpec, choose, humming, scaled_mm
from qtool.runtime.kernels import reference as plain
from qtool.scheme import CODEBOOKS, SCHEMES, Activations, Scheme, Weights
from qtool.weight import (
    Activation,
    QuantizedWeight,
    dequantize,
    fake_quantize_input,
    quantize,
    spread,
)

H200 = Device("cuda", 90)


def spec_of(scheme: Scheme | str, shape=(64, 128), dtype=torch.bfloat16) -> LinearSpec:
    scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return LinearSpec(
        scheme, shape, dtype, bool(scheme.activations and not scheme.activations.dynamic)
    )


def weight_of(spec: LinearSpec, scale: float | None = None) -> QuantizedWeight:
    torch.manual_seed(0)
    weight = quantize((torch.randn(spec.shape) * 0.02).to(spec.dtype), spec.scheme)
    return (
        weight
        if scale is None
        else replace(weight, activation=Activation(spec.scheme.activations, torch.tensor(scale)))
    )


@pytest.fixture
def with_humming(monkeypatch):
    monkeypatch.setattr(humming, "_unusable_reason", lambda: None)


def test_without_humming_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "humming", None)  # as if it were not installed
    humming._unusable_reason.cache_clear()
    assert (
        humming.unsupported_reason(spec_of("W4A16"), H200)
        == "humming-kernels is not installed: pip install 'qtool[cuda]'"
    )
    humming._unusable_reason.cache_clear()


IN_A_CODEBOOK = [name for name in SCHEMES if SCHEMES[name].weights.format in CODEBOOKS]


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in IN_A_CODEBOOK])
def test_humming_takes_every_named_scheme_on_hopper(name, with_humming):
    for shape in ((6144, 4096), (1000, 4096), (72, 200)):
        assert humming.unsupported_reason(spec_of(name, shape), H200) is None


@pytest.mark.parametrize("name", IN_A_CODEBOOK)
def test_codes_of_a_codebook_are_looked_up_on_hopper(name, with_humming):
    pytest.importorskip("triton")
    for shape in ((6144, 4096), (1000, 4096), (72, 200)):
        choice = choose(spec_of(name, shape), H200)
        assert choice.kernel == "triton_weight_only" and choice.few is None


@pytest.mark.parametrize(
    ("spec", "device", "reason"),
    [
        (spec_of("NF4"), H200, "table"),
        (spec_of("W4A16"), Device("cuda", 75), "sm_80"),
        (spec_of("W4A16", dtype=torch.float16), Device("cuda", 70), "sm_75"),
        (spec_of("W4A16", dtype=torch.float32), H200, "float32"),
        (spec_of("W4A16", (60, 128)), H200, "multiples of 8"),
        (spec_of("W4A16", (64, 100)), H200, "multiples of 8"),
        (spec_of(Scheme(Weights("int4", "group", 48))), H200, "groups of 48"),
        (spec_of(Scheme(Weights("fp8", "block", block=(64, 128)))), H200, "blocks"),
    ],
)
def test_humming_names_what_it_cannot_hold(spec, device, reason, with_humming):
    assert reason in humming.unsupported_reason(spec, device)


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        *(
            ("FP8", 90, True),
            ("FP8_DYNAMIC", 90, True),
            ("FP8_BLOCK", 90, True),
            ("FP8", 80, False),
        ),
        *(("W8A8", 75, True), ("W4A8", 75, True), ("W4AFP8", 90, True), ("W4AFP8", 80, False)),
        *(
            ("W4A16", 90, False),
            ("NVFP4", 90, False),
            ("MXFP8", 90, False),
            ("MXFP4AFP8", 90, False),
            ("NVFP4AFP8", 90, False),
        ),
    ],
)
def test_humming_multiplies_codes_only_where_both_sides_have_them(name, capability, expected):
    assert humming.multiplies_codes(spec_of(name), capability) == expected
    assert not humming.multiplies_codes(spec_of(name, (64, 136)), capability)


TILES = {"block_shape": [64, 256, 64], "warp_shape": [64, 32, 64], "num_stages": 5}


@pytest.fixture
def measured_schedule(tmp_path, monkeypatch):
    """A table with one schedule, for wide W4A16 layers and 33 to 64 tokens, measured on an H200."""
    pytest.importorskip("triton")
    entry = {
        "weights": "int4 g128",
        "kind": "wide",
        "above": 32,
        "up_to": 64,
        "us": 20.0,
        "schedule": TILES,
    }
    table = tmp_path / "schedules.json"
    table.write_text(
        json.dumps(
            {"device": "sm_90", "multiprocessors": 132, "gpu": "NVIDIA H200", "schedules": [entry]}
        )
    )
    monkeypatch.setattr(humming, "MEASURED", table)
    humming.measured.cache_clear()
    yield
    humming.measured.cache_clear()


def test_a_measured_schedule_is_for_the_gpu_weights_shape_and_tokens_it_was_measured_with(
    measured_schedule,
):
    (found,) = humming.measured("sm_90", 132)
    assert humming.measured("sm_90", 78) == humming.measured("sm_80", 132) == ()
    assert found.takes(SCHEMES["W4A16"].weights, (28672, 4096), 64)
    assert not found.takes(SCHEMES["W4A16_ASYM"].weights, (28672, 4096), 64)
    assert not found.takes(SCHEMES["W4A16"].weights, (4096, 4096), 64)
    # its tile of 256 rows
    assert not found.takes(SCHEMES["W4A16"].weights, (28672 + 128, 4096), 64)
    assert not found.takes(SCHEMES["W4A16"].weights, (28672, 4096), 32) and not found.takes(
        SCHEMES["W4A16"].weights, (28672, 4096), 96
    )


def test_humming_is_told_the_measured_schedule_and_chooses_the_others(
    measured_schedule, monkeypatch
):
    layer = SimpleNamespace(a_dtype=SimpleNamespace(num_bits=16))
    modules = {
        "humming": SimpleNamespace(),
        "humming.schema": SimpleNamespace(
            HummingInputSchema=SimpleNamespace, HummingWeightSchema=SimpleNamespace
        ),
        "humming.transform": SimpleNamespace(prepare_layer_config=lambda *sizes, **options: layer),
        "humming.tune": SimpleNamespace(
            get_heuristics_config=lambda config, shape_m, device: {"chosen for": shape_m}
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(humming, "device_of", lambda device: H200)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )
    early = {"use_pdl": True}
    for spec, expected in (
        (spec_of("W4A16", (28672, 4096)), TILES),
        (spec_of("W4A16", (4096, 4096)), {"chosen for": 64}),
    ):
        config, schedules = humming._config.__wrapped__(spec, torch.device("cuda", 0), False)
        found = {high: schedule for _, high, schedule in json.loads(schedules)}
        assert config is layer and found[64] == expected | early
        assert [found[tokens] for tokens in (16, 32, 1024, 2048)] == [
            {"chosen for": 16},
            {"chosen for": 32} | early,
            {"chosen for": 1024} | early,
            {"chosen for": 2048},
        ]
    choice = {"tile": [1, 2]}
    modules["humming.tune"].get_heuristics_config = lambda config, shape_m, device: {"tile": (1, 2)}
    steps = json.loads(
        humming._config.__wrapped__(spec_of("W4A16", (4096, 4096)), torch.device("cuda", 0), False)[
            1
        ]
    )
    # equal neighbours are one
    assert steps == [
        [0, 16, choice],
        [16, 1024, choice | early],
        [1024, 1 << 30, choice],
    ]
    layer.a_dtype.num_bits = 8
    assert json.loads(
        humming._config.__wrapped__(spec_of("W4A8"), torch.device("cuda", 0), False)[1]
    ) == [[0, 1 << 30, choice]]


def test_the_table_of_measured_schedules_can_be_read():
    table = json.loads(humming.MEASURED.read_text())
    assert all(
        isinstance(found, humming.Measured)
        for found in humming.measured(table["device"], table["multiprocessors"])
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_humming_gets_offset_binary_words_padded_to_whole_tiles(bits, symmetric):
    spec = spec_of(Scheme(Weights(f"int{bits}", "group", 32, symmetric=symmetric)), (72, 200))
    weight = weight_of(spec)
    tensors = humming.canonical(spec, weight)
    assert tensors["weight"].shape == (128, 256 * bits // 32)
    assert (
        tensors["weight_scale"].shape == (128, 8)
        and tensors["weight_scale"].dtype == torch.bfloat16
    )
    values = unpack_bits(tensors["weight"], bits, 256).float()
    zero = torch.full((128, 8), 2.0 ** (bits - 1))
    if not symmetric:
        assert tensors["zero_point"].shape == (128 * bits // 32, 8)
        zero = unpack_bits(tensors["zero_point"].T.contiguous(), bits, 128).T.float()
    whole = (values - spread(zero, 256, 32, dim=1)) * spread(
        tensors["weight_scale"].float(), 256, 32, dim=1
    )
    assert torch.equal(whole[:72, :200], dequantize(weight))
    assert not whole[72:].any()


@pytest.mark.parametrize("name", ["FP8_W8A16", "NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_humming_gets_floats_byte_by_byte(name):
    spec = spec_of(name, (72, 208))
    weight = weight_of(spec)
    tensors = humming.canonical(spec, weight)
    width = weight.data.shape[1]
    assert torch.equal(
        tensors["weight"].view(torch.uint8)[:72, :width], weight.data.view(torch.uint8)
    )
    assert torch.equal(
        tensors["weight_scale"][:72, : weight.scale.shape[1]].float(), weight.scale.float()
    )
    assert (
        tensors["weight_scale"][72:].float() == (1 if spec.scheme.weights.scale == "e8m0" else 0)
    ).all()


def test_humming_gets_blocks_in_f32():
    spec = spec_of("FP8_BLOCK", (200, 300))
    weight = weight_of(spec)
    tensors = humming.canonical(spec, weight)
    assert tensors["weight"].shape == (256, 384 // 4)
    assert tensors["weight_scale"].dtype == torch.float32 and torch.equal(
        tensors["weight_scale"], weight.scale.float()
    )


def test_rows_with_other_global_scales_leave_a_factor_for_the_output():
    spec = spec_of("NVFP4A16")
    weight = weight_of(spec)
    tensors = humming.canonical(spec, weight)
    assert "row_scale" not in tensors and torch.equal(tensors["weight_scale_2"], weight.scale2[:1])
    scale2 = weight.scale2.clone()
    scale2[32:] *= 0.25
    tensors = humming.canonical(spec, replace(weight, scale2=scale2))
    assert tensors["row_scale"].tolist() == [1.0] * 32 + [0.25] * 32


TENSOR_TOKEN = Scheme(Weights("fp8", "tensor"), Activations("fp8", "token"))
TENSOR_TENSOR = Scheme(Weights("fp8", "tensor"), Activations("fp8", "tensor"))


@pytest.mark.parametrize(
    "scheme", ["FP8", "FP8_DYNAMIC", "W8A8", "W8A8_STATIC", TENSOR_TOKEN, TENSOR_TENSOR], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_sums_of_codes_are_the_plain_product(scheme, dtype, fused):
    spec = spec_of(scheme, dtype=dtype)
    weight = weight_of(spec, 0.02 if spec.static_input else None)
    if fused:  # q|k|v with a scale of each their own
        weight.scale[32:] *= 3
    bias = torch.randn(64).to(dtype)
    for tokens in (1, 16, 17, 600):
        x = torch.randn(tokens, 128).to(dtype)
        expected = plain.apply(spec, x, plain.pack(spec, weight), bias).float()
        y = scaled_mm.apply(spec, x, scaled_mm.pack(spec, weight), bias)
        assert y.dtype == dtype and y.shape == (tokens, 64)
        assert (y.float() - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC", "W8A8", "W8A8_STATIC"])
def test_rounded_rows_are_the_fake_quantized_input(name):
    inputs, scale = (
        SCHEMES[name].activations,
        torch.tensor(0.01) if "token" not in str(SCHEMES[name].activations) else None,
    )
    x = torch.randn(33, 256)
    x[3] = 0
    codes, scales = scaled_mm.rounded_rows(x, inputs, scale)
    assert scales.shape == (33, 1) and scales.dtype == torch.float32
    assert torch.equal(codes.float() * scales, fake_quantize_input(x, inputs, scale))


@pytest.mark.parametrize(
    ("spec", "device", "reason"),
    [
        (spec_of("W8A16"), H200, "16 bits"),
        (spec_of("W4AFP8"), H200, "weights are int4 and inputs fp8"),
        (spec_of("FP8_BLOCK"), H200, "block"),
        (spec_of("MXFP8"), H200, "group"),
        (
            spec_of(Scheme(Weights("int8"), Activations("int8", symmetric=False))),
            H200,
            "zero points",
        ),
        (spec_of("FP8"), Device("cuda", 80), "sm_89"),
        (spec_of("FP8", (72, 128)), H200, "multiples of 16"),
        (spec_of("W8A8", (68, 128)), Device("cuda", 80), "multiples of 8"),
    ],
)
def test_scaled_mm_names_what_it_cannot_multiply(spec, device, reason):
    assert reason in scaled_mm.unsupported_reason(spec, device)


def test_the_registry_prefers_codes_then_humming_then_the_definition(monkeypatch, with_humming):
    names = [name for name in KERNELS["cuda"] if name in ("scaled_mm", "humming", "reference")]
    assert names == ["scaled_mm", "humming", "reference"] and KERNELS["cuda"][-1] == "reference"
    monkeypatch.setattr(kernels, "KERNELS", {"cuda": tuple(names)})
    assert choose(spec_of("FP8"), H200).kernel == "scaled_mm"
    assert choose(spec_of("FP8", (72, 128)), H200).kernel == "humming"
    assert choose(spec_of("W4A16"), H200).kernel == "humming"
    old = choose(spec_of("W4A16"), Device("cuda", 70))
    assert old.kernel == "reference" and set(old.refused) == {"scaled_mm", "humming"}


RESCALE = """
    import torch
    from support import triton_cpu
    triton_cpu.repair()
    from qtool.runtime.triton.rescale import rescale
    torch.manual_seed(0)
    for kind in (torch.int32, torch.float32, torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float16):
            for bias in (None, torch.randn(1500).to(dtype)):
                sums = (torch.randn(3, 1500) * 50).to(kind)
                rows, columns = torch.rand(3, 1), torch.rand(1500)
                expected = sums.float() * rows * columns + (0 if bias is None else bias)
                y = rescale(sums, rows, columns, bias, dtype)
                wanted = expected.to(dtype).float()
                close = torch.allclose(y.float(), wanted, rtol=1e-2, atol=1e-2)
                assert y.dtype == dtype and close, (kind, dtype)
    print("same")
"""
COMPILED = """
    from functools import partial
    import torch
    from support import triton_cpu
    compiled = []
    triton_cpu.compile_only(compiled)
    from qtool.runtime.triton.rescale import rescale
    empty = partial(torch.empty, device="meta")
    for kind in (torch.int32, torch.float32, torch.bfloat16):
        sums, bias = empty(3, 1500, dtype=kind), empty(1500, dtype=torch.bfloat16)
        rescale(sums, empty(3, 1), empty(1500), bias, torch.bfloat16)
    assert len(compiled) == 3
    assert all(triton_cpu.resources(kernel)["stack"] == 0 for kernel in compiled)
    print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "interpret"),
    [(RESCALE, "1"), (COMPILED, "0")],
    ids=["interpreted", "compiled for sm_90"],
)
def test_sums_are_rescaled_in_one_launch(code, interpret):
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": interpret,
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(TESTS), str(ROOT))),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("device", "capability", "tested", "warns"),
    [
        ("cuda", 9, False, True),
        ("cuda", 9, True, False),
        ("cuda", 8, False, False),
        ("cpu", 9, False, False),
    ],
)
def test_an_engine_says_that_another_triton_runs_slower_kernels(
    monkeypatch, caplog, device, capability, tested, warns
):
    tiles = pytest.importorskip("qtool.runtime.triton.tiles", reason="triton is for Linux only")
    monkeypatch.setattr(tiles, "GLUON", tested)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    warn_of_version(torch.device(device))
    assert ("were tested with Triton 3.6 alone" in caplog.text) == warns

"""Layers of experts in one grouped product: against the definition, on a CPU and, in Triton's
interpreter, as a GPU computes them (`python tests/runtime/test_grouped_experts.py
interpret|compile`).
"""

from __future__ import annotations

import sys

import pytest


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16", "NF4"])
def test_the_native_kernel_multiplies_all_experts_as_the_definition_does(scheme):
    assert native_error(scheme=scheme) < 1e-2


@pytest.mark.parametrize(
    "case",
    [
        {"scheme": "FP8_DYNAMIC"},
        {"scheme": "FP8_BLOCK"},
        {"scheme": "FP8_BLOCK", "hidden": 200, "inner": 80},  # blocks that reach over the edge
        {"scheme": "NVFP4"},
        {"scheme": "W8A8"},
        {"scheme": "FP8", "gate": "squared_relu", "tokens": 33, "top_k": 3},
    ],
    ids=lambda case: case["scheme"],
)
def test_the_native_kernel_rounds_inputs_as_each_expert_does(case):
    # codes move where sums are rounded to bfloat16 in another order
    assert native_error(**case) < 3e-2


@pytest.mark.parametrize(
    "case",
    [
        {"gate": "clamped", "has_bias": True, "tokens": 300, "has_shared": True},
        {"gate": "gelu", "experts": 5, "hidden": 320, "inner": 192, "tokens": 70, "top_k": 3},
        {"tokens": 1, "top_k": 1, "experts": 2},
        {"tokens": 40, "crowded": True},
        {"tokens": 3, "experts": 64, "top_k": 8},
    ],
    ids=["many tokens", "odd shapes", "one token", "one expert has all", "most have none"],
)
def test_the_native_kernel_takes_any_share_of_tokens(case):
    assert native_error(scheme="W4A16", **case) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q8_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ4_NL"])
def test_the_native_kernel_takes_the_types_of_gguf(type):
    assert native_error(scheme=type, hidden=512, inner=256, gate="clamped", has_bias=True) < 1e-2


def native_error(**case) -> float:
    from support.experts import Case

    from qtool.runtime.experts import native_experts
    from qtool.runtime.kernels import Device

    made = Case(**case)
    if reason := native_experts.unsupported_reason(made.layer()[0], Device("cpu")):
        pytest.skip(f"the native kernel does not run here: {reason}")
    return made.error(native_experts)


def test_a_server_names_the_schemes_of_experts_too():
    import torch
    from support.experts import Case

    from qtool.runtime.experts.grouped import GroupedExperts
    from qtool.serve.backend import engine_process

    spec, weights = Case("MXFP4A16", experts=2).layer()
    model = torch.nn.Sequential(GroupedExperts(spec, "reference", weights))
    assert engine_process._schemes(model) == "MXFP4A16"


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "count"), [(1, 2, 8), (200, 2, 5), (33, 8, 128), (64, 1, 2)]
)
def test_choices_are_sorted_by_expert_in_blocks(tokens, top_k, count, size):
    import torch

    from qtool.runtime.experts.routing import sort_by_expert

    experts = torch.rand(tokens, count, generator=torch.Generator().manual_seed(0)).topk(top_k)[1]
    blocks = sort_by_expert(experts, count, size)
    rows = blocks.rows[: int(blocks.used)].view(-1, size)
    seen = []
    for choices, expert in zip(rows.tolist(), blocks.experts.tolist(), strict=False):
        present = [choice for choice in choices if choice < tokens * top_k]
        assert present == sorted(present)
        assert {int(experts.flatten()[choice]) for choice in present} == {expert}
        seen += present
    assert sorted(seen) == list(range(tokens * top_k))


def test_the_triton_kernels_multiply_all_experts_as_the_definition_does(run_here):
    assert "compared" in run_here("interpret")


@pytest.mark.exhaustive
def test_the_triton_kernels_do_so_for_all_schemes(run_here):
    assert "compared" in run_here("interpret_all")


@pytest.mark.exhaustive
def test_the_triton_kernels_compile_for_hopper(run_here):
    assert "compiled" in run_here("compile")


FEW = (
    {"scheme": "FP8_DYNAMIC", "experts": 4, "hidden": 128, "inner": 64},
    {"scheme": "W4A16", "gate": "clamped", "experts": 4, "has_bias": True, "has_shared": True},
    {"scheme": "Q4_K", "experts": 4, "hidden": 256, "inner": 256},
)
ALL = (
    {"scheme": "FP8_DYNAMIC", "gate": "gelu", "tokens": 40, "top_k": 3, "crowded": True},
    {"scheme": "W8A8", "gate": "squared_relu"},
    {"scheme": "FP8_BLOCK", "experts": 4},
    {"scheme": "FP8", "experts": 4},
    {"scheme": "W4A16_ASYM"},
    {"scheme": "W8A16", "hidden": 128},
    {"scheme": "NVFP4A16", "experts": 4},
    {"scheme": "NVFP4", "experts": 4},
    {"scheme": "NF4", "experts": 4},
    {"scheme": "MXFP4A16", "gate": "clamped", "has_bias": True},
)


# tokens, experts of each, all experts, rows of a block; segments and chunks of many choices
SORTED = (
    *((7, 4, 16, 16, ()), (64, 1, 2, 128, ()), (30, 8, 128, 16, ()), (1500, 3, 40, 64, ())),
    (2100, 2, 5, 128, (8, 32)),  # segments of several chunks
)


def interpret(cases=FEW) -> None:
    import torch
    from support import triton_cpu
    from support.experts import Case

    from qtool.runtime.experts import triton_experts
    from qtool.runtime.experts.routing import sort_by_expert
    from qtool.runtime.experts.rules import RoutingRule, route
    from qtool.runtime.kernels import Device
    from qtool.runtime.triton import routing

    triton_cpu.repair()
    generator = torch.Generator().manual_seed(0)
    for tokens, top_k, count, size, cut in SORTED:
        if cut:
            routing.SEGMENTS, routing.CHUNK = cut
        shares = torch.rand(count, generator=generator)  # some experts have many choices, some none
        experts = (torch.rand(tokens, count, generator=generator) * shares).topk(top_k)[1]
        plain, sorted_ = (
            sort(experts, count, size) for sort in (sort_by_expert, routing.sort_choices)
        )
        used = int(plain.used)
        assert int(sorted_.used) == used
        assert torch.equal(sorted_.rows[:used], plain.rows[:used])
        assert torch.equal(sorted_.experts[: used // size], plain.experts[: used // size])
    for rule, count in (
        (RoutingRule(8, normalizes=True), 128),
        (RoutingRule(4, of_chosen=True), 32),
        (RoutingRule(4, "sigmoid", normalizes=True, scaling=2.5, groups=8, top_groups=4), 64),
    ):
        logits = torch.randn(5, count, generator=generator)
        bias = torch.randn(count, generator=generator) / 10 if rule.groups > 1 else None
        weights, experts = route(logits, rule, bias)
        found, chosen = routing.top_experts(logits, rule, bias, torch.float32)
        assert torch.equal(experts.sort(-1)[0], chosen.sort(-1)[0])
        torch.testing.assert_close(found.sort(-1)[0], weights.sort(-1)[0])
    for given in cases:
        case = Case(**given)
        assert triton_experts.unsupported_reason(case.layer()[0], Device("cuda", 90)) is None
        # fp4 inputs are rounded, and then multiplied as bfloat16
        assert case.error(triton_experts) < (3e-2 if case.scheme == "NVFP4" else 1e-2), given
    print("compared")


def compile_all() -> None:
    import threading
    import time

    import torch
    from support import triton_cpu
    from support.experts import GATES
    from triton import knobs

    from qtool.runtime.experts import triton_experts
    from qtool.runtime.experts.routing import Blocks
    from qtool.runtime.kernels import LinearSpec
    from qtool.runtime.kernels import triton_weight_only as weight_only
    from qtool.runtime.triton import parallel_compile, routing
    from qtool.runtime.triton.parallel_compile import compile_in_parallel
    from qtool.scheme import SCHEMES

    hopper, launchers = triton_cpu.Hopper(), []
    hopper.launcher_cls = lambda src, metadata: launchers.append(src.name)
    triton_cpu.driver.set_active(hopper)
    own_run = triton_cpu.JITFunction.run
    with compile_in_parallel():
        for size in (16, 64):
            # whose number makes no other kernel
            for tokens in (*range(5, 64), *range(513, 560), 20000):
                some = torch.empty(tokens, 8, dtype=torch.int32, device="meta")
                blocks = routing.sort_choices(some, 128, size)
                lists = blocks.rows, blocks.experts, blocks.used
                assert not any(each.storage_offset() % 4 for each in lists)  # of 16 bytes
    kernels = routing._sort.device_caches[0][0].values()
    assert [kernel.asm["cubin"][:4] for kernel in kernels] == [b"\x7fELF"] * 2
    # that of many choices takes blocks of any size
    assert sorted(launchers) == ["_count_segment", "_sort", "_sort", "_sort_segment"]
    assert triton_cpu.JITFunction.run is own_run

    def enter() -> None:
        with compile_in_parallel():
            time.sleep(0.05)

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert triton_cpu.JITFunction.run is own_run

    compiled: list = []
    triton_cpu.compile_only(compiled)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    said: list[str] = []
    parallel_compile.LOG.addFilter(lambda record: said.append(record.getMessage()))
    knobs.compilation.always_compile = True

    def serve() -> None:
        parallel_compile.log_compiles()
        routing.sort_choices(empty(8, 8, dtype=torch.int32), 128, 32)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    routing.sort_choices(empty(8, 8, dtype=torch.int32), 128, 128)  # in a thread that serves nobody
    knobs.compilation.always_compile = False
    assert [line.split(" compiled")[0] for line in said] == ["requests wait for a kernel: _sort"]

    for name in ("W4A16", "MXFP4A16", "NVFP4A16", "NF4", "W8A16"):
        linear = LinearSpec(SCHEMES[name], (1536, 2048), torch.bfloat16)
        whole = LinearSpec(SCHEMES[name], (2 * 1536, 2048), torch.bfloat16)
        packed = triton_cpu.empty_packed("triton_weight_only", whole)
        for tile, _ in triton_experts.tiles(linear).values():
            places = empty(4 * tile.m, dtype=torch.int32), empty(4, dtype=torch.int32)
            blocks = Blocks(*places, empty(1, dtype=torch.int32), tile.m, 64, 8)
            weight_only.multiply_blocks(
                linear, empty(8, 2048), packed, None, tile, blocks, GATES["silu"]
            )
            used = triton_cpu.resources(compiled[-1])
            # those for many tokens spill a little, and are faster on an H200 than smaller ones
            assert used["stack"] <= 160, f"{name} {tile} spills registers: {used}"
            assert used["shared"] <= 232448, f"{name} {tile}: {used}"
    print(f"{len(compiled)} compiled")


if __name__ == "__main__":
    {
        "interpret": interpret,
        "interpret_all": lambda: interpret(ALL),
        "compile": compile_all,
    }[sys.argv[1]]()

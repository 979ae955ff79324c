"""Every format the three libraries write is recognised from headers alone, and what contradicts
itself is refused or reported.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.sample_names import ALL, MIXED, PROJECTIONS, SCHEMES

from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats import check_values, detect, values

pytest_plugins = ["support.sample_plugin"]

FORMATS = {"ct": "compressed-tensors", "gptq": "gptq", "modelopt": "modelopt"}


@pytest.fixture
def edited(sample, tmp_path):
    """A function: a sample's name and changes to its tensors and its quantization config, to a
    checkpoint that has them.
    """

    def edit(name, tensors=lambda tensors: None, config=lambda config: None):
        folder = shutil.copytree(sample(name), tmp_path / "edited", dirs_exist_ok=True)
        loaded = load_file(folder / "model.safetensors")
        tensors(loaded)
        save_file(loaded, folder / "model.safetensors")
        whole = json.loads((folder / "config.json").read_text())
        config(whole["quantization_config"])
        (folder / "config.json").write_text(json.dumps(whole))
        return open_checkpoint(folder)

    return edit


@pytest.mark.parametrize("name", ALL)
def test_every_layer_of_every_sample_gets_its_scheme_and_shape(sample, name):
    layout = detect(open_checkpoint(sample(name)))
    assert layout.format == ("awq" if name == "gptq/rtn_gemm" else FORMATS[name.split("/")[0]])
    expected = MIXED.get(name) or dict.fromkeys(PROJECTIONS, SCHEMES.get(name))
    assert {
        module.name.rpartition(".")[2]: module.scheme.name for module in layout.modules.values()
    } == expected
    assert {
        module.name.rpartition(".")[2]: module.shape
        for module in layout.modules.values()
        if ".0." in module.name
    } == {
        kind: {
            "k_proj": (128, 256),
            "v_proj": (128, 256),
            "down_proj": (256, 768),
            "gate_proj": (768, 256),
            "up_proj": (768, 256),
        }.get(kind, (256, 256))
        for kind in expected
    }
    assert layout.kv_cache == ("fp8" if "kv" in name.lower() else None)
    assert bool(layout.warnings) == (name == "gptq/rtn_gemm")


@pytest.mark.parametrize("name", ALL)
def test_every_sample_passes_the_deep_check(sample, name):
    checkpoint = open_checkpoint(sample(name))
    assert check_values(checkpoint, detect(checkpoint)) == []


def test_sizes_on_disk_agree_with_what_the_scheme_says(sample):
    for name in ("ct/W4A16", "ct/FP8_DYNAMIC", "ct/NVFP4A16", "ct/MXFP8", "ct/W4A16_ASYM"):
        for module in detect(open_checkpoint(sample(name))).modules.values():
            # weight_shape
            assert module.size_bytes - module.scheme.weights.size_bytes(*module.shape) in (
                0,
                16,
            )


def test_a_plain_model_has_no_layout():
    assert detect(open_checkpoint(EXAMPLE)) is None
    assert check_values(open_checkpoint(EXAMPLE), None) == []


def test_detection_and_inspection_never_import_torch(sample):
    code = """if True:
        import sys; from pathlib import Path; from qtool.checkpoint import open_checkpoint; from qtool.inspection import inspect, render
        for path in sys.argv[1:]: render(inspect(open_checkpoint(Path(path))))
        assert "torch" not in sys.modules"""
    folders = [
        sample(name)
        for name in ("ct/NVFP4", "ct/W3A16", "gptq/rtn4", "gptq/rtn_gemm", "modelopt/NVFP4")
    ]
    result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_quantized_tensors_without_a_config_are_refused(sample, tmp_path):
    folder = shutil.copytree(sample("ct/W4A16"), tmp_path / "lost")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointRefused) as error:
        detect(open_checkpoint(folder))
    assert error.value.code == "E_NO_QUANT_CONFIG"


def test_an_unknown_method_is_refused_and_named(edited):
    with pytest.raises(CheckpointRefused, match="aqlm") as error:
        detect(
            edited(
                "ct/FP8_DYNAMIC",
                config=lambda config: (config.clear(), config.update(quant_method="aqlm")),
            )
        )
    assert error.value.code == "E_QUANT_METHOD"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("ct/W4A16", "weight_scale"),
        ("ct/W4A16", "weight_packed"),
        ("ct/W4A16_ASYM", "weight_zero_point"),
        ("ct/NVFP4", "weight_global_scale"),
        ("ct/NVFP4", "input_global_scale"),
        ("ct/FP8", "input_scale"),
        ("ct/FP8", "weight"),
        ("gptq/rtn4", "scales"),
        ("gptq/rtn4", "qweight"),
        ("gptq/rtn4", "qzeros"),
        ("modelopt/NVFP4", "weight_scale_2"),
        ("modelopt/NVFP4", "input_scale"),
        ("modelopt/FP8", "weight_scale"),
        ("modelopt/FP8", "weight"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(edited, name, suffix):
    lost = f"model.layers.1.mlp.up_proj.{suffix}"
    with pytest.raises(CheckpointRefused, match=lost) as error:
        detect(edited(name, lambda tensors: tensors.pop(lost)))
    assert error.value.code == "E_MISSING_TENSOR"


@pytest.mark.parametrize(
    "name",
    [
        "ct/W4A16",
        "ct/NVFP4",
        "ct/FP8_DYNAMIC",
        "ct/FP8_BLOCK",
        "gptq/rtn4",
        "modelopt/NVFP4",
        "modelopt/INT4",
    ],
)
def test_scales_of_another_shape_are_refused(edited, name):
    def cut(tensors):
        scale = next(
            key
            for key in tensors
            if "layers.1.mlp.down_proj" in key and key.endswith(("weight_scale", "scales"))
        )
        tensors[scale] = tensors[scale][:-1].clone()

    with pytest.raises(CheckpointRefused, match=r"down_proj") as error:
        detect(edited(name, cut))
    assert error.value.code == "E_SCALE_SHAPE"


def test_a_wrong_number_of_bits_in_the_config_is_refused_by_its_shapes(edited):
    with pytest.raises(CheckpointRefused) as error:
        detect(
            edited(
                "ct/W4A16",
                config=lambda config: config["config_groups"]["group_0"]["weights"].update(
                    num_bits=8
                ),
            )
        )
    assert error.value.code == "E_WEIGHT_SHAPE"


def test_a_gptq_config_that_lies_about_bits_is_reported_and_the_tensors_decide(edited):
    layout = detect(edited("gptq/rtn4", config=lambda config: config.update(bits=8)))
    assert {module.scheme.name for module in layout.modules.values()} == {"W4A16"}
    assert "config says 8" in layout.warnings[0]


def test_a_layer_both_quantized_and_ignored_is_reported(edited):
    layout = detect(
        edited(
            "ct/W4A16", config=lambda config: config["ignore"].append("model.layers.0.mlp.up_proj")
        )
    )
    assert layout.warnings == (
        "`model.layers.0.mlp.up_proj` is quantized and the config ignores it",
    )


def test_a_target_that_stayed_plain_is_reported(edited):
    def unquantize(tensors):
        for suffix in ("packed", "scale", "shape"):
            tensors.pop(f"model.layers.0.mlp.up_proj.weight_{suffix}")
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(768, 256, dtype=torch.bfloat16)

    layout = detect(edited("ct/W4A16", unquantize))
    assert layout.warnings == (
        "`model.layers.0.mlp.up_proj` is a target of the config and is stored as BF16",
    )


def test_a_layer_that_no_group_targets_is_refused(edited):
    with pytest.raises(CheckpointRefused, match="no group") as error:
        detect(
            edited(
                "ct/mixed",
                config=lambda config: [
                    group.update(targets=["re:.*up_proj"])
                    for group in config["config_groups"].values()
                ],
            )
        )
    assert error.value.code == "E_QUANT_TARGET"


def test_between_two_patterns_the_smaller_string_wins(edited):
    def add(config):
        config["config_groups"]["z"] = {
            **config["config_groups"]["group_0"],
            "targets": ["re:.*up_proj"],
        }
        config["config_groups"]["z"]["weights"] = {
            **config["config_groups"]["z"]["weights"],
            "num_bits": 3,
        }
        config["config_groups"]["group_0"]["targets"] = ["re:.*proj"]

    layout = detect(edited("ct/W4A16", config=add))
    assert {module.scheme.name for module in layout.modules.values()} == {"W4A16"}


def test_a_pattern_that_is_none_or_takes_too_long_is_refused(edited, monkeypatch):
    def detected(pattern):
        with pytest.raises(CheckpointRefused, match="pattern") as error:
            detect(edited("ct/W4A16", config=lambda config: config["ignore"].append(pattern)))
        return error.value.code

    assert detected("re:(") == "E_QUANT_PATTERN"
    monkeypatch.setattr("qtool.patterns.BUDGET_S", 1e-9)
    assert detected("re:.*nothing") == "E_QUANT_PATTERN"


def test_kv_scales_that_the_config_does_not_mention_are_reported(edited):
    layout = detect(edited("ct/kv_fp8", config=lambda config: config.update(kv_cache_scheme=None)))
    assert layout.kv_cache is None
    assert "no kv_cache_scheme" in layout.warnings[0]


def test_autoawq_configs_and_old_config_files_are_read(edited, sample, tmp_path):
    autoawq = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    layout = detect(
        edited("gptq/rtn_gemm", config=lambda config: (config.clear(), config.update(autoawq)))
    )
    assert (layout.format, layout.warnings) == ("awq", ())
    assert {module.scheme.name for module in layout.modules.values()} == {"W4A16_ASYM"}

    folder = shutil.copytree(sample("gptq/rtn4"), tmp_path / "old")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 128, "desc_act": False, "sym": True})
    )
    assert detect(open_checkpoint(folder)).format == "gptq"


def test_a_modelopt_checkpoint_with_only_hf_quant_config_is_read(sample, tmp_path):
    folder = shutil.copytree(sample("modelopt/NVFP4"), tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    layout = detect(open_checkpoint(folder))
    assert (layout.format, {module.scheme.name for module in layout.modules.values()}) == (
        "modelopt",
        {"NVFP4"},
    )


@pytest.mark.parametrize(
    "name",
    [
        "ct/mixed",
        "ct/NVFP4",
        "ct/W5A16_ASYM",
        "gptq/dynamic",
        "gptq/rtn_gemm",
        "modelopt/MIXED",
        "modelopt/FP8_KV",
    ],
)
def test_a_broken_config_or_header_is_refused_or_read_and_never_a_crash(sample, name):
    checkpoint = open_checkpoint(sample(name))
    random = Random(name)
    refused = 0
    for _ in range(150):
        config, tensors = json.loads(json.dumps(checkpoint.config)), dict(checkpoint.tensors)
        for _ in range(random.randint(0, 2)):
            break_one(random, config["quantization_config"])
        for tensor in random.sample(list(tensors.values()), random.randint(0, 2)):
            shape = random.choice([(), (0,), (3, 0), (1, 1), (7,), tensor.shape[::-1], (2, 3, 4)])
            tensors[tensor.name] = tensor._replace(
                shape=shape, dtype=random.choice([tensor.dtype, "U8", "I32", "F32"])
            )
        try:
            detect(replace(checkpoint, config=config, tensors=tensors))
        except CheckpointRefused:
            refused += 1
    assert refused > 10


def break_one(random, config):
    key = (
        random.choice(list(config) if isinstance(config, dict) else range(len(config)))
        if config
        else None
    )
    if key is not None:
        if isinstance(config[key], dict | list) and config[key] and random.random() < 0.8:
            break_one(random, config[key])
        else:
            config[key] = random.choice(
                [None, -1, 0, 3, "x", "re:(", [], {}, [None], {"x": 1}, 1e300, True]
            )


@pytest.mark.parametrize(
    ("name", "tensor", "value", "what"),
    [
        ("ct/W4A16", "model.norm.weight", float("nan"), "NaN or infinity"),
        ("ct/W4A16", "model.embed_tokens.weight", float("-inf"), "NaN or infinity"),
        ("ct/W4A16", "model.layers.1.mlp.up_proj.weight_scale", 0.0, None),
        ("ct/W4A16", "model.layers.1.mlp.up_proj.weight_scale", -1.0, None),
        ("ct/FP8_DYNAMIC", "model.layers.1.mlp.up_proj.weight_scale", -1.0, "negative scale"),
        ("ct/FP8_DYNAMIC", "model.layers.1.mlp.up_proj.weight", float("nan"), "NaN or infinity"),
        ("ct/NVFP4", "model.layers.1.mlp.up_proj.weight_global_scale", 0.0, "zero scale"),
        ("ct/NVFP4", "model.layers.1.mlp.up_proj.weight_scale", 0.0, None),
        ("ct/NVFP4", "model.layers.1.mlp.up_proj.weight_scale", -1.0, "negative scale"),
        ("ct/MXFP4", "model.layers.1.mlp.up_proj.weight_scale", 255, "NaN scale"),
        ("ct/MXFP4", "model.layers.1.mlp.up_proj.weight_scale", 0, None),
        ("ct/MXFP4", "model.layers.1.mlp.up_proj.weight_packed", 255, None),
        ("ct/kv_fp8", "model.layers.1.self_attn.k_scale", 0.0, "zero scale"),
        ("gptq/rtn4", "model.layers.1.mlp.up_proj.scales", float("inf"), "NaN or infinity"),
        ("gptq/rtn4", "model.layers.1.mlp.up_proj.g_idx", 2, "and there are 2"),
        ("gptq/rtn4", "model.layers.1.mlp.up_proj.g_idx", -1, "and there are 2"),
        ("modelopt/FP8", "model.layers.1.mlp.up_proj.weight_scale", 0.0, None),
        (
            "modelopt/NVFP4",
            "model.layers.1.mlp.up_proj.weight_scale_2",
            float("nan"),
            "NaN or infinity",
        ),
        ("modelopt/INT4_AWQ", "model.layers.1.mlp.down_proj.pre_quant_scale", 0.0, "zero scale"),
    ],
)
def test_the_deep_check_finds_one_bad_value_and_names_its_tensor(edited, name, tensor, value, what):
    def spoil(tensors):
        flat = tensors[tensor].view(-1)
        flat[-1] = torch.tensor(value, dtype=torch.float32).to(flat.dtype)

    checkpoint = edited(name, spoil)
    problems = check_values(checkpoint, detect(checkpoint))
    assert len(problems) == (what is not None)
    if what:
        assert f"`{tensor}`" in problems[0]
        assert what in problems[0]


def test_the_deep_check_sees_the_last_value_of_the_last_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(values, "BLOCK_BYTES", 1 << 10)
    weight = torch.ones(3000, 7)
    weight[-1, -1] = float("nan")
    save_file(
        {"a.weight": torch.ones(5, dtype=torch.float64), "b.weight": weight},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    assert check_values(open_checkpoint(tmp_path), None) == [
        "model.safetensors: `b.weight` holds NaN or infinity"
    ]

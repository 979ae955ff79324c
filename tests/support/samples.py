"""Real quantized checkpoints of the tiny model, made by the three libraries, each in a process of
its own.

`python samples.py LIBRARY SOURCE OUT` writes OUT/<name>/ (a checkpoint) and
OUT/<name>.reference.safetensors: the weights the library itself dequantizes (`weight:<module>`),
the logits it computes for a prompt (`logits`), and what goes in and out of two layers on the way
(`input:<module>`, `output:<module>`), as far as the library can do that on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import sys
from pathlib import Path

from qtool.imports import skip_unused
from qtool.memory import no_collection
from support import EXAMPLE

PROMPT_TOKENS = 48
WATCHED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SHORT = {  # samples of two layers: no test of them needs more
    *("W3A16", "W4A16_ASYM", "W5A16_ASYM", "W6A16", "W7A16", "W8A8_STATIC_ASYM", "W4AFP8"),
    *("FP8", "FP8_PC_PT", "fp8_weight_only", "INT8", "INT8_WO"),
    *("MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4A16", "W4A16_NVFP4", "W4A8_NVFP4_FP8"),
}


def texts(name: str, count: int) -> list[str]:
    lines = (EXAMPLE / name).read_text().splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]


def token_sequences(name: str, count: int, length: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    return [
        tokenizer.encode(text, add_special_tokens=False).ids[:length] for text in texts(name, count)
    ]


def load(source, **options):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, **{"dtype": torch.bfloat16, **options}
    ).eval()


def keep_reference(out: Path, *, model=None, weights=None) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {f"weight:{name}": weight.contiguous() for name, weight in (weights or {}).items()}
    if model is not None:
        for name in WATCHED:

            def keep(module, args, result, name=name):
                tensors[f"input:{name}"], tensors[f"output:{name}"] = (
                    args[0].clone(),
                    result.clone(),
                )

            model.get_submodule(name).register_forward_hook(keep)
        with torch.no_grad():
            tensors["logits"] = model(
                torch.tensor(token_sequences("evaluation.jsonl", 1, PROMPT_TOKENS)), use_cache=False
            ).logits.float()
    save_file(tensors, out.with_name(f"{out.name}.reference.safetensors"))


def shorten(source: Path, out: Path, layers: int = 2) -> Path:
    """Write the model again with its first ``layers`` only: libraries are slow."""
    from transformers import AutoConfig, AutoTokenizer

    load(
        source, config=AutoConfig.from_pretrained(source, num_hidden_layers=layers)
    ).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


def make_ct(source: Path, out: Path) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    data = Dataset.from_list(
        [
            {"input_ids": ids, "attention_mask": [1] * len(ids)}
            for ids in token_sequences("calibration.jsonl", 4, 64)
        ]
    )
    fp8 = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }

    def preset(name, targets=("Linear",)):
        return preset_name_to_scheme(name, list(targets)).model_dump()

    def group(weights, inputs=None):
        return {
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
            }
        }

    presets = """FP8_DYNAMIC FP8_BLOCK W8A8 W8A16 W4A16 W4A16_ASYM W2A16 W3A16 W5A16 W6A16 W7A16 W4A8 W4AFP8 NVFP4A16 MXFP4 MXFP4A16 MXFP8 MXFP8A16"""
    recipes = {name: {"targets": "Linear", "scheme": name} for name in presets.split()}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    recipes |= {
        "FP8": {"targets": "Linear", "scheme": "FP8"},
        "NVFP4": {"targets": "Linear", "scheme": "NVFP4"},
        "fp8_weight_only": group({**fp8, "strategy": "channel"}),
        "W5A16_ASYM": group(
            {"num_bits": 5, "type": "int", "symmetric": False, "strategy": "channel"}
        ),
        "W8A8_STATIC_ASYM": group(
            {**int8, "strategy": "channel"},
            {**int8, "symmetric": False, "strategy": "tensor", "dynamic": False},
        ),
        "mixed": {
            "config_groups": {
                "attention": preset("FP8_DYNAMIC", ["re:.*self_attn.*_proj$"]),
                "mlp": preset("W4A16", [r"re:.*mlp\.(gate|up)_proj$"]),
            }
        },
        "kv_fp8": {
            "targets": "Linear",
            "scheme": "FP8_DYNAMIC",
            "kv_cache_scheme": QuantizationArgs(**fp8),
        },
    }
    short = shorten(source, out / "short-model")
    for name, recipe in recipes.items():
        model = load(short if name in SHORT else source)
        needs_data = name in ("FP8", "NVFP4", "W8A8_STATIC_ASYM", "kv_fp8")
        options = {
            "dataset": data,
            "num_calibration_samples": 4,
            "max_seq_length": 64,
            "shuffle_calibration_samples": False,
            "pipeline": "basic",
        }
        oneshot(
            model=model,
            recipe=[QuantizationModifier(ignore=["lm_head"], **recipe)],
            **(options if needs_data else {}),
        )
        model.save_pretrained(out / name)
        # so that its roundings can be compared exactly
        loaded = load(out / name, dtype=torch.float32)
        # the first forward decompresses, NVFP4 to bf16 whatever it is asked for
        with contextlib.suppress(RuntimeError):
            loaded(torch.tensor([[1, 2, 3]]))
        torch.nn.Module.float(loaded)  # transformers' own refuses
        weights = {
            module_name: module.weight.data
            for module_name, module in loaded.named_modules()
            if module_name.endswith("_proj")
        }
        keep_reference(out / name, model=loaded, weights=weights)


def make_gptq(source: Path, out: Path) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.looper import loop_processor
    from gptqmodel.quantization.config import GPTQConfig, RTNConfig
    from gptqmodel.utils import logger
    from logbar import LogBar

    LogBar.shared().setLevel("ERROR")  # its bars take a quarter of the time
    logger._suppress_live_renderables = lambda: True
    loop_processor._PROJECT_LOG_DIR = out / "logs"
    short = shorten(source, out / "short-model")
    data = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for ids in token_sequences("calibration.jsonl", 4, 64)
    ]
    dynamic = {"-:.*o_proj.*": {}, "+:.*down_proj.*": {"bits": 8, "group_size": 64}}
    quick = {"mock_quantization": True}
    configs = {
        "rtn4": RTNConfig(bits=4, group_size=128),
        "rtn_gemm": RTNConfig(bits=4, group_size=128, format="gemm"),
        "gptq3": GPTQConfig(bits=3, group_size=128, **quick),
        "asym_v1": GPTQConfig(bits=4, group_size=32, sym=False, **quick),
        "asym_v2": GPTQConfig(bits=4, group_size=32, sym=False, format="gptq_v2", **quick),
        "channel2": GPTQConfig(bits=2, group_size=-1, act_group_aware=False, **quick),
        "desc_act": GPTQConfig(bits=4, group_size=64, desc_act=True, act_group_aware=False),
        "dynamic": GPTQConfig(bits=4, group_size=128, dynamic=dynamic, **quick),
    }
    for name, config in configs.items():
        model = GPTQModel.load(str(source if name == "rtn4" else short), config)
        model.quantize(
            None if name.startswith("rtn") else data, batch_size=1, calibration_sort=None
        )
        model.save(str(out / name))
        if name == "rtn_gemm":
            continue  # its own loader refuses method gptq with format gemm
        loaded = GPTQModel.load(str(out / name), device="cpu", backend=BACKEND.TORCH).model
        weights = {
            n: m.dequantize_weight().T.float()
            for n, m in loaded.named_modules()
            if hasattr(m, "dequantize_weight")
        }
        keep_reference(out / name, model=loaded.to(torch.bfloat16), weights=weights)


def make_modelopt(source: Path, out: Path) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    batches = [torch.tensor([ids]) for ids in token_sequences("calibration.jsonl", 4, 64)]

    def forward_loop(model):
        with torch.no_grad():
            for ids in batches:
                model(input_ids=ids, use_cache=False)

    configs = {
        "FP8": mtq.FP8_DEFAULT_CFG,
        "FP8_PC_PT": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "FP8_PB_WO": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        "INT8": mtq.INT8_DEFAULT_CFG,
        "INT8_SQ": mtq.INT8_SMOOTHQUANT_CFG,
        "INT8_WO": mtq.INT8_WEIGHT_ONLY_CFG,
        "INT4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
        "INT4_AWQ": mtq.INT4_AWQ_CFG,
        "W4A8_AWQ": mtq.W4A8_AWQ_BETA_CFG,
        "NVFP4": mtq.NVFP4_DEFAULT_CFG,
        "W4A16_NVFP4": mtq.W4A16_NVFP4_CFG,
        "W4A8_NVFP4_FP8": mtq.W4A8_NVFP4_FP8_CFG,
        "MXFP8": mtq.MXFP8_DEFAULT_CFG,
        "MXFP4": mtq.MXFP4_DEFAULT_CFG,
        "W4A8_MXFP4_FP8": mtq.W4A8_MXFP4_FP8_CFG,
    }
    configs = {name: copy.deepcopy(config) for name, config in configs.items()}
    for name in ("INT4_AWQ", "W4A8_AWQ"):  # three scales are tried, not eleven
        configs[name]["algorithm"] = {"method": "awq_lite", "alpha_step": 0.5}
    configs["FP8_KV"] = copy.deepcopy(configs["FP8"])
    configs["FP8_KV"]["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    configs["MIXED"] = copy.deepcopy(configs["FP8"])
    nvfp4 = [
        entry
        for entry in copy.deepcopy(configs["NVFP4"]["quant_cfg"])
        if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    ]
    configs["MIXED"]["quant_cfg"] += [
        {**entry, "quantizer_name": f"*mlp.{entry['quantizer_name']}"} for entry in nvfp4
    ]
    for entry in configs["MIXED"]["quant_cfg"][-len(nvfp4) :]:
        entry["quantizer_name"] = entry["quantizer_name"].replace("*mlp.*", "*mlp.*_proj.")
    configs["MIXED"]["quant_cfg"].append({"quantizer_name": "*mlp.down_proj.*", "enable": False})
    no_forward = (
        "NVFP4",
        "W4A16_NVFP4",
        "W4A8_NVFP4_FP8",
        "MXFP8",
        "MXFP4",
        "W4A8_MXFP4_FP8",
        "MIXED",
    )
    short = shorten(source, out / "short-model")
    for name, config in configs.items():
        model = mtq.quantize(load(short if name in SHORT else source), config, forward_loop)
        keep_reference(
            out / name, model=None if name in no_forward else copy.deepcopy(model).float()
        )
        export_hf_checkpoint(model, export_dir=out / name)


if __name__ == "__main__":
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # GPTQModel compiles its dequantization again for every layer
        "GPTQMODEL_CPU_WORKERS": "2",
        "GPTQMODEL_DISABLE_PACK_EXT": "1",
        "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
    }
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make, library = {
        "ct": (make_ct, "llmcompressor"),
        "gptq": (make_gptq, "gptqmodel"),
        "modelopt": (make_modelopt, "modelopt.torch.quantization"),
    }[sys.argv[1]]
    skip_unused(library.partition(".")[0])
    with no_collection(keep=True):  # GPTQModel collects 14 times, and modules are many objects
        importlib.import_module(library)
    make(Path(sys.argv[2]), Path(sys.argv[3]))

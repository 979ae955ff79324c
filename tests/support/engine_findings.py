"""A checkpoint for each finding of the engine rules."""

from __future__ import annotations

from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats import detect
from qtool.inspection.engines import check_engine
from support.headers_only import (
    EXPERTS,
    HEAD,
    MODEL,
    TOKEN_FP8,
    Awq,
    Fp8,
    Gptq,
    ModelOpt,
    build,
    fp8,
    int8,
    nvfp4,
    packed,
    plain,
    write,
)
from support.published import PUBLISHED
from support.published.models import qwen3_moe
from support.published.models import write as write_small

ENGINES = ("sglang", "tensorrt-llm", "transformers", "vllm")


def only_config(**config):
    """A checkpoint of a method that qtool does not read."""
    return lambda folder: write(
        folder, plain("model.layers.0.mlp.up_proj", (64, 64)), quantization_config=config
    )


def mixed_precision(algorithm):
    """ModelOpt's MIXED_PRECISION with ``algorithm`` in every layer."""
    format = ModelOpt(algorithm)
    layers = {name: {"quant_algo": algorithm, "group_size": 128} for name in MODEL}
    format.config |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return format


def of(format, **options):
    return lambda folder: build(folder, format, **options)


def published(name):
    """The published layout ``name``, made small."""

    def make(folder):
        PUBLISHED[name](folder / "model")
        return open_checkpoint(folder / "model")

    return make


def experts_in_16_bits(folder):
    """Experts one by one, as they are dequantized to, of a model that stacks them."""
    model, weights = qwen3_moe()
    write_small(folder / "model", ({**model, "model_type": "gemma4_text"}, weights), {}, None)
    return open_checkpoint(folder / "model")


def check(checkpoint, engine, **options):
    try:
        layout = detect(checkpoint)
    except CheckpointRefused:
        layout = None
    return check_engine(checkpoint, layout, engine, **options)


def by_name(value, **others):
    return lambda name: next((other for part, other in others.items() if part in name), value)


def transforms_at(location):
    group = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}
    return {"config_groups": {"v": group}}


FP8_CACHE = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
INT8_CACHE = FP8_CACHE | {"type": "int"}
ORDERED = by_name(0, q_proj=1)
SCALED = by_name(1.0, q_proj=2.0)

FIRES = {  # code, or engine and code -> the checkpoint that fires it, and options of the check
    "E_ENGINE_METHOD": (only_config(quant_method="nothing_known"), {}),
    "N_ENGINE_NOT_READ": (only_config(quant_method="quark"), {}),
    "E_ENGINE_METHOD_GPU": (only_config(quant_method="fp8"), {"gpu": "v100"}),
    "N_ENGINE_FP8_DEQUANTIZED": (only_config(quant_method="fp8"), {"gpu": "a100"}),
    "E_ENGINE_GGUF": (only_config(quant_method="gguf"), {}),
    "E_ENGINE_GGUF_TYPE": (published("gguf-moe-mxfp4"), {}),
    "N_ENGINE_GGUF": (only_config(quant_method="gguf"), {}),
    "E_ENGINE_BITSANDBYTES": (only_config(quant_method="bitsandbytes"), {}),
    "E_ENGINE_BITSANDBYTES_STORAGE": (published("bnb-fp4-bf16-storage"), {}),
    "E_ENGINE_BITSANDBYTES_EXPERTS": (published("bnb-qwen3-moe"), {}),
    "N_ENGINE_BITSANDBYTES_PACKAGE": (published("bnb-llm-int8"), {}),
    "E_ENGINE_SPARSE": (
        only_config(
            quant_method="compressed-tensors", sparsity_config={"format": "sparse-24-bitmask"}
        ),
        {},
    ),
    "E_ENGINE_DEPRECATED": (of(Fp8(quant_method="fbgemm_fp8")), {}),
    "E_ENGINE_FBGEMM_KEYS": (of(Fp8(quant_method="fbgemm_fp8")), {}),
    "E_ENGINE_FBGEMM_EXPERTS": (of(Fp8(quant_method="fbgemm_fp8"), shapes=EXPERTS), {}),
    "N_ENGINE_PACKAGE_OF_METHOD": (of(Fp8(quant_method="fbgemm_fp8")), {}),
    "transformers E_ENGINE_METHOD_GPU": (of(Fp8(quant_method="fbgemm_fp8")), {"gpu": "a100"}),
    "E_ENGINE_SCALE_NAME": (of(Fp8(scale_name="scale")), {}),
    "E_ENGINE_FP8_EXPERTS": (of(ModelOpt("W4A16_NVFP4", quant_method="fp8")), {}),
    "E_ENGINE_QUARK_KEYS": (of(Fp8(quant_method="quark")), {}),
    "E_ENGINE_QUARK_SCHEME": (
        of(
            Fp8(
                quant_method="quark",
                global_quant_config={"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            )
        ),
        {},
    ),
    "E_ENGINE_MODELOPT_UNNAMED": (
        lambda folder: build(folder, without(ModelOpt("FP8"), "quant_method")),
        {},
    ),
    "E_ENGINE_GPTQ_KEYS": (lambda folder: build(folder, without(Gptq(), "desc_act")), {}),
    "E_ENGINE_GPTQ_TENSORS": (
        of(Awq(quant_method="gptq", checkpoint_format="gemm", sym=False)),
        {},
    ),
    "E_ENGINE_GPTQ_ORDER": (of(Gptq(desc_act=True)), {}),
    "E_ENGINE_GPTQ_BITS": (of(Gptq(sym=False)), {}),
    "E_ENGINE_GPTQ_GROUP": (of(Gptq(group=16)), {}),
    "E_ENGINE_AWQ_KEYS": (lambda folder: build(folder, without(Awq(), "zero_point")), {}),
    "W_ENGINE_AWQ_GROUP": (of(Awq(16)), {}),
    "E_ENGINE_AUTO_ROUND_NAME": (of(Gptq(quant_method="intel/auto-round")), {}),
    "E_ENGINE_PACKING": (of(Gptq(quant_method="auto-round", packing_format="auto_round:gptq")), {}),
    "N_ENGINE_AUTO_ROUND": (of(Gptq(quant_method="auto-round")), {}),
    "E_ENGINE_EMBEDDING": (
        of(packed(symmetric=False), shapes=MODEL | {"model.embed_tokens": (512, 256)}),
        {},
    ),
    "E_ENGINE_MODELOPT_ALGORITHM": (of(ModelOpt("MXFP4")), {}),
    "E_ENGINE_MODELOPT_LAYER": (of(mixed_precision("W4A16_AWQ")), {}),
    "E_ENGINE_MODELOPT_SIDECAR": (of(ModelOpt("MXFP8"), sidecar=True), {}),
    "E_ENGINE_SCHEME": (of(int8(inputs=None)), {}),
    "E_ENGINE_INT8_AS_FP8": (of(int8()), {}),
    "E_ENGINE_W4A8_CPU": (of(int8(4, group=128)), {}),
    "E_ENGINE_W4AFP8": (of(packed(inputs=TOKEN_FP8)), {"gpu": "b200"}),
    "E_ENGINE_PADDED": (of(packed(5, padded=True)), {}),
    "W_ENGINE_HUMMING": (of(packed(3)), {}),
    "E_ENGINE_BITS": (of(packed(3)), {}),
    "E_ENGINE_GROUP": (of(packed(group=16)), {}),
    "E_ENGINE_EXPERTS_INT8": (of(int8(), shapes=EXPERTS), {}),
    "W_ENGINE_STATIC_INT8": (of(int8(inputs={"strategy": "tensor", "dynamic": False})), {}),
    "E_ENGINE_TRANSFORMS": (of(packed(transform_config=transforms_at("q_attn"))), {}),
    "N_ENGINE_TRANSFORMS": (of(packed(transform_config=transforms_at("input"))), {}),
    "E_ENGINE_GPU": (of(packed()), {"gpu": "v100"}),
    "tensorrt-llm E_ENGINE_GPU": (of(fp8()), {"gpu": "l4"}),
    "W_ENGINE_WEIGHT_ONLY": (of(nvfp4()), {"gpu": "h100"}),
    "W_ENGINE_GPU_TOO_NEW": (of(ModelOpt("FP8_PER_CHANNEL_PER_TOKEN")), {"gpu": "b200"}),
    "tensorrt-llm N_ENGINE_DEQUANTIZED": (of(ModelOpt("W4A16_NVFP4")), {}),
    "N_ENGINE_DEQUANTIZED": (of(fp8()), {}),
    "E_ENGINE_GROUPS_CUT": (of(packed()), {"tensor_parallel": 8}),
    "tensorrt-llm E_ENGINE_GROUPS_CUT": (
        of(nvfp4(), shapes={"model.layers.0.mlp.down_proj": (256, 320)}),
        {"tensor_parallel": 8},
    ),
    "E_ENGINE_BLOCKS_CUT": (
        of(
            fp8("block", {"type": "float", "strategy": "group", "group_size": 128, "dynamic": True})
        ),
        {"tensor_parallel": 4},
    ),
    "E_ENGINE_BLOCK_SIZE": (of(ModelOpt("FP8_PB_WO")), {}),
    "N_ENGINE_PADDING": (of(packed(group=32)), {"tensor_parallel": 8}),
    "E_ENGINE_SHAPE": (of(packed(group=32)), {"tensor_parallel": 8}),
    "E_ENGINE_HEAD_BLOCKS": (
        of(fp8("block", targets=["Linear", "lm_head"], ignore=[]), shapes=MODEL | HEAD),
        {},
    ),
    "E_ENGINE_SKIPS": (of(Awq(modules_to_not_convert=["model.layers.0.mlp.gate"])), {}),
    "E_ENGINE_EXPERTS": (of(Gptq(), shapes=EXPERTS), {}),
    "E_ENGINE_EXPERTS_SCHEME": (of(nvfp4(), shapes=EXPERTS), {}),
    "E_ENGINE_EXPERTS_NAMES": (
        of(fp8(), shapes=EXPERTS, model={"model_type": "granitemoe"}),
        {"version": "0.25.1"},
    ),
    "E_ENGINE_INITIALIZES": (of(packed(), model={"model_type": "falcon"}), {}),
    "E_ENGINE_OWN_LINEARS": (of(Gptq(), model={"model_type": "falcon"}), {}),
    "E_ENGINE_DENSE_EXPERTS": (experts_in_16_bits, {}),
    "E_ENGINE_EXPERTS_ONE_BY_ONE": (of(fp8(), shapes=EXPERTS, model={"model_type": "gpt_oss"}), {}),
    "W_ENGINE_EXPERT_STACK": (published("mistral-small-4-fp8"), {}),
    "E_ENGINE_EXPERT_STACK": (published("nvidia-llama-4-nvfp4"), {}),
    "W_ENGINE_EXPERT_SCALES": (published("mistral-small-4-fp8"), {}),
    "N_ENGINE_EXPERTS_INPUTS": (of(fp8(), shapes=EXPERTS), {}),
    "W_ENGINE_CPU_GROUP": (of(Gptq(group=256, group_size=-1)), {}),
    "E_ENGINE_EXPERTS_NO_GROUP": (
        of(
            packed(config_groups={}, kv_cache_scheme=FP8_CACHE),
            shapes=EXPERTS,
            but=["experts"],
        ),
        {},
    ),
    "E_ENGINE_EXPERTS_PACKED": (of(packed(), shapes=EXPERTS), {"version": "5.12.0"}),
    "E_ENGINE_EXPERTS_FP8": (of(fp8(), shapes=EXPERTS), {"version": "5.14.0"}),
    "tensorrt-llm E_ENGINE_SKIPS": (of(ModelOpt("FP8", ignore=["*mlp*"])), {}),
    "E_ENGINE_EXPECTS": (of(packed(), but=["down_proj"]), {}),
    "transformers E_ENGINE_EXPECTS": (of(Awq(), but=["down_proj"]), {}),
    "tensorrt-llm E_ENGINE_EXPECTS": (of(ModelOpt("FP8"), but=["down_proj"]), {}),
    "W_ENGINE_MAY_EXPECT": (
        of(packed(), tensors=plain("model.layers.0.memory_proj", (256, 256))),
        {},
    ),
    "tensorrt-llm W_ENGINE_MAY_EXPECT": (
        of(ModelOpt("FP8"), tensors=plain("model.layers.0.memory_proj", (256, 256))),
        {},
    ),
    "E_ENGINE_OTHER_WEIGHTS": (
        of(Gptq(dynamic={r".*\.q_proj": {"bits": 8}}), others={"q_proj": Gptq(8)}),
        {},
    ),
    "E_ENGINE_CACHE": (of(packed(kv_cache_scheme=INT8_CACHE)), {}),
    "W_ENGINE_CACHE_IGNORED": (of(ModelOpt("FP8", kv_cache_scheme="INT8")), {}),
    "N_ENGINE_CACHE_SCALES": (of(packed(kv_cache_scheme=FP8_CACHE)), {}),
    "N_ENGINE_PACKAGE": (of(Gptq()), {}),
    "vllm N_ENGINE_PACKAGE": (only_config(quant_method="torchao"), {}),
    "E_ENGINE_RAW_CODES": (of(ModelOpt("FP8")), {}),
    "E_ENGINE_RAW_SHAPE": (of(ModelOpt("W4A16_AWQ")), {}),
    "E_ENGINE_SHARD_LEFT_OUT": (of(packed(), but=["v_proj"]), {}),
    "E_ENGINE_SHARD_SCHEMES": (of(Gptq(), others={"v_proj": Gptq(8)}), {}),
    "E_ENGINE_EXPERT_SCHEMES": (of(Gptq(), shapes=EXPERTS, others={"experts.1": Gptq(8)}), {}),
    "E_ENGINE_SHARD_ORDERS": (of(Gptq(desc_act=True, order=ORDERED)), {}),
    "N_ENGINE_SHARD_SCALES": (of(ModelOpt("FP8", scale=SCALED)), {}),
    "W_ENGINE_SHARD_GLOBAL_SCALES": (of(nvfp4(SCALED)), {}),
    "E_ENGINE_INVERSE_SCALES": (of(Fp8(weight_scale_semantics="inverse")), {}),
    "E_ENGINE_FP8_KEYS": (lambda folder: build(folder, without(Fp8(), "activation_scheme")), {}),
    "E_ENGINE_FP8_AS_BLOCKS": (of(Fp8()), {}),
    "E_ENGINE_HEADS": (of(packed()), {"tensor_parallel": 3}),
    "E_ENGINE_CACHE_HEADS": (
        of(packed(), model={"num_key_value_heads": 4}),
        {"tensor_parallel": 3},
    ),
    "E_ENGINE_UNEVEN": (of(packed()), {"tensor_parallel": 3}),
    "E_ENGINE_TIED_HEAD": (
        of(
            packed(targets=["Linear", "lm_head"], ignore=[]),
            shapes=MODEL | HEAD,
            model={"tie_word_embeddings": True},
        ),
        {},
    ),
}


def without(format, key):
    format.config = {name: value for name, value in format.config.items() if name != key}
    return format


def with_weights(format, **keys):
    """``format`` with more keys in the arguments of its weights."""
    group = format.config["config_groups"]["g"]
    format.config = format.config | {
        "config_groups": {"g": group | {"weights": group["weights"] | keys}}
    }
    return format


FIRES["E_ENGINE_CONFIG_KEYS"] = (of(with_weights(packed(), new_key=1)), {})
FIRES["E_ENGINE_ORDER"] = (of(with_weights(packed(), actorder="group")), {})
FIRES["N_ENGINE_ORDER_WITHOUT_GROUPS"] = (of(with_weights(int8(), actorder="static")), {})
two_groups = fp8()
two_groups.config["config_groups"]["h"] = packed(targets=["re:.*nothing"]).config["config_groups"][
    "g"
]
FIRES["E_ENGINE_CLASS_TARGETS"] = (of(two_groups), {})

"""The names of the samples that `samples.py` makes, and the scheme that each one holds."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CT_FLOAT = (
    "FP8",
    "FP8_BLOCK",
    "FP8_DYNAMIC",
    "MXFP4",
    "MXFP4A16",
    "MXFP8",
    "MXFP8A16",
    "NVFP4",
    "NVFP4A16",
)
CT_INT = (
    "W2A16",
    "W3A16",
    "W4A16",
    "W5A16",
    "W6A16",
    "W7A16",
    "W8A16",
    "W4A16_ASYM",
    "W4A8",
    "W4AFP8",
    "W8A8",
)
SCHEMES = {
    **{f"ct/{name}": name for name in (*CT_FLOAT, *CT_INT)},
    "ct/W5A16_ASYM": "int5 channel asym",
    "ct/W8A8_STATIC_ASYM": "int8 channel, activations int8 tensor static",
    "ct/fp8_weight_only": "FP8_W8A16",
    "ct/kv_fp8": "FP8_DYNAMIC",
    "gptq/rtn4": "W4A16",
    "gptq/rtn_gemm": "W4A16",
    "gptq/gptq3": "W3A16",
    "gptq/asym_v1": "int4 g32 asym",
    "gptq/asym_v2": "int4 g32 asym",
    "gptq/channel2": "int2 channel",
    "gptq/desc_act": "int4 g64",
    "modelopt/FP8": "FP8",
    "modelopt/FP8_KV": "FP8",
    "modelopt/FP8_PC_PT": "FP8_DYNAMIC",
    "modelopt/FP8_PB_WO": "FP8_BLOCK_W8A16",
    "modelopt/INT8": "W8A8_STATIC",
    "modelopt/INT8_SQ": "W8A8_STATIC",
    "modelopt/INT8_WO": "W8A16_CHANNEL",
    "modelopt/INT4": "W4A16",
    "modelopt/INT4_AWQ": "W4A16",
    "modelopt/W4A8_AWQ": "W4AFP8_STATIC",
    "modelopt/NVFP4": "NVFP4",
    "modelopt/W4A16_NVFP4": "NVFP4A16",
    "modelopt/W4A8_NVFP4_FP8": "NVFP4AFP8",
    "modelopt/MXFP8": "MXFP8",
    "modelopt/MXFP4": "MXFP4",
    "modelopt/W4A8_MXFP4_FP8": "MXFP4AFP8",
}
MIXED = {
    "ct/mixed": dict.fromkeys(PROJECTIONS[:4], "FP8_DYNAMIC")
    | dict.fromkeys(PROJECTIONS[4:6], "W4A16"),
    "gptq/dynamic": dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "W4A16")
    | {"down_proj": "int8 g64"},
    "modelopt/MIXED": dict.fromkeys(PROJECTIONS[:4], "FP8")
    | dict.fromkeys(PROJECTIONS[4:6], "NVFP4"),
}
ALL = [*SCHEMES, *MIXED]

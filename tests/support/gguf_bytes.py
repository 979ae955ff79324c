"""GGUF files written byte by byte, so that a test can say anything in them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STRING, ARRAY, U16, U32, F32, F64 = 8, 9, 2, 4, 6, 12


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def u16(value: int) -> bytes:
    return struct.pack("<IH", U16, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", F32, value)


def f64(value: float) -> bytes:
    return struct.pack("<Id", F64, value)


def string(value: str | bytes) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + data


METADATA: Mapping[str, bytes] = {
    "general.architecture": string("llama"),
    "llama.block_count": u32(1),
    "llama.context_length": u32(64),
    "llama.embedding_length": u32(32),
    "llama.feed_forward_length": u32(32),
    "llama.attention.head_count": u32(2),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# name, dims (the fastest first), type, offset
Entry = tuple[str, Sequence[int], int, int]


def entries(*, matrix: int = 1, size: int = 2) -> list[Entry]:
    """The tensors of a Llama of one layer and 32 tokens, matrices of the type ``matrix`` with
    ``size`` bytes a weight.
    """
    found: list[Entry] = []
    end = 0
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (32, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in MATRICES}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        kind = matrix if len(shape) == 2 else 0
        found.append((f"{name}.weight", shape, kind, end))
        end += (size if kind else 4) * (32 ** len(shape))
    return found


@dataclass
class Gguf:
    """A file that is right until a test changes it."""

    metadata: dict[str, bytes] = field(default_factory=lambda: dict(METADATA))
    tensors: list[Entry] = field(default_factory=entries)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    keys: bytes = b""
    """More metadata, as they are."""
    data_bytes: int = 2 * 32 * 32 * 8 + 4 * 32 * 3
    alignment: int = 32
    cut: int | None = None

    def write(self, path: Path) -> Path:
        count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.metadata) if self.key_count is None else self.key_count
        data = self.magic + struct.pack("<IQQ", self.version, count, keys)
        data += b"".join(text(key) + value for key, value in self.metadata.items()) + self.keys
        for name, dims, kind, offset in self.tensors:
            data += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        data += bytes(-len(data) % self.alignment) + bytes(self.data_bytes)
        path.write_bytes(data[: self.cut])
        return path


Change = Callable[[Gguf], object]


def key(name: str, value: bytes) -> Change:
    return lambda file: file.metadata.update({name: value})


def tensor(number: int, **changes: object) -> Change:
    names = ("name", "dims", "kind", "offset")

    def change(file: Gguf) -> None:
        values = dict(zip(names, file.tensors[number], strict=True)) | changes
        file.tensors[number] = tuple(values[name] for name in names)  # type: ignore[assignment]

    return change


def fields(**changes: object) -> Change:
    return lambda file: file.__dict__.update(changes)


def architecture(name: str, **more: bytes) -> Change:
    """Call the model ``name``, with ``more`` keys of that architecture."""

    def change(file: Gguf) -> None:
        metadata = {key.replace("llama.", f"{name}."): value for key, value in METADATA.items()}
        metadata["general.architecture"] = string(name)
        file.metadata = metadata | {f"{name}.{key}": value for key, value in more.items()}

    return change


def experts(*dims: int) -> Change:
    """Make the model a Qwen3 MoE whose only MLP is a stack of experts of F32."""

    def change(file: Gguf) -> None:
        architecture("qwen3moe", expert_count=u32(4), expert_used_count=u32(2))(file)
        data_bytes = 4 * math.prod(dims)
        file.tensors = [("blk.0.ffn_gate_exps.weight", dims, 0, 0)]
        embeddings = ("token_embd.weight", (32, 32), 1, -(-data_bytes // 32) * 32)
        file.tensors.append(embeddings)
        file.data_bytes = embeddings[3] + 2 * 32 * 32

    return change


def tokenizer(**changes: bytes) -> Change:
    """Give the model a tokenizer, with ``changes`` of its keys."""
    right = {
        "model": string("gpt2"),
        "tokens": array(STRING, 32, b"".join(text(f"t{number}") for number in range(32))),
        "merges": array(STRING, 0, b""),
    }
    values = right | changes
    return lambda file: file.metadata.update(
        {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    )


HUGE = 1 << 63
DAMAGE: Mapping[str, tuple[Change, str]] = {
    "magic": (fields(magic=b"GGML"), "E_NOT_GGUF"),
    "version 1": (fields(version=1), "E_GGUF_VERSION"),
    "big-endian": (fields(version=3 << 24), "E_GGUF_VERSION"),
    "2^63 tensors": (fields(tensor_count=HUGE), "E_GGUF_COUNT"),
    "2^63 keys": (fields(key_count=HUGE), "E_GGUF_COUNT"),
    "no tensors": (fields(tensor_count=0, tensors=[], data_bytes=0), "E_NO_TENSORS"),
    "more tensors than there are": (fields(tensor_count=12), "E_"),
    "a string of a gigabyte": (
        key("general.name", struct.pack("<I", STRING) + text("x", 1 << 30)),
        "E_GGUF_STRING",
    ),
    "a string of 2^63 bytes": (
        key("general.name", struct.pack("<I", STRING) + text("x", HUGE)),
        "E_GGUF_STRING",
    ),
    "a string that ends after the file": (
        key("general.name", struct.pack("<I", STRING) + text("x", 1 << 20)),
        "E_TRUNCATED",
    ),
    "not UTF-8": (key("general.name", string(b"\xff\xfe")), "E_GGUF_STRING"),
    "an array of 2^63 numbers": (key("general.x", array(U32, HUGE, b"")), "E_GGUF_COUNT"),
    "an array of 2^63 strings": (key("general.x", array(STRING, HUGE, b"")), "E_GGUF_COUNT"),
    "an array of many strings": (key("general.x", array(STRING, 1_000_000, b"")), "E_"),
    "an entry of a gigabyte": (
        key("general.x", array(STRING, 1, text("x", 1 << 30))),
        "E_GGUF_STRING",
    ),
    "an entry that is not UTF-8": (
        key("general.x", array(STRING, 1, text(b"\xff"))),
        "E_GGUF_STRING",
    ),
    "arrays in arrays": (
        key("general.x", array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 100)),
        "E_GGUF_VALUE",
    ),
    "an unknown type of values": (key("general.x", struct.pack("<I", 77)), "E_GGUF_VALUE"),
    "a boolean of 2": (key("general.x", struct.pack("<IB", 7, 2)), "E_GGUF_VALUE"),
    "a key twice": (
        fields(keys=text("general.architecture") + string("llama"), key_count=8),
        "E_GGUF_KEY",
    ),
    "a key without a name": (key("", u32(1)), "E_GGUF_NAME"),
    "a long key": (key("x" * 2000, u32(1)), "E_GGUF_STRING"),
    "a tensor twice": (tensor(1, name="token_embd.weight"), "E_DUPLICATE"),
    "a name that cannot be printed": (tensor(0, name="token\x1b[2J"), "E_GGUF_NAME"),
    "no dimensions": (tensor(0, dims=()), "E_GGUF_SHAPE"),
    "five dimensions": (tensor(0, dims=(2, 2, 2, 2, 64)), "E_GGUF_SHAPE"),
    "a dimension of 0": (tensor(0, dims=(32, 0)), "E_GGUF_SHAPE"),
    "2^63 columns": (tensor(0, dims=(HUGE, 32)), "E_GGUF_SHAPE"),
    "2^64 numbers": (tensor(0, dims=(1 << 32, 1 << 32)), "E_GGUF_SHAPE"),
    "part of a block": (tensor(1, dims=(33,), kind=8), "E_GGUF_SHAPE"),
    "an unknown type": (tensor(0, kind=99), "E_GGUF_TYPE"),
    "a type that is not read": (tensor(0, kind=23), "E_GGUF_TYPE"),
    "an offset outside": (tensor(3, offset=1 << 40), "E_TRUNCATED"),
    "an offset of 2^63": (tensor(3, offset=HUGE), "E_GGUF_SHAPE"),
    "an offset before another's end": (tensor(1, offset=0), "E_OVERLAP"),
    "a hole": (tensor(10, offset=2 * 32 * 32 * 8 + 4 * 32 * 2 + 32), "E_"),
    "the data cut off": (fields(data_bytes=100), "E_TRUNCATED"),
    "bytes behind the last tensor": (fields(data_bytes=1 << 20), "E_TRAILING_BYTES"),
    "alignment 0": (key("general.alignment", u32(0)), "E_GGUF_ALIGNMENT"),
    "alignment 24": (key("general.alignment", u32(24)), "E_GGUF_ALIGNMENT"),
    "alignment 2^31": (key("general.alignment", u32(1 << 31)), "E_GGUF_ALIGNMENT"),
    "alignment of text": (key("general.alignment", string("32")), "E_GGUF_ALIGNMENT"),
    "no architecture": (lambda file: file.metadata.pop("general.architecture"), "E_GGUF_ARCH"),
    "an unknown architecture": (key("general.architecture", string("rwkv7")), "E_GGUF_ARCH"),
    "an unknown key": (key("llama.attention.clamp_kqv", f32(8.0)), "E_GGUF_KEY"),
    "no layers": (lambda file: file.metadata.pop("llama.block_count"), "E_GGUF_KEY"),
    "layers as text": (key("llama.block_count", string("1")), "E_GGUF_KEY"),
    "heads that do not fit": (key("llama.attention.head_count", u32(3)), "E_"),
    "more layers than there are": (key("llama.block_count", u32(2)), "E_LAYER_MISSING"),
    "an infinite epsilon": (
        key("llama.attention.layer_norm_rms_epsilon", f32(float("inf"))),
        "E_GGUF_KEY",
    ),
    "an unknown tensor": (tensor(2, name="blk.0.attn_x.weight"), "E_GGUF_TENSOR"),
    "quantized norms": (tensor(1, kind=8, dims=(32,)), "E_"),
    "frequencies of its own": (tensor(1, name="rope_freqs.weight"), "E_GGUF_ROPE"),
    "part of a split model": (key("split.count", u16(3)), "E_GGUF_SPLIT"),
    "experts that are not there": (key("llama.expert_count", u32(8)), "E_GGUF_TENSOR"),
    "a tokenizer of another kind": (key("tokenizer.ggml.model", string("rwkv")), "E_GGUF_TOK"),
    "a temperature of text": (key("general.sampling.temp", string("0.5")), "E_GGUF_KEY"),
    "a temperature of NaN": (key("general.sampling.temp", f32(math.nan)), "E_GGUF_KEY"),
    "a top_k that is not whole": (key("general.sampling.top_k", f32(1.5)), "E_GGUF_KEY"),
    "no heads of keys": (key("llama.attention.head_count_kv", u32(0)), "E_GGUF_KEY"),
    "an epsilon of f64": (key("llama.attention.layer_norm_rms_epsilon", f64(1e300)), "E_GGUF_KEY"),
    "layers that would be listed": (
        architecture("gemma3", block_count=u32((1 << 31) - 1)),
        "E_GGUF_KEY",
    ),
    "experts in one row": (experts(1024), "E_GGUF_SHAPE"),
    "an expert for each number": (experts(1, 1, 600_000), "E_GGUF_SHAPE"),
    "types of tokens that are NaN": (
        tokenizer(token_type=array(F32, 32, struct.pack("<f", math.nan) * 32)),
        "E_GGUF_TOK",
    ),
    "a pre-tokenizer that is an array": (tokenizer(pre=array(U32, 1, bytes(4))), "E_GGUF_TOK"),
    "an end token that is an array": (
        tokenizer(eom_token_id=array(U32, 1, bytes(4))),
        "E_GGUF_TOK",
    ),
    "an end token beyond the others": (tokenizer(eot_token_id=u32(HUGE >> 32)), "E_GGUF_TOK"),
    "an unknown key of the tokenizer": (
        key("tokenizer.ggml.precompiled_charsmap", string("x")),
        "E_GGUF_TOK",
    ),
    "a chat template that leads away": (
        key("tokenizer.chat_template.../../x", string("x")),
        "E_GGUF_TOK",
    ),
}

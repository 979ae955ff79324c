"""llama.cpp itself, through xllamacpp: what it makes of a GGUF file. Run as a program, it prints
the log probability of each token after those before it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

PRINTABLE = 300  # a token of the example's tokenizer; what is drawn has no part in the numbers


def log_probabilities(path: Path, tokens: Sequence[int]) -> list[float]:
    """Return the log probability that llama.cpp gives each of ``tokens`` but the first."""
    values: list[float] = _asked("probabilities", path, list(tokens))
    return values


def texts_cut_otherwise(path: Path, texts: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the ``texts`` for which llama.cpp's model answers otherwise than for their tokens:
    its tokenizer makes others of them.
    """
    values: list[str] = _asked("texts", path, {text: list(ids) for text, ids in texts.items()})
    return values


def quantized(rows: np.ndarray[Any, Any], type: str) -> np.ndarray[Any, Any]:
    """Return ``rows`` [..., K], f32, as llama.cpp's quantizer rounds them to ``type``, uint8."""
    import xllamacpp.xllamacpp

    size, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    rows = np.ascontiguousarray(rows, np.float32)
    columns = rows.shape[-1]
    blocks = np.empty((*rows.shape[:-1], columns // size * size_bytes), np.uint8)
    quantize = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]
    count = rows.size // columns
    kind = int(GGMLQuantizationType[type])
    written = quantize(kind, rows.ctypes.data, blocks.ctypes.data, 0, count, columns, None)
    assert written == blocks.nbytes
    return blocks


def _asked(what: str, path: Path, value: object) -> Any:
    command = [sys.executable, __file__, what, str(path), json.dumps(value)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def _serve(path: str) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1  # threads that spin wait long on a busy machine
    parameters.warmup = False
    return xllamacpp.Server(parameters)


def _next_token(server: Any, prompt: str | list[int]) -> dict[int, float]:
    """Return the log probability of each token after ``prompt``."""
    request = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": 1 << 20,
        "temperature": -1,
        "cache_prompt": True,
        # an answer without text has no probabilities: end of text, or a part of a character
        "logit_bias": [[PRINTABLE, 1000]],
    }
    answer = server.handle_completions(request)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in token["top_logprobs"]}


def _log_probabilities(server: Any, tokens: list[int]) -> list[float]:
    counts = range(1, len(tokens))
    return [_next_token(server, tokens[:count])[tokens[count]] for count in counts]


def _texts_cut_otherwise(server: Any, texts: dict[str, list[int]]) -> list[str]:
    found = []
    for text, tokens in texts.items():
        by_tokens, by_text = _next_token(server, tokens), _next_token(server, text)
        if max(abs(by_tokens[each] - by_text[each]) for each in by_tokens) > 1e-3:
            found.append(text)
    return found


if __name__ == "__main__":
    answer = {"probabilities": _log_probabilities, "texts": _texts_cut_otherwise}[sys.argv[1]]
    print(json.dumps(answer(_serve(sys.argv[2]), json.loads(sys.argv[3]))))

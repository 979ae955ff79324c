"""What the three bare scripts share: their command line, and the tokens of a calibration file."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any


def arguments(description: str, methods: list[str]) -> argparse.Namespace:
    """Return the parsed command line ``MODEL CALIBRATION OUT --method NAME [options]``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument(
        "calibration", type=Path, help='file with {"text": ...} or {"input_ids": [...]} a line'
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args()


def calibration_tokens(
    path: Path, tokenizer: Any, num_samples: int, seq_len: int
) -> list[list[int]]:
    """Return the token ids of ``num_samples`` records, drawn with seed 0, each cut to ``seq_len``
    tokens.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    random.Random(0).shuffle(records)
    ids = [
        record.get("input_ids") or tokenizer(record["text"])["input_ids"]
        for record in records[:num_samples]
    ]
    return [row[:seq_len] for row in ids]

"""Write a Llama checkpoint of a real model's shape with random weights, and random calibration
tokens beside it.

Time and memory depend on the shape alone, so this stands for a model of 8 billion parameters cut to
a few layers. The tokenizer is a small one's, copied: its ids are all below the vocabulary's size.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def write_model(out: Path, config: LlamaConfig, tokenizer: Path) -> None:
    """Write the checkpoint: bf16, weights drawn from a normal distribution as in training from
    scratch, sharded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="2GB")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)


def write_calibration(path: Path, *, records: int, tokens: int, vocab: int, seed: int) -> None:
    """Write ``records`` lines ``{"input_ids": [...]}`` of ``tokens`` random ids each."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"input_ids": [draw.randrange(vocab) for _ in range(tokens)]}) + "\n"
            for _ in range(records)
        )


def main() -> None:
    """Write OUT and ``random_calibration.jsonl`` beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("examples/tiny-python-llama"),
        help="folder whose tokenizer files are copied",
    )
    parser.add_argument("--records", type=int, default=64, help="calibration records")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a record")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    write_model(args.out, config, args.tokenizer)
    write_calibration(
        args.out.parent / "random_calibration.jsonl",
        records=args.records,
        tokens=args.tokens,
        vocab=args.vocab,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()

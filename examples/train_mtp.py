"""Train a layer for multi-token prediction (MTP) for a DeepSeek-V3 that has none, and write both as
one checkpoint, as DeepSeek publishes its own: `--speculative-algorithm NEXTN` then drafts with it.

python examples/train_mtp.py MODEL DATA OUT    # MODEL: a folder with one file of weights

The model stays as it is: its hidden states are the input, its embeddings and its head are shared.
DATA is a token file as ``tiny-python-llama/corpus.py`` writes them, uint16 in a ``.npy``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

TOKENS = 256  # a row
DEPTH = 2  # times that the layer is applied, from the second on to its own output
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 20
REPORT_EVERY = 50
EXPERTS = "mlp.experts."


class MtpLayer(nn.Module):
    """A decoder layer behind two norms and a projection, begun as a copy of the model's last."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        super().__init__()
        decoder = model.model
        size = model.config.hidden_size
        self.block = copy.deepcopy(decoder.layers[-1])
        self.enorm, self.hnorm, self.norm = (copy.deepcopy(decoder.norm) for _ in range(3))
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        nn.init.normal_(self.eh_proj.weight, std=0.02)
        self.requires_grad_(True)

    def forward(self, embeddings: Tensor, hidden: Tensor, mask: Tensor, angles: Any) -> Tensor:
        """Return the hidden states [B, T, H] before the head.

        Args:
            embeddings: of the token after each position, [B, T, H].
            hidden: of each position, [B, T, H].
            mask: which positions each one sees, bool [1, 1, T, T].
            angles: of the rotary embeddings.
        """
        x = self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(hidden)], dim=-1))
        return self.norm(self.block(x, attention_mask=mask, position_embeddings=angles))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights in bfloat16, by the names under which DeepSeek publishes them."""
        named = {
            "enorm.weight": self.enorm.weight,
            "hnorm.weight": self.hnorm.weight,
            "eh_proj.weight": self.eh_proj.weight,
            "shared_head.norm.weight": self.norm.weight,
        }
        for name, tensor in self.block.state_dict().items():
            if name == f"{EXPERTS}gate_up_proj":
                for number, both in enumerate(tensor):
                    gate, up = both.chunk(2)
                    named[f"{EXPERTS}{number}.gate_proj.weight"] = gate
                    named[f"{EXPERTS}{number}.up_proj.weight"] = up
            elif name == f"{EXPERTS}down_proj":
                for number, down in enumerate(tensor):
                    named[f"{EXPERTS}{number}.down_proj.weight"] = down
            else:
                named[name] = tensor
        return {
            f"{prefix}.{name}": tensor.detach().to(torch.bfloat16).contiguous().clone()
            for name, tensor in named.items()
        }


def train(model: DeepseekV3ForCausalLM, tokens: Tensor, *, steps: int, rows: int) -> MtpLayer:
    """Return the layer, trained for ``steps`` steps on random rows of ``tokens``."""
    layer = MtpLayer(model)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    positions = torch.arange(TOKENS)[None]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    offsets = torch.arange(TOKENS + 2)
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / WARM_UP_STEPS)
            group["lr"] = PEAK_LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        first = torch.randint(len(tokens) - TOKENS - 2, (rows,))
        batch = tokens[first[:, None] + offsets].long()
        with torch.no_grad():
            hidden = model.model(batch[:, :TOKENS], use_cache=False).last_hidden_state
            embeddings = model.model.embed_tokens(batch[:, 1 : TOKENS + 1])
            angles = model.model.rotary_emb(hidden, position_ids=positions)
        labels = batch[:, 2:].reshape(-1)
        losses = []
        for _ in range(DEPTH):
            hidden = layer(embeddings, hidden, mask, angles)
            logits = model.lm_head(hidden).flatten(0, 1)
            losses.append(nn.functional.cross_entropy(logits, labels))
            hidden = hidden.roll(1, dims=1)
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % REPORT_EVERY == 0 or step == steps - 1:
            shown = ", ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {step}: losses {shown}, {time.monotonic() - began:.0f} s", flush=True)
    return layer


def main() -> None:
    """Read MODEL and DATA, train, and write the checkpoint to OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder of one file")
    parser.add_argument("data", type=Path, help="token file")
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="of 256 tokens, a step")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.requires_grad_(False)
    tokens = torch.from_numpy(np.load(args.data).astype(np.int32))
    layer = train(model, tokens, steps=args.steps, rows=args.rows)
    shutil.copytree(args.model, args.out, copy_function=shutil.copyfile)
    args.out.chmod(0o755)
    weights = load_file(args.model / "model.safetensors")
    added = layer.tensors(f"model.layers.{model.config.num_hidden_layers}")
    save_file({**weights, **added}, args.out / "model.safetensors", {"format": "pt"})
    config = json.loads((args.out / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()

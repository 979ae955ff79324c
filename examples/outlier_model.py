"""Make a model with outlier channels from one without: the same function in other numbers.

    python examples/outlier_model.py OUTPUT [--model examples/tiny-python-llama]

Large language models have a few channels whose activations are many times larger than all others:
the same channels in every layer and for every token. Dettmers et al. 2022 (arXiv:2208.07339) found
6 of them in models from 6.7 B parameters on, about 20 times as large as the rest; Xiao et al. 2022
(arXiv:2211.10438) saw factors of 100. They are why activations are hard to round, and why
SmoothQuant and AWQ exist. The tiny model is too small to have grown them.

This script gives it some. In every layer it multiplies the weights of both norms by 32 in three
channels, and divides the columns of the linear layers that read those channels by the same: q, k, v
and gate, up. A power of two moves only exponents, so in bfloat16 each product is what it was, and
the logits are equal bit by bit, which is checked. What changes is what a quantizer sees: large
inputs, and small weights for them beside others that share their scale.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TINY = Path(__file__).parent / "tiny-python-llama"
# Of the 256 of the hidden state: two of those that are largest after the norms as it is, by a
# fifth, and a neighbour. They lie in one group of 16, or NVFP4 would lose many of so few groups.
CHANNELS = torch.tensor([184, 185, 190])
FACTOR = 32
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
NORM = re.compile(r"(?P<layer>.*\.layers\.\d+)\.(?P<norm>\w+)\.weight")
COPIED = ("*.json", "*.jinja", "*.jsonl")
PROMPT_TOKENS = 256


def main() -> None:
    """Write the model and compare it with the one it was made from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--model", type=Path, default=TINY, help="a Llama in one file")
    arguments = parser.parse_args()
    make_outlier_model(arguments.model, arguments.output)
    if not is_same_function(arguments.model, arguments.output):
        raise SystemExit(f"{arguments.output} does not compute what {arguments.model} does")
    print(f"{arguments.output}: the logits equal those of {arguments.model}")


def make_outlier_model(model: Path, output: Path) -> None:
    """Write to ``output`` a copy of ``model`` with `CHANNELS` made large."""
    output.mkdir(parents=True)
    for pattern in COPIED:
        for file in sorted(model.glob(pattern)):
            shutil.copyfile(file, output / file.name)
    with safe_open(model / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, norm in tensors.items():
        found = NORM.fullmatch(name)
        if not found:
            continue
        norm[CHANNELS] *= FACTOR
        for reader in READERS[found["norm"]]:
            tensors[f"{found['layer']}.{reader}.weight"][:, CHANNELS] /= FACTOR
    save_file(tensors, output / "model.safetensors", metadata)


@torch.inference_mode()
def is_same_function(model: Path, other: Path) -> bool:
    """Whether both models have the same logits for the beginning of the held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (model / "evaluation.jsonl").read_text().splitlines()[0]
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")["input_ids"]
    one, two = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto")(ids[:, :PROMPT_TOKENS]).logits
        for path in (model, other)
    )
    return torch.equal(one, two)


if __name__ == "__main__":
    main()

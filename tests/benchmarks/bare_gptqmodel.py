"""Quantize with GPTQModel alone, as its documentation shows."""

import os

from bare import arguments, calibration_tokens

METHODS = ["gptq_int4"]


def main() -> None:
    """Load, calibrate, quantize, save."""
    args = arguments(__doc__, METHODS)
    if args.device == "cpu":
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # the default fails on one or two cores
        # else it compiles a packer for half a minute
        os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

    from gptqmodel import GPTQConfig, GPTQModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = calibration_tokens(args.calibration, tokenizer, args.num_samples, args.seq_len)
    model = GPTQModel.load(
        args.model, GPTQConfig(bits=4, group_size=128, sym=True, device=args.device)
    )
    model.quantize(tokens, batch_size=1)
    model.save(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

"""Quantize with LLM Compressor alone, as its documentation shows."""

import os

from bare import arguments, calibration_tokens

METHODS = ["w4a16_gptq", "fp8_dynamic"]


def main() -> None:
    """Load, calibrate, quantize, save."""
    args = arguments(__doc__, METHODS)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it takes an accelerator whenever it sees one

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.method == "fp8_dynamic":
        oneshot(
            model=model,
            recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]),
        )
    else:
        tokens = calibration_tokens(args.calibration, tokenizer, args.num_samples, args.seq_len)
        oneshot(
            model=model,
            recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
            dataset=Dataset.from_dict({"input_ids": tokens}),
            num_calibration_samples=len(tokens),
            max_seq_length=args.seq_len,
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

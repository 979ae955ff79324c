"""Quantize with NVIDIA ModelOpt alone, as its documentation shows."""

import copy

from bare import arguments, calibration_tokens

METHODS = {
    "modelopt_fp8": "FP8_DEFAULT_CFG",
    "modelopt_fp4": "NVFP4_DEFAULT_CFG",
    "modelopt_int4_awq": "INT4_AWQ_CFG",
}


def main() -> None:
    """Load, calibrate, quantize, export."""
    args = arguments(__doc__, list(METHODS))

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = calibration_tokens(args.calibration, tokenizer, args.num_samples, args.seq_len)

    def calibrate(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for row in tokens:
                model(input_ids=torch.tensor([row], device=args.device), use_cache=False)

    model = mtq.quantize(model, copy.deepcopy(getattr(mtq, METHODS[args.method])), calibrate)
    export_hf_checkpoint(model, export_dir=args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

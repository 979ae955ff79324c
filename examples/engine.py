"""SGLang's offline example with the import changed: answer some prompts with a quantized model.

python examples/engine.py [MODEL]    # default: the tiny model here, quantized to FP8 while it loads
"""

import sys
from pathlib import Path

import qtool


def main() -> None:
    if len(sys.argv) > 1:
        llm = qtool.Engine(model_path=sys.argv[1])
    else:
        tiny = Path(__file__).parent / "tiny-python-llama"
        llm = qtool.Engine(model_path=tiny, quantization="fp8")
    prompts = ["def fibonacci(n):", "import os\n", "class Stack:\n    def __init__(self"]
    sampling_params = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 40}
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt!r}\nOutput: {output['text']!r}\n")
    llm.shutdown()


if __name__ == "__main__":
    main()

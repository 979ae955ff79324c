"""Let real clients do their ordinary work against a served small model: the table in docs/serve.md.

    python tests/benchmarks/clients.py [NAME ...] [--python VENV/bin/python] [--vllm VENV]
        [--node FOLDER] [--results FILE.json] [--write docs/serve.md]

VENV has the clients (pip install openai anthropic litellm langchain-openai instructor
'pydantic-ai-slim[openai]' 'smolagents[openai]' dspy llm inspect-ai guidellm aiperf, in one
environment or in several runs, for they ask for different versions of openai); --vllm has vLLM and
SGLang for their benchmarks; FOLDER has node_modules (npm i ai @ai-sdk/openai-compatible
@ai-sdk/openai @ai-sdk/anthropic). The model is the bundled one, rounded to W8A8: its answers make no
sense, and tools are called because they must be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.server import Server, start_server  # noqa: E402

HERE = Path(__file__).with_name("clients")
MODEL = ROOT / "examples" / "tiny-python-llama"
START, END = "<!-- table: tests/benchmarks/clients.py -->", "<!-- end -->"
TIMEOUT_S = 300
CONTEXT = 8192  # prompts of agents are long
SCRIPTS = {  # name -> the package whose version is shown
    "openai": "openai",
    "anthropic": "anthropic",
    "litellm": "litellm",
    "langchain": "langchain-openai",
    "instructor": "instructor",
    "pydantic_ai": "pydantic-ai-slim",
    "smolagents": "smolagents",
    "dspy": "dspy",
    "inspect_ai": "inspect-ai",
}
COMMANDS = {  # name -> package, what it does, its command
    "llm": ("llm", "a prompt, streamed", ["llm", "-m", "tiny", "def main():"]),
    "guidellm": (
        "guidellm",
        "benchmark, one request after another",
        [
            *("guidellm", "run", "--backend", "kind=openai_http,target={url},model=tiny"),
            *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
            *("--tokenizer", "kind=huggingface_auto,model={model}", "--disable-console"),
            *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        ],
    ),
    "aiperf": (
        "aiperf",
        "benchmark of streamed chats",
        [
            *("aiperf", "profile", "--model", "tiny", "--url", "{url}", "--endpoint-type", "chat"),
            *("--streaming", "--request-count", "8", "--concurrency", "2"),
            *("--tokenizer", "{model}", "--isl", "64", "--osl", "16", "--ui", "none"),
        ],
    ),
    "vllm bench serve": (
        "vllm",
        "benchmark of streamed chats",
        [
            *("vllm", "bench", "serve", "--backend", "openai-chat", "--base-url", "{url}"),
            *("--endpoint", "/v1/chat/completions", "--model", "tiny", "--tokenizer", "{model}"),
            *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"),
            *("--num-prompts", "8"),
        ],
    ),
    "sglang.bench_serving": (
        "sglang",
        "benchmark of /generate",
        [
            *("python", "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", "{url}"),
            *("--model", "tiny", "--tokenizer", "{model}", "--dataset-name", "random-ids"),
            *("--random-input-len", "64", "--random-output-len", "16", "--num-prompts", "8"),
        ],
    ),
}
LLM_MODEL = "- model_id: tiny\n  model_name: tiny\n  api_base: {url}/v1\n"


def main() -> None:
    """Try each client, print one line for it, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--results", type=Path, default=Path("clients.json"))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    results = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if arguments.write:
        write_table(arguments.write, results)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, served = shutil.copytree(MODEL, work / "model"), work / "tiny"
        config = json.loads((model / "config.json").read_text())
        config["max_position_embeddings"] = CONTEXT
        (model / "config.json").write_text(json.dumps(config))
        quantize = ["quantize", "--model-path", model, "--method", "w8a8_rtn", "--output", served]
        subprocess.run([sys.executable, "-m", "qtool.cli", *quantize], check=True, cwd=ROOT)
        server = start_server(work, served, "--served-model-name", "tiny")
        try:
            for name in arguments.names or [*SCRIPTS, *COMMANDS, "ai sdk"]:
                results[name] = try_client(name, server, work, arguments)
                print(f"{name}: {results[name]}", flush=True)
                arguments.results.write_text(json.dumps(results, indent=1))
        finally:
            server.end()


def try_client(
    name: str, server: Server, work: Path, arguments: argparse.Namespace
) -> dict[str, str]:
    """Return the version of a client, what it did, and ``ok`` or the end of what it said."""
    environment = {**os.environ, "SERVER": server.url, "OPENAI_API_KEY": "none"}
    environment |= {"PYTHONPATH": "", "LLM_USER_PATH": str(work)}
    (work / "extra-openai-models.yaml").write_text(LLM_MODEL.format(url=server.url))
    binaries = arguments.python.parent
    if name == "ai sdk":
        script = shutil.copy(HERE / "with_ai_sdk.mjs", arguments.node)
        command = ["node", str(script)]
        package = json.loads((arguments.node / "node_modules/ai/package.json").read_text())
        version, what = package["version"], first_line(HERE / "with_ai_sdk.mjs")
    elif name in SCRIPTS:
        script = HERE / f"with_{name}.py"
        command = [str(arguments.python), "-P", str(script)]
        version, what = version_of(arguments.python, SCRIPTS[name]), first_line(script)
    else:
        package, what, words = COMMANDS[name]
        if package in ("vllm", "sglang"):
            binaries = arguments.vllm / "bin"
        command = [word.format(url=server.url, model=server.model) for word in words]
        command[0] = str(binaries / command[0])
        version = version_of(binaries / "python", package)
    try:
        ended = subprocess.run(
            command, env=environment, cwd=work, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        said = (ended.stdout + ended.stderr).strip()[-400:]
        result = "ok" if ended.returncode == 0 and ended.stdout is not None else said
    except (OSError, subprocess.TimeoutExpired) as error:
        result = str(error)
    return {"version": version, "what": what, "result": result}


def first_line(script: Path) -> str:
    """Return what a script says that it does."""
    text = script.read_text().removeprefix('"""').removeprefix("// ").replace("\n// ", " ")
    return text.split(": ", 1)[1].split(".\n")[0].split('."""')[0].split(". ")[0]


def version_of(python: Path, package: str) -> str:
    """Return the version of a package in the environment of an interpreter."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() or "none"


def write_table(path: Path, results: dict[str, dict[str, str]]) -> None:
    """Put the table of results in a document."""
    lines = ["| client | version | what it does | |", "|---|---|---|---|"]
    for name in [*SCRIPTS, *COMMANDS, "ai sdk"]:
        found = results[name]
        lines.append(
            f"| {name.replace('_', '-')} | {found['version']} | {found['what']} | {found['result']} |"
        )
    text = path.read_text()
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    path.write_text("\n".join([f"{before}{START}", *lines, END]) + after)


if __name__ == "__main__":
    main()

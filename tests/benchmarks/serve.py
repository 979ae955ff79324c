"""A server under load: output tokens a second, time to first token and between tokens, for clients
that stream, one request after another.

    python tests/benchmarks/serve.py load --url http://127.0.0.1:30000 --clients 64 --requests 512
    --prompt 512 --tokens 256
    python tests/benchmarks/serve.py engine /tmp/8b/fp8-32 --clients 64 --requests 512 --prompt 512 --tokens 256    # the same, without HTTP
    python tests/benchmarks/serve.py write /tmp/8b/fp8-32 --kind fp8    # Llama-3.1-8B's shape, random weights, a tokenizer of 128 256 tokens

Clients are processes of their own (``--processes``), so that they do not slow one another. Any
OpenAI server can be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 2)]
VOCABULARY = 128256


@dataclass
class Timing:
    """What the clients of one process saw: seconds, and tokens as the server's usage counts
    them.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    events: int = 0
    failed: list[str] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    """When each event came, of the clock that all processes share."""


def random_prompt(draw: random.Random, size: int) -> list[int]:
    return [draw.randrange(300, VOCABULARY - 300) for _ in range(size)]


async def one_request(host: str, port: int, body: bytes, timing: Timing) -> None:
    """Send one streaming completion on a connection of its own, and time its events."""
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(body)}\r\n"
    )
    start = last = time.perf_counter()
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    status = await reader.readline()
    if b" 200 " not in status:
        timing.failed.append((status + await reader.read(2000)).decode(errors="replace")[:500])
        writer.close()
        return
    seen, ended = 0, False
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            ended = True
            break
        now = time.perf_counter()
        if b'"choices":[]' in line:
            timing.tokens += json.loads(line[6:])["usage"]["completion_tokens"]
            continue
        timing.first.append(now - start) if not seen else timing.between.append(now - last)
        timing.seen.append(now)
        seen, last = seen + 1, now
    timing.events += seen
    if not ended:
        timing.failed.append("a stream without an end")
    writer.close()


async def clients(url: str, model: str, count: int, bodies: list[bytes], timing: Timing) -> None:
    address = urlsplit(url)
    waiting = iter(bodies)

    async def client() -> None:
        for body in waiting:
            await one_request(str(address.hostname), int(address.port or 80), body, timing)

    await asyncio.gather(*(client() for _ in range(count)))


def process(
    url: str, model: str, count: int, bodies: list[bytes], start: object, results: object
) -> None:
    timing = Timing()
    start.wait()  # type: ignore[attr-defined]
    asyncio.run(clients(url, model, count, bodies, timing))
    results.put(timing)  # type: ignore[attr-defined]


def load(options: argparse.Namespace) -> None:
    draw = random.Random(options.seed)
    bodies = []
    for _ in range(options.requests):
        body = {
            "model": options.model,
            "prompt": random_prompt(draw, options.prompt),
            "max_tokens": options.tokens,
            "temperature": 0,
        }
        bodies.append(
            json.dumps(
                {
                    **body,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()
        )
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    count = min(options.processes, options.clients)
    workers = [
        context.Process(
            target=process,
            args=(
                options.url,
                options.model,
                options.clients // count,
                bodies[i::count],
                start,
                results,
            ),
        )
        for i in range(count)
    ]
    for worker in workers:
        worker.start()
    time.sleep(1)
    began = time.perf_counter()
    start.set()
    timings = [results.get() for _ in workers]
    took = time.perf_counter() - began
    tokens = sum(timing.tokens for timing in timings)
    failed = [text for timing in timings for text in timing.failed]
    found = {
        "clients": options.clients,
        "requests": options.requests,
        "output_tokens_s": round(tokens / took),
        "tokens_an_event": round(tokens / max(1, sum(timing.events for timing in timings)), 3),
        **spread("first_token_ms", [value for timing in timings for value in timing.first]),
        **spread("between_ms", [value for timing in timings for value in timing.between]),
        **longest_pause([value for timing in timings for value in timing.seen], began),
        "failed": len(failed),
    }
    print(f"RESULT {options.name} {json.dumps(found)}", flush=True)
    if failed:
        print(failed[0])


def longest_pause(seen: Sequence[float], began: float) -> dict[str, float]:
    """Return the longest time without an event of any client, and when it was."""
    ordered = [began, *sorted(seen)]
    pauses = ((now - last, last) for last, now in itertools.pairwise(ordered))
    pause, since = max(pauses, default=(0.0, began))
    return {"longest_pause_ms": round(pause * 1e3, 1), "which_began_s": round(since - began, 2)}


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {
        f"{name}_p{share}": round(
            ordered[min(len(ordered) - 1, len(ordered) * share // 100)] * 1e3, 2
        )
        for share in (50, 99)
    }


def engine(options: argparse.Namespace) -> None:
    from qtool.engine.engine import Engine

    with Engine(options.folder, max_running_requests=options.clients, context_length=4096) as one:
        draw = random.Random(options.seed)
        params = {"temperature": 0, "max_new_tokens": options.tokens, "ignore_eos": True}
        one.generate(
            input_ids=[random_prompt(draw, options.prompt) for _ in range(options.clients)],
            sampling_params=params,
        )
        prompts = [random_prompt(draw, options.prompt) for _ in range(options.requests)]
        for stream in (False, True):
            began = time.perf_counter()
            if stream:
                asyncio.run(streamed(one, prompts, params))
            else:
                one.generate(input_ids=prompts, sampling_params=params)
            took = time.perf_counter() - began
            print(
                f"RESULT engine {'streamed' if stream else 'whole'} "
                f"{options.requests * options.tokens / took:.0f} output tokens/s",
                flush=True,
            )


async def streamed(one: object, prompts: list[list[int]], params: dict[str, object]) -> None:
    async for _ in await one.async_generate(input_ids=prompts, sampling_params=params, stream=True):  # type: ignore[attr-defined]
        pass


def write(options: argparse.Namespace) -> None:
    from model_8b import write_checkpoint

    write_checkpoint(options.folder, options.kind)
    write_tokenizer(options.folder)


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of as many tokens as Llama 3's, whose merges join random shorter
    tokens: text comes out, though no words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    draw = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    # bytes above would make halves of characters
    letters = [letter for letter in tokens if letter.isascii()]
    known = set(tokens)
    merges: list[tuple[str, str]] = []
    while len(tokens) < VOCABULARY:
        left, right = draw.choice(letters), draw.choice(letters)
        joined = left + right
        if len(joined) <= 12 and joined not in known:
            known.add(joined)
            tokens.append(joined)
            letters.append(joined)
            merges.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192})
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    for name, value in (
        ("clients", 64),
        ("requests", 512),
        ("prompt", 512),
        ("tokens", 256),
        ("seed", 0),
    ):
        shared.add_argument(f"--{name}", type=int, default=value)
    one = commands.add_parser("load", parents=[shared])
    one.add_argument("--url", default="http://127.0.0.1:30000")
    one.add_argument("--model", default="default")
    one.add_argument("--name", default="server")
    one.add_argument("--processes", type=int, default=8)
    one.set_defaults(run=load)
    one = commands.add_parser("engine", parents=[shared])
    one.add_argument("folder", type=Path)
    one.set_defaults(run=engine)
    one = commands.add_parser("write")
    one.add_argument("folder", type=Path)
    one.add_argument("--kind", default="fp8")
    one.set_defaults(run=write)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

"""`qtool serve`: its options, and which of three things they ask for."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.options import Debug, Json, ModelPath, Quiet, Revision, Verbose
from qtool.cli.output import printable, show
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.serve.service import Service
    from qtool.serve.settings import Settings


def serve(
    context: typer.Context,
    model_path: ModelPath,
    tokenizer_path: Annotated[
        str | None,
        typer.Option(help="Where the tokenizer is, if not with the model.", show_default=False),
    ] = None,
    skip_tokenizer_init: Annotated[
        bool,
        typer.Option("--skip-tokenizer-init", help="No text: /generate takes and gives tokens."),
    ] = False,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="The model's name for clients. [--model-path]", show_default=False),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; 0.0.0.0 is all of this machine's. [127.0.0.1]",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="[30000]", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QTOOL_API_KEY",
            help="What clients must send as Bearer token.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="builtin, vllm or sglang.")] = "builtin",
    quantization: Annotated[
        str | None,
        typer.Option(
            help=(
                "Quantize a plain model while it loads, e.g. fp8; of a quantized one, what it "
                "must be."
            ),
            show_default=False,
        ),
    ] = None,
    torchao_config: Annotated[
        str | None,
        typer.Option(help="The same by torchao's names, e.g. int4wo-128.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:<n>. [a GPU, if there is one]", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of what stays plain: bfloat16, float16 or float32. [the model's]",
            show_default=False,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(help="auto or fp8_e4m3. [auto: as the checkpoint says]", show_default=False),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt and answer. [the model's]", show_default=False),
    ] = None,
    mem_fraction_static: Annotated[
        float | None,
        typer.Option(
            help="Share of the GPU's memory for weights and KV cache. [0.85]", show_default=False
        ),
    ] = None,
    max_running_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Computed at once. [256; 32 on a CPU]", show_default=False),
    ] = None,
    max_queued_requests: Annotated[
        int | None,
        typer.Option(min=0, help="Waiting at most; others get 429. [512]", show_default=False),
    ] = None,
    max_total_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Size of the KV cache. [what fits]", show_default=False),
    ] = None,
    chunked_prefill_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a step. [8192; 2048 on a CPU]", show_default=False),
    ] = None,
    disable_cuda_graph: Annotated[
        bool, typer.Option("--disable-cuda-graph", help="Launch every kernel by itself.")
    ] = False,
    disable_radix_cache: Annotated[
        bool, typer.Option("--disable-radix-cache", help="Compute every prompt anew.")
    ] = False,
    disable_overlap_schedule: Annotated[
        bool, typer.Option("--disable-overlap-schedule", help="Launch no step ahead.")
    ] = False,
    enable_torch_compile: Annotated[
        bool,
        typer.Option(
            "--enable-torch-compile",
            help="Compile decoder layers that qtool has no kernels for; starts take longer.",
        ),
    ] = False,
    random_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Makes requests without a seed repeat.", show_default=False),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A Jinja file in place of the model's template.", show_default=False),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(help="hermes or llama3_json. [as the template shows]", show_default=False),
    ] = None,
    sampling_defaults: Annotated[
        str | None,
        typer.Option(
            help="model: those of generation_config.json; openai: OpenAI's. [model]",
            show_default=False,
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp",
            "--tp-size",
            "--tensor-parallel-size",
            min=1,
            help="GPUs that share each layer.*",
            show_default=False,
        ),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            "--pp",
            "--pp-size",
            "--pipeline-parallel-size",
            min=1,
            help="GPUs that share the layers out.*",
            show_default=False,
        ),
    ] = None,
    dp: Annotated[
        int | None,
        typer.Option(
            "--dp",
            "--dp-size",
            "--data-parallel-size",
            min=1,
            help="Copies of the model.*",
            show_default=False,
        ),
    ] = None,
    nnodes: Annotated[
        int | None, typer.Option(min=1, help="Machines.*", show_default=False)
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="Which of them this one is.*", show_default=False)
    ] = None,
    dist_init_addr: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first.*", show_default=False)
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            min=0, help="Seconds for requests to end after SIGTERM. [20]", show_default=False
        ),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write prompts to the log; else it has none.")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. [info]", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run model code of the checkpoint; the builtin engine never does.*",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show which kernel multiplies each layer, and why not another; serve nothing.",
        ),
    ] = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Serve a checkpoint over HTTP, as OpenAI and SGLang do; with --dry-run show how it would run.

    Options with a * are for --engine vllm and sglang, which this process is handed to; what follows
    `--` is theirs.
    """
    options = {
        name: value
        for name, value in locals().items()
        if name not in ("context", "engine", "dry_run", "as_json", "quiet", "verbose", "debug")
    }
    if log_level is None and (quiet or verbose):
        options["log_level"] = "warning" if quiet else "debug"
    if engine != "builtin":
        return _hand_over(engine, options, context.args, dry_run=dry_run, as_json=as_json)
    if context.args:
        raise UsageError(
            "E_USAGE",
            f"unexpected arguments: {' '.join(context.args)}",
            hint="--engine vllm and sglang take more, after `--`",
        )
    from qtool.serve.settings import make_settings

    settings = make_settings(options)
    if dry_run:
        return _show_kernels(settings, as_json=as_json)
    from qtool.serve.server import ready_dict, ready_text
    from qtool.serve.server import serve as run

    def ready(service: Service) -> None:
        show(lambda: ready_dict(service), ready_text(service), as_json)
        sys.stdout.flush()

    run(settings, on_ready=ready)
    # everything has ended; one more signal does not make a failure of it
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):
        signal.signal(number, signal.SIG_IGN)


def _hand_over(
    engine: str, options: dict[str, object], extra: list[str], *, dry_run: bool, as_json: bool
) -> None:
    from qtool.serve.handover import hand_over, prepare

    command = prepare(engine, options, extra, dry_run=dry_run)
    for warning in command.warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)
    if dry_run:
        return show(command.to_dict, str(command), as_json)
    typer.echo(str(command), err=True)
    hand_over(command)


def _show_kernels(settings: Settings, *, as_json: bool) -> None:
    from qtool.checkpoint import open_checkpoint, resolve_model
    from qtool.cli.tables import kernels
    from qtool.runtime.load import device_named, plan_load

    checkpoint = open_checkpoint(resolve_model(settings.model_path, revision=settings.revision))
    plan = plan_load(
        checkpoint, device_named(settings.engine.get("device")), settings.engine["quantization"]
    )
    for warning in plan.warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)
    show(plan.to_dict, kernels(plan), as_json)

"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelPath = Annotated[
    str,
    typer.Option(
        "--model-path", "--model", help="Checkpoint folder or Hub name.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing but warnings and errors on stderr.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists, at the very end.")]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run model code that comes with the checkpoint.")
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        help="Accept a state file of mto.save; ModelOpt loads it with weights-only loading."
    ),
]
RestorePath = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-restore-path",
        help="ModelOpt: skip calibration, take the state kept here.",
        show_default=False,
    ),
]

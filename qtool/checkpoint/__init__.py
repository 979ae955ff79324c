"""A checkpoint is a folder of safetensors and JSON: `reader` opens it without torch, `hub` fetches
it, `writer` makes a new one.
"""

from qtool.checkpoint.digests import digest_files, sample_files
from qtool.checkpoint.hub import resolve_model
from qtool.checkpoint.model import Checkpoint, TensorInfo
from qtool.checkpoint.reader import PICKLE_SUFFIXES, open_checkpoint
from qtool.checkpoint.source_files import SourceFiles, source_files
from qtool.checkpoint.strict_json import read_json
from qtool.checkpoint.writer import Staging, check_output, stage_output

__all__ = [
    "PICKLE_SUFFIXES",
    "Checkpoint",
    "SourceFiles",
    "Staging",
    "TensorInfo",
    "check_output",
    "digest_files",
    "open_checkpoint",
    "read_json",
    "resolve_model",
    "sample_files",
    "source_files",
    "stage_output",
]

"""A checkpoint is a folder of safetensors and JSON: `reader` opens it without torch, `hub` fetches
it, `writer` makes a new one.
"""

from qtool.checkpoint.hub import resolve_model
from qtool.checkpoint.model import Checkpoint, TensorInfo
from qtool.checkpoint.reader import PICKLE_SUFFIXES, open_checkpoint
from qtool.checkpoint.strict_json import read_json
from qtool.checkpoint.writer import Staging, digest_files, sample_files, stage_output

__all__ = [
    "PICKLE_SUFFIXES",
    "Checkpoint",
    "Staging",
    "TensorInfo",
    "digest_files",
    "open_checkpoint",
    "read_json",
    "resolve_model",
    "sample_files",
    "stage_output",
]

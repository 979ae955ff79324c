"""Calibration data: `sources` finds and shuffles records, `records` picks the field that counts,
`reading` renders and tokenizes (`isolated` does it in a process of its own), `samples` cuts.

No code that comes with data is run and no pickle is opened. Each module imports only what a source
needs: `check_source` on a file of JSON or text runs on the standard library alone.
"""

from qtool.calibration.isolated import isolated_tokenizing
from qtool.calibration.samples import (
    CalibrationReport,
    CalibrationSet,
    check_source,
    load_calibration,
)
from qtool.calibration.spec import CalibrationSpec

__all__ = [
    "CalibrationReport",
    "CalibrationSet",
    "CalibrationSpec",
    "check_source",
    "isolated_tokenizing",
    "load_calibration",
]

"""File operations that fail, one at a time: a code and exit 3, 4 or 6, no traceback, the source as
it was, the output absent or complete, and the next run works. `tests/benchmarks/fault_injection.py`
does the same for every operation and every error.
"""

from __future__ import annotations

import pytest
from support.faults import ERRORS, Fault, Faults, may_fail

CHANGING = ("create", "write", "copy", "truncate", "sync", "rename", "mkdir", "lock", "chmod")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "process", "count"),
    [
        ("overwrite", "command", 8),
        pytest.param("llmcompressor data", "command", 6, marks=pytest.mark.exhaustive),
        pytest.param("llmcompressor data", "worker", 8, marks=pytest.mark.exhaustive),
    ],
)
def test_a_file_operation_that_fails_has_an_exit_code(scenario, process, count, tmp_path):
    with Faults(scenario, tmp_path) as faults:
        clean = faults.run(Fault(process, -1))
        assert clean.problems == ()
        operations = enumerate(clean.operations)
        numbers = [number for number, what in operations if may_fail(process, what)]
        is_changing = [clean.operations[number].startswith(CHANGING) for number in numbers]
        changing = [number for number, does in zip(numbers, is_changing, strict=True) if does]
        reading = [number for number, does in zip(numbers, is_changing, strict=True) if not does]
        chosen = changing[:: 1 + len(changing) * 3 // (2 * count)]
        chosen += reading[:: 1 + len(reading) * 3 // count]
        found = {}
        for index, number in enumerate(chosen):
            fault = Fault(process, number, ERRORS[index % len(ERRORS)])
            outcome = faults.run(fault)
            if outcome.problems:
                found[fault.error, clean.operations[number]] = (outcome.problems, outcome.stderr)
    assert found == {}

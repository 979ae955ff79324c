"""Whether generation_config.json can be read, with values that a sampler takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qtool.checkpoint import Checkpoint, read_json
from qtool.checkpoint.config_values import bad_field, is_flag, is_positive

FILE_NAME = "generation_config.json"


def check_generation(checkpoint: Checkpoint) -> None:
    """Refuse values that no sampler takes.

    Raises: CheckpointRefused.
    """
    path = checkpoint.path / FILE_NAME
    if not path.is_file():
        return
    config = read_json(path)
    for key, value in config.items():
        holds, wanted = FIELDS.get(key, (None, ""))
        if holds and value is not None and not holds(value):
            raise bad_field(checkpoint.origin(FILE_NAME), key, value, wanted)


def _is_fraction(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_temperature(value: object) -> bool:
    return value == 0 or is_positive(value)


def _is_token(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(type(each) is int and each >= -1 for each in values)


FRACTION = (_is_fraction, "a number from 0 to 1")
TOKEN = (_is_token, "a token id, or a list of them")
LENGTH = (lambda value: type(value) is int and value > 0, "a whole number greater than zero")
FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "bos_token_id": TOKEN,
    "do_sample": (is_flag, "true or false"),
    "eos_token_id": TOKEN,
    "max_length": LENGTH,
    "max_new_tokens": LENGTH,
    "min_p": FRACTION,
    "pad_token_id": TOKEN,
    "repetition_penalty": (is_positive, "a number greater than zero"),
    "temperature": (_is_temperature, "a number, zero or more"),
    "top_k": (lambda value: type(value) is int and value >= -1, "a whole number, -1 or more"),
    "top_p": FRACTION,
}

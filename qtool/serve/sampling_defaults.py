"""The sampling parameters that the model's `generation_config.json` sets for requests."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from qtool.engine.sampling_params import SamplingParams
from qtool.errors import QtoolError
from qtool.serve.backend.messages import EngineInfo
from qtool.serve.settings import ServeSettings

LOG = logging.getLogger("qtool.serve")
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


async def sampling_defaults(settings: ServeSettings, info: EngineInfo) -> dict[str, object]:
    """Return the parameters, unless ``settings`` ask for OpenAI's."""
    if settings.sampling_defaults != "model":
        return {}
    return await asyncio.to_thread(_generation_config, Path(info.model_path))


def _generation_config(path: Path) -> dict[str, object]:
    """Return the model's own sampling defaults; what is not usable is left out, with a warning."""
    file = path / "generation_config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError):
        config = {}
    found: dict[str, object] = {}
    for name in DEFAULTS:
        value = config.get(name) if isinstance(config, Mapping) else None
        value = -1 if name == "top_k" and value == 0 else value
        if value is None:
            continue
        try:
            SamplingParams.from_dict({name: value})
        except QtoolError as error:
            LOG.warning("generation_config.json: %s; it is left out", error.message)
        else:
            found[name] = value
    return found

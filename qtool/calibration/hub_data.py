"""Records of a data set of the Hub, streamed."""

from __future__ import annotations

import os

from qtool.calibration.spec import CalibrationSpec, Rows
from qtool.checkpoint.hub import is_offline, unreachable
from qtool.errors import DataRefused, ResourceError, one_line

SHUFFLE_BUFFER = 1000  # records that are fetched before the first is drawn


def hub_rows(spec: CalibrationSpec, name: str, config: str | None, split: str) -> Rows:
    """Yield the records of the data set ``name`` in an order that the seed decides.

    Raises: ResourceError, when the Hub does not answer, or not as it should; DataRefused, for a
        name, config or split that it does not have.
    """
    from qtool.checkpoint.hub_download import check_data_set, failed, is_reachable

    # offline, the cache answers, or the library refuses at once
    if not is_offline() and os.environ.get("HF_DATASETS_OFFLINE", "0") in ("", "0"):
        if not is_reachable():
            raise unreachable(spec.source)
        check_data_set(name)
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True).shuffle(
            seed=spec.seed, buffer_size=SHUFFLE_BUFFER
        )
        for number, record in enumerate(stream, 1):
            yield f"{spec.source}, record {number} of the shuffled stream", record
    except MemoryError:
        raise
    except (ConnectionError, httpx.TransportError) as error:
        hint = (
            "give a local file, or fill the Hub cache where there is a network; with "
            "HF_HUB_OFFLINE only that cache is read"
        )
        raise ResourceError(
            "E_HUB_UNREACHABLE",
            f"data set `{name}` is not a local file, is not in the Hub cache, and: "
            f"{one_line(error)}",
            hint=hint,
        ) from error
    # a wrong name, config or split, a broken file: the library raises whatever its readers do
    except Exception as error:
        is_http = isinstance(error, HfHubHTTPError | httpx.HTTPError)
        if is_http and not isinstance(error, RepositoryNotFoundError):
            raise failed(f"data set `{name}`", one_line(error)) from error
        hint = (
            "write name:config:split or name::split; a private or gated data set needs `hf auth "
            "login`"
        )
        message = (
            f"Hub data set `{name}`, config {config or 'default'}, split {split}: {one_line(error)}"
        )
        raise DataRefused("E_DATA_HUB", message, hint=hint) from error

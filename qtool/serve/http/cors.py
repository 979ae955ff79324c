"""Which web pages of other origins may call the server."""

from __future__ import annotations

from collections.abc import Collection

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from qtool.serve.http.limits import REQUEST_ID_HEADERS


def allow_origins(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Return ``app`` with answers to the preflights of pages from ``origins``, or from everywhere
    for ``*``; without origins, ``app`` itself.

    Cookies are not read, so a page that has no key learns nothing from a server with one.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=("retry-after", *REQUEST_ID_HEADERS),
    )

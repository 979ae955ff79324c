"""Thoughts in fields that clients send back as they got them: ``encrypted_content`` of OpenAI and
``signature`` of Anthropic. Nothing is secret in them, as they only return to the client what is its
own; without them a client that does not send thoughts would lose them, because nothing is stored.
"""

from __future__ import annotations

import base64
import binascii

MARK = "qtool:"
"""In front of what this server made."""


def seal(thoughts: str) -> str:
    """Return ``thoughts`` as a text that `unseal` reads."""
    return MARK + base64.b64encode(thoughts.encode()).decode()


def unseal(sealed: str) -> str | None:
    """Return the thoughts in ``sealed``; None if another server made it."""
    if not sealed.startswith(MARK):
        return None
    try:
        return base64.b64decode(sealed.removeprefix(MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None

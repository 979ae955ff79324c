"""A grammar that holds the answer alone, and not the thoughts before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qtool.engine.detokenizer import HALF
from qtool.engine.grammar import Constraint, token_mask
from qtool.engine.thoughts import Thoughts


class AnswerConstraint:
    """A `Constraint` of what follows the thoughts; while they last, any token may come.

    Args:
        constraint: of the answer.
        thoughts: of the text, which has a token before `accept` has it.
        tokenizer: of the model.
        start: the marker that may begin thoughts; None if the text begins inside of them.
        end: the marker that ends them.
    """

    def __init__(
        self,
        constraint: Constraint,
        thoughts: Thoughts,
        tokenizer: Tokenizer,
        start: str | None,
        end: str,
    ) -> None:
        self._constraint = constraint
        self._thoughts = thoughts
        self._tokenizer = tokenizer
        self._start_ids: list[int] = []
        if start is not None:
            self._start_ids = tokenizer.encode(start, add_special_tokens=False).ids
        self._started = 0
        """How many tokens of the start marker came."""
        self._last = end[-1]
        self._state: Literal["before", "inside", "answer"] = "before" if start else "inside"

    @property
    def mask(self) -> NDArray[np.int32] | None:
        """The tokens that may come next, like `Constraint.mask`; None: any."""
        match self._state:
            case "answer":
                return self._constraint.mask
            case "inside":
                return None
        bits = 32 * len(self._constraint.mask)
        start = token_mask(self._start_ids[self._started : self._started + 1], bits)
        return start if self._started else self._constraint.mask | start

    def accept(self, token: int) -> bool:
        """Add the token that came next; return whether it ends the text.

        Raises: UsageError, as `Constraint.accept` does, and where the answer begins inside of the
            token that ends the thoughts, and not as the grammar asks.
        """
        match self._state:
            case "before" if self._starts(token):
                self._started += 1
                if self._started == len(self._start_ids):
                    self._state = "inside"
                return False
            case "inside":
                if not self._thoughts.over:
                    return False
                self._state = "answer"
                return self._constraint.begin(self._thoughts.rest.lstrip(), self._thoughts.tokens)
        self._state = "answer"
        return self._constraint.accept(token)

    def masks_along(self, drafts: Sequence[int]) -> Sequence[NDArray[np.int32] | None]:
        """Return `mask` now and after each of ``drafts``, as `Constraint.masks_along` does, up to
        the first that may end the thoughts.
        """
        if self._state == "answer":
            return self._constraint.masks_along(drafts)
        if self._state == "before":
            return [self.mask]
        ends = [index for index, token in enumerate(drafts) if self._may_end(token)]
        return [None] * (1 + min(ends, default=len(drafts)))

    def _starts(self, token: int) -> bool:
        """Whether ``token`` is the next of the start marker. A marker of several tokens begins only
        where the grammar does not allow its first one.
        """
        if token != self._start_ids[self._started]:
            return False
        allowed = self._constraint.mask[token >> 5] >> (token & 31) & 1
        return self._started > 0 or len(self._start_ids) == 1 or not allowed

    def _may_end(self, token: int) -> bool:
        """Whether the thoughts may end when ``token`` comes: its text has the last character of the
        marker, or bytes that hold this back or let it go.
        """
        # twice, since some tokenizers drop a space in front
        text: str = self._tokenizer.decode([token, token], skip_special_tokens=False)
        return self._last in text or HALF in text

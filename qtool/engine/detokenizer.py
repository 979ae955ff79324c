"""Turns tokens into text as they come; it never returns half a character or the beginning of a stop
string.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from qtool.engine.outputs import FinishReason
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.thoughts import Thoughts

HALF = "\N{REPLACEMENT CHARACTER}"  # bytes that are not a character decode to it
# so many tokens without a whole character are held back before some are decoded as they are
MOST_HELD = 16


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that skip_special_tokens leaves out of a text."""
    return frozenset(
        token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    )


@functools.lru_cache(maxsize=64)
def skipped_ids(tokenizer: Tokenizer, markers: tuple[str, ...]) -> frozenset[int]:
    """Return the tokens that skip_special_tokens leaves out of a text in which ``markers`` stay."""
    if not markers:
        return special_ids(tokenizer)
    return frozenset(
        token_id
        for token_id in special_ids(tokenizer)
        if not any((tokenizer.id_to_token(token_id) or "") in marker for marker in markers)
    )


class Detokenizer:
    """Decodes the tokens of one text as they come; its parts, joined, are what the tokenizer makes
    of all tokens.

    Args:
        tokenizer: the tokenizers library's.
        skipped: tokens that are left out of the text.
        context: tokens before the text, such as the end of the prompt: a tokenizer that drops a
            leading space then keeps the text's.
    """

    def __init__(
        self, tokenizer: Tokenizer, skipped: Collection[int], *, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        # decoded again with what follows
        self._before = [token_id for token_id in context if token_id not in self._skipped]
        if self._decode(self._before).endswith(HALF):
            self._before = []  # nothing to continue
        self._held: list[int] = []
        """Tokens whose text is not complete."""
        self._stream = self._new_stream()

    def push(self, token_id: int) -> str:
        """Return the characters that ``token_id`` completes."""
        if token_id in self._skipped:
            return ""  # a stream would decode them again and again
        self._held.append(token_id)
        try:
            text: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # Some tokenizers decode what came before differently once bytes turn out not to be a
            # character, and the stream fails.
            self._before = []
            self._stream = self._new_stream()
            text = self._stream.step(self._tokenizer, self._held)
        if text is not None:
            self._before = self._held
            self._held = []
            return text
        return self._release() if len(self._held) >= MOST_HELD else ""

    def flush(self) -> str:
        """Return what is left, half characters as replacement characters."""
        text = self._after(self._held)
        self._held = []
        return text

    def _new_stream(self) -> DecodeStream:
        # the special ones to skip never reach it
        return DecodeStream(ids=self._before, skip_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _after(self, ids: list[int]) -> str:
        """Return what ``ids`` add to the text."""
        before = self._decode(self._before)
        both = self._decode(self._before + ids)
        return both[len(before) :] if both.startswith(before) else self._decode(ids)

    def _release(self) -> str:
        """Return the text of all but the last few held tokens, cut where no character is split; a
        character has at most four bytes.
        """
        cuts = range(len(self._held) - 4, len(self._held) - 8, -1)
        whole = self._decode(self._held)
        cut = next(
            (
                cut
                for cut in cuts
                if self._decode(self._held[:cut]) + self._decode(self._held[cut:]) == whole
            ),
            cuts[0],
        )
        text = self._after(self._held[:cut])
        if text:
            self._before = []
        self._held = self._held[cut:]
        self._stream = self._new_stream()
        self._stream.step(self._tokenizer, self._held)
        return text


class TextStream:
    """The text of one request, and when it ends.

    Args:
        tokenizer: the tokenizers library's (``backend_tokenizer`` of transformers' fast ones); None
            gives no text, and stop strings never match.
        params: when the text ends, and what is left out of it.
        eos_ids: the model's end tokens, which do not count under ignore_eos; ``params.stop_ids``
            always do.
        max_new_tokens: in place of the parameters', where the context is shorter.
        context: the last tokens of the prompt, if the text is to continue it (a space in front of
            the first word is kept).
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        eos_ids: Collection[int] = (),
        *,
        max_new_tokens: int | None = None,
        context: Sequence[int] = (),
    ) -> None:
        self.reason: FinishReason | None = None
        self.tokens = 0
        """Tokens pushed, the one that ended the text among them."""
        self._max_tokens = params.max_new_tokens if max_new_tokens is None else max_new_tokens
        self._min_tokens = params.min_new_tokens
        self.end_ids = frozenset({*params.stop_ids, *(() if params.ignore_eos else eos_ids)})
        self._stops = params.stop_strings
        self._keep_stop = params.no_stop_trim
        self._first = "".join({stop[0] for stop in self._stops})
        self._detokenizer = None
        if tokenizer is not None:
            skipped: Collection[int] = ()
            if params.skip_special_tokens:
                skipped = skipped_ids(tokenizer, params.markers)
            self._detokenizer = Detokenizer(tokenizer, skipped, context=context)
        self.thoughts: Thoughts | None = None
        """What comes before the answer, and has no stop strings; None if all of it is answer."""
        if params.reasoning_ends:
            self.thoughts = Thoughts(
                params.reasoning_start, params.reasoning_ends, params.reasoning_calls
            )
        self._safe: list[str] = []
        """What `take` returns next."""
        self._held = ""
        """What may be the beginning of a stop string."""
        self._exempt = 0
        """How many of the held characters came before min_new_tokens: a stop string must end after
        them.
        """

    def push(self, token_id: int) -> FinishReason | None:
        """Add the next token; return why the text ends with it, or None.

        Once it has ended, further tokens change nothing.
        """
        if self.reason is not None:
            return self.reason
        self.tokens += 1
        if self.thoughts is not None:
            self.thoughts.count_token()
        may_end = self.tokens > self._min_tokens
        if may_end and token_id in self.end_ids:
            if self._keep_stop:
                self._add(token_id, may_end)
            self._end({"type": "stop", "matched": token_id}, may_end)
            return self.reason
        self._add(token_id, may_end)
        if self.reason is None and self._max_tokens is not None and self.tokens >= self._max_tokens:
            self._end({"type": "length", "length": self.tokens}, may_end)
        return self.reason

    def take(self) -> str:
        """Return the text that became safe since the last take."""
        text = "".join(self._safe)
        self._safe.clear()
        return text

    def finish(self, reason: FinishReason | None = None) -> str:
        """End the text, for ``reason`` if nothing else ended it before; return what is left to
        take.
        """
        if self.reason is None:
            self._end(
                reason or {"type": "abort", "message": "Aborted"}, self.tokens > self._min_tokens
            )
        return self.take()

    def _end(self, reason: FinishReason, may_stop: bool) -> None:
        if self._detokenizer is not None and self.reason is None:
            self._grow(self._detokenizer.flush(), may_stop)  # may end in a stop string
            if self.thoughts is not None:
                self._grow_answer(self.thoughts.flush()[1], may_stop)
        if self.reason is None:
            self._safe.append(self._held)
            self._held = ""
            self.reason = reason

    def _add(self, token_id: int, may_stop: bool) -> None:
        if self._detokenizer is not None:
            self._grow(self._detokenizer.push(token_id), may_stop)

    def _grow(self, new: str, may_stop: bool) -> None:
        """Add characters of thoughts or of the answer."""
        if self.thoughts is not None:
            thoughts, new = self.thoughts.push(new)
            self._safe.append(thoughts)
        self._grow_answer(new, may_stop)

    def _grow_answer(self, new: str, may_stop: bool) -> None:
        """Add characters of the answer, up to the first stop string that is complete; hold back
        what may be the beginning of one.
        """
        if not new:
            return
        if not self._stops:
            self._safe.append(new)
            return
        text = self._held + new
        if not may_stop:
            self._exempt = len(text)
        elif match := self._first_stop(text):
            end, stop = match
            self._safe.append(text[: end if self._keep_stop else end - len(stop)])
            self._held = ""
            self.reason = {"type": "stop", "matched": stop}
            return
        start = self._held_from(text)
        self._safe.append(text[:start])
        self._held = text[start:]
        self._exempt = max(0, self._exempt - start)

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Return the stop string that is complete first in ``text``, and where it ends; of those
        that end together, the longest.
        """
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, self._exempt - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), -len(stop), stop))
        if not found:
            return None
        end, _, stop = min(found)
        return end, stop

    def _held_from(self, text: str) -> int:
        """Return where the end of ``text`` begins that may be the beginning of a stop string."""
        for start, first in enumerate(text):
            if first in self._first and self._begins(text[start:]):
                return start
        return len(text)

    def _begins(self, tail: str) -> bool:
        return any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops)

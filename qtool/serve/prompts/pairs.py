"""`Pairs`: a query and a document as the prompt of a reranker."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.checkpoint.encoding import Encoding
from qtool.engine.scores import PairForm
from qtool.errors import UsageError
from qtool.serve.prompts.templates import Templates
from qtool.serve.prompts.vocabulary import Vocabulary

MAX_CHARACTERS = 16 << 20  # of all prompts of a request: each repeats the query


class Pairs:
    """Makes prompts for the reranker that is served, if it is one.

    Raises: CheckpointRefused, when the model answers yes or no and its chat template asks nothing.
    """

    def __init__(
        self, encoding: Encoding | None, templates: Templates, vocabulary: Vocabulary
    ) -> None:
        self._templates = templates
        self._vocabulary = vocabulary
        self._form = PairForm.of(encoding, templates.text)

    async def tokenize(
        self, pairs: Sequence[tuple[str, str]], instruction: str | None
    ) -> list[list[int]]:
        """Return the prompts for ``pairs`` of a query and a document.

        Args:
            pairs: what is scored.
            instruction: what makes a document relevant, in place of the checkpoint's; templates
                alone show it.
        Raises: UsageError, also for a long query that many documents would repeat, and for an
            instruction that the prompts do not show.
        """
        form = self._form
        form.check(instruction)
        shown = len(instruction or form.instruction) if form.has_template else 0
        characters = sum(shown + len(query) + len(document) for query, document in pairs)
        check_characters(characters, len(pairs))
        if not form.has_template:
            return await self._vocabulary.encode_pairs(pairs)
        texts = await self._templates.render_all(
            form.conversations(pairs, instruction), form.variables(instruction)
        )
        form.check_shown(instruction, texts[0])
        return await self._vocabulary.encode(texts, add_special_tokens=False)


def check_characters(characters: int, documents: int) -> None:
    """Raise: UsageError, when ``documents``, each with the query, have too many ``characters``."""
    if characters > MAX_CHARACTERS:
        raise UsageError(
            "E_PROMPT",
            f"the query with each of the {documents:,} documents comes to {characters:,} "
            f"characters; the limit is {MAX_CHARACTERS:,}",
            hint="send fewer documents in a request, or shorten the query",
        )

"""`Pairs`: a query and a document as the prompt of a reranker.

Sources: sentence-transformers 5 `base/modality.py` and vLLM 0.33
`examples/pooling/score/template/`: templates take messages of the roles query and document, and the
instruction as a system message or as a variable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtool.checkpoint.encoding import Encoding
from qtool.checkpoint.strict_json import Json
from qtool.errors import CheckpointRefused, UsageError
from qtool.serve.prompts.templates import Templates
from qtool.serve.prompts.vocabulary import Vocabulary

MAX_CHARACTERS = 16 << 20  # of all prompts of a request: each repeats the query
SHOWN = [re.compile(rf"['\"<]{role}['\">]", re.IGNORECASE) for role in ("query", "document")]


def check_pair_template(encoding: Encoding | None, templates: Templates) -> bool:
    """Return whether the chat template shows a query and a document.

    Raises: CheckpointRefused, when it does not and the model answers yes or no.
    """
    text = templates.text or ""
    shown = all(role.search(text) for role in SHOWN)
    if encoding is not None and encoding.labels and not shown:
        raise CheckpointRefused(
            "E_CHAT_TEMPLATE",
            "the model scores by the answers yes and no, and its chat template does not show a "
            "query and a document",
            hint="give a template with messages of these roles with --chat-template",
        )
    return shown


class Pairs:
    """Makes prompts for the reranker that is served, if it is one.

    Raises: CheckpointRefused, when the model answers yes or no and its chat template asks nothing.
    """

    def __init__(
        self, encoding: Encoding | None, templates: Templates, vocabulary: Vocabulary
    ) -> None:
        self._templates = templates
        self._vocabulary = vocabulary
        self._instruction = "" if encoding is None else encoding.prompt
        self._has_template = check_pair_template(encoding, templates)

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
        if instruction and not self._has_template:
            raise instruction_not_shown()
        shown = len(instruction or self._instruction) if self._has_template else 0
        characters = sum(shown + len(query) + len(document) for query, document in pairs)
        check_characters(characters, len(pairs))
        if not self._has_template:
            return await self._vocabulary.encode_pairs(pairs)
        wanted = instruction or self._instruction
        variables = {"instruction": wanted, "instruct": wanted} if wanted else {}
        system: list[Json] = [{"role": "system", "content": wanted}] if wanted else []
        texts = await self._templates.render_all(
            [
                [
                    {"role": "query", "content": query},
                    {"role": "document", "content": document},
                    *system,
                ]
                for query, document in pairs
            ],
            variables,
        )
        if instruction and instruction.strip() not in texts[0]:
            raise instruction_not_shown()
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


def instruction_not_shown() -> UsageError:
    """Return the error for an instruction that would be ignored."""
    return UsageError(
        "E_INSTRUCTION",
        "`instruction` would be ignored: the prompts of this model do not contain it",
        hint="leave it out, or serve with --chat-template a template that shows it",
    )

"""The chat template of a checkpoint, found where transformers finds it, and rendered by
transformers in a `Sandbox`, because it is an untrusted program.

Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qtool.checkpoint.aux_files import NAMED_TEMPLATES
from qtool.checkpoint.strict_json import Json, JsonDict, read_json, refused
from qtool.errors import CheckpointRefused, ResourceError, UsageError, one_line
from qtool.sandbox import (
    CallRaised,
    LimitExceeded,
    Sandbox,
    SandboxError,
    TooManyWaiting,
)
from qtool.serve.prompts.pool import SandboxPool

MAX_TEMPLATE_BYTES = 1 << 20  # the largest of a public model are below 50 kB
TIMEOUT_S = 5.0
MEMORY_BYTES = 256 << 20  # eight times the largest body of a request
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
RESERVED = frozenset(  # what `Templates.render` passes itself
    {"self", "messages", "conversations", "tools", "documents", "chat_template"}
    | {"add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"}
)
OTHER_TEMPLATE_HINT = "give another template with --chat-template"


@dataclass(frozen=True)
class ChatTemplate:
    """The source of a template."""

    text: str
    tool_text: str
    """Rendered if there are tools; usually the same as ``text``."""

    source: Path
    """The file it is from."""

    @property
    def accepts_tools(self) -> bool:
        """Whether it uses the tools of a request."""
        return re.search(r"\btools\b", self.tool_text) is not None


class Templates:
    """Renders conversations with the checkpoint's chat template."""

    def __init__(
        self, template: ChatTemplate | None, special_tokens: Mapping[str, str], pool: SandboxPool
    ) -> None:
        self.template = template
        """None if the checkpoint has none."""
        self._special_tokens = special_tokens
        self._pool = pool

    @classmethod
    async def open(
        cls,
        folder: Path,
        chat_template: str | os.PathLike[str] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> Templates:
        """Find the template for the tokenizer in ``folder`` and compile it.

        Args:
            folder: of the tokenizer.
            chat_template: a file that replaces the checkpoint's own template.
            timeout_s: for one conversation.
            memory_bytes: for one conversation.
        Raises: UsageError, if there is no such file; CheckpointRefused, if the template cannot be
            read or compiled; ResourceError, if the child process cannot start.
        """
        template = await asyncio.to_thread(find_template, folder, chat_template)
        tokens = await asyncio.to_thread(find_special_tokens, folder)

        def make_sandbox() -> Sandbox:
            return Sandbox(
                f"{__name__}:{render_conversations.__name__}",
                init=[f"{__name__}:{prepare.__name__}"],
                timeout_s=timeout_s,
                memory_bytes=memory_bytes,
            )

        pool = SandboxPool(make_sandbox, ("", [], None, None, False, False, {}))
        templates = cls(template, tokens, pool)
        try:
            await templates._compile()
        except BaseException:
            await pool.close()
            raise
        return templates

    @property
    def text(self) -> str | None:
        """The source of the template."""
        return self.template.text if self.template is not None else None

    async def render(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] | None = None,
        *,
        documents: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Json | None = None,
    ) -> str:
        """Return the prompt for a conversation, as ``tokenizer.apply_chat_template(...,
        tokenize=False)`` does.

        Args:
            messages: of the conversation, in order.
            tools: the tools that the model may call.
            documents: for templates that can show them.
            add_generation_prompt: whether to end with the start of an answer.
            continue_final_message: whether to end inside the last message; not both.
            kwargs: further variables for the template.
        Raises: UsageError, if there is no template, it refuses these messages, or it exceeds a
            limit with them; TooManyWaiting; ResourceError, if the process cannot start.
        """
        if self.template is None:
            hint = "send a prompt to /v1/completions, or serve with --chat-template"
            raise UsageError("E_NO_CHAT_TEMPLATE", "the model has no chat template", hint=hint)
        if not messages:
            raise UsageError("E_MESSAGES", "`messages` is empty", hint="send one message at least")
        _check_options(kwargs or {}, add_generation_prompt, continue_final_message)
        text = self.template.text if tools is None else self.template.tool_text
        variables = {**self._special_tokens, **(kwargs or {})}
        rendered = await self._render(
            text,
            [messages],
            tools,
            documents,
            add_generation_prompt,
            continue_final_message,
            variables,
        )
        return rendered[0]

    async def render_all(self, conversations: Sequence[Sequence[Json]], kwargs: Json) -> list[str]:
        """Return the prompts for several conversations without tools. Raises: as `render`."""
        assert self.template is not None
        _check_options(kwargs, True, False)
        variables = {**self._special_tokens, **kwargs}
        text = self.template.text
        return await self._render(text, conversations, None, None, True, False, variables)

    async def close(self) -> None:
        """End the child processes."""
        await self._pool.close()

    async def _render(self, *args: object) -> list[str]:
        """Call `render_conversations` in the child. Raises: as `render`."""
        try:
            return cast(list[str], await self._pool.call(*args))
        except CallRaised as error:
            raise _template_error(error) from None
        except LimitExceeded as error:
            raise UsageError(
                "E_CHAT_TEMPLATE_LIMIT",
                f"the chat template cannot render these messages: {error}",
                hint="send fewer or shorter messages, or no chat_template_kwargs",
            ) from None
        except TooManyWaiting:
            raise
        except SandboxError as error:
            raise ResourceError(
                "E_CHAT_TEMPLATE_PROCESS",
                f"rendering the chat template failed: {error}",
                hint="try again",
            ) from None

    async def _compile(self) -> None:
        if self.template is None:
            return
        try:
            for text in {self.template.text, self.template.tool_text}:
                await self._pool.call(text, [], None, None, False, False, {})
        except (CallRaised, LimitExceeded) as error:
            raise refused(
                "E_CHAT_TEMPLATE",
                f"{self.template.source}: the chat template does not compile: {error}",
                OTHER_TEMPLATE_HINT,
            ) from None
        except SandboxError as error:
            raise ResourceError(
                "E_CHAT_TEMPLATE_PROCESS", f"the chat template cannot be compiled: {error}"
            ) from None


def _check_options(kwargs: Json, add_generation_prompt: bool, continue_final_message: bool) -> None:
    """Raise: UsageError, for options of `Templates.render` that exclude each other."""
    if add_generation_prompt and continue_final_message:
        raise UsageError(
            "E_MESSAGES",
            "`add_generation_prompt` and `continue_final_message` exclude each other",
            hint="a prompt ends inside the last message or after it",
        )
    if clash := RESERVED.intersection(kwargs):
        raise UsageError(
            "E_CHAT_TEMPLATE_KWARGS",
            f"`{min(clash)}` cannot be set by chat_template_kwargs",
            hint="if it is a field of requests, use that",
        )


def find_template(
    folder: Path, chat_template: str | os.PathLike[str] | None = None
) -> ChatTemplate | None:
    """Return the template in the file ``chat_template``, else the template of the tokenizer in
    ``folder``; None if it has none.

    Raises: UsageError, if ``chat_template`` is not a file; CheckpointRefused, if a template cannot
        be read or none of several is the default.
    """
    try:
        if chat_template is not None:
            return _read_given_template(Path(chat_template))
        files = _template_files(folder)
        if files:  # transformers then ignores tokenizer_config.json
            source = files.get("default", folder / NAMED_TEMPLATES)
            texts = {name: _read_text(path) for name, path in files.items()}
            return _choose_template(texts, source)
        source = folder / "tokenizer_config.json"
        texts = _texts_by_name(_read_config(source).get("chat_template"), source)
        return _choose_template(texts, source)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _read_given_template(path: Path) -> ChatTemplate:
    if not path.is_file():
        raise UsageError(
            "E_NO_SUCH_FILE",
            f"--chat-template {path}: no such file",
            hint="give the path of a file with a Jinja template; names of templates are unknown",
        )
    text = _read_text(path)
    return ChatTemplate(text, text, path)


def _template_files(folder: Path) -> dict[str, Path]:
    """Return the files of templates by name."""
    named = {
        path.name.removesuffix(".jinja"): path
        for path in (folder / NAMED_TEMPLATES).glob("*.jinja")
    }
    default = folder / "chat_template.jinja"
    return ({"default": default} if os.path.lexists(default) else {}) | named


def find_special_tokens(folder: Path) -> dict[str, str]:
    """Return the tokens that the tokenizer in ``folder`` names, as its templates see them:
    ``bos_token``, ``eos_token`` and so on.

    Raises: CheckpointRefused for a file that cannot be read.
    """
    config = _tokenizer_config(folder)
    own = config.get("extra_special_tokens")
    if isinstance(own, dict):
        config |= own
    extra = [name for name in config if name.endswith("_token") or name in (own or ())]
    tokens = {name: _content(config.get(name)) for name in (*SPECIAL_TOKENS, *extra)}
    return {name: content for name, content in tokens.items() if isinstance(content, str)}


def _tokenizer_config(folder: Path) -> JsonDict:
    """Return the file that names special tokens, or both of an old checkpoint."""
    try:
        config = _read_config(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # as written before transformers 4.34
            config |= _read_config(folder / "special_tokens_map.json")
    except OSError as error:
        raise _unreadable(folder, error) from None
    return config


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def prepare() -> None:
    """Import in the child what `render_conversations` needs."""
    import transformers.utils.chat_template_utils  # noqa: F401


def render_conversations(
    template: str,
    conversations: list[list[JsonDict]],
    tools: list[JsonDict] | None,
    documents: list[JsonDict] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: JsonDict,
) -> list[str]:
    """Return, in the child, the prompts of ``conversations``; without any, only compile the
    template.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations,
        tools,
        documents,
        template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **variables,
    )
    return list(rendered)


def _template_error(error: CallRaised) -> UsageError:
    if error.name == "TemplateError":  # of raise_exception
        message = f"the chat template refuses these messages: {error.message}"
        return UsageError("E_CHAT_TEMPLATE_REFUSED", message, hint="send messages as it asks for")
    message = f"the chat template cannot render these messages: {error}"
    return UsageError(
        "E_CHAT_TEMPLATE_REFUSED",
        message,
        hint="check the roles and fields of the messages against the template",
    )


def _choose_template(texts: Mapping[str, str], source: Path) -> ChatTemplate | None:
    if not texts:
        return None
    if "default" not in texts:
        names = ", ".join(f"`{name[:100]}`" for name in sorted(texts)[:5])
        raise refused(
            "E_CHAT_TEMPLATE",
            f"{source}: the chat templates are {names}, none is the default",
            OTHER_TEMPLATE_HINT,
        )
    return ChatTemplate(texts["default"], texts.get("tool_use", texts["default"]), source)


def _texts_by_name(value: object, source: Path) -> dict[str, str]:
    texts: dict[str, object]
    if value is None:
        texts = {}
    elif isinstance(value, dict):
        texts = value
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        texts = {str(entry.get("name")): entry.get("template") for entry in value}
    else:
        texts = {"default": value}
    for name, text in texts.items():
        if not isinstance(text, str):
            message = (
                f"{source}: the chat template `{name[:100]}` is of type {type(text).__name__}, "
                "and must be a text"
            )
            raise refused("E_CHAT_TEMPLATE", message, OTHER_TEMPLATE_HINT)
        _check_size(len(text.encode()), source)
    return cast(dict[str, str], texts)


def _read_config(path: Path) -> JsonDict:
    return read_json(path) if os.path.lexists(path) else {}


def _read_text(path: Path) -> str:
    if not path.is_file():  # a FIFO would block
        raise refused(
            "E_CHAT_TEMPLATE", f"{path} is not a regular file", "put the file itself there"
        )
    with path.open("rb") as file:
        data = file.read(MAX_TEMPLATE_BYTES + 1)
    _check_size(len(data), path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise refused(
            "E_CHAT_TEMPLATE",
            f"{path}: not text in UTF-8 ({error.reason} at byte {error.start:,})",
            "save it again as UTF-8",
        ) from None


def _check_size(size: int, source: Path) -> None:
    if size > MAX_TEMPLATE_BYTES:
        raise refused(
            "E_CHAT_TEMPLATE",
            f"{source}: a chat template of more than {MAX_TEMPLATE_BYTES:,} bytes",
            OTHER_TEMPLATE_HINT,
        )


def _unreadable(folder: Path, error: OSError) -> CheckpointRefused:
    message = f"{error.filename or folder} cannot be read: {error.strerror or one_line(error)}"
    return CheckpointRefused(
        "E_CHAT_TEMPLATE", message, hint="check its name, its permissions and the disk"
    )

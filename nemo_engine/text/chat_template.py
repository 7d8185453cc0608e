"""``ChatTemplate``: one Jinja template, and the conversations that it makes prompts of: texts, and the control tokens
between them.

Text of a user never becomes a control token, whatever a template does with it. The template is rendered twice: with the
plain texts, and with their ``shadow``, in which no character of theirs that a control token has is what it was. Both
have equal lengths and, but for shadows, equal characters; so a control token that stands in the second was written by
the template, and all else is text. Where the second differs, because a template looks at letters in a way that does not
see through shadows, it is made once more with fewer shadows: without those of letters, and at last with one in each
control token that a user's text holds, which then decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import TemplateError, nodes

from nemo_engine.checks import check_unicode
from nemo_engine.text import shadow
from nemo_engine.text.template_meter import MAX_CHARS, Metered, TemplateLimitError, meter
from nemo_engine.text.template_sandbox import ChatEnvironment, TemplateRefusal
from nemo_engine.text.text_cache import TextCache
from nemo_engine.text.tokenizer import Tokenizer
from nemo_engine.text.vocabulary import AddedToken

MAX_TEMPLATE = 1 << 17  # characters
Part: TypeAlias = str | AddedToken
Cast: TypeAlias = Callable[[str], str]
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own, so that templates treat it as they do there
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.$-]*")
_USUAL_KEYS = frozenset(("role", "content"))
_SPACES = re.compile(r"\s*")


class ControlTokens:
    """The added tokens of a tokenizer that a template may write, how shadows keep them out of texts, and prompts into
    ids.

    ``casts`` are the ways to cast shadows, from the most to the fewest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # White space that has an id of its own, such as Gemma's, is text like any other.
        tokens = [token for token in tokenizer.added_tokens if token.content and not token.content.isspace()]
        self.by_text: dict[str, AddedToken] = {token.content: token for token in tokens}
        longest_first = sorted(self.by_text, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) if longest_first else "(?!)")
        self._lengths = sorted({len(text) for text in self.by_text}, reverse=True)
        self._first_ids = TextCache(lambda text: tokenizer.encode_span(text, is_start=True))
        self._ids = TextCache(lambda text: tokenizer.encode_span(text, is_start=False))
        self._firsts = {text[0] for text in self.by_text}
        characters = {element for text in self.by_text for element in text if shadow.can_have_shadow(element)}
        signs = {element for element in characters if not element.isalnum()}
        words = {
            element
            for text in self.by_text
            if not signs & set(text)
            for element in text
            if shadow.can_have_shadow(element)
        }
        self._cast_key = shadow.Shadower(signs).cast
        self.casts: tuple[Cast, ...] = (
            TextCache(shadow.Shadower(characters).cast),
            shadow.Shadower(signs | words).cast,
            lambda text: pattern.sub(lambda hit: shadow.shadow_first(hit[0]), text),
        )

    def cast(self, value: Any, cast: Cast | None) -> Any:
        """A copy of ``value``, which is JSON, with shadows in its strings; of the keys in those alone that are no
        names.
        """
        if isinstance(value, str):
            return value if cast is None else cast(value)
        if isinstance(value, dict) or isinstance(value, Mapping):  # the second takes a while
            members = {}
            for key, inner in value.items():
                if cast is not None and key not in _USUAL_KEYS and not _PLAIN_KEY.fullmatch(key):
                    key = self._cast_key(key)
                if not isinstance(inner, str):
                    inner = self.cast(inner, cast)
                elif cast is not None:
                    inner = cast(inner)
                members[key] = inner
            return members
        if isinstance(value, (list, tuple)):
            return [self.cast(inner, cast) for inner in value]
        return value

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of what a template wrote.

        Those of texts are kept, for most of a conversation comes again with its next turn.
        """
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += self._ids(part) if index else self._first_ids(part)
        return ids

    def _token_at(self, text: str, place: int) -> AddedToken | None:
        """The longest token that stands there."""
        for length in self._lengths:
            token = self.by_text.get(text[place : place + length])
            if token is not None:
                return token
        return None

    def split(self, text: str, marked: str) -> list[Part]:
        """``text`` at the control tokens of ``marked``, which is ``text`` with shadows in it."""
        parts: list[Part] = []
        start = 0
        for place in shadow.places_of(self._firsts, marked):
            token = self._token_at(marked, place) if place >= start else None
            if token is None:
                continue
            end = place + len(token.content)
            if token.single_word and (text[place - 1 : place].isalnum() or text[end : end + 1].isalnum()):
                continue
            before = text[start:place]
            parts += [before.rstrip() if token.lstrip else before, token]
            start = end
            if token.rstrip:
                start = _SPACES.match(text, end).end()  # type: ignore[union-attr]  # it matches anywhere
        parts.append(text[start:])
        return [part for part in parts if part]


class ChatTemplate:
    """A compiled template; ``name`` says in errors where it came from.

    ``words`` are the names and the texts that stand in it.

    ``special`` are ``bos_token`` and its like, as texts. Raises ``ValueError`` for a template that cannot be compiled.
    """

    def __init__(self, source: str, name: str, control: ControlTokens, special: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"{name} must have at most {MAX_TEMPLATE} characters, got {len(source)}")
        check_unicode(name, source)
        self.name = name
        self.source = source
        self._control = control
        self._special = dict(special)
        with Metered():
            try:
                tree = _environment().parse(source)
                self._template = _environment().from_string(source)
            except Exception as error:
                raise ValueError(f"{name} cannot be used: {_reason(error)}") from None
        self.words = frozenset(
            [node.attr for node in tree.find_all(nodes.Getattr)]
            + [node.name for node in tree.find_all(nodes.Name)]
            + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[Part]:
        """The prompt: texts, none empty, and the control tokens that the template wrote.

        ``messages``, ``tools`` and ``documents`` are JSON values without lone surrogates; ``variables`` are what the
        template may look at besides. Raises ``ValueError`` for a conversation that the template refuses, and for a
        template that costs too much.
        """
        given = {"tools": tools, "documents": documents, **(variables or {}), "messages": messages}
        fixed = {**self._special, "add_generation_prompt": add_generation_prompt}
        with Metered():
            text = self._run(given, fixed, None, continue_final_message)
            for cast in self._control.casts:
                try:
                    marked = self._run(given, fixed, cast, continue_final_message)
                except ValueError as error:
                    failure: Exception = error
                    marked = ""
                if shadow.are_alike(text, marked):
                    return self._control.split(text, marked)
        if not marked:
            raise ValueError(f"{self.name} looks at the control tokens in a text and then fails: {failure}")
        return self._control.split(shadow.plain(marked), marked)

    def _run(self, given: Mapping[str, Any], fixed: Mapping[str, Any], cast: Cast | None, continues: bool) -> str:
        """One rendering; what it makes is cut where the last message, if it is to be continued, ends."""
        pieces = []
        try:
            value = {**fixed, **self._control.cast(given, cast)}
            for message, plain in zip(value["messages"], given["messages"]):
                message["role"] = plain["role"]  # one of a few words, which templates write into control tokens
            if continues:
                self._tag(value["messages"][-1])
            for piece in self._template.generate(value):
                meter().charge(len(piece))
                pieces.append(piece)
        except TemplateRefusal as error:
            raise ValueError(f"{self.name} refuses the conversation: {error}") from None
        except Exception as error:
            raise ValueError(f"{self.name} cannot be rendered: {_reason(error)}") from None
        text = "".join(pieces)
        return self._cut(text) if continues else text

    def _tag(self, message: dict[str, Any]) -> None:
        content = message.get("content")
        if isinstance(content, list):
            content[-1]["text"] += _CONTINUE_TAG
        else:
            message["content"] = (content or "") + _CONTINUE_TAG

    def _cut(self, text: str) -> str:
        end = text.rfind(_CONTINUE_TAG.rstrip())
        if end < 0:
            raise ValueError(f"{self.name} leaves out the last message, so that it cannot be continued")
        kept = text[:end]
        return kept if text.startswith(_CONTINUE_TAG, end) else kept.rstrip()


@lru_cache(1)
def _environment() -> ChatEnvironment:
    return ChatEnvironment()


def _reason(error: BaseException) -> str:
    """What went wrong, and in which line of the template."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, RecursionError):
        text = "it is nested too deeply, or calls itself without end"
    elif isinstance(error, MemoryError):
        text = f"it makes more than {MAX_CHARS} characters of text"
    elif isinstance(error, (TemplateError, TemplateLimitError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    text = shadow.plain(text)[:400]
    return text if line is None or text.startswith("line ") else f"line {line}: {text}"

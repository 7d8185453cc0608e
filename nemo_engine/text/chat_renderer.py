"""Which way a checkpoint's conversations become prompts: by Mistral's rules (``chat``), or by the checkpoint's own
template.

That is found by trying. The template is rendered over small conversations, with a system text, turns and tools; where
its ids are those of Mistral's rules, these serve, with all that they can. Else the template does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from nemo_engine.text.call_styles import CallStyle, ListCalls
from nemo_engine.text.chat import SystemPlacement, render_chat
from nemo_engine.text.chat_sources import Templates, find_templates, given_template, special_texts
from nemo_engine.text.messages import asks_nothing
from nemo_engine.text.tokenizer import Tokenizer
from nemo_engine.text.tools import check_tools

if TYPE_CHECKING:
    from nemo_engine.text.chat_template import ControlTokens
    from nemo_engine.text.template_renderer import TemplateRenderer

MISTRAL = "mistral"  # as a value of ``chat_template``: Mistral's rules, whatever the checkpoint brings
_MAX_GIVEN = 8  # templates of requests that are kept
Messages: TypeAlias = Sequence[Mapping[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]] | None


class Renderer(Protocol):
    """Makes prompts of conversations. ``source`` is a template's file. ``calls`` is how tool calls are written.

    ``end_ids`` end an answer, beside the model's own end-of-sequence tokens; ``end_names`` are the same as texts.
    ``no_tools``: why tools are refused, None where they are taken. ``places_system``: ``system_placement`` has a
    meaning. ``fields`` of messages, beside the usual ones, may have an effect.
    """

    name: str
    source: str | None
    end_names: tuple[str, ...]
    end_ids: frozenset[int]
    calls: CallStyle | None
    no_tools: str | None
    places_system: bool
    fields: frozenset[str]

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        documents: object = None,
        chat_template_kwargs: object = None,
        strict: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        system_placement: SystemPlacement = "last",
        start_tool_calls: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of the prompt; see ``render_chat``. ``documents`` and ``chat_template_kwargs`` are for templates.

        Raises ``ValueError``.
        """
        ...


class MistralRenderer:
    """Mistral's own rules."""

    name = MISTRAL
    source: str | None = None
    places_system = True
    fields: frozenset[str] = frozenset()
    end_names: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.calls: CallStyle | None = None
        self.no_tools: str | None = "tools need a tokenizer with [TOOL_CALLS], and this model's has none"
        if tokenizer.tool_calls_id is not None:
            self.calls, self.no_tools = ListCalls(tokenizer.tool_calls_id), None

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        documents: object = None,
        chat_template_kwargs: object = None,
        **options: Any,
    ) -> list[int]:
        """See ``Renderer``."""
        if self._tokenizer.mistral is None:
            raise ValueError(
                "chat needs a chat template, and this model has none, nor [INST] and the like for Mistral's format: "
                "give "
                "chat_template=FILE, or use generate"
            )
        for name, value in (("documents", documents), ("chat_template_kwargs", chat_template_kwargs)):
            if not asks_nothing(value):
                raise ValueError(f"{name} is for chat templates, and Mistral's own format has no place for it")
        return render_chat(self._tokenizer, messages, tools=tools if tools is None else check_tools(tools), **options)


class ChatRenderers:
    """The renderer of a checkpoint's conversations, and those of templates that requests bring.

    ``folders`` are those in which files are looked for, the tokenizer's first. ``why`` says why it is this one.
    ``chat_template``: a template's file or text, or "mistral"; None takes what the checkpoint has. Raises
    ``ValueError`` for a template that cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, folders: Sequence[Path], chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._folders = folders
        self._control: ControlTokens | None = None
        self._given = lru_cache(_MAX_GIVEN)(self._of_text)
        self.default, self.why = self._choose(chat_template)

    def of(self, chat_template: object = None) -> Renderer:
        """The renderer for a conversation that may bring its own template, as text."""
        if chat_template is None:
            return self.default
        if not isinstance(chat_template, str):
            raise ValueError(f"chat_template must be the text of a template, got {chat_template!r}")
        return self._given(chat_template)

    def describe(self) -> dict[str, Any]:
        """What serves and why: ``renderer`` ("mistral" or "template"), ``template`` (its file), ``why``, ``ends``,
        ``tools``.

        ``ends`` are the tokens that the template ends a turn with, by name; ``tools`` is how calls are written, or why
        tools are refused.
        """
        default = self.default
        return {
            "renderer": default.name,
            "template": default.source,
            "why": self.why,
            "ends": list(default.end_names),
            "tools": default.no_tools or f"calls are {default.calls.described}",  # type: ignore[union-attr]
        }

    def line(self) -> str:
        """The same in one line."""
        said = self.describe()
        by = f"the template of {said['template']}" if said["template"] else "Mistral's format"
        ends = f"; {', '.join(said['ends'])} ends a turn" if said["ends"] else ""
        return f"chat by {by}: {said['why']}{ends}; {said['tools']}"

    def _of_text(self, text: str) -> TemplateRenderer:
        return self._template(Templates("chat_template", {"default": text}))

    def _template(self, templates: Templates) -> TemplateRenderer:
        from nemo_engine.text.chat_template import ControlTokens
        from nemo_engine.text.template_renderer import TemplateRenderer

        if self._control is None:
            self._control = ControlTokens(self.tokenizer)
        return TemplateRenderer(self.tokenizer, self._control, templates, special_texts(self._folders, self.tokenizer))

    def _choose(self, option: str | None) -> tuple[Renderer, str]:
        mistral = MistralRenderer(self.tokenizer)
        if option == MISTRAL:
            return mistral, "chat_template asks for it"
        if option is not None:
            return self._template(given_template(option)), "chat_template gives it"
        templates = find_templates(self._folders)
        if templates is None:
            return mistral, "the checkpoint has no chat template"
        try:
            template = self._template(templates)
        except ValueError as error:
            raise ValueError(
                f"chat template in {self._folders[0]}: {error}; another can be given: chat_template=FILE, or "
                f'chat_template="{MISTRAL}" for Mistral\'s own format'
            ) from None
        difference = template.difference_from_mistral()
        if difference is None:
            return mistral, f"the template of {templates.source} makes the same prompts"
        return template, difference


def chat_line(tokenizer: Tokenizer, folders: Sequence[Path]) -> str:
    """What would make prompts of a checkpoint's conversations, in one line, or why nothing can. Loads no model."""
    try:
        return ChatRenderers(tokenizer, folders).line()
    except ValueError as error:
        return f"no chat: {error}"

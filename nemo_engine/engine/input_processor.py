"""Turns what a user passes in (prompts, messages, sampling parameters) into checked scheduler requests.

Every check that needs the vocabulary, the tokenizer or the engine's limits is made here, before anything is queued.
"""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from inspect import signature
from typing import Any, TypeAlias

from nemo_engine.checks import check_unicode
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.option_names import refuse_unknown_options
from nemo_engine.sampling_params import DEFAULT_TEMPERATURE, SamplingParams
from nemo_engine.scheduler import Request
from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text import ChatRenderers, Renderer
from nemo_engine.text.grammar import Grammar, GrammarCompiler

Prompt: TypeAlias = str | Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]
Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None

CHAT_TEMPERATURE = 0.3  # recommended by the makers of NeMo
_MAX_SALT = 1024
# A text that is encoded only to be counted or cut may have the larger of these many characters:
_LEAST_MAX_TEXT = 1 << 20
_MAX_TEXT_PER_TOKEN = 16  # for each token of the context
_MAX_BAD_WORD_TOKENS = 1 << 20  # every step compares them all
CHAT_MAX_TOKENS = 1024  # the limit of ``chat`` without sampling parameters
_CHAT_OPTIONS = {"chat_template", *signature(Renderer.render).parameters} - {"self", "messages", "max_tokens"}


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as token ids, with the text it came from if it was text.

    Prefixes match only between prompts of equal ``cache_salt``.

    ``end_ids`` end what is generated, beside the model's own end-of-sequence tokens.
    """

    text: str | None
    token_ids: list[int]
    cache_salt: str = ""
    end_ids: frozenset[int] = frozenset()


class InputProcessor:
    """Checks and encodes, in any thread.

    It keeps no state but counters: unseeded requests get their noise from one of them.
    """

    def __init__(
        self, model_config: ModelConfig, config: EngineConfig, renderers: ChatRenderers | None, max_model_len: int
    ) -> None:
        self._max_model_len = max_model_len
        self._vocab_size = model_config.vocab_size
        self._eos_token_ids = frozenset(model_config.eos_token_ids)
        self._config = config
        self._renderers = renderers
        self._tokenizer = tokenizer = None if renderers is None else renderers.tokenizer
        self._grammars = None
        self._chat_end_ids: frozenset[int] = frozenset()
        if renderers is not None and tokenizer is not None:
            self._chat_end_ids = self._end_ids(renderers.default)
            ends = (*model_config.eos_token_ids, *sorted(renderers.default.end_ids))
            self._grammars = GrammarCompiler(tokenizer, model_config.vocab_size, ends)
        self._unseeded = itertools.count(1)
        self._salts = itertools.count()
        self._numbers = itertools.count(1)

    def encode(self, prompt: Prompt, name: str = "prompt") -> EncodedPrompt:
        """Encode a string, ``{"prompt": str}`` or ``{"prompt_token_ids": [...]}``, the latter two also with a
        ``cache_salt`` of 1 to 1024 characters; errors call it ``name``.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt, name)
        if not isinstance(prompt, Mapping):
            raise ValueError(
                f'{name} must be a string, {{"prompt": ...}} or {{"prompt_token_ids": [...]}}, got '
                f"{reprlib.repr(prompt)}"
            )
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown:
            raise ValueError(
                f"{name} has unknown keys {sorted(map(str, unknown))}: it takes prompt, prompt_token_ids and cache_salt"
            )
        salt = check_cache_salt(prompt.get("cache_salt"), f'{name}["cache_salt"]')
        if prompt.get("prompt_token_ids") is not None:
            text = prompt.get("prompt")
            if text is not None and not isinstance(text, str):
                raise ValueError(f'{name}["prompt"] must be a string, got {reprlib.repr(text)}')
            return EncodedPrompt(text, self.check_ids(prompt["prompt_token_ids"], f'{name}["prompt_token_ids"]'), salt)
        if not isinstance(prompt.get("prompt"), str):
            raise ValueError(
                f"{name} needs prompt (a string) or prompt_token_ids (a list of ids), got {reprlib.repr(dict(prompt))}"
            )
        return dataclasses.replace(self._encode_text(prompt["prompt"], name), cache_salt=salt)

    def check_ids(self, token_ids: object, name: str) -> list[int]:
        """``token_ids`` as a list of ints within the vocabulary, not empty."""
        if isinstance(token_ids, (str, bytes, Mapping)) or not isinstance(token_ids, Iterable):
            raise ValueError(f"{name} must be a list of token ids, got {reprlib.repr(token_ids)}")
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
        if not ids:
            raise ValueError(f"{name} must not be empty")
        if {*map(type, ids)} != {int}:
            index = next(i for i, token_id in enumerate(ids) if type(token_id) is not int)
            raise ValueError(f"{name}[{index}] must be an integer, got {ids[index]!r}")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            index = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < self._vocab_size)
            raise ValueError(f"{name}[{index}] must be in [0, {self._vocab_size - 1}], got {ids[index]}")
        return ids

    def effective_params(self, params: SamplingParams | None, *, is_chat: bool = False) -> SamplingParams:
        """Fill in the defaults of ``chat`` or ``generate``, and check what depends on model and tokenizer."""
        if params is None:
            params = SamplingParams(max_tokens=CHAT_MAX_TOKENS) if is_chat else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be a SamplingParams, got {reprlib.repr(params)}")
        if params.temperature is None:
            params = dataclasses.replace(params, temperature=CHAT_TEMPERATURE if is_chat else DEFAULT_TEMPERATURE)
        limit = self._config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and limit != -1:
                count = self._vocab_size if value == -1 else value
                if count > limit:
                    raise ValueError(
                        f"{name} must be at most max_logprobs ({limit}), got {value} ({count} per position)"
                    )
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if token_id >= self._vocab_size:
                    raise ValueError(f"{name} must hold ids in [0, {self._vocab_size - 1}], got {token_id}")
        if self._tokenizer is None:
            for name in ("stop", "bad_words"):
                if getattr(params, name):
                    raise ValueError(f"{name} needs a tokenizer, and this engine has none: use token ids")
        self._grammar(params)
        return params

    def encode_all(self, prompts: Prompt | Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode one prompt or a list of them."""
        if isinstance(prompts, (str, Mapping)):
            return [self.encode(prompts)]
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a prompt or a list of prompts, got {reprlib.repr(prompts)}")
        return [self.encode(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]

    def encode_conversations(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any
    ) -> list[EncodedPrompt]:
        """Render one conversation or a list of them; ``options`` are those of ``Renderer.render``, and
        ``chat_template``, the text of a template that serves instead of the model's.
        """
        if self._renderers is None:
            raise ValueError("chat needs a tokenizer, and this engine has none: use generate with prompt_token_ids")
        refuse_unknown_options("chat", options, _CHAT_OPTIONS)
        renderer = self._renderers.of(options.pop("chat_template", None))
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise ValueError(f"messages must be a list of messages, got {reprlib.repr(messages)}")
        is_many = bool(messages) and all(isinstance(m, Sequence) and not isinstance(m, (str, bytes)) for m in messages)
        conversations: Sequence[Any] = messages if is_many else [messages]
        options = {"max_tokens": self._max_model_len} | options
        rendered = [renderer.render(conversation, **options) for conversation in conversations]
        ends = self._end_ids(renderer)
        return [EncodedPrompt(None, self.check_ids(ids, "messages"), end_ids=ends) for ids in rendered]

    def _end_ids(self, renderer: Renderer) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's end of sequence, and those that end a turn in the renderer."""
        assert self._tokenizer is not None
        eos = () if self._tokenizer.eos_id is None else (self._tokenizer.eos_id,)
        return frozenset(token_id for token_id in (*eos, *renderer.end_ids) if token_id < self._vocab_size)

    def params_per_prompt(self, params: Params, count: int, *, is_chat: bool) -> list[SamplingParams]:
        """The effective parameters of each of ``count`` prompts, given one for all or one for each."""
        if params is None or isinstance(params, SamplingParams):
            return [self.effective_params(params, is_chat=is_chat)] * count
        if not isinstance(params, Sequence):
            raise ValueError(f"sampling_params must be a SamplingParams or a list of them, got {reprlib.repr(params)}")
        if len(params) != count:
            raise ValueError(f"sampling_params must be one, or one per prompt ({count}), got {len(params)}")
        return [self.effective_params(prompt_params, is_chat=is_chat) for prompt_params in params]

    def requests(
        self, request_id: str, prompt: EncodedPrompt, params: SamplingParams, priority: int = 0, client: str = ""
    ) -> list[Request]:
        """The ``n`` scheduler requests of one user request; ``params`` are effective ones.

        ``request_id`` is a label, so each scheduler request gets a number in front of it.

        All ``n`` share the prompt's pages through the prefix cache. Where that is turned off, they have a common salt,
        which no other request has.
        """
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if priority != 0 and self._config.scheduling_policy != "priority":
            raise ValueError(f'priority needs scheduling_policy="priority", got priority {priority}')
        bad_words: Sequence[tuple[int, ...]] = ()
        if params.bad_words:
            assert self._tokenizer is not None
            # The model cannot generate an id beyond its vocabulary, so a word that needs one cannot appear.
            bad_words = [
                ids for ids in self._tokenizer.encode_bad_words(params.bad_words) if max(ids) < self._vocab_size
            ]
            longest = max(map(len, bad_words), default=0)
            size = len(bad_words) * longest * params.n
            if size > _MAX_BAD_WORD_TOKENS:
                raise ValueError(
                    f"bad_words must be at most {_MAX_BAD_WORD_TOKENS} tokens in all, each counted as long as the "
                    "longest and n times, "
                    f"got {size}"
                )
        unseeded = next(self._unseeded) if params.seed is None else 0
        salt = prompt.cache_salt.encode() if self._config.enable_prefix_caching else b""
        if params.n > 1 and not self._config.enable_prefix_caching:
            salt = blake2b(f"{request_id}\0{next(self._salts)}".encode(), digest_size=16).digest()
        ends = self._eos_token_ids | prompt.end_ids
        if params.structured_outputs is not None and ends:  # with no end token, a text ends where its grammar does
            ends |= self._chat_end_ids  # a grammar allows each of these where a text may end
        siblings = []
        for index in range(params.n):
            # Prompt log-probabilities are the same for all siblings: the first one computes them.
            sibling_params = (
                params
                if index == 0 or params.prompt_logprobs is None
                else dataclasses.replace(params, prompt_logprobs=None)
            )
            siblings.append(
                Request(
                    f"{next(self._numbers)}-{request_id}",
                    prompt.token_ids,
                    sibling_params,
                    seed=self._seed(params.seed, unseeded, index),
                    eos_token_ids=ends,
                    bad_words_token_ids=tuple(bad_words),
                    priority=priority,
                    client=client,
                    cache_salt=salt,
                    grammar=self._grammar(params),
                )
            )
        return siblings

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        """A grammar at its start, for one completion; None for free text. The first request for it compiles it."""
        form = params.structured_outputs
        if form is None:
            return None
        if self._grammars is None:
            raise ValueError("structured_outputs needs a tokenizer, and this engine has none")
        assert isinstance(form, StructuredOutputsParams)
        return self._grammars.compile(form)

    def _seed(self, seed: int | None, unseeded: int, index: int) -> int:
        if seed is not None:
            return (seed + index) % 2**64
        digest = blake2b(f"{self._config.seed} {unseeded} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _encode_text(self, text: str, name: str) -> EncodedPrompt:
        if self._tokenizer is None:
            raise ValueError(f'{name} is text, and this engine has no tokenizer: pass {{"prompt_token_ids": [...]}}')
        if not text:
            raise ValueError(f"{name} must not be empty")
        check_unicode(name, text)
        self.check_length(text, name)
        return EncodedPrompt(text, self.check_ids(self._tokenizer.encode(text), name))

    def check_size(self, text: str, name: str) -> None:
        """Raise ``ValueError`` for a text that would take too long to encode, for callers that set no limit of
        tokens.
        """
        limit = max(_LEAST_MAX_TEXT, _MAX_TEXT_PER_TOKEN * self._max_model_len)
        if len(text) > limit:
            raise ValueError(f"{name} must have at most {limit} characters here, got {len(text)}")

    def check_length(self, text: str, name: str) -> None:
        """Raise ``ValueError`` for a text of more tokens than the context holds, without encoding all of it."""
        assert self._tokenizer is not None
        limit = self._max_model_len
        if self._tokenizer.exceeds(text, limit):
            least = max(limit + 1, self._tokenizer.min_tokens(text))
            raise ValueError(f"{name} has at least {least} tokens: more than max_model_len {limit}")


def check_cache_salt(salt: object, name: str) -> str:
    """A salt that keeps prefixes apart, "" for none."""
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 1 <= len(salt) <= _MAX_SALT:
        raise ValueError(f"{name} must be a string of 1 to {_MAX_SALT} characters, got {salt!r}")
    check_unicode(name, salt)
    return salt

"""What a user may ask of one request.

Names, defaults and rules are vLLM's; every value is checked here or at admission.

Must not know: tokenizers, models, requests. Checks that need the vocabulary, the context length or the tokenizer are
made by ``Engine`` when the request arrives.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nemo_engine.checks import check_unicode
from nemo_engine.option_names import refuse_unknown_options
from nemo_engine.structured_outputs import StructuredOutputsParams

MAX_N = 16384
GREEDY_TEMPERATURE = 1e-5  # below: greedy
MIN_TEMPERATURE = 1e-2  # between GREEDY_TEMPERATURE and this: raised to this, with a warning
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP = 1024  # each is looked for after every token
MAX_STOP_LENGTH = 10_000  # characters, so many of which are held back
MAX_STOP_OF_ALL = 16_384  # stop strings times completions
MAX_BAD_WORDS = 10_000
MAX_BAD_WORD_LENGTH = 1000  # characters
DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
_MAX_FLOAT = sys.float_info.max


class RequestOutputKind(Enum):
    """What a streamed ``RequestOutput`` carries: all so far, only what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """Stop when the output ends in ``min_count`` repetitions of one pattern of tokens.

    Patterns of ``min_pattern_size`` to ``max_pattern_size`` tokens are looked for; the finish reason is "repetition".
    ``max_pattern_size=0`` turns the detection off.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            _check_int(f"repetition_detection.{name}", getattr(self, name), low=0)
        if self.max_pattern_size == 0:
            return
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"repetition_detection.min_pattern_size must be at most max_pattern_size ({self.max_pattern_size}), "
                f"got {self.min_pattern_size}"
            )
        if self.min_count < 2:
            raise ValueError(f"repetition_detection.min_count must be at least 2, got {self.min_count}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what it reports.

    The order of operations on the logits is: raw log-probabilities are taken; then in fp32 ``structured_outputs``,
    ``allowed_token_ids``, ``bad_words``, ``min_tokens`` and ``logit_bias``, the repetition, frequency and presence
    penalties; greedy requests take the maximum; for the others ``temperature``, ``min_p``, ``top_k``, ``top_p`` (the
    token that crosses ``top_p`` is kept), and the draw.

    n: completions per prompt, sharing the prompt's pages; above 1 needs sampling.
    presence_penalty, frequency_penalty: [-2, 2], over generated tokens only.
    repetition_penalty: finite, > 0, over prompt and generated tokens; above 1 discourages.
    temperature: [0, 2]; 0 is greedy, and top_p, top_k and min_p then mean nothing. None means the default of the call,
        which fills it in: 1.0, or for ``chat`` the model's own. A copy or ``dataclasses.replace`` keeps what was given.
    top_p: (0, 1].
    top_k: 0 or -1 is off.
    min_p: [0, 1], relative to the most likely token.
    seed: 64-bit; -1 or None lets the engine choose. The same seed gives the same tokens in any batch.
    stop: strings that end the output, at most 1024 of at most 10,000 characters, cut off unless
        ``include_stop_str_in_output``.
    include_stop_str_in_output: keep the stop string, or the text of a stop token, at the end of the text.
    stop_token_ids: ids that end the output and stay in ``token_ids``.
    ignore_eos: do not end at the end-of-sequence token.
    max_tokens: None means as many as context and cache hold.
    min_tokens: until then no stop token can be chosen.
    logprobs, prompt_logprobs: alternatives to report per position, -1 for the whole vocabulary; the chosen or prompt
        token is always added. prompt_logprobs turns off reading the prefix cache for the request.
    logprob_token_ids: report exactly these ids (at most 128) beside the chosen token.
    logit_bias: {token id: bias}.
    allowed_token_ids: nothing else can be chosen.
    bad_words: at most 10,000 of at most 1000 characters, never completed in the output.
    skip_special_tokens, detokenize: leave control tokens out of the text; make text at all.
    spaces_between_special_tokens: taken for compatibility; these tokenizers never put spaces there.
    output_kind, stream_interval: what the outputs of ``step()`` carry, and how many new tokens one is worth.
    repetition_detection: end a request that loops.
    structured_outputs: the form of the output, a ``StructuredOutputsParams`` or a mapping with its fields, such as
        {"json": {"type": "object"}} or {"choice": ["yes", "no"]}. Stop strings and ``max_tokens`` may cut it short;
        with ``ignore_eos``, it ends where its grammar does.
    speculation: whether an engine with ``speculative_config`` may look up drafts for the request. Its tokens are the
        same.
    extra_args: accepted only when empty.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    repetition_detection: RepetitionDetection | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    speculation: bool = True
    extra_args: Mapping[str, Any] | None = None

    def __new__(cls, *args: Any, **options: Any) -> SamplingParams:
        """Refuse unknown names by a ``ValueError`` that says what to use, before the constructor would by a
        ``TypeError``.
        """
        refuse_unknown_options("SamplingParams", options, cls.__dataclass_fields__)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        put = _Setter(self)
        self._check_counts(put)
        self._check_distribution(put)
        self._check_ends(put)
        self._check_tokens(put)
        if self.structured_outputs is not None:
            put("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        if self.extra_args:
            raise ValueError(f"extra_args is not supported, got {dict(self.extra_args)!r}")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n must be 1 with greedy sampling (temperature 0), got {self.n}")

    def _check_counts(self, put: _Setter) -> None:
        _check_int("n", self.n, low=1, high=MAX_N)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1)
        _check_int("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is True:
                put(name, 1)
            elif value is False:
                put(name, None)
            elif value is not None:
                _check_int(name, value, low=-1, low_text="at least 0, or -1 for the whole vocabulary")
        if self.stream_interval is not None:
            _check_int("stream_interval", self.stream_interval, low=1)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
                     "include_stop_str_in_output", "speculation"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check_distribution(self, put: _Setter) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, _check_float(name, getattr(self, name), low=-2.0, high=2.0))
        put("repetition_penalty", _check_float("repetition_penalty", self.repetition_penalty))
        if self.repetition_penalty <= 0.0:
            raise ValueError(f"repetition_penalty must be greater than 0, got {self.repetition_penalty}")
        put("top_p", _check_float("top_p", self.top_p))
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        _check_int("top_k", self.top_k, low=-1, low_text="0 or -1 (off), or at least 1")
        put("min_p", _check_float("min_p", self.min_p, low=0.0, high=1.0))
        if self.temperature is not None:
            temperature = _check_float("temperature", self.temperature, low=0.0, high=2.0)
            if temperature < GREEDY_TEMPERATURE:
                temperature = 0.0
            elif temperature < MIN_TEMPERATURE:
                warnings.warn(
                    f"temperature {temperature} is raised to {MIN_TEMPERATURE}: below it logits overflow", stacklevel=4
                )
                temperature = MIN_TEMPERATURE
            put("temperature", temperature)
        put("top_k", max(self.top_k, 0))
        if self.seed is not None:
            _check_int(
                "seed", self.seed, low=-1, high=2**64 - 1, low_text="at least 0, or -1 for a seed of the engine's"
            )
            if self.seed == -1:
                put("seed", None)

    def _check_ends(self, put: _Setter) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else _as_list("stop", self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
            check_unicode("stop", text)
        put("stop", tuple(dict.fromkeys(stop)))
        if len(stop) > MAX_STOP:
            raise ValueError(f"stop must hold at most {MAX_STOP} strings, got {len(stop)}")
        longest = max(map(len, stop), default=0)
        if longest > MAX_STOP_LENGTH:
            raise ValueError(f"stop must hold strings of at most {MAX_STOP_LENGTH} characters, got one of {longest}")
        if len(stop) * self.n > MAX_STOP_OF_ALL:
            raise ValueError(
                f"stop must hold at most {MAX_STOP_OF_ALL // self.n} strings with n {self.n}, got {len(stop)}"
            )
        if stop and not self.detokenize:
            raise ValueError("stop needs detokenize=True: stop strings are looked for in the text")
        put("stop_token_ids", _check_ids("stop_token_ids", self.stop_token_ids))
        if self.repetition_detection is not None and not isinstance(self.repetition_detection, RepetitionDetection):
            raise ValueError(f"repetition_detection must be a RepetitionDetection, got {self.repetition_detection!r}")

    def _check_tokens(self, put: _Setter) -> None:
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _check_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must not be empty")
        if self.logprob_token_ids is not None:
            ids = _check_ids("logprob_token_ids", self.logprob_token_ids)
            put("logprob_token_ids", ids)
            if len(ids) > MAX_LOGPROB_TOKEN_IDS:
                raise ValueError(f"logprob_token_ids must hold at most {MAX_LOGPROB_TOKEN_IDS} ids, got {len(ids)}")
            if self.logprobs is not None and self.logprobs != len(ids):
                raise ValueError(
                    f"logprobs must equal the number of logprob_token_ids ({len(ids)}), got {self.logprobs}"
                )
        words = _as_list("bad_words", self.bad_words)
        for word in words:
            if not isinstance(word, str) or not word:
                raise ValueError(f"bad_words must hold non-empty strings, got {word!r}")
            if len(word) > MAX_BAD_WORD_LENGTH:
                raise ValueError(
                    f"bad_words must hold words of at most {MAX_BAD_WORD_LENGTH} characters, got one of {len(word)}"
                )
        put("bad_words", tuple(dict.fromkeys(words)))
        if len(words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words must hold at most {MAX_BAD_WORDS} words, got {len(words)}")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
            bias: dict[int, float] = {}
            for key, value in self.logit_bias.items():
                is_number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 20
                token_id = int(key) if is_number else key
                _check_int("logit_bias key", token_id, low=0)
                bias[token_id] = min(100.0, max(-100.0, _check_float(f"logit_bias[{token_id}]", value)))
            put("logit_bias", bias)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one that the masks leave."""
        return self.temperature is not None and self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens the request already holds."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def why_no_drafts(self) -> str | None:
        """Why speculation makes no drafts for such a request; None if it may."""
        if not self.speculation:
            return "speculation is false"
        if self.structured_outputs is not None:
            return "structured_outputs: which tokens may come is known one at a time"
        if self.has_penalties:
            return "penalties: each token changes what the next is chosen from"
        return None

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities of generated tokens are asked for."""
        return self.logprobs is not None or self.logprob_token_ids is not None


class _Setter:
    """Normalises fields of a frozen dataclass while it is being constructed."""

    def __init__(self, target: SamplingParams) -> None:
        self._target = target

    def __call__(self, name: str, value: object) -> None:
        object.__setattr__(self._target, name, value)


def _check_int(name: str, value: object, *, low: int, high: int | None = None, low_text: str | None = None) -> None:
    if type(value) is int and value >= low and (high is None or value <= high):
        return  # the words for an error take longer than the check
    limit = low_text or (f"at least {low}" if high is None else f"in [{low}, {high}]")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer {limit}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {limit}, got {value}")


def _check_float(name: str, value: object, *, low: float = -_MAX_FLOAT, high: float = _MAX_FLOAT) -> float:
    if type(value) is float and low <= value <= high:
        return value
    # An int of any size can be compared with a float; a NaN is within no limits.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MAX_FLOAT <= value <= _MAX_FLOAT:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return float(value)


def _as_list(name: str, value: object) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return list(value)


def _check_ids(name: str, value: object) -> tuple[int, ...]:
    ids = _as_list(name, value)
    for token_id in ids:
        _check_int(f"{name} entry", token_id, low=0)
    return tuple(dict.fromkeys(ids))

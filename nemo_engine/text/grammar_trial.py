"""Compiling a grammar that may be hostile: in a process of its own first, with little time, memory and stack.

llguidance bounds what a token may cost, but some small inputs take it minutes, gigabytes or the whole stack to compile.
So whatever is not known to be harmless is compiled by this file as a script, which may be killed. The texts that
llguidance reads, and its limits, are made here for both processes. As a script it must import nothing of this package.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

TRIAL_CPU_SECONDS = 3
TRIAL_WALL_SECONDS = 20.0  # on a busy machine
TRIAL_MEMORY = 160 << 20  # bytes more than an idle trial has
_TRIAL_STACK = 4 << 20  # bytes; the engine compiles on one that is larger by far
COMPILE_STACK = 64 << 20
MAX_LEXER_STATES = 50_000  # of 1 to 2 kB, for each request
NOTHING = "no text satisfies it"

_trials = threading.BoundedSemaphore(2)
_stack_size = threading.Lock()


class UntriedError(ValueError):
    """A grammar of which nothing is known: the machine was too busy, or has no processes left. Another time may do."""


def matcher(tokenizer: Any, spec: Mapping[str, Any]) -> Any:
    """An ``LLMatcher`` at the start of ``spec``; ``ValueError`` if it cannot be honoured.

    spec: ``kind`` (regex, choice, grammar, or lark for one that is surely Lark) and ``text``.
    """
    from llguidance import LLMatcher, LLParserLimits

    kind, text = spec["kind"], spec["text"]
    if kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    elif kind == "choice":
        grammar = LLMatcher.grammar_from_regex(_one_of(json.loads(text)))
    else:
        grammar = LLMatcher.grammar_from_lark(text if kind == "lark" else _lark(text))
    limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
    compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not compiled.is_error():
        compiled.compute_bitmask()
    error = plain_error(compiled.get_error())
    if error.startswith("NoExtension") or (not error and compiled.is_stopped() and not compiled.is_accepting()):
        raise ValueError(NOTHING)
    if error:
        raise ValueError(error)
    return compiled


def plain_error(text: str) -> str:
    """llguidance's message in one line, without its excerpt of the grammar."""
    text = re.split(r"\n\s+\d+ \| |\n?<non-verbose/>|\n<state>|\s*<backtrace>", text)[0]
    text = re.sub(r"\s*\n\s*", " ", text).strip()
    return text if len(text) <= 400 else text[:200] + " ... " + text[-190:]


def _one_of(texts: list[str]) -> str:
    """A regular expression: as rules of a grammar, more than some thousand texts would be too many to follow at
    once.
    """
    return "|".join([re.sub(r"[^0-9A-Za-z]", lambda match: f"\\x{{{ord(match[0]):x}}}", text) for text in texts])


def _lark(text: str) -> str:
    """``text``, or its translation from GBNF if it is not Lark."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark: str = any_to_lark(text)
        return lark
    except Exception as error:
        raise ValueError(f"it has no rule `start:`, and is not GBNF either: {error}") from None


def matches_nothing(tokenizer: Any, lark: str) -> bool:
    """Whether no text fits the grammar ``lark``; ``ValueError`` if it is none."""
    try:
        matcher(tokenizer, {"kind": "lark", "text": lark})
    except ValueError as error:
        if str(error) == NOTHING:
            return True
        raise
    return False


def allows_more_than_white_space(tokenizer: Any, pattern: str) -> bool:
    """Whether the regular expression ``pattern`` matches a text that is not JSON white space; ``ValueError`` if it is
    none.
    """
    from llguidance import regex_to_lark

    return not matches_nothing(tokenizer, f"start: W\nW: /{regex_to_lark(pattern)}/ & ~/[ \\t\\r\\n]*/")


def on_large_stack(function: Callable[[], T], size: int = COMPILE_STACK) -> T:
    """``function()`` in a thread with ``size`` bytes of stack: compilers recurse as deep as their input."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    with _stack_size:
        before = threading.stack_size(size)
        try:
            thread = threading.Thread(target=run, name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def try_compile(spec: Mapping[str, Any]) -> None:
    """Compile ``spec`` in a process of its own; ``ValueError`` if it is refused or costs too much."""
    _try(spec)


def find_empty(grammars: Mapping[str, str]) -> list[str]:
    """The names of those ``grammars``, Lark by name, that match nothing; ``ValueError`` if finding out costs too
    much.
    """
    return _try({"grammars": grammars})


def _try(spec: Mapping[str, Any]) -> list[str]:
    with _trials:
        try:
            trial = subprocess.run(
                [sys.executable, "-P", __file__],
                input=json.dumps(spec),
                capture_output=True,
                text=True,
                timeout=TRIAL_WALL_SECONDS,
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # arenas would reserve what the limit counts
            )
            answer = json.loads(trial.stdout) if trial.returncode == 0 else None
        except (subprocess.TimeoutExpired, OSError) as error:
            raise UntriedError(f"it could not be tried: {error}") from None
    if answer is None:
        raise ValueError(
            f"it is too complex: compiling it takes more than {TRIAL_CPU_SECONDS} s, {TRIAL_MEMORY >> 20} MiB or its "
            "nesting "
            f"{_TRIAL_STACK >> 20} MiB of stack"
        )
    if answer["error"]:
        raise ValueError(answer["error"])
    empty: list[str] = answer["empty"]
    return empty


def _limit() -> None:
    """Give this process little more than it has, where the system knows such limits."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_CPU_SECONDS, TRIAL_CPU_SECONDS))
    max_bytes = pages * resource.getpagesize() + TRIAL_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def _main() -> None:
    from llguidance import LLTokenizer

    spec = json.loads(sys.stdin.read())
    tokenizer = LLTokenizer("byte")
    _limit()

    empty: list[str] = []

    def work() -> str:
        try:
            for name, text in spec.get("grammars", {}).items():
                if matches_nothing(tokenizer, text):
                    empty.append(name)
            if "grammars" not in spec:
                if spec.get("whitespace_pattern") and allows_more_than_white_space(
                    tokenizer, spec["whitespace_pattern"]
                ):
                    return "whitespace_pattern: it must match nothing but white space"
                matcher(tokenizer, spec)
        except ValueError as error:
            return str(error)
        return ""

    print(json.dumps({"error": on_large_stack(work, _TRIAL_STACK), "empty": empty}))


if __name__ == "__main__":
    _main()

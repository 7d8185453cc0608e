"""Mistral's chat format over a tokenizer that mistral-common does not know: its encoder of messages, with the ids of ``tokenizer.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_engine.text.tokenizer import Tokenizer

_NEEDED = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
)


class _Tokens:
    """What the encoder asks of a tokenizer."""

    model_settings_builder = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self._tokenizer = tokenizer

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        assert not bos and not eos
        return self._tokenizer.encode_span(text)

    def get_special_token(self, name: str) -> int:
        token_id = self._tokenizer.added_id(name)
        return -1 if token_id is None else token_id  # [PREFIX] and [SUFFIX] are not for chat


def instruct_over(tokenizer: Tokenizer) -> Any:
    """NeMo's encoder of messages with the ids of ``tokenizer``, None if that lacks the control tokens for it."""
    if (
        tokenizer.bos_id is None
        or tokenizer.eos_id is None
        or any(tokenizer.added_id(name) is None for name in _NEEDED)
    ):
        return None
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3

    return InstructTokenizerV3(_Tokens(tokenizer))  # type: ignore[arg-type]

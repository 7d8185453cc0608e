"""Text in and out: tokenizers, chat rendering to ids, incremental detokenization. Knows no requests and no tensors."""

from nemo_engine.text.chat import render_chat, tool_call_id_for_prompt
from nemo_engine.text.detokenizer import Detokenizer
from nemo_engine.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer", "render_chat", "tool_call_id_for_prompt"]

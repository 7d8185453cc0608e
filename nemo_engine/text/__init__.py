"""Text in and out: tokenizers, chat rendering to ids, tool calls, incremental detokenization.

Knows no requests and no tensors.
"""

from nemo_engine.text.chat import SystemPlacement, render_chat
from nemo_engine.text.chat_renderer import ChatRenderers, Renderer, chat_line
from nemo_engine.text.detokenizer import Detokenizer
from nemo_engine.text.messages import tool_call_id_for_prompt
from nemo_engine.text.tokenizer import Tokenizer, load_tokenizer
from nemo_engine.text.tool_calls import AnswerParser, parse_answer
from nemo_engine.text.tools import ToolChoice, check_tool_choice, check_tools, tool_call_schema
from nemo_engine.text.vocabulary import AddedToken

__all__ = [
    "AddedToken",
    "AnswerParser",
    "ChatRenderers",
    "Detokenizer",
    "Renderer",
    "SystemPlacement",
    "ToolChoice",
    "Tokenizer",
    "chat_line",
    "check_tool_choice",
    "check_tools",
    "load_tokenizer",
    "parse_answer",
    "render_chat",
    "tool_call_id_for_prompt",
    "tool_call_schema",
]

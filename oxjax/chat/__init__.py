"""Conversations with a model: chat templates, parsing of tool calls and reasoning, and running of tools."""

from oxjax.chat.call_grammar import call_grammar, call_schema
from oxjax.chat.forms import ToolCall
from oxjax.chat.parser import ChatParser, Delta, Message
from oxjax.chat.session import ChatDelta, ChatResult, Session
from oxjax.chat.tool_format import DIALECTS, Dialect, detect
from oxjax.chat.tools import ToolDispatcher, ToolResult, tool_schema

__all__ = [
    "DIALECTS",
    "ChatDelta",
    "ChatParser",
    "ChatResult",
    "Delta",
    "Dialect",
    "Message",
    "Session",
    "ToolCall",
    "ToolDispatcher",
    "ToolResult",
    "call_grammar",
    "call_schema",
    "detect",
    "tool_schema",
]

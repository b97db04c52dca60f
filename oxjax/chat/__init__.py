"""Conversations with a model: its template, the calls and the reasoning in what it writes, and running the calls."""

from oxjax.chat.dialect import DIALECTS, Dialect, detect
from oxjax.chat.forms import ToolCall
from oxjax.chat.parser import ChatParser, Delta, Message

__all__ = ["DIALECTS", "ChatParser", "Delta", "Dialect", "Message", "ToolCall", "detect"]

"""Dialects: the formats in which models write tool calls and reasoning, detected from chat templates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from oxjax.chat.forms import GemmaCalls, JsonCalls, NamedCalls, PythonCalls, TaggedCalls
from oxjax.errors import ChatTemplateError

CallForm = JsonCalls | NamedCalls | TaggedCalls | GemmaCalls | PythonCalls


@dataclass(frozen=True)
class Dialect:
    """Format in which a model writes tool calls and reasoning.

    Attributes:
        name: its name in `DIALECTS`.
        calls: forms of calls; those with the same `begin` are tried in order.
        ignored: texts that are dropped.
        reasoning: (begin, end) of reasoning.
        harmony: messages are in the channels of gpt-oss, and the other fields do not apply.
    """

    name: str
    calls: tuple[CallForm, ...] = ()
    ignored: tuple[str, ...] = ()
    reasoning: tuple[tuple[str, str], ...] = ()
    harmony: bool = False

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """All texts with a meaning in this dialect."""
        texts = [t for form in self.calls for t in vars(form).values() if isinstance(t, str)]
        texts += [end for form in self.calls if isinstance(form, TaggedCalls) for end, _ in form.key_ends]
        texts += [t for pair in self.reasoning for t in pair]
        return tuple(t for t in (*texts, *self.ignored, *(HARMONY_MARKERS if self.harmony else ())) if t)

    @property
    def has_calls(self) -> bool:
        """True if the dialect has a format of calls."""
        return self.harmony or bool(self.calls)

    def without_calls(self) -> Dialect:
        """This dialect without calls."""
        return replace(self, calls=())

    @classmethod
    def custom(
        cls,
        begin: str,
        end: str = "",
        *,
        name_key: str = "name",
        arguments_key: str = "arguments",
        reasoning: tuple[tuple[str, str], ...] = (("<think>", "</think>"),),
    ) -> Dialect:
        """Make a dialect whose calls are JSON between two texts.

        Args:
            begin, end: texts before and after a call, or an array of calls; the model may omit `end`.
            name_key, arguments_key: keys of a call for the name of the function and its arguments.
            reasoning: (begin, end) of reasoning.

        Raises:
            ChatTemplateError: `begin` is empty.
        """
        if not begin:
            raise ChatTemplateError("a dialect needs a text that calls begin with; begin is empty")
        return cls("custom", (JsonCalls(begin, end, (name_key,), (arguments_key,)),), reasoning=reasoning)


HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_SEP, _CALL = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>"
_PARAMETERS, _TOOL_NAME = ("parameters", "arguments"), ("tool_name", "name")  # the first is what the model writes
_PLAIN_KEY = (('">', None), ('" string="true">', True), ('" string="false">', False))


def _invoke(tag: str) -> TaggedCalls:
    return TaggedCalls(
        begin=f'<{tag}invoke name="',
        open="",
        name_end='">',
        key=f'<{tag}parameter name="',
        key_ends=_PLAIN_KEY,
        value_end=f"</{tag}parameter>",
        close=f"</{tag}invoke>",
    )


DIALECTS: dict[str, Dialect] = {
    d.name: d
    for d in (
        Dialect("plain"),
        Dialect("gpt-oss", harmony=True),
        Dialect("hermes", (JsonCalls("<tool_call>", "</tool_call>"),)),
        Dialect(
            "llama3",
            (
                JsonCalls("<|python_tag|>", arguments_keys=_PARAMETERS),
                PythonCalls("<|python_tag|>"),
                JsonCalls("", arguments_keys=_PARAMETERS),
            ),
        ),
        Dialect(
            "mistral",
            (
                JsonCalls("[TOOL_CALLS]"),
                NamedCalls("[TOOL_CALLS]", "[ARGS]", id_mark="[CALL_ID]"),
            ),
        ),
        Dialect("gemma4", (GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>'),)),
        Dialect(
            "deepseek",
            (
                NamedCalls(f"{_CALL}function{_SEP}", "\n```json", "```<｜tool▁call▁end｜>"),
                NamedCalls(_CALL, _SEP, "<｜tool▁call▁end｜>"),
            ),
            ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
        Dialect(
            "deepseek-v3.2",
            (_invoke("｜DSML｜"),),
            ignored=tuple(f"<{s}｜DSML｜{t}>" for s in ("", "/") for t in ("function_calls", "tool_calls")),
        ),
        Dialect(
            "qwen3-coder",
            (
                JsonCalls("<tool_call>", "</tool_call>"),
                TaggedCalls(
                    begin="<tool_call>",
                    open="<function=",
                    name_end=">",
                    key="<parameter=",
                    key_ends=((">", None),),
                    value_end="</parameter>",
                    close="</function>",
                    end="</tool_call>",
                    own_lines=True,
                ),
            ),
        ),
        Dialect(
            "glm",
            (
                TaggedCalls(
                    begin="<tool_call>",
                    open="",
                    name_end="",
                    key="<arg_key>",
                    key_ends=(("</arg_key>", None),),
                    value="<arg_value>",
                    value_end="</arg_value>",
                    close="</tool_call>",
                ),
            ),
        ),
        Dialect("minimax-m2", (_invoke(""),), ignored=("<minimax:tool_call>", "</minimax:tool_call>")),
        Dialect(
            "minicpm5",
            (
                TaggedCalls(
                    begin='<function name="',
                    open="",
                    name_end='">',
                    key='<param name="',
                    key_ends=(('">', None),),
                    value_end="</param>",
                    quote=("<![CDATA[", "]]>"),
                    close="</function>",
                ),
            ),
        ),
        Dialect(
            "kimi-k2",
            (NamedCalls("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", head_is_id=True),),
            ignored=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ),
        Dialect("tool_calls", (JsonCalls("<tool_calls>", "</tool_calls>"),)),
        Dialect("gigachat", (JsonCalls("<|function_call|>"),)),
        Dialect(
            "cohere2",
            (JsonCalls("<|START_ACTION|>", "<|END_ACTION|>", _TOOL_NAME, _PARAMETERS),),
            ignored=("<|START_TEXT|>", "<|END_TEXT|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
        Dialect("command-r", (JsonCalls("Action:\n```json", "```", _TOOL_NAME, _PARAMETERS),)),
        Dialect("lfm2", (PythonCalls("<|tool_call_start|>", "<|tool_call_end|>"),)),
        Dialect("functools", (JsonCalls("functools"),)),
    )
}

# The first of these that a template contains names its dialect: special tokens before tags that several share.
_MARKS = {
    "<|channel|>": "gpt-oss",
    "｜DSML｜": "deepseek-v3.2",
    "<｜tool▁call▁begin｜>": "deepseek",
    "<|tool_call>call:": "gemma4",
    "[TOOL_CALLS]": "mistral",
    "<|tool_call_begin|>": "kimi-k2",
    "<|tool_call_start|>": "lfm2",
    "<|START_ACTION|>": "cohere2",
    "<|function_call|>": "gigachat",
    "<minimax:tool_call>": "minimax-m2",
    "<function=": "qwen3-coder",
    "<arg_key>": "glm",
    '<function name="': "minicpm5",
    "<tool_calls>": "tool_calls",
    "<tool_call>": "hermes",
    "functools[": "functools",
    "Action:\\n```json": "command-r",
    "<|python_tag|>": "llama3",
    '"parameters": ': "llama3",
}
_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)


def detect(source: str) -> Dialect:
    """Detect the dialect of a chat template; "plain" if it has no known one.

    Args:
        source: Jinja text.
    """
    return _with_reasoning(DIALECTS[next((name for mark, name in _MARKS.items() if mark in source), "plain")], source)


def named(name: str, source: str) -> Dialect:
    """Dialect by name, with the delimiters of reasoning from a chat template.

    Args:
        name: of `DIALECTS`.
        source: Jinja text.

    Raises:
        ChatTemplateError: the name is unknown.
    """
    if name not in DIALECTS:
        raise ChatTemplateError(f"there is no dialect {name!r}; there are {', '.join(sorted(DIALECTS))}")
    return _with_reasoning(DIALECTS[name], source)


def _with_reasoning(dialect: Dialect, source: str) -> Dialect:
    return replace(dialect, reasoning=tuple(pair for pair in _REASONING if pair[0] in source or pair[1] in source))

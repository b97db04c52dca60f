"""Sandboxed Jinja environment for untrusted templates: no Python internals, and every operation metered.

Only the methods of `METHODS` can be called on strings and containers, and nothing on other Python objects. The
bounds on time and memory are those of `meter`; here is where the compiled template and jinja2 report to it.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes, pass_context, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace

from oxjax.errors import ChatTemplateError

from .meter import FILTER_GUARDS, METER, METHOD_GUARDS, format_text, modulo, multiply, padding, power

_STRING_METHODS = """
    capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix
    removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper zfill
"""
METHODS = {
    str: frozenset(_STRING_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
}
OWN_OBJECTS = (LoopContext, Cycler, Joiner, Macro, BlockReference, TemplateReference)
# Slow or random in ways no size check bounds, and of no use in a prompt.
REMOVED_FILTERS = frozenset({"pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"})


class MeteredCode(CodeGenerator):
    """Compiles templates so that what the environment's methods do not see reports to the meter, too."""

    def enter_frame(self, frame: Frame) -> None:
        """Begin a loop turn, a macro or a block."""
        super().enter_frame(frame)
        self.writeline("environment.tick()")

    def _made(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """`[a, b]`."""
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """`{a: b}`."""
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """`(a, b)`, unless it is assigned to."""
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """`a[i:j]` bypasses `environment.getitem`; `a[i]` does not."""
        if isinstance(node.arg, nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`."""
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """`a == b`, `a in b`."""
        self.write("(environment.tick() or ")
        super().visit_Compare(node, frame)
        self.write(")")


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """A namespace that does not print its values: those may refer to each other without end."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = METER.get()
        meter.check(padding(format_spec))
        return meter.made(super().format_field(value, format_spec))


@pass_environment
def _join(environment: Sandbox, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """`value|join(d)`; the separator is put between, piece by piece, so that it is counted every time."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    pieces = itertools.chain.from_iterable((d, piece) for piece in value)
    return environment.concat(str(piece) for piece in itertools.islice(pieces, 1, None))


@pass_environment
def _sum(environment: Sandbox, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """`value|sum`; adding lists is counted like any addition."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    for item in value:
        environment.tick()
        start = environment.made(start + item)
    return start


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (Hugging Face's settings), every operation reported to `METER`."""

    code_generator_class = MeteredCode
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self):
        # Unoptimised: constant folding would run filters at compile time, unmetered.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[GenerationTag, LoopControlExtension],
            finalize=_finalize,
        )
        self.binop_table |= {"%": modulo, "*": multiply, "**": power}
        own = {"format": format_text, "join": _join, "sum": _sum}
        kept = {name: f for name, f in (self.filters | own).items() if name not in REMOVED_FILTERS}
        self.filters = {name: _metered(f, FILTER_GUARDS.get(name)) for name, f in kept.items()}
        self.tests = {name: _metered(f, None) for name, f in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter whose result is metered like that of the built-in ones."""
        self.filters[name] = _metered(function, None)

    def tick(self) -> None:
        """Report one operation."""
        METER.get().tick()

    def made(self, value: Any) -> Any:
        """Report a value that was made."""
        return METER.get().made(value)

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a template, macro, block or `~` puts together; jinja2 calls this for every buffer."""
        meter, kept, size = METER.get(), [], 0
        for piece in pieces:
            size += len(piece)
            meter.check(size)
            kept.append(piece)
        return meter.made("".join(kept))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No underscores, no mutation, and no methods but those of `METHODS` and of Jinja's own objects."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        if allowed is not None:
            return attr in allowed or not callable(value)
        return not callable(value) or isinstance(obj, (*OWN_OBJECTS, Namespace))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Reaching for internals is an error at once; any other method that is not allowed is undefined."""
        if attribute.startswith("_"):
            raise ChatTemplateError(f"the template reaches for {attribute!r} of a {type(obj).__name__}")
        return super().unsafe_undefined(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` through a formatter that looks attributes up in the sandbox and counts what it makes."""
        if super().wrap_str_format(value) is None:
            return None
        text, name = value.__self__, value.__name__

        def formatted(*args: Any, **kwargs: Any) -> str:
            if name == "format_map":
                (kwargs,), args = args, ()
            return _Formatter(self).vformat(str(text), args, kwargs)

        return formatted

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`."""
        self.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`."""
        self.tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left + right` and its kin."""
        self.tick()
        return self.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`obj(...)`: the arguments become tuples inside macros, so they are weighed, too."""
        meter = METER.get()
        meter.tick()
        meter.weigh(args)
        meter.weigh(kwargs)
        text = getattr(obj, "__self__", None)
        if isinstance(text, str) and obj.__name__ in METHOD_GUARDS:
            METHOD_GUARDS[obj.__name__](text, *args, **kwargs)
        elif isinstance(text, str) and obj.__name__ == "join":
            args = tuple(meter.made(list(pieces)) for pieces in args)
            meter.check(len(text) * sum(len(pieces) for pieces in args))
        return self.made(super().call(context, obj, *args, **kwargs))


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """Text of an output expression. Passing the context keeps jinja2 from calling it at compile time."""
    return METER.get().made(value if isinstance(value, str) else str(value))


def _metered(function: Callable[..., Any], guard: Callable[..., None] | None) -> Callable[..., Any]:
    """A filter or test that ticks, is guarded, and whose result (or every item of it, if lazy) is counted."""
    extra = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment before the value

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.tick()
        if guard is not None:
            guard(*args[extra:], **kwargs)
        result = function(*args, **kwargs)
        if not isinstance(result, types.GeneratorType):
            return meter.made(result)
        lazy = _lazily(result)  # generators over generators count as nested: CPython frees them recursively
        meter.know(lazy, 8, 1 + max(meter.weigh(arg)[1] for arg in (*args, *kwargs.values())))
        return lazy

    return wrapper


def _lazily(items: Iterable[Any]) -> Iterable[Any]:
    for item in items:
        METER.get().tick()
        yield METER.get().made(item)

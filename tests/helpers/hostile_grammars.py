"""Grammars that mean harm, each compiled and followed for some steps with little memory; see `test_grammar_limits`."""

from __future__ import annotations

import json
import random
import resource
import sys
import time

MEMORY = 2 << 30


def nested(start: str, end: str, depth: int) -> str:
    return start * depth + end * depth


def rules(first: str, link: str, count: int, last: str) -> str:
    """Rules of which each uses the next."""
    return "\n".join([first, *(link.format(i, i + 1) for i in range(count)), f"r{count} {last}"])


def doubling(rules: int) -> str:
    """A grammar of a few lines and a text of 2**rules characters."""
    return "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(rules)) + f'\nr{rules} ::= "a"'


def schema(value: object) -> tuple[str, str]:
    return "json_schema", json.dumps(value)


def nested_schema(depth: int, wrap) -> object:
    value: object = {"type": "integer"}
    for _ in range(depth):
        value = wrap(value)
    return value


def chain(length: int) -> str:
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {}}}, separators=(",", ":"))


NODE = {"$ref": "#/$defs/a"}
GRAMMARS: dict[str, tuple[str, str]] = {
    "gbnf parentheses": ("gbnf", "root ::= " + nested("(", ")", 50_000)),
    "gbnf repetition": ("gbnf", 'root ::= (("a"{1,900000000}){1,900000000}){1,900000000}'),
    "gbnf repetitions": ("gbnf", 'root ::= "a"' + "{1,9}" * 20_000),
    "gbnf doubling": ("gbnf", doubling(60)),
    "gbnf nullable": ("gbnf", 'root ::= ("a"? "b"? root? "" root?)* | root root root'),
    "gbnf left recursion": ("gbnf", 'root ::= a | b\na ::= b a | "x" | ""\nb ::= a b | a "y" | ""'),
    "gbnf cycle": ("gbnf", "root ::= a\na ::= b\nb ::= a"),
    "gbnf many rules": ("gbnf", rules("root ::= r0", "r{} ::= [a-z] r{}?", 9000, "::= .")),
    "gbnf rules": ("gbnf", rules("root ::= r0", "r{} ::= [a-z] r{}?", 990, "::= .")),
    "gbnf long": ("gbnf", "root ::= root? " + '"a"? ' * 40_000),
    "gbnf ambiguous": ("gbnf", "root ::= root root root root | [a-z] | [a-m] | [a-f] | [a-c]"),
    "regex parentheses": ("regex", nested("(", ")", 50_000)),
    "regex repetition": ("regex", "(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "regex exponential": ("regex", "(a|b)*a(a|b){500}c(a|b)*b(a|b){500}"),
    "regex optional": ("regex", "(a?){5000}a{5000}"),
    "regex alternatives": ("regex", "|".join(str(i * 7919) for i in range(30_000))),
    "regex unicode": ("regex", r"(\w\W\p{L}\P{L}){1000}"),
    "lark many rules": ("lark", rules("start: r0", "r{}: r{}", 2000, ": /./")),
    "lark rules": ("lark", rules("start: r0", "r{}: /a/ r{}?", 990, ": /./")),
    "lark terminals": ("lark", rules("start: R0", "R{}: /a/ R{}?", 990, ": /./").replace("r990", "R990")),
    "lark references": ("lark", "start: %json " + chain(990)),
    "lark parentheses": ("lark", "start: " + nested("(", ")", 50_000)),
    "lark repetition": ("lark", "start: x{1,100000}\nx: y{1,100000}\ny: z{1,100000}\nz: z z | /a?/"),
    "lark intersection": ("lark", "start: X\nX: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(20))),
    "lark complement": ("lark", "start: X\nX: ~/(a|b)*a(a|b){30}/"),
    "schema chain": ("json_schema", chain(4000)),
    "schema short chain": ("json_schema", chain(990)),
    "schema arrays": schema(nested_schema(90, lambda s: {"type": "array", "items": s})),
    "schema objects": schema(nested_schema(11, lambda s: {"anyOf": [{"properties": {k: s}} for k in "ab"]})),
    "schema itself": schema({"$ref": "#"}),
    "schema cycle": schema({**NODE, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": NODE}}),
    "schema any of itself": schema({**NODE, "$defs": {"a": {"anyOf": [NODE, {"type": "integer"}]}}}),
    "schema all of itself": schema({**NODE, "$defs": {"a": {"allOf": [NODE, {"type": "object"}]}}}),
    "schema without end": schema({**NODE, "$defs": {"a": {"properties": {"x": NODE}, "required": ["x"]}}}),
    "schema references": schema(
        {
            "$ref": "#/$defs/d0",
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {}},
        }
    ),
    "schema properties": schema({"properties": {f"p{i}": {"maxLength": 99, "type": "string"} for i in range(4000)}}),
    "schema enum": schema({"enum": [f"{i * 7919} and some more text" for i in range(7000)]}),
    "schema all of any": schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(4)]} for i in range(12)]}
    ),
    "schema items": schema(nested_schema(3, lambda s: {"type": "array", "minItems": 900_000_000, "items": s})),
    "schema lengths": schema({"type": "string", "minLength": 900_000_000, "maxLength": 999_999_999}),
    "schema pattern": schema({"type": "string", "pattern": "(a|b)*a(a|b){200}c(a|b)*b(a|b){200}"}),
    "schema multiple": schema({"type": "integer", "multipleOf": 99_991}),
    "schema bounds": schema({"type": "number", "minimum": -1.5e300, "maximum": 1.0000000000000002}),
}  # fmt: skip


# They reach a limit only after a second or more.
SLOW = (
    "gbnf repetitions",
    "gbnf doubling",
    "gbnf nullable",
    "gbnf left recursion",
    "gbnf ambiguous",
    "lark intersection",
)


def _main(path: str, *names: str) -> None:
    from oxjax.constrain import Grammar
    from oxjax.errors import GrammarError, GrammarStuckError
    from tests.helpers.grammar_walks import allowed_tokens, load

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tokenizer, compiler = load(path)
    for name in names:
        kind, source = GRAMMARS[name]
        rng, began = random.Random(0), time.monotonic()
        try:
            matcher = compiler.start(Grammar(kind, source))
            while not matcher.is_done and rng.random() > 1 / 30:
                open_ = [i for i in allowed_tokens(matcher).nonzero()[0] if i not in tokenizer.eog_ids]
                matcher.advance(int(rng.choice(open_)))
            outcome = "followed"
        except (GrammarError, GrammarStuckError) as error:
            outcome = f"{type(error).__name__} {error}"
        print(json.dumps([name, time.monotonic() - began, outcome]), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

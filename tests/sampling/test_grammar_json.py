"""Random texts under random JSON schemas are valid, as another validator sees it."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from oxjax.constrain import Grammar
from oxjax.errors import GrammarError
from tests.helpers.grammar_walks import allowed_tokens, load

PATTERNS = ["^[a-c]{2,4}$", "x+y?", "^(ab|cd)*$", "[0-9]", r"^\d{3}-\w+$", "^é.?$"]
WORDS = ["a", "b", "name", "ünï", 'q"uote', "back\\slash", "line\nbreak", "", "🙂"]


def random_schema(rng: random.Random, depth: int, defs: list[str]) -> dict | bool:  # noqa: PLR0911, PLR0912
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "types", "true"]
    if depth:
        kinds += ["object"] * 5 + ["array"] * 4 + ["anyOf"] * 2 + ["oneOf", "allOf"] + ["ref"] * (2 * bool(defs))
    kind = rng.choice(kinds)
    inner = lambda: random_schema(rng, depth - 1, defs)  # noqa: E731
    match kind:
        case "string":
            return {"type": "string", **_string(rng)}
        case "integer" | "number":
            return {"type": kind, **_bounds(rng, kind)}
        case "boolean" | "null":
            return {"type": kind}
        case "enum":
            return {
                "enum": rng.sample([1, -2.5, "a", "ü\n", None, True, [1, {"a": []}], {"b": 0}, ""], rng.randint(1, 4))
            }
        case "const":
            return {"const": rng.choice([0, "x", None, False, [], {"k": [1, 2]}, 'a"b'])}
        case "types":
            return {"type": rng.sample(["string", "integer", "boolean", "null", "array", "object"], 2)}
        case "true":
            return rng.choice([True, {}])
        case "object":
            return _object(rng, inner)
        case "array":
            return _array(rng, inner)
        case "anyOf":
            return {"anyOf": [inner() for _ in range(rng.randint(1, 3))]}
        case "oneOf":
            return {"oneOf": [{"type": t, **_bounds(rng, t)} for t in rng.sample(["integer", "string", "null"], 2)]}
        case "allOf":
            return {"allOf": [{"type": "integer", "minimum": rng.randint(-9, 3)}, {"maximum": rng.randint(4, 99)}]}
    return {"$ref": f"#/$defs/{rng.choice(defs)}"}


def _string(rng: random.Random) -> dict:
    match rng.randrange(4):
        case 0:
            return {"pattern": rng.choice(PATTERNS)}
        case 1:
            low = rng.randint(0, 4)
            return {"minLength": low, "maxLength": low + rng.randint(0, 5)}
        case 2:
            return {rng.choice(["minLength", "maxLength"]): rng.randint(0, 6)}
    return {}


def _bounds(rng: random.Random, kind: str) -> dict:
    if kind not in ("integer", "number"):
        return {}
    low = rng.randint(-120, 1200) if kind == "integer" else round(rng.uniform(-30, 30), rng.randint(0, 3))
    high = low + rng.choice([2, 3, 17, 950])
    lower, upper = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    multiple = {"multipleOf": rng.choice([2, 5, 7])} if kind == "integer" and rng.random() < 0.15 else {}
    return rng.choice([{}, {lower: low}, {upper: high}, {lower: low, upper: high}]) | multiple


def _object(rng: random.Random, inner) -> dict:
    names = rng.sample(WORDS, rng.randint(0, 4))
    schema: dict = {"type": "object", "properties": {name: inner() for name in names}}
    required = [name for name in names if rng.random() < 0.5]
    if required:
        schema["required"] = required
    more = rng.choice([None, False, True, inner()])
    return schema if more is None else schema | {"additionalProperties": more}


def _array(rng: random.Random, inner) -> dict:
    schema: dict = {"type": "array"}
    if rng.random() < 0.8:
        schema["items"] = inner()
    if rng.random() < 0.2:
        schema["prefixItems"] = [inner() for _ in range(rng.randint(1, 2))]
    low = rng.randint(0, 2)
    return schema | rng.choice([{}, {"minItems": low}, {"minItems": low, "maxItems": low + rng.randint(0, 2)}])


def random_document(seed: int) -> dict | bool:
    """A schema with definitions, of which some are recursive."""
    rng = random.Random(seed)
    defs = ["node", "leaf"][: rng.randint(0, 2)]
    schema = random_schema(rng, 3, defs)
    if isinstance(schema, dict) and defs:
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": random_schema(rng, 1, []),
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value"],
                "additionalProperties": False,
            },
            "leaf": random_schema(rng, 1, ["node"]),
        }
    return schema


# Tokens that lead to the end, first those that close most.
CLOSING = [b'"', b"}", b"]", b"null", b"0", b"1", b"[", b"{", b":", b",", b" ", b"true", b"false"]


def random_text(matcher, tokenizer, seed: int, free: int = 25, steps: int = 400) -> str | None:
    """A finished text: `free` random tokens, and then the way out; None if there is none in so many steps."""
    rng = np.random.default_rng(seed)
    closing = [i for i, piece in enumerate(tokenizer.vocab_bytes()) if piece in CLOSING]
    closing.sort(key=lambda i: CLOSING.index(tokenizer.token_bytes(i)))
    is_single = np.array([len(piece) == 1 for piece in tokenizer.vocab_bytes()])
    text = b""
    for step in range(steps):
        mask = allowed_tokens(matcher)[: tokenizer.vocab_size]
        ends = [i for i in tokenizer.eog_ids if mask[i]]
        assert bool(ends) == matcher.is_accepting
        mask[list(tokenizer.eog_ids)] = False
        if ends and (not mask.any() or step >= free or rng.random() < 0.1):
            assert matcher.is_done == (not mask.any())
            return text.decode()
        single = mask & is_single
        if step >= free and rng.random() < 0.9 and (ways := [i for i in closing if mask[i]]):
            token = ways[0]
        else:
            token = int(rng.choice(np.flatnonzero(single if single.any() and rng.random() < 0.8 else mask)))
        matcher.advance(token)
        text += tokenizer.token_bytes(token)
    return None


def unique_keys(pairs: list) -> dict:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def sweep(data, seeds: range) -> None:
    tokenizer, compiler = load(data / "vocab" / "ggml-vocab-gpt-2.gguf")
    outcomes, refused = Counter(), []
    for seed in seeds:
        schema = random_document(seed)
        Draft202012Validator.check_schema(schema)
        try:
            matcher = compiler.start(Grammar.json_schema(schema))
        except GrammarError as error:
            refused.append(str(error))
            continue
        for text_seed in range(3):
            text = random_text(matcher.copy(), tokenizer, text_seed)
            if text is None:
                outcomes["unfinished"] += 1
                continue
            outcomes["finished"] += 1
            Draft202012Validator(schema).validate(json.loads(text))
    assert outcomes["finished"] > 2.9 * len(seeds)
    assert len(refused) <= len(seeds) // 100 and all("unsatisfiable" in reason for reason in refused)


def test_random_schemas(data):
    sweep(data, range(40))


UNSUPPORTED = [
    {"not": {"type": "null"}},
    {"if": {"type": "null"}, "then": True},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"maxLength": 3}},
    {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
    {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2},
    {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
    {"type": "string", "format": "json-pointer"},
    {"type": "string", "pattern": "(?=a)"},
    {"$ref": "https://example.org/schema"},
]


@pytest.mark.parametrize("schema", UNSUPPORTED, ids=json.dumps)
def test_what_cannot_be_kept_is_refused(schema, data):
    """A keyword is never ignored."""
    Draft202012Validator.check_schema(schema)
    with pytest.raises(GrammarError, match="json_schema: "):
        load(data / "vocab" / "ggml-vocab-gpt-2.gguf")[1].start(Grammar.json_schema(schema))


@pytest.mark.slow
def test_many_random_schemas(data):
    sweep(data, range(1000, 1400))

"""Chat templates: published ones against llama.cpp's rendering, and what templates may rely on."""

import copy
import functools
import json
from datetime import datetime

import pytest

from oxjax.errors import ChatTemplateError
from oxjax.tokenizer.chat import ChatTemplate
from tests.helpers.data import DATA

DATE = datetime(2026, 11, 20)  # the day the reference was rendered
# llama.cpp always sets `enable_thinking`, and drops the BOS text because its tokenizer adds that token.
# Where llama.cpp hands a template something that Hugging Face does not, so the test must.
EXTRA = {
    # These iterate over `tools` without asking whether there are any. llama.cpp never passes None.
    "CohereForAI-c4ai-command-r-plus-tool_use": {"tools": []},
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": {"tools": []},
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": {"tools": []},
    # Variables of the vendor's own runtime; llama.cpp leaves `functions` undefined and prints it as nothing.
    "fireworks-ai-llama-3-firefunction-v2": {"functions": "", "datetime": "Nov 20 2026"},
    # llama.cpp defines `date_string`; otherwise these two print a day of July 2024.
    "meta-llama-Llama-3.1-8B-Instruct": {"date_string": "20 Nov 2026"},
    "meta-llama-Llama-3.3-70B-Instruct": {"date_string": "20 Nov 2026"},
}
# Renderings that differ from Hugging Face's, with the error that Hugging Face and we give instead.
ONLY_LLAMA_CPP = {
    # `tools|map(...)|tojson`: jinja2's `map` gives a generator, which is not JSON; llama.cpp's gives a list.
    ("llama-cpp-deepseek-r1", "tools"): "generator is not JSON serializable",
}
USER = [{"role": "user", "content": "Hi"}]


@functools.cache
def published(name: str) -> ChatTemplate:
    source = (DATA / "templates" / f"{name}.jinja").read_text("utf-8")
    return ChatTemplate(source, bos_token="", eos_token="</s>", name=name)


def conversations() -> list:
    """(template, conversation) of every reference rendering, or one that the `data` fixture skips."""
    file = DATA / "templates" / "rendered.json"
    if not file.is_file():
        return [pytest.param("", "", id="no-data")]
    rendered = json.loads(file.read_text("utf-8"))["rendered"]
    return [
        pytest.param(name.removesuffix(".jinja"), kind, id=f"{name.removesuffix('.jinja')}-{kind}")
        for name, kinds in rendered.items()
        for kind in kinds
    ]


@pytest.mark.parametrize("name, kind", conversations())
def test_published_templates_render_as_in_llama_cpp(data, name, kind):
    reference = json.loads((data / "templates" / "rendered.json").read_text("utf-8"))
    messages = reference["messages"][1:2] if kind == "user_only" else reference["messages"]
    given = {"tools": reference["tools"]} if kind == "tools" else {}
    given = {"enable_thinking": True, "date": DATE, **EXTRA.get(name, {}), **given}
    before = copy.deepcopy((messages, given))
    template = published(name)
    if (name, kind) in ONLY_LLAMA_CPP:
        with pytest.raises(ChatTemplateError, match=ONLY_LLAMA_CPP[name, kind]):
            template.render(messages, **given)
    else:
        assert template.render(messages, **given) == reference["rendered"][f"{name}.jinja"][kind]
    assert (messages, given) == before


def test_every_published_template_is_covered(data):
    files = {f.stem for f in (data / "templates").glob("*.jinja")}
    assert files == {p.values[0] for p in conversations()}


def render(source: str, messages=USER, **kwargs) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **kwargs)


def test_blocks_are_trimmed_as_hugging_face_does():
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"


def test_variables_of_a_template():
    source = "{{ bos_token }}|{{ messages[0].content }}|{{ tools is none }}|{{ documents is none }}|{{ eos_token }}"
    assert render(source) == "<s>|Hi|True|True|</s>"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ enable_thinking }}{{ bos_token }}", enable_thinking=1, bos_token="!") == "1!"
    assert render("{{ documents[0].title }}", documents=[{"title": "D"}]) == "D"


def test_an_undefined_variable_prints_nothing_and_its_attributes_are_errors():
    assert render("[{{ nothing }}{{ messages[0].nothing }}{{ nothing is defined }}]") == "[False]"
    with pytest.raises(ChatTemplateError, match="line 2: UndefinedError: 'nothing' is undefined"):
        render("a\n{{ nothing.at_all }}")


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("x|tojson", '{"b": "<é\'&>", "a": [1, 2.5, true, null]}'),
        ("x|tojson(sort_keys=true, ensure_ascii=true)", '{"a": [1, 2.5, true, null], "b": "<\\u00e9\'&>"}'),
        ("x.a|tojson(indent=1)", "[\n 1,\n 2.5,\n true,\n null\n]"),
        ("x|tojson(separators=(',', ':'))", '{"b":"<é\'&>","a":[1,2.5,true,null]}'),
    ],
)
def test_tojson_is_plain_json(expression, expected):
    assert render("{{ " + expression + " }}", x={"b": "<é'&>", "a": [1, 2.5, True, None]}) == expected


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{{ ['a', 'b']|join('-') }}{{ '-'.join(['c', 'd']) }}{{ [{'k': 1}, {'k': 2}]|join('+', 'k') }}", "a-bc-d1+2"),
        ("{{ [1, 2, 3]|sum }}{{ [{'n': 2}]|sum('n') }}", "62"),
        ("{{ '%s=%d'|format('a', 3) }}{{ '{} {x}'.format(1, x=2) }}{{ '**%(k)s**' % {'k': 'v'} }}", "a=31 2**v**"),
        ("{{ 'a\nb'|indent(2) }}{{ 'ab'.center(4) }}{{ 'aXbX'.replace('X', '-', 1) }}", "a\n  b ab a-bX"),
        ("{{ 1 ~ 'a' ~ none }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ [1] + [2] }}", "1aNone1024abab[1, 2]"),
        ("{{ messages[::-1][0].role }}{{ 'abc'[1:] }}{{ (1, 2) == (1, 2) }}", "userbcTrue"),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{{ loop.last }}{% endfor %}", "x1True"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "023"),
        ("{% generation %}{% set a = 1 %}x{{ a }}{% endgeneration %}{{ a is defined }}", "x1False"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(1) }}{{ m(1, 2, 3) }}", "12()12(3,)"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x|upper }}{% filter upper %}b{% endfilter %}", "A1B"),
        ("{{ [3, 1]|sort|first }}{{ ['a']|map('upper')|list }}{{ [0, 1]|select|list }}{{ '<'|e }}", "1['A'][1]&lt;"),
        ("{{ [1, 2, 3]|batch(2)|list }}{{ 2.567|round(1) }}{{ {'b': 1, 'a': 2}|dictsort }}",
         "[[1, 2], [3]]2.6[('a', 2), ('b', 1)]"),
    ],
)  # fmt: skip
def test_the_language_of_templates(source, expected):
    assert render(source) == expected


def test_the_date_is_given_or_today():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert render(source, date=datetime(2024, 2, 29)) == "29 Feb 2024"
    before, shown, after = datetime.now(), render(source), datetime.now()
    assert shown in {before.strftime("%d %b %Y"), after.strftime("%d %b %Y")}


def test_a_template_refuses_in_its_own_words():
    with pytest.raises(ChatTemplateError, match="template 'default', line 2: Roles must alternate!"):
        render("\n{{ raise_exception('Roles must alternate!') }}")


def test_a_syntax_error_names_the_line():
    with pytest.raises(ChatTemplateError, match=r"'odd', line 3: .*endfor"):
        ChatTemplate("a\n{% for x in y %}\n{% endif %}", name="odd")


def test_a_conversation_that_contains_itself_is_an_error():
    loop: list = []
    loop.append(loop)
    with pytest.raises(ChatTemplateError, match="contains itself"):
        render("{{ x }}", x=loop)


METADATA = {
    "tokenizer.chat_template": "default {{ tools is none }}{{ bos_token }}",
    "tokenizer.chat_templates": ["rag", "tool_use"],
    "tokenizer.chat_template.rag": "rag",
    "tokenizer.chat_template.tool_use": "tools {{ tools|length }}{{ bos_token }}",
}


def test_named_templates_of_a_file():
    template = ChatTemplate.from_metadata(METADATA, bos_token="<s>")
    assert template.render(USER) == "default True<s>"
    assert template.render(USER, tools=[]) == "default False<s>"
    assert template.render(USER, tools=[{}, {}]) == "tools 2<s>"
    assert ChatTemplate.from_metadata(METADATA, name="rag").render(USER, tools=[{}]) == "rag"
    assert ChatTemplate.from_metadata(METADATA, name="default").render(USER, tools=[{}]) == "default False"


def test_a_missing_template_lists_those_there_are():
    with pytest.raises(ChatTemplateError, match=r"no chat template 'chat'.*it has: 'default', 'rag', 'tool_use'"):
        ChatTemplate.from_metadata(METADATA, name="chat")
    with pytest.raises(ChatTemplateError, match=r"no chat template 'default'.*it has: 'rag'"):
        ChatTemplate.from_metadata({"tokenizer.chat_template.rag": "x"})
    with pytest.raises(ChatTemplateError, match="it has: none"):
        ChatTemplate.from_metadata({})

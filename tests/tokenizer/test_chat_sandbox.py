"""Templates from strangers: each attack ends in ChatTemplateError, soon, and without eating the memory."""

import gc
import resource
import threading
import time

import pytest

from oxjax.errors import ChatTemplateError
from oxjax.tokenizer import meter
from oxjax.tokenizer.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hello", "parts": [1, 2, 3]}]
DOUBLING = "{%- set ns = namespace(a='ab', l=[1], t=(1,)) -%}{%- for i in range(60) -%}"

INTERNALS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'][1] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner|attr('__init__')|attr('__globals__') }}",
    "{{ namespace.__init__.__globals__.__builtins__.open('/etc/passwd') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ raise_exception.__globals__.json }}",
    "{{ strftime_now.__class__.__call__.__globals__ }}",
    "{{ range.__globals__['operator'] }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{{ dict.__subclasses__() }}",
    "{{ dict.fromkeys('ab') }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{{ (255).to_bytes(10**9) }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
    "{{ '%s'|format(''.__class__.__mro__) }}",
    "{{ ['']|map(attribute='__class__.__mro__')|list|first|first }}",
    "{{ ['']|map('attr', '__class__')|map('attr', '__mro__')|list|first|first }}",
    "{{ [1]|sort(attribute='__class__.__mro__')|first }}{{ [1]|map(attribute='__class__')|first|list }}",
    "{{ 'x'.encode() }}",
    "{{ 'abc'.translate({97: 'x'}) }}",
    "{% for x in (1).__class__.mro() %}{{ x }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
]

TIME = [
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i == j }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{{ range(99999)|map('string')|map('list')|list|length }}" * 40,
    "{% set l = range(60000)|list %}{% for i in l %}{{ -1 in l }}{% endfor %}",
    "{% set l = range(60000)|list %}" + "{{ [-1 in l, l == l[1:]] }}" * 1000,
    "{% set s = 'ab' * 200000 %}{% for i in range(99999) %}{{ s.count('ab' ~ i) }}{% endfor %}",
    "{% set s = 'a' * 500000 %}{{ s.rfind('b' ~ s[:250000]) }}",
    "{% set s = 'a' * 500000 %}{{ s.rsplit('b' ~ s[:250000]) }}",
    "{{ ('<' * 500000)|striptags }}",
    "{{ range(90000)|batch(2)|map('join', '-')|join|wordcount }}" * 200,
    "{% for i in range(99999) %}{% for w in 'a b c'.split() %}{{ w|upper|title|trim }}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x %}{{ range(30000)|list }}{% endset %}{% endfor %}",
    "{{ ([[1]] * 30000)|sum(start=[]) }}" * 20,
    "{% set ns = namespace(l=[0]) %}{% for i in range(15) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"
    "{% set ns.m = namespace(n=0) %}{% for i in ns.l %}{% for j in ns.l %}{% set ns.n = i %}{% endfor %}{% endfor %}",
]

SIZE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ (1, 2) * 10**9 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 2 ** 999999999999 }}",
    "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n % 7 }}",
    "{{ ('f' * 500000)|int(base=16) }}",
    "{{ 1|round(10**9, 'ceil') }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%-5.*f' % (999999999, 1) }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
    "{{ ('%(a)s' * 100000)|format(a='x' * 1000000) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "{{ ('{x}' * 100000).format_map({'x': 'x' * 1000000}) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ ('a\n' * 100000)|indent(10**5) }}",
    "{{ 'a\nb'|indent('x' * 1000000) }}{{ ('a\n' * 100000)|indent('x' * 1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "{{ ('x' * 1000000).join('y' * 1000000) }}",
    "{{ range(99999)|join('x' * 1000000) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ range(50000)|list|tojson(separators=('x' * 1000000, ':')) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ namespace(a=1)|xmlattr }}",
    "{{ dict(a='x' * 1000000, b=['x' * 1000000]) }}",
    DOUBLING + "{%- set ns.a = ns.a ~ ns.a -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.a = ns.a + ns.a -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.a = ns.a * 2 -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.a = [ns.a, ns.a]|join -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.a = '%s%s' % (ns.a, ns.a) -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.a = '{0}{0}'.format(ns.a) -%}{%- endfor -%}",
    DOUBLING + "{%- set x -%}{{ ns.a }}{{ ns.a }}{%- endset -%}{%- set ns.a = x -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.a = ns.a|replace('b', 'bb') -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.l = ns.l + ns.l -%}{%- endfor -%}",
    DOUBLING + "{%- set ns.l = [ns.l, ns.l] -%}{%- endfor -%}{{ ns.l }}",
    DOUBLING + "{%- set ns.l = {'a': ns.l, 'b': ns.l} -%}{%- endfor -%}{{ ns.l|tojson }}",
    DOUBLING + "{%- set ns.l = dict(a=ns.l, b=ns.l) -%}{%- endfor -%}{{ ns.l == ns.l }}",
    DOUBLING + "{%- set ns.l = {'a': ns.l, 'b': ns.l}.items() -%}{%- endfor -%}{{ ns.l }}",
    DOUBLING + "{%- set ns.t = (ns.t, ns.t) -%}{%- endfor -%}{{ {ns.t: 1} }}",
    DOUBLING + "{%- for x in [ns.l]|batch(3, ns.l) -%}{%- set ns.l = x -%}{%- endfor -%}{%- endfor -%}{{ ns.l }}",
    DOUBLING + "{%- macro m() -%}{%- set ns.t = varargs -%}{%- endmacro -%}{{ m(ns.t, ns.t) }}{%- endfor -%}",
    DOUBLING + "{%- set ns.t = cycler(ns.t, ns.t).items -%}{%- endfor -%}{{ {ns.t: 1} }}",
    "{% set ns = namespace(t=()) %}{% for i in range(99999) %}{% set ns.t = (ns.t,) %}{% endfor %}{{ {ns.t: 1} }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(25000) %}{% set ns.x = ns.x|batch(1) %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(25000) %}{% set ns.x = ns.x|map('upper') %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(25000) %}"
    "{% set ns.x = [1]|batch(2, fill_with=ns.x) %}{% endfor %}",
    "{% set x = 'y' * 1000000 %}{{ [" + "x, " * 3000 + "] }}",
    "{% set x = 'y' * 1000000 %}{{ " + " ~ ".join(["x"] * 3000) + " }}",
    "{% set x = 'y' * 1000000 %}" + "{{ x }}" * 3000,
    "".join("{% set x" + str(i) + " = 'y' * 1000000 %}" for i in range(3000)),
    "{% macro f(n) %}{% set x = 'y' * (1000000 - n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% set x %}{% for i in range(99999) %}" + "z" * 100000 + "{% endfor %}{% endset %}",
    "{% for i in range(99999) %}" + "z" * 100000 + "{% endfor %}",
    "{% set l = [0] * 50000 %}{% set x %}{% for i in range(99999) %}{{ l }}{% endfor %}{% endset %}",
]

COMPILE = [
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ 1" + " + 1" * 50000 + " }}",
    "{{ " + "not " * 50000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 100000 + " }}",
    "x" * 1_000_000,
    "{{ 'a'|nosuchfilter }}",
    "{{ 'a'|pprint }}",
]


def attacks() -> list:
    groups = {"internals": INTERNALS, "time": TIME, "size": SIZE, "compile": COMPILE}
    return [pytest.param(t, id=f"{g}-{i}") for g, templates in groups.items() for i, t in enumerate(templates)]


@pytest.mark.parametrize("source", attacks())
def test_an_attack_ends_in_an_error_soon_and_within_bounded_memory(source, monkeypatch):
    monkeypatch.setattr(meter, "CPU_SECONDS", 0.1)  # of a render; it keeps this long list short
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.freeze()  # what the tests before left behind is not the attack's to collect: that alone takes a second
    start = time.thread_time()
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source).render(MESSAGES)
    spent = time.thread_time() - start
    gc.unfreeze()
    assert spent < 5  # unbounded, each of them takes minutes or for ever
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 600 * 1024  # KiB on Linux
    assert len(str(caught.value)) < 2000
    assert MESSAGES == [{"role": "user", "content": "Hello", "parts": [1, 2, 3]}]


def test_what_is_unsafe_looks_undefined_when_it_is_only_tested_for():
    assert ChatTemplate("{{ ''.encode is defined }}{{ [].append is defined }}").render(MESSAGES) == "FalseFalse"


def test_the_sandbox_works_in_every_thread_at_once():
    template, out = ChatTemplate("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}"), {}

    def work(n):
        out[n] = template.render([{"role": "user", "content": str(n)}])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert out == {n: str(n) * 2000 for n in range(8)}


def test_a_template_is_usable_after_it_was_stopped():
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}done")
    with pytest.raises(ChatTemplateError, match="too long"):
        template.render(MESSAGES, n=90_000)
    assert template.render(MESSAGES, n=2) == "done"


@pytest.mark.parametrize("growing", [False, True], ids=["streamed", "accumulated"])
def test_a_long_conversation_is_no_attack(growing):
    messages = [{"role": "user", "content": f"{i} " + "word " * 400} for i in range(1000)]
    loop = "{% for m in messages %}{% if m.role != 'system' %}"
    if growing:
        source = "{% set ns = namespace(s='') %}" + loop + "{% set ns.s = ns.s + m.content|trim %}"
        source += "{% endif %}{% endfor %}{{ ns.s }}"
    else:
        source = loop + "{{ m['content']|trim }}{% endif %}{% endfor %}"
    assert ChatTemplate(source).render(messages) == "".join(m["content"].strip() for m in messages)

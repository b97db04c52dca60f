"""A snapshot continues to the bit, anywhere; a damaged one is refused and changes nothing."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load as load_arrays

import oxjax
from oxjax import LLM, SamplingParams
from oxjax.assets import embedded_draft, embedded_model
from oxjax.engine import snapshot
from oxjax.engine.config import EngineConfig
from oxjax.engine.engine import Engine
from oxjax.engine.request import Capture, Generation
from oxjax.errors import SnapshotError, SnapshotMismatchError
from oxjax.machine import enable_compilation_cache

NAMED = {"logit_bias": {300: 4.0, 7: -1.0}, "banned_tokens": (301,), "stop_token_ids": (300, 12), "min_tokens": 5}
NAMED |= {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": -0.25, "penalty_window": None}
PROBE = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    enable_compilation_cache()
    return oxjax.load(embedded_model())


def make(model, *, page_size=16, n_pages=None, max_batch=4, max_rows=16, max_context=128, reuse_prefixes=False):
    config = EngineConfig(
        n_pages=1 + (max_batch * max_context // page_size if n_pages is None else n_pages),
        page_size=page_size,
        max_batch=max_batch,
        max_rows=max_rows,
        max_context=max_context,
        reuse_prefixes=reuse_prefixes,
        steps_per_call=1,
    )
    return Engine(model, config)


@pytest.fixture(scope="module")
def engine(model):
    """The engine that snapshots are taken from."""
    return make(model)


@pytest.fixture(scope="module")
def other(model):
    """One of another shape, that finds prefixes."""
    return make(model, page_size=8, max_batch=3, max_rows=32, max_context=256, reuse_prefixes=True)


def finish(engine, requests):
    engine.run(requests)
    return [outcome(r) for r in requests]


def outcome(request):
    """Everything that a request gave, as JSON would have it."""
    if isinstance(request, Capture):
        return np.concatenate(request.rows).tobytes().hex()
    return [
        [c.token_id, c.logprob, [list(p) for p in c.top_logprobs], c.text, c.finish_reason]
        for c in request.output.chunks
    ]


def queue(engine, stops):
    """Greedy and drawn, with stop texts, bytes of unfinished characters, a long prompt, a scored one, one too many."""
    encode = engine.tokenizer.encode
    long = np.random.default_rng(1).integers(300, 2000, 70).tolist()
    wild = SamplingParams(max_tokens=40, temperature=60.0, ignore_eos=True)  # about uniform: bytes come often
    return [
        engine.generate(encode("Once upon a time"), replace(PROBE, logprobs=3, stop=stops), 0),
        engine.generate(encode("The dog")[:2], wild, 5),
        engine.generate(long, SamplingParams(max_tokens=9, temperature=0.8, top_k=40, logprobs=2), 2**64 - 1),
        engine.logits(long[:50]),
        engine.generate(encode("A small 😀")[:-1], SamplingParams(max_tokens=6, top_p=0.9, min_p=0.01, **NAMED), 3),
        engine.logits(long[5:40]),
    ]


@pytest.fixture(scope="module")
def stops(engine):
    """One that the first request ends with, and one that it begins and does not finish."""
    (chunks,) = finish(engine, [engine.generate(engine.tokenizer.encode("Once upon a time"), PROBE, 0)])
    text = "".join(c[3] for c in chunks)
    return text[-8:-2], text[12:22] + "\0"


@pytest.fixture(scope="module")
def expected(engine, stops):
    return finish(engine, queue(engine, stops))


def is_mid_character(request):
    return isinstance(request, Generation) and bool(request.output._detokenizer._utf8.getstate()[0])


def is_holding(request):
    return isinstance(request, Generation) and bool(request.output._held)


@pytest.fixture(scope="module")
def taken(engine, stops, expected):
    """A snapshot before every step of the run, with the places of its requests and what was special then."""
    requests, found = queue(engine, stops), []
    while not all(r.done for r in requests):
        live = [r for r in requests if not r.done]
        kinds = {
            "mid character": any(map(is_mid_character, live)),
            "holding text": any(map(is_holding, live)),
            "mid prefill": any(
                isinstance(r, Generation) and 0 < r.sequence.n_computed < 70 and not r.output.chunks for r in live
            ),
            "half scored": any(isinstance(r, Capture) and r.rows for r in live),
            "waiting": bool(engine.scheduler.waiting),
        }
        found.append((engine.snapshot(), [requests.index(r) for r in live], {k for k, v in kinds.items() if v}))
        engine.step()
    assert [outcome(r) for r in requests] == expected  # snapshots do not disturb the engine that they are taken of
    return found


KINDS = ["mid character", "holding text", "mid prefill", "half scored", "waiting"]


def of_kind(taken, kind):
    """The last snapshot of a kind, so that most of its keys and values are there."""
    return next(t for t in reversed(taken) if kind in t[2])


def check_resumed(engine, blob, places, expected):
    resumed = engine.resume(blob)
    assert finish(engine, resumed) == [expected[i] for i in places]
    assert engine.pool.pages.used_count == 0
    assert all(r.sequence.swapped is None for r in resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_to_the_bit(engine, taken, expected, kind):
    blob, places, _ = of_kind(taken, kind)
    check_resumed(engine, blob, places, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_to_the_bit_in_an_engine_of_another_shape(other, taken, expected, kind):
    """Twice: the second time its prefixes are found on pages, and only the rest comes from the snapshot."""
    blob, places, _ = of_kind(taken, kind)
    for _ in range(2):
        check_resumed(other, blob, places, expected)
    assert other.metrics().prefix_hits


@pytest.mark.slow
def test_goes_on_to_the_bit_from_everywhere(model, engine, other, taken, expected):
    wide = make(model, page_size=64, max_batch=9, max_rows=64)
    for blob, places, _ in taken:
        for target in (engine, other, wide):
            check_resumed(target, blob, places, expected)


def test_computed_tokens_are_not_computed_again(engine, taken):
    blob, _, _ = of_kind(taken, "half scored")
    before = engine.metrics().computed_tokens
    resumed = engine.resume(blob)
    pending = sum(len(r.sequence.tokens) - (r.sequence.swapped.n_tokens if r.sequence.swapped else 0) for r in resumed)
    generating = [r for r in resumed if isinstance(r, Generation)]
    new = sum(len(r.output.chunks) for r in generating)
    finish(engine, resumed)
    later = sum(len(r.output.chunks) - 1 for r in generating) - new
    # Each resumed request computes what was pending, then one row per further token but the last.
    assert engine.metrics().computed_tokens - before == pending + later


def test_a_snapshot_of_what_was_resumed_is_the_same(engine, other, taken):
    for blob, places, _ in taken[::4]:
        for target in (engine, other):
            resumed = target.resume(blob)
            assert len(resumed) == len(places)
            assert target.snapshot() == blob
            for request in resumed:
                target.cancel(request)


def test_an_engine_that_is_busy_takes_the_requests_in_addition(engine, stops, taken, expected):
    own = queue(engine, stops)
    engine.step()
    blob, places, _ = of_kind(taken, "holding text")
    resumed = engine.resume(blob)
    assert finish(engine, own + resumed) == expected + [expected[i] for i in places]


def test_requests_wait_for_pages_and_survive_preemption(model, stops, expected):
    """A pool that holds a sequence or two: rows wait on the host, sequences are preempted before and after."""
    tight = make(model, n_pages=7)
    requests, blobs = queue(tight, stops), []
    while not all(r.done for r in requests):
        blobs.append((tight.snapshot(), [i for i, r in enumerate(requests) if not r.done]))
        tight.step()
    assert tight.metrics().preemptions
    for blob, places in blobs[5::12]:
        check_resumed(tight, blob, places, expected)


def test_only_what_no_page_holds_is_imported(engine, other, monkeypatch):
    prompt = np.random.default_rng(7).integers(300, 2000, 60).tolist()
    whole = finish(engine, [engine.generate(prompt, PROBE, 0)])
    request = engine.generate(prompt, PROBE, 0)
    for _ in range(6):
        engine.step()
    blob = engine.snapshot()
    engine.cancel(request)
    finish(other, [other.generate(prompt[:24] + prompt[:9], PROBE, 0)])
    imported, run = [], other.runner.restore
    monkeypatch.setattr(other.runner, "restore", lambda pages, *rest: (imported.append(len(pages)), run(pages, *rest)))
    check_resumed(other, blob, [0], whole)
    n_computed = snapshot._header(blob)["requests"][0]["n_computed"]
    assert n_computed > 60
    assert imported == [-(-n_computed // 8) - 24 // 8]


def test_a_step_that_fails_loses_no_saved_rows(engine, taken, expected, monkeypatch):
    """Neither for the next step nor for another snapshot."""
    blob, places, _ = of_kind(taken, "half scored")
    resumed = engine.resume(blob)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "restore", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.snapshot() == blob
    assert finish(engine, resumed) == [expected[i] for i in places]


def test_nothing_is_also_a_snapshot(engine):
    assert engine.resume(engine.snapshot()) == []


CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import oxjax
from oxjax.assets import embedded_model
from oxjax.engine.snapshot import save
from tests.engine.test_snapshot import enable_compilation_cache, finish, make, queue
enable_compilation_cache()
engine = make(oxjax.load(embedded_model()))
path = Path(sys.argv[2])
if len(sys.argv) == 3:
    print(json.dumps(finish(engine, engine.resume(path.read_bytes()))))
while len(sys.argv) == 4:  # again and again, until the process is killed
    requests = queue(engine, tuple(json.loads(sys.argv[3])))
    while not all(r.done for r in requests):
        save(path, engine.snapshot())
        print("step", flush=True)
        engine.step()
"""


def child(*arguments):
    here = Path(__file__)
    return [sys.executable, "-c", CHILD, str(here.parents[2]), *map(str, arguments)]


def test_goes_on_to_the_bit_in_a_new_process(tmp_path, taken, expected):
    blob, places, _ = taken[8]
    snapshot.save(tmp_path / "snapshot", blob)
    done = subprocess.run(child(tmp_path / "snapshot"), check=True, capture_output=True, text=True)
    assert len(places) == 6
    assert json.loads(done.stdout) == expected


def test_goes_on_after_kill_9(tmp_path, engine, stops, expected):
    path = tmp_path / "snapshot"
    with subprocess.Popen(child(path, json.dumps(stops)), stdout=subprocess.PIPE, text=True) as process:
        for _ in range(9):
            assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = engine.resume(path.read_bytes())
    assert resumed
    assert all(o in expected for o in finish(engine, resumed))


def test_llm_snapshots_what_streams(tmp_path, expected):
    params = SamplingParams(max_tokens=8, seed=4, temperature=0.7)
    with LLM(max_batch=2, max_context=64) as llm:
        whole = llm.generate("Once", params)
        stream = llm.stream("Once", params)
        next(stream)
        llm.snapshot(tmp_path / "snapshot")
        stream.close()
        assert llm.resume(tmp_path / "snapshot") == whole


def test_bfloat16(model):
    engine = make(oxjax.load(embedded_model(), dtype="bfloat16"))
    prompt = engine.tokenizer.encode("Once upon")
    whole = finish(engine, [engine.generate(prompt, PROBE, 0)])
    request = engine.generate(prompt, PROBE, 0)
    for _ in range(5):
        engine.step()
    blob = engine.snapshot()
    engine.cancel(request)
    check_resumed(engine, blob, [0], whole)


def test_the_comparison_can_fail(engine, taken, expected, monkeypatch):
    """Rows that do not arrive are noticed."""
    blob, places, _ = of_kind(taken, "half scored")
    monkeypatch.setattr(engine.runner, "restore", lambda *given: None)
    assert finish(engine, engine.resume(blob)) != [expected[i] for i in places]


# Damage


@pytest.fixture(scope="module")
def blob(taken):
    return of_kind(taken, "half scored")[0]


def refuse(engine, blob, match=None):
    before = engine.metrics(), engine.runner.state
    with pytest.raises(SnapshotError, match=match):
        engine.resume(blob)
    assert (engine.metrics(), engine.runner.state) == before


def test_any_truncation_is_found(engine, blob):
    rng = np.random.default_rng(0)
    for length in [*range(20), len(blob) - 1, *rng.integers(0, len(blob), 150).tolist()]:
        refuse(engine, blob[:length])
    refuse(engine, blob + b"\0")
    refuse(engine, blob[1:])


def test_any_bit_flip_is_found(engine, blob):
    rng = np.random.default_rng(1)
    n_header = 8 + int.from_bytes(blob[:8], "little")
    places = [*range(0, n_header, 3), n_header - 1, *rng.integers(n_header, len(blob), 200).tolist(), len(blob) - 1]
    for place in places:
        damaged = bytearray(blob)
        damaged[place] ^= 1 << int(rng.integers(8))
        refuse(engine, bytes(damaged))


def test_garbage_is_refused(engine):
    rng = np.random.default_rng(2)
    for n in (0, 1, 8, 9, 100, 5000):
        refuse(engine, rng.bytes(n), match="not a snapshot")
    for text in (b"[]", b"null", b'{"__metadata__": {"oxjax": "[]"}}', b"[" * 100_000):
        refuse(engine, len(text).to_bytes(8, "little") + text, match="not a snapshot")
    refuse(engine, (2**63).to_bytes(8, "little") + b"{}", match="not a snapshot")


def edited(blob, edit):
    """The blob with its header and arrays edited and its checksum right again."""
    header, arrays = snapshot._header(blob), load_arrays(blob)
    edit(header, arrays)
    return snapshot.pack({k: v for k, v in header.items() if k in ("fingerprint", "requests")}, arrays)


def test_an_edit_of_nothing_is_accepted(engine, blob):
    assert edited(blob, lambda header, arrays: None) == blob


EDITS = {
    "no requests": lambda h, a: h.pop("requests"),
    "requests of another kind": lambda h, a: h.update(requests={"a": 1}),
    "a request of another kind": lambda h, a: h["requests"].__setitem__(0, [1]),
    "a request less": lambda h, a: h["requests"].pop(),
    "a request twice": lambda h, a: h["requests"].append(h["requests"][0]),
    "an unknown field": lambda h, a: h["requests"][0].update(extra=1),
    "a field less": lambda h, a: h["requests"][0].pop("seed"),
    "an array less": lambda h, a: a.pop("tokens"),
    "an array more": lambda h, a: a.update(more=np.zeros(3)),
    "another dtype": lambda h, a: a.update(tokens=a["tokens"].astype(np.int64)),
    "another shape": lambda h, a: a.update({"state.0": a["state.0"][:, :1]}),
    "a token outside the vocabulary": lambda h, a: a["tokens"].__setitem__(0, 2048),
    "a negative token": lambda h, a: a["tokens"].__setitem__(0, -1),
    "a count outside its range": lambda h, a: a["top_counts"].__setitem__(0, 99),
    "a negative count": lambda h, a: a["top_counts"].__setitem__(0, -1),
    "an unknown sampling parameter": lambda h, a: params_of(h).update(heat=1),
    "NaN": lambda h, a: params_of(h).update(temperature="NaN"),
    "a parameter outside its range": lambda h, a: params_of(h).update(top_p=1.5),
    "a parameter of another kind": lambda h, a: params_of(h).update(top_k=True),
    "stop texts of another kind": lambda h, a: params_of(h).update(stop=[""]),
    "a bias of nothing": lambda h, a: params_of(h).update(logit_bias=[7]),
    "a bias of a list": lambda h, a: params_of(h).update(logit_bias=[[[7], 1.0]]),
    "a ban of no token": lambda h, a: params_of(h).update(banned_tokens=[-1]),
    "a ban beyond the vocabulary": lambda h, a: params_of(h).update(banned_tokens=[10**6]),
    "another max_tokens": lambda h, a: params_of(h).update(max_tokens=7),
    "more than the context": lambda h, a: (params_of(h).update(max_tokens=None), generating(h).update(max_length=9999)),
    "done already": lambda h, a: params_of(h).update(stop=["e", "a", " "]),
}


def generating(header):
    return next(r for r in header["requests"] if r["params"] is not None)


def params_of(header):
    return generating(header)["params"]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_header_that_lies_is_refused(engine, taken, edit):
    refuse(engine, edited(of_kind(taken, "holding text")[0], edit))


def test_non_numbers_in_the_header_are_refused(engine, blob):
    """What JSON has no word for and Python's reader takes."""
    for word in (b"NaN", b"Infinity", b"1e999"):
        place = blob.index(b'temperature\\": ') + len(b'temperature\\": ')
        text = bytearray(blob)
        end = text.index(b",", place)
        changed = bytes(text[:place]) + word + bytes(text[end:])
        length = int.from_bytes(blob[:8], "little") + len(changed) - len(blob)
        changed = length.to_bytes(8, "little") + changed[8:]
        at = changed.index(b'checksum\\": \\"') + len(b'checksum\\": \\"')
        refuse(engine, changed[:at] + snapshot._checksum(changed, at).encode() + changed[at + 64 :])


@pytest.mark.parametrize(
    "name", ["n_tokens", "n_prompt", "n_computed", "n_states", "n_logits", "n_top", "max_length", "seed"]
)
def test_counts_that_lie_are_refused(engine, blob, name):
    """Absurd ones allocate nothing; each is put to a request that generates and to one that scores."""
    for i, request in enumerate(snapshot._header(blob)["requests"]):
        beyond = [request["n_tokens"], request["n_tokens"] + 1] if name == "n_computed" else []
        for value in (-1, 2**31, 2**62, 2**64, 10**400, 1.0, True, "1", None, [], *beyond):
            if not (name == "seed" and type(value) is int and 0 <= value < 2**64):
                refuse(engine, edited(blob, lambda h, a: h["requests"][i].update({name: value})))  # noqa: B023


def test_another_version_is_refused(engine, blob, monkeypatch):
    ours = snapshot.VERSION + 1
    monkeypatch.setattr(snapshot, "VERSION", ours)
    with pytest.raises(
        SnapshotError, match=f"version {ours - 1}, and this oxjax reads 'oxjax snapshot' version {ours}"
    ):
        engine.resume(blob)


def test_a_snapshot_of_another_model_is_refused(model, engine, blob):
    ours = engine._host.fingerprint
    leaves, tree = jax.tree.flatten(model.params)
    changed = np.array(leaves[0])
    changed.view(np.uint8)[7, 7] ^= 1
    variants = [
        replace(model, params=jax.tree.unflatten(tree, [jnp.asarray(changed), *leaves[1:]])),
        oxjax.load(embedded_model(), weights="bfloat16"),
        oxjax.load(embedded_model(), weights="file", activations="float32"),
        oxjax.load(embedded_draft()),
        oxjax.load(embedded_model(), exact=False),
        oxjax.load(embedded_model(), dtype="bfloat16"),
    ]
    for variant in variants:
        foreign = make(variant)
        with pytest.raises(SnapshotMismatchError) as error:
            foreign.resume(blob)
        assert (error.value.found, error.value.expected) == (ours, foreign._host.fingerprint)
        assert ours in str(error.value)
        assert foreign._host.fingerprint in str(error.value)
        assert not foreign.scheduler.waiting
    assert make(oxjax.load(embedded_model()))._host.fingerprint == ours


def test_a_snapshot_of_another_backend_is_refused(model, blob):
    """Bits of one model differ between backends; parameters and their forms are the same here."""
    other = {"native": "xla", "xla": "native"}[model.config.numerics.backend]
    numerics = replace(model.config.numerics, backend=other)
    with pytest.raises(SnapshotMismatchError, match=f"fast|exact {other}"):
        make(replace(model, config=replace(model.config, numerics=numerics))).resume(blob)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "snapshot"
    snapshot.save(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        snapshot.save(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["snapshot"]
    monkeypatch.undo()
    snapshot.save(path, b"new")
    assert path.read_bytes() == b"new"

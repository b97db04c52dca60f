"""State leaves its pages and slots and comes back the same, in few compiled shapes."""

import jax.numpy as jnp
import numpy as np

from oxjax.cache.slots import RecurrentState
from oxjax.cache.states import SwappedState
from oxjax.cache.transfer import copy_page, export_state, gather, import_state, scatter


def test_state_moves_between_pools_of_any_page_size():
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((37, 2, 3)).astype(np.float32), rng.standard_normal((37, 5)).astype(np.float32)]
    values = [rng.standard_normal((3, 6)).astype(np.float32), rng.standard_normal((2, 4, 4)).astype(np.float32)]
    before = gather._cache_size() + scatter._cache_size()
    for page_size in (1, 8, 16):
        n_pages, slot = -(-37 // page_size), 5
        pages = rng.permutation(np.arange(1, 50))[:n_pages].tolist()
        paged = [jnp.ones((60, page_size, *r.shape[1:])) for r in rows]
        recurrent = RecurrentState(conv=jnp.ones((9, 3, 6)), ssm=jnp.ones((9, 2, 4, 4)))
        state = import_state((paged[0], recurrent, paged[1]), pages, slot, SwappedState(37, rows, values), 0)
        for n in (0, 1, 36, 37):
            got = export_state(state, pages, slot, n)
            assert all(np.array_equal(a, b[:n]) for a, b in zip(got.rows, rows, strict=True))
            assert all(np.array_equal(a, b) for a, b in zip(got.values, values, strict=True))
        assert export_state(state, pages, None, 37).values == []
        for array, kept in ((state[0], pages), (state[2], pages), (state[1].conv, [slot]), (state[1].ssm, [slot])):
            untouched = np.setdiff1d(np.arange(1, len(array)), kept)
            assert (np.asarray(array)[untouched] == 1).all()
        for n in range(1, n_pages + 1):
            export_state(state, pages[:n], slot, n)
    compiled = gather._cache_size() + scatter._cache_size() - before
    assert compiled <= 3 + 7 + 4 + 3  # per page size: one import, and exports of 1, 2, 4 .. pages


def test_the_rows_behind_a_found_prefix_are_imported_alone():
    rows = [np.arange(20, dtype=np.float32)[:, None]]
    state = import_state((jnp.zeros((9, 4, 1)),), [5, 6], None, SwappedState(14, [rows[0][:14]], []), 8)
    np.testing.assert_array_equal(np.asarray(state[0])[5:7].ravel(), [8, 9, 10, 11, 12, 13, 0, 0])


def test_a_page_is_copied_on_every_layer_and_slots_are_left_alone():
    state = (jnp.arange(12.0).reshape(3, 4), RecurrentState(conv=jnp.ones((3, 1, 1)), ssm=jnp.zeros((3, 2))))
    pages, slots = copy_page(state, jnp.int32(1), jnp.int32(2))
    np.testing.assert_array_equal(pages, [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]])
    assert (slots.conv == 1).all()

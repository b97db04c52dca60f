"""Rows leave their pages and come back the same, in few compiled shapes."""

import jax.numpy as jnp
import numpy as np

from oxjax.cache.transfer import export_pages, gather_pages, import_pages, scatter_pages


def test_pages_move_between_pools_of_any_page_size():
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((37, 2, 3)).astype(np.float32), rng.standard_normal((37, 5)).astype(np.float32)]
    before = gather_pages._cache_size() + scatter_pages._cache_size()
    for page_size in (1, 8, 16):
        n_pages = -(-37 // page_size)
        pages = rng.permutation(np.arange(1, 50))[:n_pages].tolist()
        state = [jnp.ones((60, page_size, *r.shape[1:])) for r in rows]
        state = import_pages(state, pages, rows)
        for n in (0, 1, 36, 37):
            got = export_pages(state, pages, n)
            assert all(np.array_equal(a, b[:n]) for a, b in zip(got, rows, strict=True))
        untouched = np.setdiff1d(np.arange(1, 60), pages)
        assert all((np.asarray(leaf)[untouched] == 1).all() for leaf in state)
        for n in range(1, n_pages + 1):
            export_pages(state, pages[:n], n)
    compiled = gather_pages._cache_size() + scatter_pages._cache_size() - before
    assert compiled <= 3 + 7 + 4 + 3  # per page size: one import, and exports of 1, 2, 4 .. pages

"""What a query can give any key of a page at most: the definition, and that no key of the page is given more."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.page_bounds import page_bounds, reference

B, P, SIZE, H, K = 2, 9, 5, 6, 21  # no vector divides them


def given(G: int, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(*dims, dtype=dtype, generator=draw) for dims in ((B, 1, H, K), (B, P, SIZE, G, K)))
    return q, keys


@pytest.mark.parametrize("G", [6, 2, 1])
def test_is_its_definition_and_no_key_exceeds_it(G):
    q, keys = given(G)
    with torch.no_grad():
        found = page_bounds(q, keys.amin(2), keys.amax(2))
    torch.testing.assert_close(found, reference(q, keys.amin(2), keys.amax(2)), rtol=0, atol=1e-12)
    products = torch.einsum("bgrk,bpsgk->bgrps", q[:, 0].unflatten(1, (G, -1)), keys)
    assert (products.amax((2, 4)) <= found + 1e-12).all()


def test_not_a_number_is_not_lost():
    q, keys = given(2, torch.float32)
    keys[1, 3, 0, 1, 4] = torch.nan
    with torch.no_grad():
        found = page_bounds(q, keys.amin(2), keys.amax(2))
    assert found[1, 1, 3].isnan()
    assert found.isnan().sum() == 1

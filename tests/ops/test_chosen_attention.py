"""Attention over chosen tokens and blocks against the loop: outputs, gradients, cuts, ties, extremes, cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import chosen_attention as ops
from slipstream.ops.attention import attention
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.softmax import Softmax

B, T, H, G, K, V, SIZE, N = 2, 37, 8, 2, 6, 5, 4, 3
NONE = torch.zeros(B, dtype=torch.long)
SINKS = torch.linspace(-1, 1, H, dtype=torch.float64)
SETTINGS = {"plain": Softmax(), "all": Softmax(scale=0.7, cap=2.0, sinks=SINKS)}


def lines(tokens: int = T, dtype=torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((H, K), (G, K), (G, V))
    return [torch.randn(B, tokens, *s, dtype=dtype, generator=draw, requires_grad=True) for s in shapes]


def drawn_blocks(groups: int, tokens: int = T, n: int = N) -> Tensor:
    blocks = -(-tokens // SIZE)
    scores = torch.rand(B, tokens, groups, blocks, generator=torch.Generator().manual_seed(1))
    own = (torch.arange(tokens) // SIZE)[:, None, None]
    block = torch.arange(blocks)
    return ops.choose(scores.masked_fill(block == own, 1), (block <= own)[None], n)


def gradients(o: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    seed = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((o * seed).sum(), of, retain_graph=True)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=[1, 7, 1024])
def queries(request, monkeypatch):
    """Tiles of queries of several sizes."""
    monkeypatch.setattr(ops, "QUERIES", request.param)
    monkeypatch.setattr(ops, "TOGETHER", request.param)
    monkeypatch.setattr(ops, "SCORES", 100 * request.param)


@pytest.mark.usefixtures("queries")
@pytest.mark.parametrize("groups", [G, 4, H])
@pytest.mark.parametrize("name", SETTINGS)
def test_blocks_are_read_as_defined_in_all_ways(groups: int, name: str):
    args, chosen = lines(), drawn_blocks(groups)
    want = ops.reference(*args, chosen, SIZE, SETTINGS[name])
    tokens = ops.tokens_of(chosen, SIZE, torch.arange(T).expand(B, -1))
    dense = ops.chosen_blocks(*args, chosen, NONE, SIZE, SETTINGS[name])
    for o in (dense, *(f(*args, tokens, SETTINGS[name]) for f in (ops.chosen_tokens, ops.gathered_tokens))):
        close(o, want)
        for got, wanted in zip(gradients(o, args), gradients(want, args)):
            close(got, wanted)


@pytest.mark.parametrize("together", [1, 2, 16])
def test_the_size_of_a_tile_changes_nothing(together: int, monkeypatch: pytest.MonkeyPatch):
    args, chosen = lines(), drawn_blocks(4)
    monkeypatch.setattr(ops, "tile_size", lambda *_: together)
    close(ops.chosen_blocks(*args, chosen, NONE, SIZE), ops.reference(*args, chosen, SIZE))


def test_all_blocks_are_full_attention():
    args, chosen = lines(), drawn_blocks(G, n=12)
    o, want = ops.chosen_blocks(*args, chosen, NONE, SIZE), attention(*args)
    close(o, want)
    for got, wanted in zip(gradients(o, args), gradients(want, args)):
        close(got, wanted)


def test_rows_go_on_from_pasts_of_their_own():
    (q, k, v), chosen = lines(), drawn_blocks(4)
    want = ops.reference(q, k, v, chosen, SIZE)
    past = torch.tensor([30, 9])
    at = past[:, None] + torch.arange(7)
    row = torch.arange(B)[:, None]
    close(ops.chosen_blocks(q[row, at], k, v, chosen[row, at], past, SIZE), want[row, at])
    for f in (ops.chosen_tokens, ops.gathered_tokens):
        close(f(q[row, at], k, v, ops.tokens_of(chosen[row, at], SIZE, at)), want[row, at])


def test_a_query_that_chose_nothing_reads_zero_with_clean_gradients():
    args = lines()
    for chosen in (drawn_blocks(4), torch.full((B, T, 4, N), -1)):
        chosen[0, 5] = -1
        tokens = ops.tokens_of(chosen, SIZE, torch.arange(T).expand(B, -1))
        ways = [ops.chosen_blocks(*args, chosen, NONE, SIZE)]
        ways += [f(*args, tokens) for f in (ops.chosen_tokens, ops.gathered_tokens)]
        for o in ways:
            assert torch.equal(o[0, 5], torch.zeros_like(o[0, 5]))
            assert all(g.isfinite().all() for g in gradients(o, args))


def test_nothing_is_read_of_nothing():
    q, k, v = lines()
    assert ops.chosen_blocks(q[:, :0], k, v, drawn_blocks(4)[:, :0], NONE, SIZE).shape == (B, 0, H, V)
    assert ops.chosen_tokens(q[:, :0], k, v, drawn_blocks(4)[:, :0]).shape == (B, 0, H, V)
    assert ops.nearest_blocks(q[:, :0], k, NONE, SIZE, N).shape == (B, 0, H, N)


@pytest.mark.parametrize("n", [1, 3, 8, 20])
def test_choices_are_those_of_a_stable_sort(n: int):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (B, 9, 2, 12), generator=draw).double()  # many are equal
    seen = torch.rand(B, 9, 1, 12, generator=draw) < 0.7
    seen[0, 0] = False
    got = ops.choose(scores, seen, n)
    assert got.shape == (B, 9, 2, n)
    order = scores.masked_fill(~seen, -1).sort(dim=-1, descending=True, stable=True).indices
    for b, t, c in torch.cartesian_prod(torch.arange(B), torch.arange(9), torch.arange(2)).tolist():
        best = [s for s in order[b, t, c].tolist() if seen[b, t, 0, s]][:n]
        assert got[b, t, c].tolist() == sorted(best) + [-1] * (n - len(best))


def test_the_nearest_blocks_are_ranked_by_their_means_at_any_cut():
    q, k, _ = (x.detach() for x in lines())
    means = k[:, : T // SIZE * SIZE].unflatten(1, (-1, SIZE)).mean(2).repeat_interleave(H // G, 2)
    sums, past, chosen = torch.zeros(B, 10, G, K, dtype=torch.float64), NONE, []
    for piece in (slice(0, 5), slice(5, 5), slice(5, 6), slice(6, T)):
        sums = ops.block_sums(sums, k[:, piece], past, SIZE)
        chosen.append(ops.nearest_blocks(q[:, piece], sums, past, SIZE, N))
        past = past + k[:, piece].shape[1]
    got = torch.cat(chosen, 1)
    for b, t, h in torch.cartesian_prod(torch.arange(B), torch.arange(T), torch.arange(H)).tolist():
        own = t // SIZE
        best = (means[b, :own, h] @ q[b, t, h]).argsort(descending=True).tolist()[: N - 1]
        assert got[b, t, h].tolist() == sorted([*best, own]) + [-1] * (N - 1 - len(best))


@pytest.mark.usefixtures("queries")
def test_indexed_tokens_are_those_of_largest_score_at_any_cut():
    draw = torch.Generator().manual_seed(0)
    q, w, k = (torch.randn(B, T, *s, dtype=torch.float64, generator=draw) for s in ((5, K), (5,), (K,)))
    scores = torch.einsum("bti,btis->bts", w, torch.einsum("btik,bsk->btis", q, k).relu())
    cuts = [(0, T)], [(0, 9), (9, 9), (9, 10), (10, T)]
    for cut in cuts:
        got = torch.cat([ops.indexed_tokens(q[:, a:z], w[:, a:z], k, torch.tensor([a, a]), 8) for a, z in cut], 1)
        for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(T)).tolist():
            best = scores[b, t, : t + 1].sort(descending=True, stable=True).indices[:8].tolist()
            assert got[b, t, 0].tolist() == sorted(best) + [-1] * (8 - len(best))


def test_sums_leave_padding_out():
    k = lines()[1].detach()[:, :8]
    soiled = k.clone()
    soiled[1, 3:] = torch.nan
    sums = ops.block_sums(torch.zeros(B, 3, G, K, dtype=torch.float64), soiled, NONE, SIZE, torch.tensor([8, 3]))
    close(sums[0, 1], k[0, 4:8].sum(0))
    close(sums[1, :2], torch.stack([k[1, :3].sum(0), torch.zeros(G, K, dtype=torch.float64)]))


def test_large_logits_do_not_overflow():
    args = [1e3 * x.float().detach() for x in lines()]
    assert ops.chosen_blocks(*args, drawn_blocks(4), NONE, SIZE).isfinite().all()


def test_work_goes_with_the_pairs_kept_and_is_what_is_declared():
    def counted(tokens: int) -> tuple[float, float]:
        (q, k, v), chosen = (x.detach() for x in lines(tokens)), drawn_blocks(4, tokens)
        with FlopCounterMode(display=False) as counter:
            ops.chosen_blocks(q, k, v, chosen, NONE, SIZE)
        return counter.get_total_flops(), ops.blocks_flops(tokens, B, H, K, V, 4, N, SIZE)

    (short, said_short), (long, said_long) = counted(1024), counted(4096)
    assert long < 4.4 * short
    assert abs(said_short / short - 1) < 0.1 and abs(said_long / long - 1) < 0.1
    with torch_forms(), FlopCounterMode(display=False) as counter:
        ops.gathered_tokens(*(x.detach()[:, :1] for x in lines()), torch.zeros(B, 1, 4, N, dtype=torch.long))
    assert counter.get_total_flops() == ops.gathered_flops(B, H, K, V, N)

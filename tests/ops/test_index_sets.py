"""The language of index sets: what each sees, that tiles cover it exactly once, at any cut, and how much work they are."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.index_sets import (
    Blocks,
    Dilated,
    Global,
    IndexSet,
    RandomBlocks,
    Segments,
    Strided,
    Summaries,
    Window,
    fixed,
)
from slipstream.ops.index_tiles import density, groups, pairs, tiles

SETS: dict[str, IndexSet] = {
    "window": Window(5),
    "dilated window": Window(3, dilation=4),
    "global": Global(3),
    "blocks": Blocks(6),
    "large blocks": Blocks(160),
    "segments": Segments(8, back=2),
    "strided": Strided(4),
    "summaries": Summaries(6, 2),
    "dilated": Dilated(12, 3, offset=1),
    "random": RandomBlocks(4, 3, seed=1),
    "a-shape": Global(2) | Window(4),
    "strided pattern": Window(5) | Strided(5),
    "fixed pattern": fixed(6, 2),
    "bigbird": Global(4) | Segments(4, back=2) | RandomBlocks(4, 2, first=1, near=3),
    "two dilations": Window(4) | Window(4, dilation=3) | Global(1),
    "with holes": Global(2) | Dilated(8, 2, offset=1),
}
T = 41


def seen(index_set: IndexSet, T: int, causal: bool) -> torch.Tensor:
    t, s = torch.arange(T)[:, None], torch.arange(T)
    return index_set.sees(t, s) & ((s <= t) | (not causal))


def covered(index_set: IndexSet, past: torch.Tensor, T: int, causal: bool = True) -> torch.Tensor:
    """How many tiles hold each pair (R T S)."""
    S = int(past.max()) + T
    times = torch.zeros(len(past), T, S, dtype=torch.long)
    for group in groups(index_set, T):
        for tile in tiles(group, past, T, S, causal):
            for r, N, n, m in tile.meets.nonzero().tolist():
                query, key = int(tile.queries[r, N, n]), int(tile.keys[r, N, m])
                if query >= 0:
                    times[r, query - past[r], key] += 1
    return times


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SETS)
def test_tiles_cover_what_is_seen_exactly_once(name: str, causal: bool):
    want = seen(SETS[name], T, causal).long()
    assert torch.equal(covered(SETS[name], torch.tensor([0]), T, causal)[0], want)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_rows_of_different_pasts_are_cut_out_of_the_same_set(name: str, tokens: int):
    past, want = torch.tensor([0, 7, 12, 30]), seen(SETS[name], T, True).long()
    got = covered(SETS[name], past, tokens)
    for row, p in zip(got, past.tolist()):
        assert torch.equal(row[:, : p + tokens], want[p : p + tokens, : p + tokens])


@pytest.mark.parametrize("name", SETS)
def test_declared_pairs_are_those_of_the_tiles(name: str):
    for tokens, past in ((T, 0), (1, 17), (9, 6)):
        worked = sum(
            tile.meets.numel()
            for group in groups(SETS[name], tokens)
            for tile in tiles(group, torch.tensor([past]), tokens, past + tokens)
        )
        assert worked == pairs(SETS[name], tokens, past)


def test_sets_see_what_their_names_say():
    t, s = torch.tensor(20), torch.arange(21)
    says = {
        Window(3): [18, 19, 20],
        Window(3, dilation=4): [12, 16, 20],
        Global(2): [0, 1],
        Blocks(8): [16, 17, 18, 19, 20],
        Segments(8): list(range(8, 21)),
        Strided(9): [2, 11, 20],
        Summaries(8, 1): [7, 15],
        Dilated(8, 2): [16, 18, 20],
        Dilated(8, 2, offset=1): [],
        fixed(8, 2): [6, 7, 14, 15, 16, 17, 18, 19, 20],
    }
    for index_set, keys in says.items():
        assert s[index_set.sees(t, s)].tolist() == keys


def test_drawn_blocks_are_distinct_spread_and_the_same_at_every_call():
    own = torch.arange(200)
    index_set = RandomBlocks(16, 3, seed=5, first=1, near=2)
    drawn = index_set.drawn(own)
    assert torch.equal(drawn, torch.cat([index_set.drawn(own[i : i + 7]) for i in range(0, 200, 7)]))
    assert not torch.equal(drawn, RandomBlocks(16, 3, seed=6, first=1, near=2).drawn(own))
    for j, blocks in enumerate(drawn.tolist()):
        real = [b for b in blocks if b >= 0]
        assert len(set(real)) == len(real) == max(0, min(3, j - 2))
        assert all(1 <= b <= j - 2 for b in real)
    late = drawn[100:].float() / own[100:, None]
    assert 0.4 < late.mean() < 0.6 and late.min() < 0.1 and late.max() > 0.9


def test_blocks_ahead_are_drawn_where_an_end_is_given():
    drawn = RandomBlocks(4, 3, first=1, near=2, end=19).drawn(torch.arange(20))
    for j, blocks in enumerate(drawn.tolist()):
        assert len(set(blocks)) == 3 and all(1 <= b < 19 and abs(b - j) >= 2 for b in blocks)


@pytest.mark.parametrize("name", ["window", "blocks", "segments", "dilated", "bigbird", "a-shape"])
def test_work_is_linear_where_the_set_is_bounded(name: str):
    assert pairs(SETS[name], 1 << 14) == pytest.approx(4 * pairs(SETS[name], 1 << 12), rel=0.02)


@pytest.mark.parametrize("pattern", [lambda n: Window(n) | Strided(n), lambda n: fixed(n, 4)])
def test_work_is_length_times_root_at_a_stride_of_the_root(pattern):
    short, long = pairs(pattern(64), 64**2), pairs(pattern(128), 128**2)
    assert long / short == pytest.approx(8, rel=0.25)
    assert density(pattern(128), 128**2) < 0.06

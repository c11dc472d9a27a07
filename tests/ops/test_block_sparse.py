"""Chosen blocks and columns against their definition and against full attention: outputs, all gradients, work and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slipstream.laws.cost import COUNTED
from slipstream.ops import block_sparse as ops
from slipstream.ops.attention import attention
from slipstream.ops.softmax import PLAIN, Softmax

B, T, S, H, G, K, V = 2, 11, 24, 4, 2, 6, 3
PAST = torch.tensor([5, 12])
SETTINGS = {
    "plain": PLAIN,
    "scaled": Softmax(scale=0.3),
    "capped": Softmax(cap=2.0),
    "sinks": Softmax(sinks=torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)),
}


def lines() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (T, H, K), "k": (S, G, K), "v": (S, G, V)}
    return {n: torch.randn(B, *dims, generator=draw, dtype=torch.float64) for n, dims in shapes.items()}


def choice(block_size: int, C: int, share: float = 0.4) -> tuple[Tensor, Tensor]:
    own, blocks = ops.blocks_of(PAST, T, block_size)
    draw = torch.Generator().manual_seed(block_size)
    return tuple(torch.rand(B, C, *n, generator=draw) < share for n in ((own.shape[1], blocks), (S,)))


def results(f, args: dict[str, Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in args.values()]
    o = f(*leaves)
    seed = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    return [o, *torch.autograd.grad(o, leaves, seed)]


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("block_size, C", [(1, 4), (4, 4), (4, 2), (32, 4)])
def test_chosen_blocks_are_their_definition(block_size, C, with_columns, name):
    chosen, columns = choice(block_size, C)
    how = (chosen, PAST, block_size, SETTINGS[name], columns if with_columns else None)
    close(*(results(lambda *x, f=f: f(*x, *how), lines()) for f in (ops.block_sparse, ops.reference)))


@pytest.mark.parametrize("block_size", [3, 4, 32])
def test_everything_chosen_is_full_attention(block_size):
    """All blocks, or all columns, or both: what is chosen twice counts once, and the future never."""
    want = results(lambda *x: attention(*x, PAST), lines())
    for blocks, columns in ((True, False), (False, True), (True, True)):
        how = torch.full_like(choice(block_size, H)[0], blocks), PAST, block_size, PLAIN, torch.full((B, H, S), columns)
        close(results(lambda *x, how=how: ops.block_sparse(*x, *how), lines()), want)


@pytest.mark.parametrize("gathered", [1, 20, 2**15])
def test_the_size_of_a_tile_changes_nothing_nor_do_rooms_that_are_used_again(gathered, monkeypatch):
    chosen, columns = choice(4, H)
    want = ops.block_sparse(**lines(), chosen=chosen, past=PAST, block_size=4, columns=columns)
    monkeypatch.setattr(ops, "GATHERED", gathered)
    close([ops.block_sparse(**lines(), chosen=chosen, past=PAST, block_size=4, columns=columns)], [want])
    with torch.no_grad():
        close([ops.block_sparse(**lines(), chosen=chosen, past=PAST, block_size=4, columns=columns)], [want])


def test_rows_are_as_alone():
    chosen, columns = choice(4, H)
    both = ops.block_sparse(**lines(), chosen=chosen, past=PAST, block_size=4, columns=columns)
    for b in range(B):
        row = slice(b, b + 1)
        own, blocks = ops.blocks_of(PAST[row], T, 4)
        alone = {n: x[row, : None if n == "q" else PAST[b] + T] for n, x in lines().items()}
        few = chosen[row, :, : own.shape[1], :blocks]
        close([ops.block_sparse(**alone, chosen=few, past=PAST[row], block_size=4, columns=columns[row])], [both[row]])


def test_no_queries_and_no_rows_give_no_outputs():
    for rows, tokens in ((B, 0), (0, T)):
        q, k, v = (x[:rows] for x in lines().values())
        own, blocks = ops.blocks_of(PAST[:rows], tokens, 4)
        chosen = torch.ones(rows, H, own.shape[1], blocks, dtype=torch.bool)
        o = ops.block_sparse(q[:, :tokens], k, v, chosen, PAST[:rows], 4)
        assert o.shape == (rows, tokens, H, V)


def long(tokens: int, size: int, reach: int) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """One head whose blocks read themselves and so many before; how many are read in all."""
    qkv = [torch.randn(1, tokens, 1, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    past = torch.zeros(1, dtype=torch.long)
    own, blocks = ops.blocks_of(past, tokens, size)
    chosen = torch.arange(blocks) >= own[0][:, None] - reach
    return qkv, chosen[None, None], past, int((chosen & (torch.arange(blocks) <= own[0][:, None])).sum())


def test_the_work_is_what_is_chosen():
    (q, k, v), chosen, past, blocks = long(512, 16, 2)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        ops.block_sparse(q, k, v, chosen, past, 16)
    assert counter.get_total_flops() == ops.block_sparse_flops(blocks, 16, 8, 8)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        self.numel = max(self.numel, *made, 0)
        return out


def test_memory_is_linear_forward_and_backward(monkeypatch):
    monkeypatch.setattr(ops, "GATHERED", 64)
    sizes = []
    for tokens in (512, 2048):
        (q, k, v), chosen, past, _ = long(tokens, 16, 2)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with Largest() as made:
            ops.block_sparse(*leaves, chosen, past, 16).sum().backward()
        sizes.append(made.numel / tokens)
    assert sizes[1] <= sizes[0] * 1.01, sizes

"""Prompts read sparsely: all of them where everything is chosen, what was planted where little is, and nothing of padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.registry import mixer
from slipstream.mixers.attention.attention import Attention
from slipstream.ops.attention import attention
from slipstream.ops.block_sparse import block_sparse
from slipstream.ops.softmax import PLAIN, Softmax
from slipstream.policies.policy import PrefillPolicy, prefill_policies, prefill_policy
from slipstream.policies.prefills.flexprefill import FlexPrefill
from slipstream.policies.prefills.minference import MInference
from slipstream.policies.prefills.xattention import XAttention
from slipstream.policies.prompt import BlockPrefill, Choice, Prompt, largest, smallest_set

B, T, S, H, G, K = 3, 50, 80, 4, 2, 8
PAST, LENGTHS = torch.tensor([0, 13, 24]), torch.tensor([50, 31, 0])
CAPPED_WITH_SINKS = Softmax(cap=3.0, sinks=torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64))
LITTLE = {"minference": MInference(0.3, 4), "xattention": XAttention(0.6, 8, 4), "flexprefill": FlexPrefill(0.6, 8, 8)}
ALL = {"xattention": XAttention(1.0, 8, 4), "flexprefill": FlexPrefill(1.0, 8, 8), "minference": MInference(1.0, 4)}


def lines() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(B, *n, K, generator=draw, dtype=torch.float64) for n in ((T, H), (S, G), (S, G))]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def close_where_real(a: Tensor, b: Tensor, lengths: Tensor = LENGTHS) -> None:
    for row, n in enumerate(lengths.tolist()):
        close(a[row, :n], b[row, :n])


@pytest.mark.parametrize("softmax", [PLAIN, CAPPED_WITH_SINKS], ids=["plain", "capped with sinks"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("name", ALL)
def test_everything_chosen_is_dense_attention_and_so_are_gradients(name, lengths, softmax):
    leaves = [x.requires_grad_() for x in lines()]
    seed = (
        F.pad(torch.ones(B, T, H, K), (0, 0))
        * (torch.arange(T) < (LENGTHS if lengths is not None else T + 0 * PAST)[:, None])[..., None, None]
    )
    got, want = (ALL[name].attend(*leaves, PAST, lengths, softmax), attention(*leaves, PAST, softmax=softmax))
    close_where_real(got, want, LENGTHS if lengths is not None else torch.full_like(PAST, T))
    for a, b in zip(*(torch.autograd.grad((o * seed).square().sum(), leaves) for o in (got, want))):
        close(a, b)


def test_every_shape_of_minference_can_be_everything():
    q, k, v = lines()
    whole = MInference(8.0, 4)
    prompt = Prompt(q, k, PAST, None, PLAIN, 4)
    for shape in whole.shapes(prompt):
        close(block_sparse(q, k, v, shape.blocks, PAST, 4, columns=shape.columns), attention(q, k, v, PAST))


@pytest.mark.parametrize("name", LITTLE)
def test_little_is_less_and_rows_choose_alone(name):
    q, k, v = lines()
    together = LITTLE[name].attend(q, k, v, PAST, LENGTHS, PLAIN)
    assert (together - attention(q, k, v, PAST))[:2].abs().max() > 1e-3
    for row, n in enumerate(LENGTHS.tolist()):
        one = slice(row, row + 1)
        alone = LITTLE[name].attend(q[one, :n], k[one], v[one], PAST[one], None, PLAIN)
        close(together[one, :n], alone)


@pytest.mark.parametrize("name", LITTLE)
def test_what_stands_behind_a_row_reaches_nothing(name):
    """NaN in the queries of padding; what a cache still holds of an earlier text."""
    (q, k, v), policy = lines(), LITTLE[name]
    want = policy.attend(q, k, v, PAST, LENGTHS, PLAIN)
    behind = (torch.arange(S) >= (PAST + LENGTHS)[:, None])[..., None, None]
    q = q.masked_fill((torch.arange(T) >= LENGTHS[:, None])[..., None, None], torch.nan)
    close_where_real(
        policy.attend(q, k.masked_fill(behind, 30.0), v.masked_fill(behind, 1e4), PAST, LENGTHS, PLAIN), want
    )


@pytest.mark.parametrize("name", [*LITTLE, "sage"])
def test_no_tokens_and_no_rows_are_read_as_well(name):
    policy = prefill_policy(name)
    for rows, tokens in ((B, 0), (0, T)):
        q, k, v = (x[:rows] for x in lines())
        assert policy.attend(q[:, :tokens], k, v, PAST[:rows], None, PLAIN).shape == (rows, tokens, H, K)


SHORT = ["minference", "xattention", "flexprefill", "minference:0.01", "xattention:0.1", "flexprefill:0.1"]
WHOLE = ["minference:1", "xattention:1", "flexprefill:1"]


def build(policy: str) -> Attention:
    """The same weights under every policy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mixer("attention", d_model=16, n_heads=4, n_kv_heads=2, conv_size=3, prefill_policy=policy).double()


@pytest.mark.parametrize("spec, tokens", [(s, 44) for s in SHORT] + [(s, 300) for s in WHOLE])
def test_in_a_mixer_short_or_whole_prompts_are_dense(spec, tokens):
    """At any cut, and with rows of their own lengths whose padding holds NaN."""
    x = torch.randn(2, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense, sparse, lengths = build("dense"), build(spec), torch.tensor([tokens - 25, 40])
    soiled = x.masked_fill((torch.arange(tokens) >= lengths[:, None])[..., None], torch.nan)
    ways = []
    for m in (dense, sparse):
        y1, state = m.prefill(soiled, m.init_state(2), lengths)
        y2, state = m.prefill(x[:, :20], state)
        ways.append([y1[0, : tokens - 25], y1[1, :40], y2, m.step(x[:, :1], state)[0]])
    for a, b in zip(*ways):
        close(b, a)


@pytest.mark.parametrize("spec, tokens", [("minference:0.3", 300), ("xattention:0.5", 300), ("flexprefill:0.5", 1500)])
def test_in_a_mixer_a_policy_changes_prompts_and_not_training(spec, tokens):
    x = torch.randn(1, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense, sparse = build("dense"), build(spec)
    sparse_prompt = sparse.prefill(x, sparse.init_state(1))[0]
    assert (sparse_prompt - dense(x)).abs().max() > 1e-6
    close(sparse(x), dense(x))


def test_mistakes_are_told_in_one_line():
    for spec in ("xattention:0", "xattention:1.5", "flexprefill:much", "minference:-1", "sage:8", "xatention"):
        with pytest.raises(InputError, match=spec.partition(":")[0][:4]):
            prefill_policy(spec)
    with pytest.raises(InputError, match="causal"):
        prefill_policy("xattention", causal=False)


def test_every_policy_says_where_it_is_from_and_what_it_takes():
    for name, cls in prefill_policies().items():
        assert issubclass(cls, PrefillPolicy) and cls.name == name and cls.paper
        assert cls.takes or name in ("dense", "sage")


def test_the_largest_and_the_smallest_set():
    x = torch.tensor([[0.2, 0.3, 0.3, 0.1, 0.1]])
    assert largest(x, torch.tensor([1])).tolist() == [[False, True, False, False, False]]
    assert smallest_set(x, 0.59).tolist() == [[False, True, True, False, False]]
    assert smallest_set(x, 0.61).tolist() == [[True, True, True, False, False]]
    last = torch.tensor([[False, False, False, False, True]])
    assert smallest_set(x, 0.39, last).tolist() == [[False, True, False, False, True]]
    assert smallest_set(x, 1.0).all()


LONG, WIDTH, SIZE = 2048, 64, 32


def planted(kind: str) -> tuple[Tensor, Tensor]:
    """Queries and keys of one head: weak noise, and logits of about 20 where its structure is: the first tokens and near ones;
    columns and one narrow slash; two blocks of keys for every block of queries."""
    draw = torch.Generator().manual_seed(len(kind))
    q, k = (0.3 * torch.randn(LONG, WIDTH, generator=draw) for _ in "qk")
    place, gain = torch.arange(LONG), WIDTH**0.25 * 20**0.5
    turns = torch.rand(16, generator=draw) * (0.6 if kind == "a-shape" else 3.0)

    def near(position: Tensor) -> Tensor:
        return gain * torch.cat([(position[:, None] * turns).cos(), (position[:, None] * turns).sin()], 1) / 4

    if kind == "blocks":
        code = F.normalize(torch.randn(LONG // SIZE, WIDTH, generator=draw), dim=1)
        for n in range(LONG // SIZE):
            q[n * SIZE : n * SIZE + SIZE] += gain * code[torch.randint(0, n + 1, (2,), generator=draw)].sum(0)
        return q, k + gain * code[place // SIZE]
    some = torch.randperm(LONG, generator=draw)[:5]
    columns = torch.arange(4) if kind == "a-shape" else F.pad(some, (0, 1))
    q[:, 40], k[columns, 40] = gain, gain
    q[:, :32] += near(place - (0 if kind == "a-shape" else 601))
    k[:, :32] += near(place)
    return q, k


def mass_and_density(policy: BlockPrefill, q: Tensor, k: Tensor, shuffled: bool = False) -> tuple[Tensor, Tensor]:
    """By head: the share of all attention that falls on what is read, and the share of causal pairs that is read."""
    prompt = Prompt(q, k, torch.zeros(1, dtype=torch.long), None, PLAIN, policy.block_size)
    choice = policy.choose(prompt)
    if shuffled:
        choice = misplaced(choice, prompt)
    read = choice.blocks | (torch.arange(prompt.n_blocks) == prompt.own[..., None])[:, None]
    pairs = read.repeat_interleave(policy.block_size, 2).repeat_interleave(policy.block_size, 3)
    pairs = (pairs if choice.columns is None else pairs | choice.columns[:, :, None]).tril()
    logits = torch.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5
    weights = logits.masked_fill(torch.ones_like(pairs).triu(1), -torch.inf).softmax(-1)
    return (weights * pairs).sum((2, 3))[0] / LONG, pairs.sum((2, 3))[0] / (LONG * (LONG + 1) / 2)


def misplaced(choice: Choice, prompt: Prompt) -> Choice:
    """As many of everything, somewhere."""
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(choice.blocks.shape, generator=draw).masked_fill(~prompt.seen(), -1.0)
    blocks = largest(order, (choice.blocks & prompt.seen()).sum(-1))
    if choice.columns is None:
        return Choice(blocks)
    return Choice(blocks, largest(torch.rand(choice.columns.shape, generator=draw), choice.columns.sum(-1)))


DENSITIES = {
    "minference": (MInference(0.1, SIZE), (0.1, 0.1, 0.1)),
    "xattention": (XAttention(0.95, SIZE, 2), (0.1, 0.2, 0.1)),
    "flexprefill": (FlexPrefill(0.95, SIZE, 128), (0.15, 0.25, 0.25)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_what_was_planted_is_kept_and_a_shuffled_choice_loses_it(name):
    policy, densities = DENSITIES[name]
    q, k = (torch.stack(x, 1)[None] for x in zip(*(planted(kind) for kind in ("a-shape", "lines", "blocks"))))
    kept, density = mass_and_density(policy, q, k)
    assert (kept > 0.95).all(), kept
    assert (density <= torch.tensor(densities)).all(), density
    by_chance, _ = mass_and_density(policy, q, k, shuffled=True)
    assert (by_chance < kept - 0.2).all(), by_chance


def test_minference_finds_the_shape_of_each_head():
    """Lines for the head of lines, blocks for the head of blocks, and no more than one shape could keep of all three."""
    q, k = (torch.stack(x, 1)[None] for x in zip(*(planted(kind) for kind in ("a-shape", "lines", "blocks"))))
    policy = MInference(0.1, SIZE)
    prompt = Prompt(q, k, torch.zeros(1, dtype=torch.long), None, PLAIN, SIZE)
    choice, (a_shape, *_, blocks) = policy.choose(prompt), policy.shapes(prompt)
    assert torch.equal(choice.blocks[0, 2], blocks.blocks[0, 2]) and not choice.columns[0, 2].any()
    assert choice.columns[0, 1].any() and not torch.equal(choice.columns[0, 1], a_shape.columns[0, 1])

"""What chooses its keys, when it may choose them all, is full attention: outputs and gradients; and what it does otherwise."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError

B, T, D = 2, 33, 16
HEADS = {"d_model": D, "n_heads": 4, "n_kv_heads": 2}
LATENT = {"d_model": D, "n_heads": 4, "q_rank": 8, "kv_rank": 6, "nope_head_dim": 4, "rope_head_dim": 2}


def seeded(name: str, **config):
    torch.manual_seed(0)
    mixer = ss.mixer(name, **config).double()
    for p in mixer.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return mixer


def same(ours, full, renamed: dict[str, str]) -> None:
    """Outputs, and gradients of the input and of all weights that both have."""
    found = dict(ours.named_parameters())
    full.load_state_dict({theirs: found[mine].detach() for theirs, mine in renamed.items()})
    x = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    seed = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got, want = ours(x), full(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    full_weights = dict(full.named_parameters())
    grads = torch.autograd.grad((got * seed).sum(), [x, *(found[m] for m in renamed.values())])
    wanted = torch.autograd.grad((want * seed).sum(), [x, *(full_weights[n] for n in renamed)])
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_moba_over_all_blocks_is_attention():
    ours, full = seeded("moba", **HEADS, block_size=4, top_k=9), seeded("attention", **HEADS)
    same(ours, full, {n: n for n in full.state_dict()})


def test_dsa_over_all_tokens_is_mla():
    ours, full = seeded("dsa", **LATENT, top_k=T, index_n_heads=2, index_head_dim=4), seeded("mla", **LATENT)
    same(ours, full, {n: n for n in full.state_dict()})


@pytest.mark.parametrize(("branch", "sizes"), [("slc", {"top_k": 9}), ("win", {"window": T})])
def test_a_branch_of_nsa_that_reads_all_is_attention(branch, sizes):
    """The other branches shut: sigmoid is exactly 1 and 0 there."""
    number = ("cmp", "slc", "win").index(branch)
    ours = seeded("nsa", **HEADS, compress_size=4, compress_stride=2, block_size=4, **sizes)
    ours.g_proj.weight.data.zero_()
    ours.g_proj.bias.data = torch.tensor([1e3 if c == number else -1e3 for c in range(3) for _ in range(4)]).double()
    full = seeded("attention", **HEADS)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    own = {n: p.unflatten(0, (3, -1))[number] for n, p in (("k", ours.k_proj.weight), ("v", ours.v_proj.weight))}
    weights = {"q": ours.q_proj.weight, **own}
    full.load_state_dict(
        {f"qkv.{n}_proj.weight": w for n, w in weights.items()} | {"o_proj.weight": ours.o_proj.weight}
    )
    got, want = ours(x), full(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["moba", "dsa"])
def test_what_is_not_chosen_is_not_read(name):
    """A value that stands where nobody looks reaches only those who look: most outputs do not know it."""
    config = {"block_size": 2, "top_k": 2} if name == "moba" else {"top_k": 4, "index_n_heads": 2, "index_head_dim": 4}
    mixer = seeded(name, d_model=D, n_heads=1, **config)
    x = torch.randn(1, 64, D, dtype=torch.float64, requires_grad=True)
    read = [bool(torch.autograd.grad(mixer(x)[0, t].sum(), x)[0][0, 3].abs().max() > 0) for t in range(20, 64)]
    assert sum(read) < 0.6 * len(read)


def test_the_mean_of_a_block_decides_whether_it_is_read():
    """Of two far blocks, the one whose keys lie along the query is read, and its values are what comes out."""
    mixer = ss.mixer("moba", d_model=4, n_heads=1, rope_base=None, block_size=2, top_k=2).double()
    for p in mixer.parameters():
        p.data = torch.eye(4, dtype=torch.float64)
    x = torch.zeros(1, 7, 4, dtype=torch.float64)
    x[0, 0:2, 0], x[0, 2:4, 1], x[0, 6, 1] = 3.0, 3.0, 30.0
    y = mixer(x)[0, 6]
    assert y[0] == 0 and y[1] > 0


def test_summaries_reach_behind_window_and_blocks():
    """The first branch alone hands on what stands far back."""
    mixer = seeded("nsa", **HEADS, compress_size=4, compress_stride=2, block_size=2, top_k=3, window=2)
    x = torch.randn(1, 40, D, dtype=torch.float64, requires_grad=True)
    reach = torch.autograd.grad(mixer(x)[0, -1].sum(), x)[0][0].abs().amax(-1) > 0
    assert reach.all()


def test_compressed_keys_reach_behind_the_window_and_csa_reads_only_some():
    few = {"top_k": 3, "index_n_heads": 2, "index_head_dim": 4, "rate": 2}
    for name, config in (("hca", {"rate": 4}), ("csa", few), ("csa", few | {"top_k": 20})):
        mixer = seeded(name, d_model=D, n_heads=2, window=3, **config)
        x = torch.randn(1, 40, D, dtype=torch.float64, requires_grad=True)
        reach = torch.autograd.grad(mixer(x)[0, -1].sum(), x)[0][0].abs().amax(-1) > 0
        assert reach.all() == (config.get("top_k") != 3)


def test_sizes_that_do_not_fit_are_refused_in_words():
    with pytest.raises(InputError, match="must be multiples of compress_stride 3"):
        ss.mixer("nsa", d_model=D, compress_stride=3)
    with pytest.raises(InputError, match="does not divide into n_kv_heads 3"):
        ss.mixer("nsa", d_model=D, n_heads=4, n_kv_heads=3)
    with pytest.raises(InputError, match="rope_head_dim 3 must be even"):
        ss.mixer("csa", d_model=D, rope_head_dim=3)
    with pytest.raises(InputError, match="greater than or equal to 3"):
        ss.mixer("nsa", d_model=D, top_k=2)


def test_summed_keys_take_a_row_for_a_block():
    mixer = ss.mixer("moba", d_model=D, block_size=8)
    assert mixer.init_state(1, 20)["k_sum"].shape[1] == 3
    assert mixer.state_bytes(64) - mixer.state_bytes(0) == 4 * D * (2 * 64 + 8)

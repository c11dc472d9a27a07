"""Hashed, clustered, sorted and remembered attention: where all may be selected it is full attention; centroids in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.layers.rope import rope
from slipstream.ops.attention import reference as full_attention
from slipstream.ops.l2_norm import l2_norm

B, T, D = 2, 19, 16


def build(name, **settings):
    torch.manual_seed(0)
    return ss.mixer(name, d_model=D, n_heads=2, **settings).double().eval()


def results(f, mixer):
    """Outputs, and the gradients of x and of all parameters."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, generator=draw, dtype=torch.float64).requires_grad_()
    y = f(x)
    weights = torch.randn(y.shape, generator=draw, dtype=y.dtype)
    return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], weights, allow_unused=True)]


def same(f, g, mixer):
    for a, b in zip(results(f, mixer), results(g, mixer), strict=True):
        assert (a is None) == (b is None) or not (b if a is None else a).any()
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def heads(proj, x):
    return proj(x).unflatten(-1, (2, -1))


def turned(x):
    return rope(x, torch.arange(T).expand(B, -1))


def to_all_before(q, k, v, scale):
    """Every earlier token, not oneself; the first token itself."""
    logits = scale * torch.einsum("bthk,bshk->bhts", q, k)
    mask = torch.ones(T, T, dtype=torch.bool).tril(-1)
    mask[0, 0] = True
    return torch.einsum("bhts,bshv->bthv", logits.masked_fill(~mask, -torch.inf).softmax(-1), v)


def test_reformer_with_one_bucket_is_full_attention():
    m = build("reformer", window=T, n_hashes=3)
    m.rotations.zero_()

    def full(x):
        q = turned(heads(m.qk_proj, x))
        return m.o_proj(to_all_before(q, l2_norm(q), heads(m.v_proj, x), 1.0).flatten(2))

    same(m, full, m)


def test_routing_with_one_cluster_is_full_attention():
    m = build("routing_transformer", window=T, n_clusters=1)

    def full(x):
        q, v, k = heads(m.q_proj, x), heads(m.v_proj, x), turned(m.k_proj(x)[:, :, None])
        shared = turned(F.layer_norm(q[:, :, :1], (8,)))
        routed = to_all_before(shared, shared, v[:, :, :1], 8**-0.5)
        return m.o_proj(torch.cat([routed, full_attention(turned(q[:, :, 1:]), k, v[:, :, 1:])], 2).flatten(2))

    same(m, full, m)


def test_sinkhorn_with_one_block_is_attention():
    m = build("sinkhorn", block_size=T)
    q, k, v = (lambda x, p=p: heads(p, x) for p in (m.q_proj, m.k_proj, m.v_proj))
    same(m, lambda x: m.o_proj(full_attention(turned(q(x)), turned(k(x)), v(x)).flatten(2)), m)


def test_sinkhorn_sorts_a_single_past_block_whole():
    """In the second block the only block of the past has all the weight: both halves are full attention."""
    m = build("sinkhorn", block_size=10)
    q, k, v = (lambda x, p=p: heads(p, x) for p in (m.q_proj, m.k_proj, m.v_proj))
    same(m, lambda x: m.o_proj(full_attention(turned(q(x)), turned(k(x)), v(x)).flatten(2)), m)


def memorising(**settings):
    m = build("memorizing_transformer", **settings)

    def qkv(x):
        q, k = (l2_norm(heads(p, x)) for p in (m.q_proj, m.k_proj))
        return q * m.attention_scale[:, None] * 8**0.5, k, heads(m.v_proj, x)

    return m, qkv


def test_memorizing_within_the_window_is_full_attention():
    m, qkv = memorising(window=T)

    def full(x):
        q, k, v = qkv(x)
        return m.o_proj(full_attention(turned(q), turned(k), v).flatten(2))

    same(m, full, m)


def test_memorizing_that_finds_all_reads_all_beyond_the_window():
    """With a window of one token it is that token's own value, mixed with full attention to all before it."""
    m, qkv = memorising(window=1, top_k=T)

    def full(x):
        q, k, v = qkv(x)
        g = m.gate.sigmoid()[:, None] * (torch.arange(T) > 0)[:, None, None]
        return m.o_proj((g * to_all_before(q, k, v, 8**-0.5) + (1 - g) * v).flatten(2))

    same(m, full, m)


def test_memory_of_buckets_does_not_grow():
    for name in ("reformer", "routing_transformer"):
        m = build(name)
        assert m.state_bytes(10) == m.state_bytes(10**6)


def passes(mixer, x, run=lambda m, x: m(x)):
    before = mixer.centroids.clone()
    run(mixer, x).sum().backward()
    return (mixer.centroids - before).abs().max().item()


def test_centroids_follow_their_tokens_in_training_alone():
    m, x = build("routing_transformer", n_clusters=3, centroid_decay=0.9), torch.randn(B, T, D, dtype=torch.float64)
    assert passes(m, x) == 0
    m.train()
    with torch.no_grad():
        start = m.centroids.clone()
        m(x)
        assert torch.equal(m.centroids, start)
        q = F.layer_norm(heads(m.q_proj, x)[:, :, :1], (8,))
        near = torch.einsum("bthk,hck->bthc", q, m.centroids).argmax(-1)[..., 0]
        toward = [F.normalize(q[:, :, 0][near == c].sum(0), dim=-1) for c in range(3)]
        want = F.normalize(0.9 * m.centroids[0] + 0.1 * torch.stack(toward), dim=-1)
    assert passes(m, x) > 0
    torch.testing.assert_close(m.centroids[0], want)


def test_centroids_move_once_when_the_forward_pass_is_made_again():
    x = torch.randn(B, T, D, dtype=torch.float64)
    plain, again = (build("routing_transformer", n_clusters=3).train() for _ in range(2))
    passes(plain, x)
    passes(again, x, lambda m, x: checkpoint(m, x, use_reentrant=False))
    assert torch.equal(plain.centroids, again.centroids)
    for a, b in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_padding_moves_no_centroid():
    x, lengths, moved = torch.randn(B, T, D, dtype=torch.float64), torch.tensor([T, 7]), []
    for rubbish in (0.0, 1e4):
        m = build("routing_transformer", n_clusters=3).train()
        x[1, 7:] = rubbish
        state = m.init_state(B, T)
        m.prefill(x, state, lengths)[0][0].sum().backward()
        moved.append(m.centroids)
    assert torch.equal(*moved)


def test_impossible_settings_are_refused_in_words():
    with pytest.raises(InputError, match="n_buckets 5 must be even"):
        build("reformer", n_buckets=5)
    with pytest.raises(InputError, match="n_local_heads 2"):
        build("routing_transformer", n_local_heads=2)

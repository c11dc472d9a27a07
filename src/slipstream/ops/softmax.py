r"""One tile of softmax attention: some queries, some keys, which of them meet. Sparse or whole, attention reads in such tiles.

    o_t = sum_{s in G(t)} e^{l_ts} v_s / (e^{sink} + sum_{s in G(t)} e^{l_ts})        l_ts = scale * q_t . k_s

Logits may be capped to lie within +-c: c tanh(l / c). A set of keys may be read in parts: each part gives its outputs
and the logarithm of its denominator, from which the whole is merged (online softmax: Milakov & Gimelshein 2018,
arXiv:1805.02867; FlashAttention, Dao et al. 2022, arXiv:2205.14135). A query that meets no key reads zero. A tile is held
whole: whoever calls keeps it small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Mask = Bool[Tensor, "#B #H #T #S"] | Float[Tensor, "#B #H #T #S"]


@dataclass(frozen=True)
class Softmax:
    """How logits become weights. scale: of the products, None for 1 / sqrt(K). cap: of the logits (Gemma 2). sinks: (H), the
    logit of a key that has no value, a number a head (gpt-oss)."""

    scale: float | None = None
    cap: float | None = None
    sinks: Float[Tensor, "H"] | None = None

    @property
    def by_scale_alone(self) -> bool:
        """Whether torch's own attention can do it."""
        return self.cap is None and self.sinks is None

    @property
    def requires_grad(self) -> bool:
        """As of a tensor: whether the sinks learn."""
        return self.sinks is not None and self.sinks.requires_grad

    def scale_of(self, width: int) -> float:
        """The scale of products of queries and keys so wide."""
        return width**-0.5 if self.scale is None else self.scale

    def capped(self, logits: Tensor) -> Tensor:
        """Within the cap, where there is one."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


PLAIN = Softmax()


def read(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    mask: Mask | None = None,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """What the queries read; G key heads serve H query heads. mask: True where query and key meet, or what is added to
    the logits; None where all meet."""
    if not softmax.by_scale_alone:
        o, denominator = read_with_lse(q, k, v, mask, softmax)
        return with_sinks(o, denominator, softmax)
    return read_by_torch(q, k, v, mask, softmax.scale)


def read_by_torch(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    mask: Mask | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B T H V"]:
    """The same by torch's own attention. It makes the logits tile by tile where keys and values are equally wide, so the
    narrower are padded; else it would hold them all."""
    if 0 in q.shape[:2] or k.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    scale, V = q.shape[3] ** -0.5 if scale is None else scale, v.shape[3]
    width = max(k.shape[3], V)
    q, k, v = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[1] != q.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)[..., :V]


def read_with_lse(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    mask: Mask | None = None,
    softmax: Softmax = PLAIN,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """A part of what the queries read, without sinks, and the logarithm of its denominator: -inf where no key was met."""
    return read_by_logits(logits_of(q, k, softmax), v, mask)


def read_by_logits(
    logits: Float[Tensor, "B H T S"], v: Float[Tensor, "B S G V"], mask: Mask | None = None
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """The same of logits that were made in another way.

    By torch's softmax: its exp alone takes no longer, up to a hundred times, where weights vanish.
    """
    if not v.shape[1]:
        nothing = logits.sum(-1).transpose(1, 2)
        return nothing[..., None].expand(-1, -1, -1, v.shape[3]).to(v.dtype), nothing - torch.inf
    least = torch.finfo(logits.dtype).min  # not -inf: of a row without keys softmax would make NaN
    if mask is not None:
        logits = logits.masked_fill(~mask, least) if mask.dtype == torch.bool else (logits + mask).clamp(min=least)
    weights, (largest, first) = logits.softmax(-1), logits.max(-1, keepdim=True)
    share = weights.gather(-1, first)
    none = (largest <= least).transpose(1, 2)  # what is not a number stays to be seen
    log_total = (largest - share.log()).transpose(1, 2)  # e^largest / total is the share of the largest
    o = torch.where(none, 0, _by_groups(weights.to(v.dtype), v))
    return o, torch.where(none, -torch.inf, log_total)[..., 0]


def merge(
    parts: Sequence[tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Disjoint parts of what the same queries read, as one."""
    lse = torch.stack([lse for _, lse in parts])
    largest = lse.detach().amax(0).clamp(min=torch.finfo(lse.dtype).min)
    weights = (lse - largest).exp()
    total = weights.sum(0)
    met = total > 0
    shares = weights / torch.where(met, total, 1)
    o = sum(share[..., None].to(o.dtype) * o for share, (o, _) in zip(shares, parts))
    return o, torch.where(met, torch.where(met, total, 1).log() + largest, -torch.inf)


def with_sinks(o: Float[Tensor, "B T H V"], lse: Float[Tensor, "B T H"], softmax: Softmax) -> Float[Tensor, "B T H V"]:
    """What was read, after the sinks have taken their share of the weights."""
    if softmax.sinks is None:
        return o
    return o * torch.sigmoid(lse - softmax.sinks)[..., None].to(o.dtype)


def logits_of(q: Float[Tensor, "B T H K"], k: Float[Tensor, "B S G K"], softmax: Softmax) -> Float[Tensor, "B H T S"]:
    """Scaled and capped, in float32 at least; masks and sinks are not in them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[2]
    q = q.transpose(1, 2).unflatten(1, (groups, -1)) * softmax.scale_of(q.shape[3])  # B G R T K
    return softmax.capped((q @ k.permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2).to(wide))


def _by_groups(weights: Float[Tensor, "B H T S"], v: Float[Tensor, "B S G V"]) -> Float[Tensor, "B T H V"]:
    o = weights.unflatten(1, (v.shape[2], -1)) @ v.transpose(1, 2)[:, :, None]
    return o.flatten(1, 2).transpose(1, 2)

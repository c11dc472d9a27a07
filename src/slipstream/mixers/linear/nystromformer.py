r"""Nystromformer: softmax attention rebuilt from a few landmarks, the means of segments; bidirectional, for encoders only.

    O = softmax(Q K'^T) pinv(softmax(Q' K'^T)) softmax(Q' K^T) V + conv(V)        Q' and K' are the means of m segments of Q and K

    Z_0 = A^T / |A|_1,  Z_{j+1} = Z_j (13 I - A Z_j (15 I - A Z_j (7 I - A Z_j))) / 4,  pinv(A) = Z_6        Q, K = W x / K^(1/4)

Segments are of the row's own length, as even as whole tokens allow; up to m tokens, attention is exact. The convolution is
along time, one filter a head. |A|_1 is of each head and row; transformers takes the largest of a whole batch unless told
otherwise. Landmarks see the future: there is no causal form, and a language model refuses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.bidirectional import Bidirectional
from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.layers.linear import Linear
from slipstream.ops.attention import attention, attention_flops

WHY = "its landmarks are means over the whole sequence, what is to come included"
ITERATIONS = 6  # of the pseudo-inverse, as in the paper


class Nystromformer(Bidirectional, name="nystromformer", family="linear"):
    paper = "Xiong, Zeng, Chakraborty, Tan, Fung, Li, Singh 2021, arXiv:2102.03902, algorithm 1"
    use_when = "encoders of long inputs of any length are too slow with full attention, and need no causal order"
    train_order, decode_order = "T", "T"
    symbols = {"K'": "the means of k", "Q'": "the means of q", "m": "n_landmarks", "Z": "inverse"}
    oracle = "transformers NystromformerSelfAttention, tests/oracles/test_slot_attention_oracles.py"
    limits = {"prefill": WHY, "step": WHY}

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        n_landmarks: int = 64  # segments whose means stand for all tokens
        conv_size: int = 33  # width of the convolution on the values; odd, or 0 for none

    config: Config
    tiny = Config(d_model=16, n_heads=2, n_landmarks=4, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, size = heads(config.d_model, config.n_heads), config.conv_size
        if size and size % 2 == 0:
            raise InputError(f"conv_size {size} has no middle; {size + 1} has")
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config.d_model, config.d_model, bias=False) for _ in range(4)
        )
        H = self.n_heads
        self.conv = nn.Conv2d(H, H, (size, 1), padding=(size // 2, 0), groups=H, bias=False) if size else None

    def whole(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T D"]:
        """Ragged rows one by one: each has segments of its own."""
        if lengths is None:
            return self._even(x)
        rows = [self._even(row[None, :n])[0] for row, n in zip(x, lengths.tolist())]
        return torch.stack([torch.cat([row, x.new_zeros(x.shape[1] - len(row), x.shape[2])]) for row in rows])

    def _even(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if 0 in x.shape:
            return x
        q, k, v = (proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        o = attention(q, k, v, causal=False) if x.shape[1] <= self.config.n_landmarks else self._by_landmarks(q, k, v)
        if self.conv is not None:
            o = o + self.conv(v.transpose(1, 2)).transpose(1, 2)
        return self.o_proj(o.flatten(2))

    def _by_landmarks(self, q: Tensor, k: Tensor, v: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H V"]:
        """In float32 at least: an inverse has little precision to give away."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (t.to(wide).transpose(1, 2) * t.shape[-1] ** -0.25 for t in (q, k))
        q_means, k_means = self._means(q), self._means(k)
        to_marks, between, from_marks = (
            (a @ b.mT).softmax(-1) for a, b in ((q, k_means), (q_means, k_means), (q_means, k))
        )
        read = from_marks @ v.to(wide).transpose(1, 2)
        return (to_marks @ (pseudo_inverse(between) @ read)).transpose(1, 2).to(v.dtype)

    def _means(self, x: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H M K"]:
        T, m = x.shape[2], self.config.n_landmarks
        borders = torch.arange(m + 1, device=x.device) * T // m
        sizes = borders.diff()
        segment = torch.repeat_interleave(torch.arange(m, device=x.device), sizes, output_size=T)
        return x.new_zeros(*x.shape[:2], m, x.shape[3]).index_add(2, segment, x) / sizes[:, None]

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Row by row and head by head, with the segments cut out, and the convolution tap by tap."""
        T, m, size = x.shape[1], self.config.n_landmarks, self.config.conv_size
        outs = []
        for row in x:
            q, k, v = (proj(row).unflatten(-1, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
            q, k, v = (t.transpose(0, 1) for t in (q / q.shape[-1] ** 0.25, k / k.shape[-1] ** 0.25, v))
            segments = [slice(T * j // m, T * (j + 1) // m) for j in range(m)]
            q_means, k_means = (torch.stack([t[:, s].mean(1) for s in segments], 1) for t in (q, k))
            inverse = torch.stack([pseudo_inverse(A) for A in (q_means @ k_means.mT).softmax(-1)])
            o = (q @ k_means.mT).softmax(-1) @ inverse @ (q_means @ k.mT).softmax(-1) @ v
            if self.conv is not None:
                padded = F.pad(v, (0, 0, size // 2, size // 2))
                o = o + sum(self.conv.weight[:, 0, i, None] * padded[:, i : i + T] for i in range(size))
            outs.append(o.transpose(0, 1).flatten(1))
        return self.o_proj(torch.stack(outs))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        D, m, K = self.config.d_model, self.config.n_landmarks, self.config.d_model // self.n_heads
        conv = 2.0 * B * T * D * self.config.conv_size
        if m >= T:
            return conv + attention_flops(T, B, self.n_heads, K, "forward")
        between = 2.0 * m * m * K * 2 + ITERATIONS * 4 * 2.0 * m**3
        return conv + B * self.n_heads * (between + 4 * 2.0 * T * m * K)


def pseudo_inverse(A: Float[Tensor, "*B M M"]) -> Float[Tensor, "*B M M"]:
    """Of a matrix whose rows sum to one; an iteration of the third order."""
    I, Z = torch.eye(A.shape[-1]).to(A), A.mT / A.sum(-2).amax(-1)[..., None, None]
    for _ in range(ITERATIONS):
        AZ = A @ Z
        Z = Z @ (13 * I - AZ @ (15 * I - AZ @ (7 * I - AZ))) / 4
    return Z

r"""Gated attention unit (FLASH): squared-relu attention inside chunks, linear attention over the chunks before.

    o_t = sum_{s in chunk, s<=t} relu(q_t . k_s / C + b_{t-s})^2 v_s + sum_{s before chunk} (q'_t . k'_s) v_s / C

    q, k, q', k' = gamma * z + beta, each its own        z, u, v = silu(W x)        y_t = W_o (u_t * o_t)

One head, and a gate as wide as the values, which makes a feed-forward beside it optional: `gau/none`. Chunks are C tokens
long and begin at positions 0, C, 2C, ... of each row, so block_size is part of the function. The state is the sum of
k' v^T over closed chunks, the same of the open chunk, and the open chunk's z and v. The relative bias is a number for
every distance; biases of projections, the paper's absolute positions and its dropout are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.places import cut_out
from slipstream.ops.valid import zero_padding


class GAU(Mixer, name="gau", family="linear"):
    paper = "Hua, Dai, Liu, Le 2022, arXiv:2202.10447, sec. 2-3; scaling by 1/C as in FLASH-pytorch"
    use_when = (
        "nearby tokens matter most and need full attention, and a blurred view of everything before them is enough"
    )
    train_order, decode_order = "T", "1"
    writes, erases = "k' v^T", "nothing"
    decays, reads = "nothing", "S^T q', and relu(q . k)^2 of the open chunk"
    symbols = {"s": "k_dim", "e": "expand * d_model", "C": "block_size", "U, V, Z": "u, v, z"}
    oracle = "FLASH of FLASH-pytorch 0.1.9, tests/oracles/slot_attention.npz"

    class Config(MixerConfig):
        expand: float = 2.0  # width of gate and values as a multiple of d_model
        k_dim: int = 128  # width of the queries and keys
        block_size: int = 256  # tokens of a chunk with full attention: part of what is computed

    config: Config
    tiny = Config(d_model=16, expand=1.5, k_dim=6, block_size=4)
    no_weight_decay = ("gamma", "beta")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.width = round(config.expand * config.d_model)
        self.hidden_proj = Linear(config.d_model, 2 * self.width, bias=False)
        self.z_proj = Linear(config.d_model, config.k_dim, bias=False)
        self.gamma = nn.Parameter(torch.ones(4, config.k_dim))
        self.beta = nn.Parameter(torch.zeros(4, config.k_dim))
        self.bias = nn.Parameter(
            torch.full((config.block_size,), config.block_size**-0.5)
        )  # at first, a mean of the chunk
        self.o_proj = Linear(self.width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        C, K, V = self.config.block_size, self.config.k_dim, self.width
        sums = {"S": Slot((K, V)), "S_open": Slot((K, V))}
        return {**sums, "z": Slot((C, K), dtype=None), "v": Slot((C, V), dtype=None)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        T, C, first = x.shape[1], self.config.block_size, state.length % self.config.block_size
        gate, z, v = self._lines(x)
        n = max(1, -(-(T + int(first.max() if len(first) else 0)) // C))  # chunks that any row touches
        z, v = (self._in_place(state[name], zero_padding(t, lengths), first, n * C) for name, t in (("z", z), ("v", v)))
        before, sums = self._sums(z, v, first, state)
        o = self._read(z.unflatten(1, (n, C)), v.unflatten(1, (n, C)), before[:, :n]).flatten(1, 2)
        counts = torch.full_like(first, T) if lengths is None else lengths
        closed, row = (first + counts) // C, torch.arange(len(first), device=x.device)
        kept = {name: cut_out(t, closed * C, C) for name, t in (("z", z), ("v", v))}
        y = self.o_proj(gate * cut_out(o, first, T).to(x.dtype))
        return y, state.advance(counts, S=before[row, closed], S_open=sums[row, closed], **kept)

    def _in_place(self, open_chunk: Tensor, new: Tensor, first: Int[Tensor, "B"], tokens: int) -> Tensor:
        """Each row's open chunk, which is zero from place `first` on, and its new tokens there."""
        return F.pad(open_chunk, (0, 0, 0, tokens - open_chunk.shape[1])) + cut_out(new, -first, tokens)

    def _lines(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """u, z and v."""
        u, v = F.silu(self.hidden_proj(x)).chunk(2, -1)
        return u, F.silu(self.z_proj(x)), v

    def _of(self, z: Tensor, *which: int) -> list[Tensor]:
        """Of q, k, q', k', those asked for."""
        return [z * self.gamma[i] + self.beta[i] for i in which]

    def _sums(self, z: Tensor, v: Tensor, first: Int[Tensor, "B"], state: State) -> tuple[Tensor, Tensor]:
        """S before each chunk and after the last, and what each chunk adds to it so far; a last one that adds nothing."""
        C, S = self.config.block_size, state["S"]
        new = torch.arange(z.shape[1], device=z.device) >= first[:, None]
        k, v = (t.to(S.dtype).unflatten(1, (-1, C)) for t in (*self._of(z, 3), v * new[..., None]))
        sums = k.mT @ v / C
        sums = torch.cat([sums[:, :1] + state["S_open"][:, None], sums[:, 1:]], 1)
        return torch.cat([S[:, None], S[:, None] + sums.cumsum(1)], 1), F.pad(sums, (0, 0, 0, 0, 0, 1))

    def _read(self, z: Float[Tensor, "B N C K"], v: Float[Tensor, "B N C V"], S: Float[Tensor, "B N K V"]) -> Tensor:
        q, k, q_far = self._of(z, 0, 1, 2)
        own = torch.arange(z.shape[2], device=z.device)
        distance = own[:, None] - own
        near = F.relu(q @ k.mT / z.shape[2] + self.bias[distance.clamp(min=0)]).square() * (distance >= 0)
        return near @ v + q_far.to(S.dtype) @ S

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        C, first = self.config.block_size, (state.length % self.config.block_size)[:, None, None]
        gate, z_new, v_new = self._lines(x)
        own = torch.arange(C, device=x.device)[:, None]
        z, v = (torch.where(own == first, new, state[name]) for name, new in (("z", z_new), ("v", v_new)))
        (q, q_far, k_far), (k,) = self._of(z_new, 0, 2, 3), self._of(z, 1)  # behind the token, v is zero
        near = F.relu(q @ k.mT / C + self.bias[(first - own).clamp(min=0)].mT).square()
        o = near @ v + q_far.to(state["S"].dtype) @ state["S"]
        S_open = state["S_open"] + (k_far / C).to(o.dtype).mT * v_new
        closes = first == C - 1
        kept = {"S_open": S_open, "z": z, "v": v}
        kept = {name: t.masked_fill(closes, 0) for name, t in kept.items()}
        S = torch.where(closes, state["S"] + S_open, state["S"])
        return self.o_proj(gate * o.to(x.dtype)), state.advance(1, S=S, **kept)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        C, outs = self.config.block_size, []
        u, z, v = self._lines(x)
        q, k, q_far, k_far = self._of(z, 0, 1, 2, 3)
        for t in range(x.shape[1]):
            start = t - t % C
            scores = torch.einsum("bk,bsk->bs", q[:, t], k[:, start : t + 1]) / C + self.bias[: t + 1 - start].flip(0)
            near = torch.einsum("bs,bsv->bv", F.relu(scores) ** 2, v[:, start : t + 1])
            S = torch.einsum("bsk,bsv->bkv", k_far[:, :start], v[:, :start]) / C
            outs.append(near + torch.einsum("bk,bkv->bv", q_far[:, t], S))
        return self.o_proj(u * torch.stack(outs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        C, K, V = self.config.block_size, self.config.k_dim, self.width
        if mode == "step":
            return 2.0 * B * (C * (K + V) + K * V)
        return -(-T // C) * B * (2.0 * C * C * (K + V) + 4.0 * C * K * V)

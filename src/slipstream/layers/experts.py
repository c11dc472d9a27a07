r"""Experts: SwiGLU feed-forwards side by side, of which every token uses those it chose.

    E_e(x) = W_down^e (silu(gate) * up)        (gate; up) = W_gate_up^e x
    clamped (gpt-oss, arXiv:2508.10925, sec. 2.1): E_e(x) = W_down^e (gate sigmoid(1.702 gate) * (up + 1)), gate at most clamp,
    up within +- clamp

Weights are stacked as in transformers: gate_up_proj (E 2F D), gates first, and down_proj (E D F); biases gate_up_bias, down_bias.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.layers.gated_mlp import gated_width
from slipstream.ops.expert_mlp import expert_mlp, expert_mlp_flops
from slipstream.ops.route import Gathered, dense
from slipstream.ops.silu_gate import silu_gate

ALPHA = 1.702  # of the clamped unit


class Experts(nn.Module):
    """n_experts networks from d_model over d_expert to d_model, each initialised as Linear layers are."""

    def __init__(
        self, n_experts: int, d_model: int, d_expert: int, bias: bool = False, clamp: float | None = None
    ) -> None:
        super().__init__()
        self.n_experts, self.clamp = n_experts, clamp
        self.gate_up_proj = nn.Parameter(_uniform(d_model, n_experts, 2 * d_expert, d_model))
        self.down_proj = nn.Parameter(_uniform(d_expert, n_experts, d_model, d_expert))
        self.gate_up_bias = nn.Parameter(torch.zeros(n_experts, 2 * d_expert)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(n_experts, d_model)) if bias else None

    def forward(
        self, x: Float[Tensor, "B T D"], chosen: Int[Tensor, "B T k"], weights: Float[Tensor, "B T k"], few: bool
    ) -> Float[Tensor, "B T D"]:
        """The weighted sum of what each token's experts say. chosen: n_experts or more is no expert. few: as single steps."""
        y = self._few(x, chosen, weights) if few else self._many(x, chosen, weights)
        return y if self.down_bias is None else y + dense(weights, chosen, self.n_experts) @ self.down_bias

    def _many(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        flat, chosen, weights = x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
        y = expert_mlp(flat, chosen, weights, self.gate_up_proj, self.down_proj, self._gated, self.gate_up_bias)
        return y.unflatten(0, x.shape[:2])

    def _few(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        way = Gathered(chosen)
        h = way.project(way.send(x), self.gate_up_proj)
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[chosen.clamp(max=self.n_experts - 1)]
        return way.combine(weights[..., None] * self._gated(h), self.down_proj)

    def side_by_side(self, rows: Float[Tensor, "E N D"]) -> Float[Tensor, "E N D"]:
        """Every expert on rows of its own, as many for each; without biases."""
        return self._gated(rows @ self.gate_up_proj.mT) @ self.down_proj.mT

    def reference(self, x: Float[Tensor, "D"], chosen: list[int], weights: Float[Tensor, "k"]) -> Float[Tensor, "D"]:
        """What the experts of one token say together, one after another; numbers that are no expert say nothing."""
        parts = [w * self._one(x, e) for e, w in zip(chosen, weights) if e < self.n_experts]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(x)

    def _one(self, x: Float[Tensor, "D"], e: int) -> Float[Tensor, "D"]:
        a, down = self.gate_up_proj[e] @ x, self.down_proj[e]
        if self.gate_up_bias is None or self.down_bias is None:
            return down @ self._gated(a)
        return down @ self._gated(a + self.gate_up_bias[e]) + self.down_bias[e]

    def _gated(self, h: Float[Tensor, "*A F2"]) -> Float[Tensor, "*A F"]:
        gate, up = h.chunk(2, -1)
        if self.clamp is None:
            return silu_gate(up, gate)
        gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return gate * (ALPHA * gate).sigmoid() * (up + 1)

    def flops(self, tokens: int, choices: float) -> float:
        """Of so many choices of so many tokens."""
        biases = 0 if self.down_bias is None else 2.0 * tokens * self.down_bias.numel()
        return expert_mlp_flops(choices, *self.down_proj.shape[1:]) + biases

    def idle(self, tokens: int, share: float) -> int:
        """Parameters of experts that none of so many tokens chose, where each takes an expert with this probability."""
        return round(self.n_experts * (1 - share) ** tokens) * sum(p[0].numel() for p in self.parameters())


def expert_width(d_model: int, d_ff: int | None, d_expert: int | None, used: int) -> int:
    """As given, else so wide that the experts a token uses are together as wide as a dense SwiGLU."""
    if d_expert:
        return d_expert
    return -(-(d_ff or gated_width(d_model)) // used)


def _uniform(inputs: int, *dims: int) -> Tensor:
    return torch.empty(*dims).uniform_(-(inputs**-0.5), inputs**-0.5)

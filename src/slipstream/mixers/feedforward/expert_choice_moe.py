r"""Expert choice: each expert picks the tokens it wants from the whole sequence, as many as every other expert.

    I_e = the C tokens of largest s_te, s_t = softmax(W_r x_t)        C = ceil(k n / E) of n tokens
    y_t = sum of s_te E_e(x_t) over the e that picked t, perhaps none        E_e: SwiGLU

The load is even by construction, without a loss, and a token gets as much as experts want of it, top_k experts in the mean.
Whether a token is picked depends on those after it: a language model trained so sees the future through the choice, and cannot
decode. So there is no prefill and no step here, and a language model refuses it; encoders may use it. The authors choose among
all tokens of a batch, here each row is chosen from by itself. Of equal tokens the first is picked.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.bidirectional import Bidirectional
from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.layers.experts import Experts, expert_width
from slipstream.layers.linear import Linear
from slipstream.ops.route import best, router_logits
from slipstream.ops.valid import valid_mask, zero_padding

WHY = "its experts choose their tokens from the whole sequence, those to come included"


class ExpertChoiceMoE(Bidirectional, name="expert_choice_moe", family="feedforward"):
    paper = "Zhou et al. 2022 (Mixture-of-Experts with Expert Choice Routing), arXiv:2202.09368, sec. 3.2"
    use_when = "whole sequences are at hand, as in encoders, and every expert should have the same load"
    train_order, decode_order = "T", "T"
    symbols = {"E": "n_experts", "k": "top_k", "W_r": "router"}
    oracle = "its own equation expert by expert, tests/laws"
    limits = {"prefill": WHY, "step": WHY}

    class Config(MixerConfig):
        n_experts: int = Field(8, ge=1)  # feed-forwards that choose
        top_k: int = Field(2, ge=1)  # of them that a token has in the mean: the capacity factor
        d_ff: int | None = Field(None, ge=1)  # inner width of top_k experts together; default as of swiglu
        d_expert: int | None = Field(None, ge=1)  # inner width of one; default d_ff / top_k

    config: Config
    tiny = Config(d_model=16, n_experts=4, d_expert=6)  # type: ignore[call-arg]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.top_k > c.n_experts:
            raise InputError(f"top_k {c.top_k} must be from 1 to n_experts {c.n_experts}")
        self.router = Linear(c.d_model, c.n_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = Experts(c.n_experts, c.d_model, expert_width(c.d_model, c.d_ff, c.d_expert, c.top_k))

    def whole(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T D"]:
        x = zero_padding(x, lengths)
        scores = router_logits(x, self.router.weight).softmax(-1).mT
        place, picked = self._picks(scores.detach(), lengths)
        row = torch.arange(len(x), device=x.device)[:, None, None]
        y = self.experts.side_by_side(x[row, place].transpose(0, 1).flatten(1, 2))
        y = y.unflatten(1, (len(x), -1)).transpose(0, 1)
        weights = (scores.gather(-1, place) * picked).to(x.dtype)
        flat = torch.zeros_like(x).flatten(0, 1)
        to = (row * x.shape[1] + place).flatten()
        return flat.index_add(0, to, (weights[..., None] * y).flatten(0, 2)).view_as(x)

    def _picks(self, scores: Float[Tensor, "B E T"], lengths: Int[Tensor, "B"] | None) -> tuple[Tensor, Tensor]:
        """Where each expert's tokens stand (B E C), and which of these are its own: short rows have fewer."""
        T = scores.shape[2]
        n = torch.full(scores.shape[:1], T, device=scores.device) if lengths is None else lengths
        counts = self._capacity(n)
        scores = scores.masked_fill(~valid_mask(n, T)[:, None], -torch.inf)
        place = best(scores, int(counts.max()) if len(counts) else 0)
        return place, torch.arange(place.shape[-1], device=scores.device) < counts[:, None, None]

    def _capacity(self, tokens: Tensor) -> Tensor:
        return -(-self.config.top_k * tokens // self.config.n_experts)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Row by row and expert by expert."""
        (B, T, _), y = x.shape, torch.zeros_like(x)
        for b in range(B):
            scores = (x[b] @ self.router.weight.T).softmax(-1)
            for e in range(self.config.n_experts):
                order = sorted(range(T), key=lambda t, s=scores[:, e]: -s[t].item())
                for t in order[: -(-self.config.top_k * T // self.config.n_experts)]:
                    y[b, t] = y[b, t] + self.experts.reference(x[b, t], [e], scores[t, e : e + 1])
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        capacity = -(-self.config.top_k * T // self.config.n_experts)
        return self.experts.flops(B * T, B * capacity * self.config.n_experts)

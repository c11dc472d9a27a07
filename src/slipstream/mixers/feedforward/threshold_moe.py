r"""Threshold mixture of experts (ReMoE): an expert is used where its score is above zero, by just as much; no choice is forced.

    y = sum_e r_e E_e(x)        r = relu(W_r x)        E_e: SwiGLU; those with r_e = 0 are not computed

The weight goes to zero where an expert is left, so the layer is continuous and its router fully differentiable, which no
choice of the largest is. How many a token uses is learnt: in training an L1 loss on r, weighed by the load of each expert, has
a coefficient that grows while more than top_k are used in the mean and falls while fewer are,

    loss = lambda E / (k T) sum_e n_e r_e        after each step lambda grows or falls by a factor

with n_e the tokens of T that used e, r_e in the mean over them all, and k top_k. The authors have one lambda for all layers,
here each has its own. max_experts bounds a token's experts, which theirs does not. E_e is of width d_expert.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.auxiliary import Told, tell
from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.core.routed import RoutedPerToken
from slipstream.layers.experts import Experts, expert_width
from slipstream.layers.linear import Linear
from slipstream.ops.choose import above, of_chosen
from slipstream.ops.route import router_logits


class ThresholdMoE(RoutedPerToken, name="threshold_moe", family="feedforward"):
    paper = "Wang, Zhu, Chen 2024 (ReMoE), arXiv:2412.14711, sec. 3"
    use_when = "a mixture whose router is to be trained by the loss alone, each token using as many experts as it needs"
    symbols = {"E": "n_experts", "k": "top_k", "W_r": "router", "lambda": "sparsity_loss"}
    oracle = "its own equation token by token, tests/laws; the loss against its formula, tests/mixers/test_moe.py"
    cost_is_most = True

    class Config(MixerConfig):
        n_experts: int = Field(8, ge=1)  # feed-forwards to choose from
        top_k: int = Field(2, ge=1)  # of them that a token is to use in the mean, when trained
        max_experts: int | None = Field(None, ge=1)  # that a token may use, the largest; default all
        d_ff: int | None = Field(None, ge=1)  # inner width of top_k experts together; default as of swiglu
        d_expert: int | None = Field(None, ge=1)  # inner width of one; default d_ff / top_k
        first_loss: float = Field(1e-8, ge=0)  # lambda before training
        loss_rate: float = Field(1.2, ge=1)  # factor by which lambda moves in a step

    config: Config
    sparsity_loss: Tensor
    tiny = Config(d_model=16, n_experts=5, max_experts=4, d_expert=6)  # type: ignore[call-arg]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.n_choices, self.most = c.n_experts, c.max_experts or c.n_experts
        if not c.top_k <= self.most <= c.n_experts:
            raise InputError(f"max_experts {self.most} must be from top_k {c.top_k} to n_experts {c.n_experts}")
        self.router = Linear(c.d_model, c.n_experts, bias=False)
        nn.init.normal_(self.router.weight, std=c.d_model**-0.5)
        self.experts = Experts(c.n_experts, c.d_model, expert_width(c.d_model, c.d_ff, c.d_expert, c.top_k))
        self.register_buffer("sparsity_loss", torch.tensor(c.first_loss))

    def mix(self, x: Float[Tensor, "B T D"], few: bool) -> Float[Tensor, "B T D"]:
        logits = router_logits(x, self.router.weight)
        chosen = above(logits.detach(), 0.0, self.most)
        if not few:
            tell(self, logits, chosen)
        return self.experts(x, chosen, of_chosen(logits, chosen).to(x.dtype), few)

    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> Float[Tensor, ""]:
        """load_e / T counts the same tokens as the mean of r."""
        assert told.logits is not None
        tokens, r = told.logits.shape[:-1].numel(), told.logits.relu().flatten(0, -2)
        own = torch.bincount(told.chosen.flatten(), minlength=self.n_choices)[: self.n_choices] / max(1, tokens)
        return self.sparsity_loss * self.n_choices / self.config.top_k * (own.to(r.dtype) * r.mean(0)).sum()

    def settle(self, load: Int[Tensor, "E"], tokens: int) -> None:
        used = load.sum() / max(1, tokens)
        self.sparsity_loss.mul_(self.config.loss_rate ** (used - self.config.top_k).sign())

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token; of more than may be used, the largest."""
        rows = []
        for x_t in x.flatten(0, 1):
            r = (self.router.weight @ x_t).relu()
            used = sorted((e for e in range(len(r)) if r[e] > 0), key=lambda e, r=r: -r[e].item())[: self.most]
            rows.append(self.experts.reference(x_t, used, r[used]))
        return torch.stack(rows).view_as(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens = B * (1 if mode == "step" else T)
        return self.experts.flops(tokens, tokens * self.most)

    def idle_parameters(self, tokens: int = 1) -> int:
        """When trained: top_k of them in the mean."""
        return self.experts.idle(tokens, self.config.top_k / self.n_choices)

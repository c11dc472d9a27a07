r"""Adaptive mixture of experts: a token uses as many as it takes for the router to be sure, few where it is easy.

    y = sum_i p_{e_i} E_{e_i}(x)        p = softmax(W_r x)        e_1 ... e_m: the fewest largest of p that exceed P together

P is top_p. Weights are the probabilities themselves, as in the authors' code. At most max_experts are used, which theirs does
not say: a single step has static shapes, and what it costs at most is known. A router that is unsure of everything would use
many: the entropy loss is the paper's against it, beside the one that balances the load. E_e = SwiGLU of width d_expert.
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
from slipstream.ops.balance import balance_loss, z_loss
from slipstream.ops.choose import of_chosen, up_to_mass
from slipstream.ops.route import router_logits


class AdaptiveMoE(RoutedPerToken, name="adaptive_moe", family="feedforward"):
    paper = "Huang et al. 2024 (Harder Tasks Need More Experts), arXiv:2403.07652, sec. 3; layer as in ZhenweiAn/Dynamic_MoE"
    use_when = "tokens differ in difficulty, and easy ones should cost less than hard ones"
    symbols = {"P": "top_p", "W_r": "router"}
    oracle = "its own equation token by token; the choice against a sorted search, tests/ops/test_choose.py"
    cost_is_most = True

    class Config(MixerConfig):
        n_experts: int = Field(8, ge=1)  # feed-forwards to choose from
        top_p: float = Field(0.4, gt=0, le=1)  # probability that those chosen must exceed together
        max_experts: int | None = Field(None, ge=1)  # that a token uses; default half of them
        d_ff: int | None = Field(None, ge=1)  # inner width of two experts together; default as of swiglu
        d_expert: int | None = Field(None, ge=1)  # inner width of one; default d_ff / 2
        balance_loss: float = Field(0.01, ge=0)  # weight of the loss that balances the load
        entropy_loss: float = Field(1e-4, ge=0)  # weight of the loss on the entropy of p
        z_loss: float = Field(1e-3, ge=0)  # weight of the loss that keeps logits small

    config: Config
    tiny = Config(d_model=16, n_experts=6, max_experts=4, top_p=0.6, d_expert=6)  # type: ignore[call-arg]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.n_choices = c.n_experts
        self.most = c.max_experts or max(1, c.n_experts // 2)
        if self.most > c.n_experts:
            raise InputError(f"max_experts {self.most} must be from 1 to n_experts {c.n_experts}")
        self.router = Linear(c.d_model, c.n_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = Experts(c.n_experts, c.d_model, expert_width(c.d_model, c.d_ff, c.d_expert, 2))

    def mix(self, x: Float[Tensor, "B T D"], few: bool) -> Float[Tensor, "B T D"]:
        logits = router_logits(x, self.router.weight)
        p = logits.softmax(-1)
        chosen = up_to_mass(p.detach(), self.config.top_p, self.most)
        if not few:
            tell(self, logits, chosen)
        return self.experts(x, chosen, of_chosen(p, chosen).to(x.dtype), few)

    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> Float[Tensor, ""]:
        c, logits = self.config, told.logits
        assert logits is not None
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        balance = balance_loss(log_p.exp(), load)
        return c.balance_loss * balance + c.entropy_loss * entropy + c.z_loss * z_loss(logits)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token: one expert more until their sum is above top_p."""
        rows = []
        for x_t in x.flatten(0, 1):
            p = (self.router.weight @ x_t).softmax(0)
            order = sorted(range(len(p)), key=lambda e, p=p: -p[e].item())
            chosen = order[:1]
            while len(chosen) < self.most and p[chosen].sum() <= self.config.top_p:
                chosen = order[: len(chosen) + 1]
            rows.append(self.experts.reference(x_t, chosen, p[chosen]))
        return torch.stack(rows).view_as(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens = B * (1 if mode == "step" else T)
        return self.experts.flops(tokens, tokens * self.most)

    def idle_parameters(self, tokens: int = 1) -> int:
        return self.experts.idle(tokens, self.most / self.n_choices)

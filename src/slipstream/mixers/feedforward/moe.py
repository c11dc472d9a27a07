r"""Mixture of experts (MoE): a router sends every token to the few feed-forwards that suit it.

    y = scale sum_i w_i E_{e_i}(x) + shared(x)        e_1 ... e_k: where g(W_r x) + b is largest
    w = g(W_r x) at e, normalised or not        g = softmax or sigmoid        E: SwiGLU

Experts are of width d_expert. Settings make the mixtures of published models: Mixtral and MiniMax as it stands, OLMoE and Jamba
without normalised weights, Qwen3-MoE and GraniteMoe with more, finer experts, Qwen2-MoE and Qwen3-Next with a shared one behind
a sigmoid gate, DeepSeek-V2 and V3 with choice within groups, gpt-oss with biases and clamped units, LongCat-Flash with copies.
No capacity, nothing dropped. Experts without work are numbered after the others; a null one weighs nothing, and normalised
weights leave it out. MoE++ also hands the router's scores on to the next layer, which is not here, nor is noise on the router.
Weights are named as in transformers' stacked experts: router, experts.gate_up_proj, experts.down_proj.
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
from slipstream.layers.free_experts import FreeExperts
from slipstream.layers.gated_mlp import GatedMLP
from slipstream.layers.linear import Linear
from slipstream.ops.balance import balance_loss, moved_bias, probabilities, z_loss
from slipstream.ops.choose import in_best_groups
from slipstream.ops.route import Gate, best, dense, router_logits, weigh


class MoE(RoutedPerToken, name="moe", family="feedforward"):
    paper = "Fedus et al. 2021, arXiv:2101.03961; Dai et al. 2024 (DeepSeekMoE), arXiv:2401.06066; DeepSeek-V3, arXiv:2412.19437"
    use_when = "memory for many parameters is there, and each token should pay for few of them"
    symbols = {"E": "n_experts", "k": "top_k", "W_r": "router", "b": "selection_bias"}
    oracle = "transformers' blocks of twelve models with copied weights, tests/oracles/test_moe.py"

    class Config(MixerConfig):
        n_experts: int = Field(8, ge=1)  # feed-forwards to choose from
        top_k: int = Field(2, ge=1)  # of them that a token uses
        d_ff: int | None = Field(None, ge=1)  # inner width of what a token uses, together; default as of swiglu
        d_expert: int | None = Field(None, ge=1)  # inner width of one; default d_ff over those a token uses
        n_shared_experts: int = Field(0, ge=0)  # further ones that every token uses
        shared_gate: bool = False  # the shared ones weigh sigmoid(w . x), not 1
        gate: Gate = "softmax"  # what makes scores of the router's logits: softmax over all, or each its sigmoid
        normalised: bool = True  # weights of the chosen sum to one
        scale: float = 1.0  # factor on the sum over the chosen
        n_groups: int = Field(1, ge=1)  # neighbouring experts are in so many groups
        top_groups: int = Field(1, ge=1)  # groups from which a token chooses
        group_members: int = Field(2, ge=1)  # a group counts by so many of its best scores (DeepSeek-V2: 1)
        n_null_experts: int = Field(0, ge=0)  # choices that say nothing
        n_copy_experts: int = Field(0, ge=0)  # choices that say x
        n_constant_experts: int = Field(0, ge=0)  # choices that blend x with a learnt vector
        bias: bool = False  # biases on the router and on the experts
        clamp: float | None = Field(None, gt=0)  # clamped units as of gpt-oss (there 7), sigmoid(1.702 gate), up + 1
        selection_bias: bool = False  # balance by a bias on the choice alone, moved after each step of training
        bias_rate: float = Field(1e-3, ge=0)  # by so much
        balance_loss: float = Field(0.01, ge=0)  # weight of the loss that balances the load
        z_loss: float = Field(1e-3, ge=0)  # weight of the loss that keeps logits small

    config: Config
    selection_bias: Tensor | None
    tiny = Config(d_model=16, n_experts=6, d_expert=6, n_shared_experts=1, shared_gate=True, n_groups=3, top_groups=2)  # type: ignore[call-arg]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, E = config, config.n_experts
        self.free = FreeExperts(c.d_model, c.n_null_experts, c.n_copy_experts, c.n_constant_experts)
        self.n_choices = E + self.free.n_experts
        _check(c, self.n_choices)
        width = expert_width(c.d_model, c.d_ff, c.d_expert, c.top_k + c.n_shared_experts)
        self.router = Linear(c.d_model, self.n_choices, bias=c.bias)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = Experts(E, c.d_model, width, c.bias, c.clamp)
        self.shared_experts = GatedMLP(c.d_model, c.n_shared_experts * width) if c.n_shared_experts else None
        self.shared_gate = Linear(c.d_model, 1, bias=False) if c.shared_gate else None
        self.no_weight_decay = ("gate_up_bias", "down_bias", "constants")  # type: ignore[misc]
        self.register_buffer("selection_bias", torch.zeros(self.n_choices) if c.selection_bias else None)

    def mix(self, x: Float[Tensor, "B T D"], few: bool) -> Float[Tensor, "B T D"]:
        logits, c = router_logits(x, self.router.weight, self.router.bias), self.config
        chosen = self.choose(logits)
        idle = (chosen >= c.n_experts) & (chosen < c.n_experts + c.n_null_experts) if c.n_null_experts else None
        weights = (c.scale * weigh(logits, chosen, c.gate, c.normalised, idle)).to(x.dtype)
        if not few:
            tell(self, logits, chosen)
        y = self.experts(x, chosen, weights, few)
        if self.free.n_experts:
            y = y + self.free(x, dense(weights, chosen, self.n_choices)[..., c.n_experts :])
        return y if self.shared_experts is None else y + self._shared(x)

    def choose(self, logits: Float[Tensor, "*B E"]) -> Int[Tensor, "*B k"]:
        """The experts of each token. Without a bias and groups the logits' order is the scores'."""
        c, scores = self.config, logits.detach()
        if self.selection_bias is not None or c.n_groups > 1:
            scores = scores.softmax(-1) if c.gate == "softmax" else scores.sigmoid()
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        if c.n_groups > 1:
            scores = in_best_groups(scores, c.n_groups, c.top_groups, c.group_members)
        return best(scores, c.top_k)

    def _shared(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        assert self.shared_experts is not None
        y = self.shared_experts(x)
        return y if self.shared_gate is None else self.shared_gate(x).sigmoid() * y

    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> Float[Tensor, ""]:
        c, logits = self.config, told.logits
        assert logits is not None
        return c.balance_loss * balance_loss(probabilities(logits, c.gate), load) + c.z_loss * z_loss(logits)

    def settle(self, load: Int[Tensor, "E"], tokens: int) -> None:
        if self.selection_bias is not None:
            self.selection_bias.copy_(moved_bias(self.selection_bias, load, self.config.bias_rate))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token, one expert after another."""
        c, E = self.config, self.config.n_experts
        rows = []
        for x_t in x.flatten(0, 1):
            logits = self.router(x_t)
            g = logits.softmax(0) if c.gate == "softmax" else logits.sigmoid()
            chosen = [e for e in self.choose(logits).tolist() if not E <= e < E + c.n_null_experts]
            w = g[chosen] / (g[chosen].sum() if c.normalised else 1) * c.scale
            y = self.experts.reference(x_t, chosen, w)
            y = y + sum(w_e * self.free.reference(x_t, e - E) for e, w_e in zip(chosen, w) if e >= E)
            rows.append(y if self.shared_experts is None else y + self._shared(x_t[None, None])[0, 0])
        return torch.stack(rows).view_as(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens, c = B * (1 if mode == "step" else T), self.config
        choices = tokens * c.top_k * (1 if mode == "step" else c.n_experts / self.n_choices)
        return self.experts.flops(tokens, choices) + self.free.flops(tokens)

    def idle_parameters(self, tokens: int = 1) -> int:
        return self.experts.idle(tokens, self.config.top_k / self.n_choices)


def _check(c: MoE.Config, n_choices: int) -> None:
    """Raises InputError for settings that cannot work together."""
    if c.top_k > n_choices:
        raise InputError(f"top_k {c.top_k} must be from 1 to the {n_choices} experts there are")
    if c.top_k == 1 and c.normalised:
        raise InputError(
            "top_k 1 with normalised weights: that one always weighs 1 and the router would not learn; normalised=false"
        )
    if c.shared_gate and not c.n_shared_experts:
        raise InputError("shared_gate needs n_shared_experts")
    size, rest = divmod(n_choices, c.n_groups)
    if (
        rest
        or c.top_groups > c.n_groups
        or c.top_groups * size < c.top_k
        or (c.n_groups > 1 and c.group_members > size)
    ):
        raise InputError(
            f"{n_choices} experts in n_groups {c.n_groups}, of which top_groups {c.top_groups} (by {c.group_members} members) "
            f"must hold top_k {c.top_k}: groups must be of equal size and hold enough"
        )

r"""Switch: a mixture of experts with a capacity: an expert serves so many tokens of a stretch, and those that come later pass by.

    y_t = sum_i p_{e_i} E_{e_i}(x_t) over those of e_1 ... e_k that still have room        p = softmax(W_r x_t)
    room: an expert was chosen fewer than C = ceil(capacity_factor k stretch / E) times since the stretch of t began

A bounded load is what machines with one expert each need. Switch counts over a whole batch, whose other rows and whose length
then decide what a token gets. Here each row counts for itself, in stretches of so many positions, earlier tokens first: no row
sees another, no token the future, and any cut gives the same, because the counts are kept in the state. Tokens that are dropped
add nothing to the residual stream, as in Switch. E_e = SwiGLU of width d_expert, where Switch has ReLU layers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.auxiliary import Router, Told, tell
from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.experts import Experts, expert_width
from slipstream.layers.linear import Linear
from slipstream.ops.balance import balance_loss, z_loss
from slipstream.ops.choose import within_capacity
from slipstream.ops.route import best, router_logits, weigh
from slipstream.ops.valid import last_tokens, valid_mask, zero_padding


class SwitchMoE(Router, Mixer, name="switch_moe", family="feedforward"):
    paper = (
        "Fedus, Zoph, Shazeer 2021, arXiv:2101.03961, sec. 2.2; top-2: Lepikhin et al. 2020 (GShard), arXiv:2006.16668"
    )
    use_when = "no expert may be asked for more than its share, whatever the text; elsewhere moe drops nothing"
    writes, erases = "1, to the count of e", "nothing"
    decays, reads = "all of it, where a stretch begins", "whether the count of e is below C"
    symbols = {"E": "n_experts", "k": "top_k", "W_r": "router"}
    oracle = "its own equation token by token, tests/laws"
    cost_is_most = True

    class Config(MixerConfig):
        n_experts: int = Field(8, ge=1)  # feed-forwards to choose from
        top_k: int = Field(1, ge=1)  # of them that a token asks for
        capacity_factor: float = Field(1.25, gt=0)  # room of an expert, over its share of the choices of a stretch
        stretch: int = Field(64, ge=1)  # tokens over which they are counted
        d_ff: int | None = Field(None, ge=1)  # inner width of top_k experts together; default as of swiglu
        d_expert: int | None = Field(None, ge=1)  # inner width of one; default d_ff / top_k
        balance_loss: float = Field(0.01, ge=0)  # weight of the loss that balances the load
        z_loss: float = Field(1e-3, ge=0)  # weight of the loss that keeps logits small

    config: Config
    tiny = Config(d_model=16, n_experts=4, top_k=2, stretch=5, capacity_factor=0.7, d_expert=6)  # type: ignore[call-arg]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.top_k > c.n_experts:
            raise InputError(f"top_k {c.top_k} must be from 1 to n_experts {c.n_experts}")
        self.n_choices = c.n_experts
        self.capacity = -int(-c.capacity_factor * c.top_k * c.stretch // c.n_experts)
        self.router = Linear(c.d_model, c.n_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = Experts(c.n_experts, c.d_model, expert_width(c.d_model, c.d_ff, c.d_expert, c.top_k))

    def slots(self) -> dict[str, Slot]:
        return {"counts": Slot((self.n_choices,), dtype=torch.int64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        if x.shape[1] == 0:
            return x, state
        x = zero_padding(x, lengths)
        logits, asked, chosen, counts = self._choose(x, state)
        real = valid_mask(lengths, x.shape[1]) if lengths is not None else None
        own = (t if real is None else t[real] for t in (logits, asked, chosen))
        tell_served(self, *own)
        y = self._mixed(x, logits, chosen, few=False)
        line = torch.cat([state["counts"][:, None], counts], 1)
        return y, state.advance(x.shape[1] if lengths is None else lengths, counts=last_tokens(line, 1, lengths)[:, 0])

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        logits, _, chosen, counts = self._choose(x, state)
        return self._mixed(x, logits, chosen, few=True), state.advance(1, counts=counts[:, 0])

    def _choose(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, whom each token asks, who of these has room, and the counts after each token."""
        logits = router_logits(x, self.router.weight)
        asked = best(logits.detach(), self.config.top_k)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        first = positions % self.config.stretch == 0
        return logits, asked, *within_capacity(asked, self.n_choices, self.capacity, first, state["counts"])

    def _mixed(self, x: Tensor, logits: Tensor, chosen: Tensor, few: bool) -> Float[Tensor, "B T D"]:
        idle = chosen == self.n_choices
        weights = weigh(logits, chosen.clamp(max=self.n_choices - 1), "softmax", normalised=False, idle=idle)
        return self.experts(x, chosen, weights.to(x.dtype), few)

    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> Float[Tensor, ""]:
        c, logits = self.config, told.logits
        assert logits is not None
        return c.balance_loss * balance_loss(logits.softmax(-1), load) + c.z_loss * z_loss(logits)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Row by row and token by token, counting."""
        c, y = self.config, torch.zeros_like(x)
        for b, t in ((b, t) for b in range(len(x)) for t in range(x.shape[1])):
            if t % c.stretch == 0:
                counts = [0] * c.n_experts
            p = (self.router.weight @ x[b, t]).softmax(0)
            asked = sorted(range(c.n_experts), key=lambda e, p=p: -p[e].item())[: c.top_k]
            served = [e for e in asked if counts[e] < self.capacity]
            counts = [n + (e in asked) for e, n in enumerate(counts)]
            y[b, t] = self.experts.reference(x[b, t], served, p[served])
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens = B * (1 if mode == "step" else T)
        return self.experts.flops(tokens, tokens * self.config.top_k)

    def idle_parameters(self, tokens: int = 1) -> int:
        return self.experts.idle(tokens, self.config.top_k / self.n_choices)


def tell_served(router: Router, logits: Tensor, asked: Tensor, chosen: Tensor) -> None:
    """The load is what is asked for; what is not served is dropped."""
    tell(router, logits, asked, (chosen == router.n_choices).sum())

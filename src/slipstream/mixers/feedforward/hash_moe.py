r"""Hash mixture of experts: which feed-forward a token uses is fixed before training, by the side of random planes it is on.

    y = (1 / k) sum_{i<=k} E_{h_i}(x)        h_i = sum_j 2^j [r_ij . x > 0],  j < log2 E        E_e: SwiGLU

Nothing is routed by what is learnt, so nothing can collapse and no loss is needed. Roller et al. hash the token itself: its
number alone decides, in every layer and context alike. A feed-forward here sees activations and no numbers, so planes through
the origin stand in for their hash (as in locality-sensitive hashing): tokens that are alike share an expert, but a token's
expert depends on its context too, and moves while the layers below are trained. Loads are as even as directions are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.auxiliary import Told, tell
from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.core.routed import RoutedPerToken
from slipstream.layers.experts import Experts, expert_width
from slipstream.ops.route import router_logits


class HashMoE(RoutedPerToken, name="hash_moe", family="feedforward"):
    paper = "Roller, Sukhbaatar, Szlam, Weston 2021 (Hash Layers), arXiv:2106.04426, sec. 3; planes: Charikar 2002"
    use_when = "a mixture without any router to train, or a floor that learnt routing has to beat"
    symbols = {"K": "n_experts", "k": "n_hashes", "r": "planes"}
    oracle = "its own equation token by token, tests/laws"

    class Config(MixerConfig):
        n_experts: int = Field(8, ge=2)  # feed-forwards, a power of two
        n_hashes: int = Field(1, ge=1)  # that a token has, each with an expert (perhaps the same)
        d_ff: int | None = Field(None, ge=1)  # inner width of what a token uses, together; default as of swiglu
        d_expert: int | None = Field(None, ge=1)  # inner width of one; default d_ff / n_hashes

    config: Config
    planes: Tensor
    tiny = Config(d_model=16, n_experts=4, n_hashes=2, d_expert=6)  # type: ignore[call-arg]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.n_choices, self.bits = c.n_experts, c.n_experts.bit_length() - 1
        if 2**self.bits != c.n_experts:
            raise InputError(
                f"n_experts {c.n_experts} must be a power of two, like {2**self.bits}: planes halve the tokens"
            )
        self.experts = Experts(c.n_experts, c.d_model, expert_width(c.d_model, c.d_ff, c.d_expert, c.n_hashes))
        self.register_buffer("planes", torch.randn(c.n_hashes * self.bits, c.d_model))

    def mix(self, x: Float[Tensor, "B T D"], few: bool) -> Float[Tensor, "B T D"]:
        sides = router_logits(x, self.planes).unflatten(-1, (-1, self.bits)) > 0
        chosen = (sides.long() << torch.arange(self.bits, device=x.device)).sum(-1)
        if not few:
            tell(self, None, chosen)
        weights = x.new_full((), 1 / self.config.n_hashes).expand(chosen.shape)
        return self.experts(x, chosen, weights, few)

    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> float:
        return 0.0

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token, bit by bit."""
        k, rows = self.config.n_hashes, []
        for x_t in x.flatten(0, 1):
            planes = self.planes.to(x.dtype).unflatten(0, (k, self.bits))
            chosen = [sum(2**j for j, r in enumerate(own) if r @ x_t > 0) for own in planes]
            rows.append(self.experts.reference(x_t, chosen, torch.full((k,), 1 / k, dtype=x.dtype)))
        return torch.stack(rows).view_as(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens = B * (1 if mode == "step" else T)
        return self.experts.flops(tokens, tokens * self.config.n_hashes) + 2.0 * tokens * self.planes.numel()

    def idle_parameters(self, tokens: int = 1) -> int:
        return self.experts.idle(tokens * self.config.n_hashes, 1 / self.n_choices)

r"""Mixture of memories (MoM): a router sends every token to a few of many memories, and one memory takes them all.

    S^m_t = alpha_t S^m_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T  where the token goes to m,  else  S^m_{t-1}
    o_t = sum_m r_t^m S^m_t q_t / sqrt(K)        r_t = softmax over the top_k largest of W_r x_t;  r = 1 of the shared one

    q, k, v = silu(conv(W x)) with k, v, alpha, beta of each memory's own weights        y_t = W_o (rmsnorm(o_t) * silu(W_g x_t))

Inside a memory is Gated DeltaNet, fla's default. A convolution runs over the tokens of its memory alone, as in fla where it
decodes; fla's training lets it run on over the border between memories, and its loss that balances the router is left
out. Whole sequences cost what their routed tokens cost; a single step computes every memory, and leaves those not
chosen as they were, so that it can be captured. Weights are fla's, by memory; its shared_* are those of the last.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import NO_WEIGHT_DECAY, decay_rates, log_decay, time_steps
from slipstream.layers.linear import Linear
from slipstream.layers.norm import GatedRMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.delta_scan import delta_flops, delta_scan, delta_step
from slipstream.ops.delta_scan import reference as delta_reference
from slipstream.ops.l2_norm import l2_norm
from slipstream.ops.valid import valid_mask


class MixtureOfMemories(Mixer, name="mixture_of_memories", family="linear"):
    paper = "Du, Sun, Lan, Hu, Cheng 2025, arXiv:2502.13685, sec. 3; layer as in fla 0.6.0"
    use_when = (
        "constant memory, large beside the work a token costs: unlike things are kept apart instead of overwritten"
    )
    train_order, decode_order = "T", "1"
    writes, erases = "beta v k^T, to the memories chosen", "beta of what is stored under k, in those"
    decays, reads = "a number a head, from x, where routed", "sum_m r S^m q"
    symbols = {"M": "S transposed", "g": "r", "W_g": "router", "k": "top_k", "alpha": "exp(log_decay)"}
    oracle = "MomAttention's routing in numpy around naive_recurrent_gated_delta_rule of fla 0.6.0, slot_attention.npz"
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        expand_v: float = 1.0  # value width per head as a multiple of d_model / n_heads
        n_memories: int = 4  # memories that the router chooses from
        top_k: int = 2  # memories that a token goes to
        shared: bool = True  # one more memory that takes every token
        conv_size: int = 4  # width of the short convolution on q, k and v
        negative_eigenvalues: bool = False  # beta in (0, 2), which tracks states: arXiv:2411.12537
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, expand_v=1.5, n_memories=3, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 2 <= config.top_k <= config.n_memories:
            raise InputError(
                f"top_k {config.top_k} must be from 2 (the weight of a single memory is always 1, so that its router would "
                f"not learn) to n_memories {config.n_memories}"
            )
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        self.v_head_dim = round(self.head_dim * config.expand_v)
        self.n_all, D, V = config.n_memories + config.shared, config.d_model, self.n_heads * self.v_head_dim
        self.router = Linear(D, config.n_memories, bias=False)
        self.q_proj = Linear(D, D, bias=False)
        self.memories = nn.ModuleList(Memory(D, V, self.n_heads) for _ in range(self.n_all))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConv(width, config.conv_size) for width in (D, D, V))
        self.A_log, self.dt_bias = decay_rates(self.n_heads), time_steps(self.n_heads)
        self.g_proj = Linear(D, V, bias=False)
        self.o_norm = GatedRMSNorm(self.v_head_dim, config.norm_eps)
        self.o_proj = Linear(V, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        past = {f"conv_{n}": Slot((self.n_all, *c.slot().dims), dtype=None) for n, c in zip("qkv", self._convs())}
        return {"S": Slot((self.n_all, self.n_heads, self.head_dim, self.v_head_dim)), **past}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        r, routed = self._route(x, lengths)
        q_line, read, kept = self.q_proj(x), [], []
        for m, mine in enumerate(routed.unbind(-1)):
            counts = mine.sum(1)
            place = valid_mask(counts, int(counts.max()) if len(counts) else 0)  # each row's tokens, moved together
            lines = [_placed(t, place) for t in (q_line[mine], *self.memories[m](x[mine]))]
            (q, k, v, beta, fade), convs = self._rule(lines, m, state, counts)
            scale, chunk_size = self.head_dim**-0.5, self.config.chunk_size
            own, S = delta_scan(q, k, v, beta, fade, state["S"][:, m], counts, scale, chunk_size)
            read.append(r[..., m, None, None] * _placed(own[place], mine))
            kept.append((S, *convs))
        return self._output(read, x), self._advanced(state, x.shape[1] if lengths is None else lengths, kept)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        r, routed = self._route(x, None)
        q_line, read, kept = self.q_proj(x), [], []
        for m, mine in enumerate(routed.unbind(-1)):
            (q, k, v, beta, fade), convs = self._rule([q_line, *self.memories[m](x)], m, state, mine[:, 0].long())
            stays = ~mine[..., None]  # not routed: nothing fades, nothing is written
            beta, fade = beta.masked_fill(stays, 0), fade.masked_fill(stays, 0)
            own, S = delta_step(q, k, v, beta, fade, state["S"][:, m], self.head_dim**-0.5)
            read.append(r[..., m, None, None] * own)
            kept.append((S, *convs))
        return self._output(read, x), self._advanced(state, 1, kept)

    def _route(self, x: Tensor, lengths: Tensor | None) -> tuple[Float[Tensor, "B T M"], Bool[Tensor, "B T M"]]:
        """The weight of each memory for each token, and whether the token goes there; the shared memory is the last."""
        logits = self.router(x)
        top = logits.topk(self.config.top_k, -1)
        r = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
        routed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top.indices, True)
        if self.config.shared:
            r, routed = (torch.cat([t, torch.ones_like(t[..., :1])], -1) for t in (r, routed))
        return r, routed if lengths is None else routed & valid_mask(lengths, x.shape[1])[..., None]

    def _convs(self) -> tuple[ShortConv, ShortConv, ShortConv]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def _rule(self, lines: list[Tensor], m: int, state: State, counts: Int[Tensor, "B"]):
        """q, k, v, beta and log_decay, and the new states of memory m's convolutions."""
        pairs = [c(t, state[f"conv_{n}"][:, m], counts) for n, c, t in zip("qkv", self._convs(), lines)]
        return self._by_heads([line for line, _ in pairs], *lines[3:]), [past for _, past in pairs]

    def _by_heads(self, qkv: list[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in qkv)
        beta = b.sigmoid() * (2 if self.config.negative_eigenvalues else 1)
        return l2_norm(q), l2_norm(k), v, beta, log_decay(a, self.A_log, self.dt_bias)

    def _advanced(self, state: State, tokens: int | Tensor, kept: list[tuple[Tensor, ...]]) -> State:
        slots = {name: torch.stack(parts, 1) for name, parts in zip(("S", "conv_q", "conv_k", "conv_v"), zip(*kept))}
        return state.advance(tokens, **slots)

    def _output(self, read: list[Float[Tensor, "B T H V"]], x: Tensor) -> Float[Tensor, "B T D"]:
        o = torch.stack(read).sum(0).to(x.dtype)
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[2:])).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Every row by itself: each memory reads its tokens as if there were no others."""
        r, routed = self._route(x, None)
        o = x.new_zeros(*x.shape[:2], self.n_heads, self.v_head_dim)
        for row in range(len(x)):
            for m, memory in enumerate(self.memories):
                at = routed[row, :, m].nonzero()[:, 0]
                lines = [self.q_proj(x[row, at][None]), *memory(x[row, at][None])]
                convolved = [c.reference(t) for c, t in zip(self._convs(), lines)]
                q, k, v, beta, fade = self._by_heads(convolved, *lines[3:])
                read, _ = delta_reference(q, k, v, beta, fade, scale=self.head_dim**-0.5)
                o = o.index_put((torch.tensor(row), at), r[row, at, m, None, None] * read[0], accumulate=True)
        return self._output([o], x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        """For tokens spread evenly over the memories, which spares whole sequences the projections of those not chosen."""
        shape, c = (B, self.n_heads, self.head_dim, self.v_head_dim), self.config
        scan = [delta_flops(n, *shape, mode, "head", c.chunk_size) for n in (-(-T * c.top_k // c.n_memories), T)]
        one = sum(m.in_features * m.out_features for m in self.memories[0].children() if isinstance(m, Linear))
        spared = 0 if mode == "step" else 2.0 * B * T * (c.n_memories - c.top_k) * one
        return c.n_memories * scan[0] + c.shared * scan[1] - spared


class Memory(nn.Module):
    """What a memory has of its own: x -> k, v, and what alpha and beta are made of."""

    def __init__(self, d_model: int, v_width: int, n_heads: int) -> None:
        super().__init__()
        widths = (d_model, v_width, n_heads, n_heads)
        self.k_proj, self.v_proj, self.a_proj, self.b_proj = (Linear(d_model, w, bias=False) for w in widths)

    def forward(self, x: Float[Tensor, "*B D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_proj(x), self.v_proj(x), self.a_proj(x), self.b_proj(x)


def _placed(values: Float[Tensor, "N *W"], place: Bool[Tensor, "B L"]) -> Float[Tensor, "B L *W"]:
    """The values one after another where place is true, zeros elsewhere."""
    return values.new_zeros(*place.shape, *values.shape[1:]).index_put((place,), values)

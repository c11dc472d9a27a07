"""What a mixer says it costs is what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.core.cost import ORDERS
from slipstream.core.mixer import Mode
from slipstream.laws.subject import B, Law, Subject, expect, is_refused, read_whole
from slipstream.ops.dispatch import torch_forms

N = 64
TRANSFORM = 2.5  # flops of a real Fourier transform of n numbers, over n log2 n


def _sdpa_flops(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _to_spectrum_flops(x: Any, dim: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> float:
    return TRANSFORM * math.prod(x) * math.log2(x[dim[0]])


def _from_spectrum_flops(x: Any, dim: Any, norm: Any, size: int, *args: Any, out_val: Any = None, **kw: Any) -> float:
    return TRANSFORM * math.prod(x) // x[dim[0]] * size * math.log2(size)


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._fft_r2c: _to_spectrum_flops,
    torch.ops.aten._fft_c2r: _from_spectrum_flops,
}


def _counted(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad(), torch_forms():
        run()
    return counter.get_total_flops()


def cost_is_what_is_counted(s: Subject) -> None:
    """The declared flops are within 5 % of those counted, in all three modes (where the work depends on what is read: no less)."""
    m, x = s.mixer, s.input(N)
    with torch.no_grad():
        _, state = read_whole(m, x, room=1)
    runs: dict[Mode, Callable[[], Any]] = {
        "forward": lambda: m(x),
        "prefill": lambda: m.prefill(x, m.init_state(B, N)),
        "step": lambda: m.step(x[:, :1], state),
    }
    for mode, run in runs.items():
        if mode in m.limits:
            is_refused(s, mode)
            continue
        counted, declared = _counted(run), m.cost(N, B, mode).flops
        enough, not_more = declared >= 0.95 * counted, declared <= 1.05 * counted or m.cost_is_most
        expect(enough and not_more, f"{mode}: declared {declared:.0f} flops, counted {counted}")
    read = sum(p.nbytes for p in m.parameters()) - m.idle_parameters(B) * x.element_size()
    written = sum(t.nbytes for n, t in m.init_state(B, N).slots.items() if not m.slots()[n].grows)
    moved = read + B * m.state_bytes(N) + written
    expect(
        m.cost(N, B, "step").bytes == moved,
        "a step reads the weights that are used and the state, and writes what does not grow",
    )


def cost_grows_as_declared(s: Subject) -> None:
    """Cost grows with length as train_order and decode_order say."""
    growth = dict(zip(ORDERS, (1.0, 22 / 21, 2.0, 44 / 21, 4.0), strict=True))
    orders: dict[Mode, str] = {"forward": s.mixer.train_order, "step": s.mixer.decode_order}
    for mode, order in orders.items():
        ratio = s.mixer.cost(2**22, 1, mode).flops / s.mixer.cost(2**21, 1, mode).flops
        expect(
            abs(ratio - growth[order]) < 0.02 * growth[order],
            f"{mode}: twice the length costs {ratio:.2f} times, declared {order}",
        )


LAWS: list[Law] = [cost_is_what_is_counted, cost_grows_as_declared]

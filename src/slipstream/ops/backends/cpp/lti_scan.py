"""The filter of diagonal state spaces by C++, mode by mode through time: no powers are made, and nothing is read twice.

It has no gradients: where they are wanted the torch form runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.calls import blank, call, offer


def run(
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(torch.promote_types(x.dtype, log_decay.dtype), torch.complex64)
    lost, weight = _parts(torch.expm1(log_decay.to(kind))), _parts(weight.to(kind))
    start = x.new_zeros(x.shape[0], *log_decay.shape, dtype=kind) if state is None else state.to(kind)
    wide, h = x.to(kind.to_real()).contiguous(), _parts(start)
    y = blank(wide)
    call("lti_scan", "forward", wide.dtype, (wide, lost, weight, lengths, h, y), *x.shape, log_decay.shape[1])
    return y.to(x.dtype), torch.complex(*h)


def _parts(z: Tensor) -> Tensor:
    """Real and imaginary parts, one after the other."""
    return torch.stack([z.real, z.imag])


offer("lti_scan", run, gradients=False)

"""What a mixer says it costs is what it does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from .conftest import B

N = 64


def sdpa_flops(q, k, v, *args, out_val=None, **kwargs):
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops}


def flops(f):
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["forward", "prefill", "step"])
def test_cost_is_what_torch_counts(mixer, mode):
    x = torch.randn(B, N, mixer.config.d_model, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer.prefill(x, mixer.init_state(B, N + 1))
    run = {
        "forward": lambda: mixer(x),
        "prefill": lambda: mixer.prefill(x, mixer.init_state(B, N)),
        "step": lambda: mixer.step(x[:, :1], state),
    }[mode]
    counted = flops(run)
    assert mixer.cost(N, B, mode).flops == pytest.approx(counted, rel=0.05)


def test_cost_grows_as_declared(mixer):
    growth = {"1": 1, "T": 2, "T^2": 4}
    for mode, order in (("forward", mixer.train_order), ("step", mixer.decode_order)):
        ratio = mixer.cost(2**22, 1, mode).flops / mixer.cost(2**21, 1, mode).flops
        assert ratio == pytest.approx(growth[order], rel=0.02), mode


def test_a_step_moves_the_weights_and_the_state(mixer):
    weights = sum(p.nbytes for p in mixer.parameters())
    assert mixer.cost(N, B, "step").bytes == weights + 2 * B * mixer.state_bytes(N)

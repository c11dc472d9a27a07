"""What a token costs in the cache of each kind of full attention, in numbers, at the sizes of the papers."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss

H, K = 128, 128  # DeepSeek-V2: 128 heads of 128
SIZES = {
    "MHA": ("attention", {"n_heads": H, "head_dim": K}, 2 * H * K),
    "GQA": ("attention", {"n_heads": H, "n_kv_heads": 8, "head_dim": K}, 2 * 8 * K),
    "MQA": ("attention", {"n_heads": H, "n_kv_heads": 1, "head_dim": K}, 2 * K),
    "MLA": ("mla", {"n_heads": H, "kv_rank": 512, "q_rank": 1536, "nope_head_dim": K, "rope_head_dim": 64}, 512 + 64),
    "GLA-2": ("grouped_latent_attention", {"n_heads": H, "n_latents": 2, "nope_head_dim": K}, 2 * 2 * K + 64),
    "TPA": ("tpa", {"n_heads": H, "head_dim": K}, (2 + 2) * (H + K)),
}


@pytest.mark.parametrize("kind", SIZES)
def test_numbers_a_token(kind):
    name, settings, numbers = SIZES[kind]
    with torch.device("meta"):
        mixer = ss.mixer(name, d_model=5120, **settings)
    assert mixer.state_bytes(1000) == 1000 * numbers * 4


def test_a_tied_state_is_half_of_grouped_keys_and_values_and_half_a_head():
    with torch.device("meta"):
        gta, gqa = (
            ss.mixer(name, d_model=4096, n_heads=32, n_kv_heads=8) for name in ("grouped_tied_attention", "attention")
        )
    assert gqa.state_bytes(1) == 2 * 8 * K * 4
    assert gta.state_bytes(1) == (8 * K + K // 2) * 4


def test_a_latent_is_nine_quarters_of_a_head():
    """DeepSeek-V2, table 1: MLA keeps 9/2 d_h numbers a token and layer, as grouped queries with 2.25 groups would."""
    _, _, numbers = SIZES["MLA"]
    assert numbers == 4.5 * K == 2 * 2.25 * K

"""Equations for the eye: Greek, subscripts and signs, and columns that stay columns."""

from __future__ import annotations

import pytest

from slipstream.core.cards import cards
from slipstream.core.notation import typeset


@pytest.mark.parametrize(
    ("plain", "shown"),
    [
        ("S_t = alpha_t S_{t-1} + k_t v_t^T", "Sₜ = αₜ Sₜ₋₁ + kₜ vₜᵀ"),
        ("x_t = a * b . c", "xₜ = a ⊙ b · c"),
        ("W_out x", "Wₒᵤₜ x"),
        ("rms_norm(o_t) log_decay", "rms_norm(oₜ) log_decay"),
        ("W_b x_t", "W_b xₜ"),
        ("sqrt(1 - a_t^2) <= k~_t", "√(1 - aₜ²) ≤ k\N{COMBINING TILDE}ₜ"),
        ("sum_{s<=t} alphabet", "Σ_{s≤t} alphabet"),
        ("2^(-5-h) 2^{-1}", "2^(-5-h) 2⁻¹"),
    ],
)
def test_signs_are_the_fields(plain, shown):
    assert typeset(plain).split() == shown.split()


def test_columns_stay_columns():
    first, second = typeset("alpha_t = 1        beta = 2\nS_t = sigmoid(x)   gamma = 3").split("\n")
    assert first.index("β") == second.index("γ") == 19


def test_no_equation_grows_wider():
    for card in cards().values():
        for plain, shown in zip(card.equation.split("\n"), typeset(card.equation).split("\n"), strict=True):
            assert len(shown) <= len(plain), card.name

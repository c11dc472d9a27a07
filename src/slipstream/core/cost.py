"""What a computation costs: floating-point operations of its matrix products, and bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """flops: of matrix products (as torch's FlopCounterMode: a multiply-add counts 2) and Fourier transforms; bytes: weights
    and state moved once.
    """

    flops: float
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


ORDERS = ("1", "log T", "T", "T log T", "T^2")  # how a cost can grow with length, from least to most

"""The laws of the contract: each a function of one mixer that raises where it is broken.

Run by the tests on every mixer, and by `slipstream check` on one.
"""

from slipstream.laws import cost, gradients, modes, precision, registry, state
from slipstream.laws.subject import Law, Subject, judge

LAWS: list[Law] = [law for module in (modes, gradients, state, precision, cost, registry) for law in module.LAWS]

__all__ = ["LAWS", "Law", "Subject", "judge"]

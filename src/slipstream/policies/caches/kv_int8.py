"""KIVI with 8 bits: everything is kept, keys and values as codes of 8 bits between the least and the largest of their groups.

Keys are grouped by channel over 32 tokens, values by token over 32 channels; the newest tokens, until 32 of them fill a
group, stay in full (see policies/quantised.py). The paper goes down to 2 bits.

Lost: a number is off by at most 1/510 of the range of its group. Codes take a quarter of float32, and the two bounds of the
groups a sixteenth each of what keys and values take in full. Memory still grows, and every key is read.
"""

from __future__ import annotations

from slipstream.policies.quantised import Quantised


class KVInt8(Quantised, name="kv_int8"):
    paper = "Liu et al. 2024, arXiv:2402.02750, sec. 3"
    bits = 8

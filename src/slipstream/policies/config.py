"""The settings of a softmax mixer whose cache can be run by a policy."""

from __future__ import annotations

from slipstream.layers.softmax_heads import SoftmaxConfig


class PolicyConfig(SoftmaxConfig):
    """What is trained does not depend on these: they say how a trained mixer reads and keeps."""

    cache: str = "full"  # what is kept of keys and values when decoding: full, or a cache policy such as h2o:512
    prefill_policy: str = "dense"  # which keys a prompt reads: dense, or a prefill policy such as minference

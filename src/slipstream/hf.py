"""slipstream's own checkpoints in transformers: after `import slipstream.hf`, AutoModelForCausalLM.from_pretrained loads them.

Needs transformers: pip install "slipstream[hf]".
"""

from __future__ import annotations

from slipstream.interop.auto import Remembered, SlipstreamConfig, SlipstreamForCausalLM

__all__ = ["Remembered", "SlipstreamConfig", "SlipstreamForCausalLM"]

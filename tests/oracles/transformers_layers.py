"""One attention layer of a model in transformers, called as its model would call it, and what ours must agree on with it."""

from __future__ import annotations

import torch
from transformers import DynamicCache


class Theirs:
    """x -> y; with `past`, the number of tokens it has seen, by its cache. window: tokens that a query sees, None for all."""

    def __init__(self, layer, rotary, window=None):
        self.layer, self.rotary, self.window, self.cache = layer, rotary, window, DynamicCache()

    def __call__(self, x, past=None):
        first = 0 if past is None else past
        query, key = torch.arange(first, first + x.shape[1])[:, None], torch.arange(first + x.shape[1])
        met = (key <= query) & (key > query - (self.window or len(key)))
        return self.layer(
            hidden_states=x,
            position_embeddings=self.rotary(x, query.T),
            attention_mask=torch.zeros(met.shape, dtype=x.dtype).masked_fill(~met, -1e300)[None, None],
            past_key_values=None if past is None else self.cache,
        )[0]


def random_layer(layer, std):
    """In float64, every weight drawn, so that no term hides at zero or one."""
    torch.manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=std)
    return layer.double().eval()


def agree_whole(ours, theirs, x):
    """Outputs and gradients of whole sequences."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(leaves[0]), theirs(leaves[1])
    assert want.std() > 0.5  # the mechanism matters
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    seed = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    (a,), (b,) = (torch.autograd.grad((y * seed).sum(), leaf) for y, leaf in zip((got, want), leaves))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def agree_in_steps(ours, theirs, x, prompt):
    """A prompt, and single tokens after it from the caches."""
    with torch.no_grad():
        y, state = ours.prefill(x[:, :prompt], ours.init_state(len(x), x.shape[1]))
        torch.testing.assert_close(y, theirs(x[:, :prompt], 0), rtol=1e-5, atol=1e-5)
        for t in range(prompt, x.shape[1]):
            y, state = ours.step(x[:, t : t + 1], state)
            torch.testing.assert_close(y, theirs(x[:, t : t + 1], t), rtol=1e-5, atol=1e-5)

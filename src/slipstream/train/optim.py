"""Optimisers: AdamW for all, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slipstream.models.language_model import LanguageModel
from slipstream.train.config import Recipe

BETAS = (0.9, 0.95)


class Optimizers:
    """One or two torch optimisers as one. Their states go out and come in as flat tables of tensors."""

    def __init__(self, model: LanguageModel, recipe: Recipe) -> None:
        decay, spared = model.weight_decay_groups()
        muon = hidden_matrices(model, decay) if recipe.optimizer == "muon" else []
        by_muon = {id(p) for p in muon}
        groups = [
            {"params": [p for p in decay if id(p) not in by_muon], "weight_decay": recipe.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=recipe.highest_lr, betas=BETAS, fused=True)
        self.parts: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
        if muon:
            self.parts["muon"] = torch.optim.Muon(
                muon, lr=recipe.highest_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            )

    def step(self, lr: float) -> None:
        """Move the parameters at this learning rate, and forget the gradients."""
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Everything they remember: <optimiser>.<parameter>.<what>."""
        return {
            f"{name}.{i}.{key}": tensor
            for name, part in self.parts.items()
            for i, kept in part.state_dict()["state"].items()
            for key, tensor in kept.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, part in self.parts.items():
            kept: dict[int, dict[str, Tensor]] = {}
            for path, tensor in tensors.items():
                owner, i, key = path.split(".")
                if owner == name:
                    kept.setdefault(int(i), {})[key] = tensor
            part.load_state_dict({"state": kept, "param_groups": part.state_dict()["param_groups"]})


def hidden_matrices(model: LanguageModel, decay: list[nn.Parameter]) -> list[nn.Parameter]:
    """Matrices inside the stack, of linear and of recurrent layers: what Muon is made for. Embeddings and heads are not."""
    decayed = {id(p) for p in decay}
    return [p for p in model.stack.parameters() if p.ndim == 2 and id(p) in decayed]

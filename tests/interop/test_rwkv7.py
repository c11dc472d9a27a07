"""RWKV-7 .pth files: a whole model against the official rwkv package, in all modes; and files that are none."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError

from .theirs import close, in_pieces

STORED = Path(__file__).parent.parent / "oracles" / "rwkv7_checkpoint.npz"
ROOM = 1 << 30  # bytes that a refusal may take at most


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def weights(stored):
    return {name: tensor for name, tensor in stored.items() if "." in name}


def saved(weights, folder, **more):
    path = folder / "RWKV-x070-tiny.pth"
    torch.save(weights | more, path)
    return path


@torch.no_grad()
def test_logits_are_the_official_packages_in_all_modes(stored, weights, tmp_path):
    model, tokens = ss.load(saved(weights, tmp_path)), stored["tokens"][None]
    close(model(tokens)[0], stored["logits"])
    close(in_pieces(model, tokens)[0], stored["logits"])
    _, state = model.prefill(tokens)
    logits, _ = model.step(torch.tensor([[7]]), state)
    close(logits[0, 0], stored["after"])
    assert model.n_parameters() == sum(t.numel() for t in weights.values())
    assert model.tokenizer is None


@torch.no_grad()
def test_it_is_kept_as_a_model_of_ours_and_as_numbers_of_another_kind(stored, weights, tmp_path):
    model, tokens = ss.load(saved(weights, tmp_path)), stored["tokens"][None]
    model.save(tmp_path / "own")
    assert torch.equal(ss.load(tmp_path / "own")(tokens), model(tokens))
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert ss.load(saved(half, tmp_path)).embedding.weight.dtype == torch.bfloat16
    rounded = ss.load(saved({name: tensor.float() for name, tensor in half.items()}, tmp_path))
    assert torch.equal(ss.load(saved(half, tmp_path), "float32")(tokens), rounded(tokens))


@torch.no_grad()
def test_what_a_first_layer_does_not_read_may_be_there(stored, weights, tmp_path):
    unread = {f"blocks.0.att.v{n}": torch.zeros(1) for n in range(3)}
    close(ss.load(saved(weights, tmp_path, **unread))(stored["tokens"][None])[0], stored["logits"])


@torch.no_grad()
def test_generation_takes_and_gives_ids(weights, tmp_path):
    model = ss.load(saved(weights, tmp_path))
    ids = list(ss.generate(model, [1, 2, 3], max_new_tokens=4, temperature=0.0))
    assert len(ids) == 4 and all(0 <= i < 31 for i in ids)


def changed(name, change):
    return lambda weights: weights | {name: change(weights[name])}


def without(name):
    return lambda weights: {n: t for n, t in weights.items() if n != name}


FORGED = {
    "no RWKV-7 model": lambda w: {"model.embed_tokens.weight": torch.zeros(2, 2)},
    "no RWKV-7 model: it has no matrix blocks.0.att.r_k": without("blocks.0.att.r_k"),
    "no matrix blocks.1.att.v1": without("blocks.1.att.v1"),
    "lacks the tensor blocks.2.att.v2": without("blocks.2.att.v2"),
    "lacks the tensor head.weight": without("head.weight"),
    "the rest of it makes": changed("blocks.1.att.w1", lambda t: t[:, :2]),
    "d_model 16 does not divide into n_heads 3": changed("blocks.0.att.r_k", lambda t: torch.zeros(3, 5)),
    "does not speak of": lambda w: w | {"blocks.0.ffn.s_emb.weight": torch.zeros(31, 4)},
    "says 1000000 layers": lambda w: w | {"blocks.999999.ln1.weight": torch.zeros(16)},
    "no matrix emb.weight": changed("emb.weight", lambda t: t[:1, :1].expand(1 << 40, 1 << 20)),
    "no matrix emb.weight.": changed("emb.weight", lambda t: t.to("meta")),
    "no matrix emb.weight. Of": changed("emb.weight", lambda t: t.to_sparse()),
    "holds torch.int64": changed("blocks.1.ln1.weight", lambda t: t.long()),
}  # fmt: skip


@pytest.mark.parametrize("complaint", FORGED)
def test_files_that_are_none_are_told(complaint, weights, tmp_path):
    path, before = saved({}, tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save(FORGED[complaint](weights), path)
    with pytest.raises(InputError, match=complaint) as told:
        ss.load(path)
    assert "\n" not in str(told.value)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ROOM


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_runs_code(weights, tmp_path):
    trap = tmp_path / "it ran"
    path = saved(weights, tmp_path, bomb=Bomb(trap))
    with pytest.raises(InputError, match="weights alone"):
        ss.load(path)
    assert not trap.exists()


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"GG" + raw[2:]])
def test_damaged_files_are_told(damage, weights, tmp_path):
    path = saved(weights, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError):
        ss.load(path)

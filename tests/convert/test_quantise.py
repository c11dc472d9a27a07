"""Quantised models: every mixer runs as one, near what it was, in fewer bytes, on disk and off."""

from __future__ import annotations

import json

import pytest
import torch

import slipstream as ss
from slipstream.convert.loss import loss, passages
from slipstream.convert.quantise import stored_bytes
from slipstream.core.registry import mixers
from slipstream.data.text import text_data
from slipstream.layers.quantised_linear import QuantisedLinear
from slipstream.train.config import Recipe, TrainConfig
from slipstream.train.loop import Trainer
from slipstream.train.run import train

KINDS = ("int8", "int4")
NEAR = {"int8": 0.1, "int4": 0.5}  # of the logits' norm; the most where a small error chooses another expert or block
MODELLING = [name for name, cls in mixers().items() if not {"prefill", "step"} & set(cls.limits)]
T, D, V = 14, 64, 96


def model(pattern: str, **settings) -> ss.LanguageModel:
    made = ss.language_model(pattern, n_layers=settings.pop("n_layers", 1), d_model=D, vocab_size=V, seed=1, **settings)
    return made.eval()


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(0))


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("name", MODELLING)
def test_every_mixer(name, to):
    whole = model(f"{name}/none")
    small = ss.quantise(whole, to)
    logits = small(tokens())
    assert off(logits, whole(tokens())) < NEAR[to]
    first, state = small.prefill(tokens()[:, :10], small.init_state(2, T), logits="all")
    rest = []
    for t in range(10, T):
        y, state = small.step(tokens()[:, t : t + 1], state)
        rest.append(y)
    assert off(torch.cat([first, *rest], 1), logits) < 1e-2
    assert small.state_bytes(20) == whole.state_bytes(20)
    assert small.n_parameters() == whole.n_parameters()
    mixer, was = small.stack.mixers()[0], whole.stack.mixers()[0]
    assert mixer.cost(20).flops == was.cost(20).flops
    held = sum(t.nbytes for m in mixer.modules() for t in (*m.parameters(False), *codes_of(m)))
    assert mixer.cost(20).bytes == held - 4 * mixer.idle_parameters(20)


def codes_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return list(module.buffers(False)) if isinstance(module, QuantisedLinear) else []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("to", KINDS)
def test_saved_and_loaded_it_is_the_same(tmp_path, to, tied):
    whole = model("gated_deltanet, attention", n_layers=2, tie_embeddings=tied)
    small = ss.quantise(whole, to)
    small.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantisation"] == {"to": to, "group": 32}
    again = ss.load(tmp_path)
    assert torch.equal(again(tokens()), small(tokens()))
    assert abs((tmp_path / "model.safetensors").stat().st_size - stored_bytes(small)) < 1e4
    assert stored_bytes(small) < stored_bytes(whole) / (2.8 if to == "int8" else 4)
    assert not [p for p in again.parameters() if p.requires_grad]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_tied_embedding_is_looked_up_in_the_heads_codes():
    small = ss.quantise(model("lstm/none"))
    assert small.embedding.matrix is small.head.proj
    assert torch.equal(small.embedding(tokens()), small.head.proj.weight[tokens()])
    apart = ss.quantise(model("lstm/none", tie_embeddings=False))
    assert apart.embedding.matrix is not apart.head.proj


def test_what_stays_as_it_is():
    whole = model("gated_deltanet, mixture_of_attention_heads", n_layers=2)
    small = ss.quantise(whole)
    swapped = {n for n, m in small.named_modules() if isinstance(m, QuantisedLinear)}
    assert {"stack.blocks.0.mixers.0.q_proj", "stack.blocks.0.mixers.1.down_proj", "embedding.matrix"} <= swapped
    assert not [n for n in swapped if n.endswith(("a_proj", "b_proj", "router"))]
    kept, were = dict(small.named_parameters()), dict(whole.named_parameters())
    assert {"stack.norm.weight", "stack.blocks.0.mixers.0.A_log", "stack.blocks.0.mixers.0.a_proj.weight"} <= set(kept)
    assert all(torch.equal(p, were[n]) for n, p in kept.items())


def test_the_given_model_is_left_alone():
    whole = model("attention")
    before = {n: t.clone() for n, t in whole.state_dict().items()}
    small = ss.quantise(whole, "int4")
    for p in small.parameters():
        p.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in whole.state_dict().items())
    assert all(p.requires_grad for p in whole.parameters()) and whole.config.quantisation is None


def test_other_precisions_and_policies():
    small = ss.quantise(model("attention"))
    low = ss.quantise(model("attention")).to(torch.bfloat16)
    assert low(tokens()).dtype == torch.bfloat16 and low.head.proj.scales.dtype == torch.float16
    assert off(low(tokens()).float(), small(tokens())) < 0.1
    wide = ss.quantise(model("attention").double())
    assert wide(tokens()).dtype == torch.float64
    cheaper = ss.with_policies(small, cache="streaming_llm")
    _, state = cheaper.prefill(tokens())
    assert cheaper.step(tokens()[:, :1], cheaper.reserve(state, 1))[0].isfinite().all()


def test_nan_in_the_embeddings_is_refused():
    whole = model("attention")
    whole.embedding.weight[3, 4] = torch.nan
    with pytest.raises(ss.InputError, match="NaN"):
        ss.quantise(whole)


def test_mistakes():
    small = ss.quantise(model("attention"))
    with pytest.raises(ss.InputError, match="int8 already"):
        ss.quantise(small, "int4")
    with pytest.raises(ss.InputError, match="groups of 32"):
        ss.quantise(model("attention"), "int4", group=64)
    with pytest.raises(ss.InputError, match="large enough"):
        ss.quantise(ss.language_model("attention", n_layers=1, d_model=16))
    with pytest.raises(ss.InputError, match="cannot be trained"):
        Trainer(small, text_data(context=16), Recipe())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d["config"].update(quantisation={"to": "int4", "group": 32}), "config.json makes it"),
        (lambda d: d["config"].update(quantisation=None), "another architecture"),
        (lambda d: d["config"].update(quantisation={"to": "int3", "group": 32}), "int3"),
        (lambda d: d["config"].update(quantisation={"to": "int4", "group": 7}), "groups of 32"),
        (lambda d: d.update(weights=d["weights"][:5000]), "damaged or cut short"),
    ],
    ids=["other bits", "none", "unknown bits", "group", "cut short"],
)
def test_directories_that_do_not_fit(tmp_path, change, complaint):
    ss.quantise(model("attention")).save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    there = {"config": json.loads(config.read_text()), "weights": weights.read_bytes()}
    change(there)
    config.write_text(json.dumps(there["config"]))
    weights.write_bytes(there["weights"])
    with pytest.raises(ss.InputError, match=complaint):
        ss.load(tmp_path)


def test_codes_of_another_kind_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    ss.quantise(model("attention")).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.codes"))
    save_file({**tensors, name: tensors[name].float()}, tmp_path / "model.safetensors")
    with pytest.raises(ss.InputError, match=r"codes is torch\.float32"):
        ss.load(tmp_path)


def test_a_trained_model_loses_little(tmp_path):
    with torch.enable_grad():
        train(TrainConfig(out=tmp_path, arch="gated_deltanet", n_layers=1, d_model=64, context=64, tokens=8_000))
    whole = ss.load(tmp_path)
    read = passages(whole, tmp_path, None, 2048)
    before = loss(whole, read).bits_per_byte
    assert before < 6
    assert abs(loss(ss.quantise(whole, "int8"), read).bits_per_byte - before) < 0.01
    assert abs(loss(ss.quantise(whole, "int4"), read).bits_per_byte - before) < 0.1

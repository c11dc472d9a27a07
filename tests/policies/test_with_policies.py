"""Policies as users apply them: to a model, to what it generates, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer
from slipstream.generate.batch import generate_batch
from slipstream.generate.reading import Reading
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import parse
from slipstream.models.policies import keys_read
from slipstream.models.retrieval_heads import retrieval_scores
from slipstream.policies.catalogue import policy_cards
from slipstream.policies.policy import cache_policies, prefill_policies

ATTENTION = "attention(n_heads=4, n_kv_heads=2, conv_size=3, qk_scale=none)"
HYBRID = f"2*lstm/none, {ATTENTION}, {ATTENTION}/mlp"
PROMPTS = ["Once upon a time, and a very good time it was, there was " * 2, "A", "No facts are here but these: " * 3]
SMALL = [
    "streaming_llm:8", "h2o:10", "snapkv:8:32", "quest:16", "duo_attention:8:1", "kv_int8", "kv_int4",
]  # fmt: skip


@pytest.fixture
def model() -> LanguageModel:
    made = ss.language_model(HYBRID, n_layers=4, d_model=16, seed=1, tie_embeddings=False).eval()
    made.tokenizer = byte_tokenizer()
    with torch.no_grad():
        made.embedding.weight.mul_(50)
        made.head.proj.weight.mul_(4)
    return made


def test_weights_are_the_models_own(model):
    changed = ss.with_policies(model, cache="h2o:8", prefill_policy="dense")
    assert [*map(id, changed.parameters())] == [*map(id, model.parameters())]
    assert changed.tokenizer is model.tokenizer and changed.training == model.training
    tokens = torch.arange(20)[None]
    assert torch.equal(changed(tokens), model(tokens))  # training knows no policies
    with torch.no_grad():
        model.head.proj.weight.mul_(2)
    assert torch.equal(changed(tokens), model(tokens))


def test_settings_are_in_the_pattern(model, tmp_path):
    changed = ss.with_policies(model, cache="h2o:8", prefill_policy="minference")
    blocks, was = parse(changed.config.pattern), parse(model.config.pattern)
    assert blocks[:2] == was[:2]
    for new, old in zip(blocks[2:], was[2:]):
        assert new.parts[0].settings == old.parts[0].settings | {"cache": "h2o:8", "prefill_policy": "minference"}
        assert new.parts[1:] == old.parts[1:]
    changed.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["pattern"] == changed.config.pattern
    loaded = ss.load(tmp_path / "run")
    assert loaded.state_bytes(1000) == changed.state_bytes(1000) < model.state_bytes(1000)
    back = ss.with_policies(loaded, cache="full", prefill_policy="dense")
    assert parse(back.config.pattern) == was


def test_what_is_not_said_stays(model):
    changed = ss.with_policies(ss.with_policies(model, cache="h2o:8"), prefill_policy="sage")
    assert changed.config.pattern.count("cache=h2o:8, prefill_policy=sage") == 2
    assert ss.with_policies(model, cache="full").config.pattern == HYBRID


def test_a_period_is_written_out_only_where_layers_differ():
    model = ss.language_model("2*lstm/none, attention", n_layers=6, d_model=16)
    assert ss.with_policies(model, cache="h2o:8").config.pattern == "2*lstm/none, attention(cache=h2o:8)"
    each = ss.with_policies(model, cache=["h2o:8", "quest:16"]).config.pattern
    assert each == "2*lstm/none, attention(cache=h2o:8), 2*lstm/none, attention(cache=quest:16)"
    caches = ["duo_attention:8:0", "duo_attention:8:none"]
    duo = ss.with_policies(ss.language_model("attention/none", n_layers=2, d_model=128), cache=caches)
    assert duo.config.pattern == ", ".join(f"attention(cache={c})/none" for c in caches)
    assert [m.config.cache for m in duo.stack.mixers()] == caches


def test_mistakes_are_told_in_words(model):
    recurrent = ss.language_model("lstm", n_layers=1, d_model=16)
    with pytest.raises(InputError, match=r"no layer of 'lstm' has a setting cache; these mixers have one: .*attention"):
        ss.with_policies(recurrent, cache="h2o:8")
    with pytest.raises(InputError, match="did you mean h2o"):
        ss.with_policies(model, cache="h20:8")
    with pytest.raises(InputError, match="3 policies are given for cache, and 2 layers"):
        ss.with_policies(model, cache=["full"] * 3)
    with pytest.raises(InputError, match="share a cache"):
        ss.with_policies(ss.language_model("attention", n_layers=2, d_model=16, share_kv=2), cache="h2o:8")


@pytest.mark.parametrize("spec", ["streaming_llm:900", "h2o:900", "snapkv:900", "quest:900", "duo_attention:900:0"])
def test_with_an_ample_budget_the_text_is_the_same(model, spec):
    text = "".join(ss.generate(model, PROMPTS[0], 40, seed=3))
    assert "".join(ss.generate(ss.with_policies(model, cache=spec), PROMPTS[0], 40, seed=3)) == text


@pytest.mark.parametrize("spec", SMALL)
def test_rows_of_a_batch_are_as_alone(model, spec):
    """Ragged prompts, read in pieces in which some rows have no tokens left."""
    changed = ss.with_policies(model.double(), cache=spec)
    rows = generate_batch(changed, PROMPTS, 50, seed=5, chunk=48)
    alone = ["".join(ss.generate(changed, p, 50, seed=5 + i, chunk=48)) for i, p in enumerate(PROMPTS)]
    assert rows == alone


@pytest.mark.parametrize("spec", SMALL)
def test_a_saved_reading_goes_on_under_its_policy_only(model, spec, tmp_path):
    changed, file = ss.with_policies(model, cache=spec), tmp_path / "read.safetensors"
    whole = "".join(ss.generate(changed, PROMPTS[0], 60, seed=4))
    stream = ss.generate(changed, PROMPTS[0], 25, seed=4)
    first = "".join(stream)
    stream.reading.save(file, changed)
    rest = ss.generate(changed, "", 35, seed=4, state=Reading.load(file, changed))
    assert first + "".join(rest) == whole
    for other in (model, ss.with_policies(model, cache="streaming_llm:9")):
        with pytest.raises(InputError, match=f"cache={spec}.* there, .* here"):
            Reading.load(file, other)


def test_keys_read_is_a_mean_over_the_layers_with_a_cache(model):
    changed = ss.with_policies(model, cache=["h2o:8", "full"])
    assert keys_read(changed, 100) == (9 + 101) / 2


def test_a_head_that_says_nothing_is_not_a_retrieval_head():
    """Of four key heads in two layers the outputs of two are cut off."""
    model = ss.language_model(f"{ATTENTION}/none", n_layers=2, d_model=16, seed=2, tie_embeddings=False).eval()
    tokens = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        model.head.proj.weight.mul_(50)
        for block, silent in zip(model.stack.blocks, (0, 1)):
            block.mixers[0].o_proj.weight[:, 8 * silent : 8 * silent + 8] = 0
    scores = retrieval_scores(model, tokens, window=8)
    assert scores[0][0] == scores[1][1] == pytest.approx(0, abs=1e-6)
    assert min(scores[0][1], scores[1][0]) > 1e-4
    caches = ss.retrieval_heads(model, tokens, window=8)
    assert caches == ["duo_attention:8:1", "duo_attention:8:0"]
    assert ss.retrieval_heads(model, tokens, window=8, share=0) == ["duo_attention:8:none"] * 2
    assert ss.retrieval_heads(model, tokens, window=8, share=1) == ["duo_attention:8:0+1"] * 2

    def predictions(m: LanguageModel) -> torch.Tensor:
        state, out = m.init_state(2, 60), []
        for piece in tokens.split(8, 1):
            logits, state = m.prefill(piece, state, logits="all")
            out.append(logits)
        return torch.cat(out, 1)

    with torch.no_grad():
        want = predictions(model)
        torch.testing.assert_close(predictions(ss.with_policies(model, cache=caches)), want, rtol=1e-4, atol=1e-4)
        wrong = predictions(ss.with_policies(model, cache=["duo_attention:8:0", "duo_attention:8:1"]))
    assert (wrong - want).abs().max() > 1e-2
    with pytest.raises(InputError, match="too short"):
        ss.retrieval_heads(model, tokens, window=30)
    with pytest.raises(InputError, match="between 0 and 1"):
        ss.retrieval_heads(model, tokens, window=8, share=1.5)


def command(*arguments: object) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "slipstream.cli.app", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_line(model, tmp_path):
    run, state = tmp_path / "run", tmp_path / "read.safetensors"
    model.save(run)
    common = ("generate", run, PROMPTS[0], "--max-new-tokens", 30, "--seed", 3)
    plain, told = command(*common), command(*common, "--cache", "h2o:10", "--save-state", state)
    assert "cache" not in plain.stderr and told.returncode == 0, told.stderr
    assert "cache h2o:10: " in told.stderr and "held after" in told.stderr and "11 keys read a token" in told.stderr
    assert "held" not in told.stdout and told.stdout != plain.stdout
    about = json.loads(command(*common, "--cache", "h2o:10, full", "--prefill-policy", "sage", "--json").stdout)
    assert about["cache"] == ["h2o:10", "full"] and about["prefill_policy"] == "sage"
    assert about["tokens_read"] == len(PROMPTS[0]) + 29 and about["keys_read"] == (11 + about["tokens_read"] + 1) / 2
    assert about["bytes_held"] > 0
    refused = command("generate", run, "--from-state", state)
    assert refused.returncode == 2 and "cache=h2o:10" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert command("generate", run, "--from-state", state, "--cache", "h2o:10", "--seed", 3).returncode == 0
    mistake = command(*common, "--cache", "snapvk:3")
    assert mistake.returncode == 2 and "did you mean snapkv" in mistake.stderr


def test_list_tells_what_the_classes_say():
    cards = {c.name: c for c in policy_cards()}
    classes = cache_policies() | prefill_policies()
    assert set(cards) == set(classes)
    for name, cls in classes.items():
        assert (cards[name].paper, cards[name].takes) == (cls.paper, cls.takes) and cards[name].title
    listed = json.loads(command("list", "--policies", "--json").stdout)
    assert {c["name"]: c["setting"] for c in listed} == {
        **dict.fromkeys(cache_policies(), "cache"),
        **dict.fromkeys(prefill_policies(), "prefill_policy"),
    }
    light = "import sys, slipstream.cli.list_ as l; l.policy_cards(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0

"""Streams, batches, and readings that are kept and continued."""

from __future__ import annotations

import itertools

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.generate.batch import generate_batch
from slipstream.generate.reading import Reading
from slipstream.generate.stream import generate
from slipstream.models.language_model import language_model

PROMPT = "Once upon a time, née"
HOT = {"temperature": 1.0, "seed": 5}


def text(stream) -> str:
    return "".join(stream)


def ids(prompt: str) -> list[int]:
    return list(prompt.encode())


def test_greedy_is_the_argmax_of_the_whole_forward_pass(model):
    """Prefill in chunks and steps against the parallel form over the growing text."""
    written = list(generate(model, ids(PROMPT), 12, temperature=0, chunk=5))
    row = ids(PROMPT)
    for token in written:
        with torch.no_grad():
            assert model(torch.tensor([row]))[0, -1].argmax().item() == token
        row.append(token)
    assert len(written) == 12


def test_the_same_seed_writes_the_same_and_another_does_not(model):
    first = text(generate(model, PROMPT, 40, **HOT))
    assert first == text(generate(model, PROMPT, 40, **HOT))
    assert first == text(generate(model, PROMPT, 40, **HOT, chunk=3))
    assert first != text(generate(model, PROMPT, 40, temperature=1.0, seed=6))


def test_the_room_is_the_function(model):
    assert text(ss.generate(model, PROMPT, max_new_tokens=9, seed=1)) == text(generate(model, PROMPT, 9, seed=1))


def test_text_and_ids_are_the_same_tokens(model):
    tokens = list(generate(model, ids(PROMPT), 60, **HOT))
    stream = generate(model, PROMPT, 60, **HOT)
    shown = text(stream)
    assert bytes(tokens).decode(errors="replace").startswith(shown)
    assert stream.n_tokens == len(tokens) == 60
    assert stream.ended == "length"


def test_a_stop_string_ends_the_text_before_it(model):
    whole = text(generate(model, PROMPT, 40, **HOT))
    stop = whole[20:23]
    stream = generate(model, PROMPT, 40, **HOT, stop=[stop, "never to be seen"])
    assert text(stream) == whole[: whole.index(stop)]
    assert stream.ended == "stop"
    assert text(generate(model, PROMPT, 40, **HOT, stop=stop)) == whole[: whole.index(stop)]
    token = list(generate(model, ids(PROMPT), 30, **HOT))[10]
    assert token not in list(generate(model, ids(PROMPT), 30, **HOT, stop=[token]))


def test_repetition_penalty_counts_prompt_and_text(model):
    """So strong that nothing is said twice."""
    tokens = list(generate(model, ids(PROMPT), 30, temperature=0, repetition_penalty=1e6))
    assert len({*tokens, *ids(PROMPT)}) == 30 + len(set(ids(PROMPT)))


@pytest.mark.parametrize("cut", [0, 1, 11])
@pytest.mark.parametrize("how", [{"temperature": 0}, HOT, HOT | {"repetition_penalty": 1.5, "top_p": 0.9}])
def test_a_reading_on_disk_continues_token_for_token(model, tmp_path, cut, how):
    whole = list(generate(model, ids(PROMPT), 25, **how))
    first = generate(model, ids(PROMPT), cut, **how)
    begun = list(first)
    first.reading.save(tmp_path / "state.safetensors", model)
    kept = Reading.load(tmp_path / "state.safetensors", model)
    rest = list(generate(model, [], 25 - cut, **how, state=kept))
    assert begun + rest == whole
    assert list(generate(model, [], 4, **how, state=kept)) == rest[:4]  # a reading is not used up


@pytest.mark.parametrize("cut", range(1, 6))
def test_text_is_continued_within_a_character(model, tmp_path, cut):
    """Wherever the cut falls, the two texts are the whole one."""
    with torch.no_grad():
        model.head.proj.weight[128:] *= 12  # now mostly not ASCII
    whole = text(generate(model, PROMPT, 20, **HOT))
    first = generate(model, PROMPT, cut, **HOT)
    begun = text(first)
    first.reading.save(tmp_path / "s", model)
    assert begun + text(generate(model, "", 20 - cut, **HOT, state=Reading.load(tmp_path / "s", model))) == whole


def test_more_prompt_can_follow_a_reading(model):
    """Reading a text in two parts is reading it once."""
    half = generate(model, ids("Once upon "), 0)
    list(half)
    want = list(generate(model, ids("Once upon a time"), 20, **HOT))
    assert list(generate(model, ids("a time"), 20, **HOT, state=half.reading)) == want
    _, state = model.prefill(torch.tensor([ids("Once upon ")]))
    assert list(generate(model, ids("a time"), 20, **HOT, state=state)) == want  # a bare state of the model's too


def test_a_reading_may_be_taken_in_the_middle(model):
    stream = generate(model, ids(PROMPT), 30, **HOT)
    begun = list(itertools.islice(stream, 11))
    kept = stream.reading
    rest = list(stream)
    assert list(generate(model, [], 19, **HOT, state=kept)) == rest
    assert begun + rest == list(generate(model, ids(PROMPT), 30, **HOT))


def test_states_of_other_models_are_refused(model, tmp_path):
    stream = generate(model, PROMPT, 3)
    stream.reading.save(tmp_path / "state.safetensors", model)
    other = language_model("lstm", n_layers=1, d_model=16)
    with pytest.raises(InputError, match=r"is a state of another model: pattern .* there, 'lstm' here"):
        Reading.load(tmp_path / "state.safetensors", other)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(InputError, match="other weights"):
        Reading.load(tmp_path / "state.safetensors", model)
    with pytest.raises(InputError, match=r"no state file .*; did you mean state\.safetensors"):
        Reading.load(tmp_path / "stat.safetensors", model)
    (tmp_path / "cut").write_bytes((tmp_path / "state.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match="no complete state file"):
        Reading.load(tmp_path / "cut", model)
    model.prefill(torch.tensor([[1]]))[1].save(tmp_path / "bare")
    with pytest.raises(InputError, match="bare state"):
        Reading.load(tmp_path / "bare", model)


PROMPTS = ["A", "Once upon a time there was a very long prompt, née", "Two words", "x" * 33]


@pytest.mark.parametrize("how", [{"temperature": 0}, HOT, HOT | {"repetition_penalty": 1.4, "min_p": 0.02}])
def test_a_row_of_a_batch_is_what_it_is_alone(model, how):
    how = {"seed": 5} | how
    together = generate_batch(model.double(), PROMPTS, 16, **how, chunk=8)
    for i, (prompt, row) in enumerate(zip(PROMPTS, together)):
        assert row == text(generate(model, prompt, 16, **how | {"seed": 5 + i}))
    assert [together[2]] == generate_batch(model, PROMPTS[2:3], 16, **how | {"seed": 7})


def test_rows_end_at_their_own_stop_string(model):
    model = model.double()
    free = generate_batch(model, PROMPTS, 20, **HOT)
    stop = next(c for c in free[1] if c in free[3] and c not in free[0][:5])
    ended = generate_batch(model, PROMPTS, 20, **HOT, stop=[stop])
    assert ended == [row.split(stop)[0] for row in free]
    assert len(set(map(len, ended))) > 1


def test_what_cannot_be_continued_is_said(model):
    with pytest.raises(InputError, match="prompt is empty"):
        generate(model, "")
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate_batch(model, ["a", ""])
    with pytest.raises(InputError, match="token 999 is not in the vocabulary of 256"):
        generate(model, [999])
    with pytest.raises(InputError, match=r"Sampling has no field|temperature"):
        generate(model, "a", temperature=-1)
    model.tokenizer = None
    with pytest.raises(InputError, match="carries no tokenizer"):
        generate(model, "a")
    assert len(list(generate(model, [97], 3))) == 3


def test_a_long_stream_keeps_no_history():
    """The state of a recurrent model and the reading beside it do not grow."""
    model = language_model("lstm", n_layers=1, d_model=16)
    stream = generate(model, [1], 300, seed=0)
    sizes = set()
    for n, _ in enumerate(stream):
        if n % 100 == 50:
            reading = stream.reading
            sizes.add((reading.state.nbytes, reading.logits.nbytes, reading.seen.nbytes, len(reading.shown)))
    assert len(sizes) == 1

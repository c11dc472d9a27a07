"""Runs in a folder: started, found finished, found different, and never half-written."""

from __future__ import annotations

import json

import pytest
import torch

from slipstream.core.errors import InputError
from slipstream.models.checkpoint import load
from slipstream.train.config import TrainConfig
from slipstream.train.interrupt import on_interrupt
from slipstream.train.loop import Point
from slipstream.train.run import Note, train

SETTINGS = {
    "arch": "attention",
    "n_layers": 1,
    "d_model": 16,
    "context": 16,
    "batch_size": 4,
    "tokens": 16 * 4 * 6,
    "eval_tokens": 64,
    "threads": 1,
}


def settings(folder, **changes) -> TrainConfig:
    return TrainConfig(**SETTINGS | {"out": folder} | changes)


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_a_model_that_loads(tmp_path):
    events = []
    result = train(settings(tmp_path), events.append)
    assert (result.out, result.step, result.tokens) == (tmp_path, 6, 384)
    model = load(tmp_path)
    assert model.tokenizer.encode("né").ids == list("né".encode())
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(files(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["validation"] == result.bits_per_byte
    assert [e.step for e in events if isinstance(e, Point)] == [1, 2, 3, 4, 5, 6]
    assert "parameters" in next(e.text for e in events if isinstance(e, Note))
    assert not [n for n in files(tmp_path) if "partial" in n]


def test_the_weights_are_as_readable_as_the_metrics(tmp_path):
    train(settings(tmp_path / "run"))
    modes = {
        n: (tmp_path / "run" / n).stat().st_mode for n in ("metrics.jsonl", "model.safetensors", "trainer.safetensors")
    }
    assert len(set(modes.values())) == 1, modes


def test_a_run_goes_on_with_the_threads_it_began_with_and_measures_none_again(tmp_path, monkeypatch):
    monkeypatch.setattr("slipstream.train.run.fitting_threads", lambda work: 2)
    before = torch.get_num_threads()
    try:
        with pytest.raises(RuntimeError, match="killed"):
            train(settings(tmp_path, threads=None, save_every=0), stop_at(2))
        monkeypatch.setattr("slipstream.train.run.fitting_threads", lambda work: pytest.fail("was measured again"))
        torch.set_num_threads(1)
        train(settings(tmp_path, threads=None))
        assert torch.get_num_threads() == 2
        train(settings(tmp_path, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_a_kill_left_behind_is_swept_away(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        train(settings(tmp_path), stop_at(2))
    (tmp_path / ".trainer.safetensors.123.partial").write_bytes(b"half")
    (tmp_path / ".tmpAbC123").write_bytes(b"half")
    (tmp_path / "tokens" / ".key.123.partial").mkdir()
    train(settings(tmp_path))
    assert not [n for n in files(tmp_path) if n.startswith(".")]
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def stop_at(step: int):
    """A listener that ends the run as a fault would."""

    def stop(event: object) -> None:
        if isinstance(event, Point) and event.step == step:
            raise RuntimeError("killed")

    return stop


def test_a_finished_run_says_so_and_changes_nothing(tmp_path):
    first = train(settings(tmp_path))
    before, events = files(tmp_path), []
    assert train(settings(tmp_path, save_every=5), events.append) == first
    assert "is finished already" in events[-1].text
    assert files(tmp_path) == before


def test_other_settings_in_the_same_folder_are_refused_and_named(tmp_path):
    train(settings(tmp_path))
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"differs in lr \(None, now 0\.5\), seed \(0, now 3\); .*--fresh"):
        train(settings(tmp_path, lr=0.5, seed=3))
    text = tmp_path.parent / "other.txt"
    text.write_text("another text " * 50)
    with pytest.raises(InputError, match="differs in the text"):
        train(settings(tmp_path, data=str(text)))
    assert files(tmp_path) == before


def test_fresh_starts_over(tmp_path):
    train(settings(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    result = train(settings(tmp_path, lr=1e-2, fresh=True))
    assert result.step == 6
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_with_another_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"holds model.safetensors of something that is no training run"):
            train(settings(tmp_path, fresh=fresh))
    assert files(tmp_path) == {"model.safetensors": b"precious"}


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "runs").write_text("a file")
    for out in (tmp_path / "runs", tmp_path / "runs" / "below"):
        with pytest.raises(InputError, match=r"cannot write to .*runs.*: .*; choose another --out"):
            train(settings(out))
    assert files(tmp_path) == {"runs": b"a file"}


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    train(settings(tmp_path / "a", tokens=16 * 4 * 2))
    before = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slipstream.train.folder.save_file", full)
    with pytest.raises(InputError, match=r"cannot write to .*b: No space left on device"):
        train(settings(tmp_path / "b"))
    kept = files(tmp_path)
    assert {n: c for n, c in kept.items() if n.startswith("a/")} == before
    assert not [n for n in kept if "partial" in n]


@pytest.mark.parametrize(
    "bad", [{"arch": "atention"}, {"context": 10**6}, {"data": "nowhere.txt"}, {"device": "cudda"}]
)
def test_mistakes_leave_nothing_behind(tmp_path, bad):
    with pytest.raises(InputError):
        train(settings(tmp_path / "run", **bad))
    assert not (tmp_path / "run").exists()


def test_a_damaged_trainer_file_is_told(tmp_path):
    train(settings(tmp_path))
    whole = (tmp_path / "trainer.safetensors").read_bytes()
    (tmp_path / "trainer.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"trainer\.safetensors is damaged .*--fresh"):
        train(settings(tmp_path))


def test_a_line_cut_short_and_steps_after_the_checkpoint_are_dropped(tmp_path):
    """As a kill between a line and its checkpoint leaves them."""
    stopped = settings(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        train(stopped, stop_at(3))
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 4, "tok')
    train(stopped)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_params_choose_the_widths(tmp_path):
    train(settings(tmp_path, params="100k", n_layers=None, d_model=None, tokens=64))
    assert load(tmp_path).n_parameters() == pytest.approx(100_000, rel=0.02)


def test_interrupts_reach_python_again_afterwards():
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its children to ignore it
    try:
        with on_interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_tied_matrix_is_kept_once(tmp_path):
    from safetensors import safe_open

    train(settings(tmp_path))
    with safe_open(tmp_path / "trainer.safetensors", "pt") as stored:
        names = [n for n in stored.keys() if n.startswith("model.")]  # noqa: SIM118
        shapes = [stored.get_tensor(n).shape for n in names]
    assert sum(s == torch.Size([256, 16]) for s in shapes) == 1

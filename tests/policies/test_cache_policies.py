"""Cache policies: full attention where nothing has to be left out; else each one's definition, written out token by token."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.state import State
from slipstream.laws import modes, state
from slipstream.laws.subject import Subject, close
from slipstream.layers.rope import rope
from slipstream.mixers.attention.attention import Attention
from slipstream.ops.softmax import Softmax
from slipstream.policies.policy import KVHeads, Reading, cache_policies, cache_policy, prefill_policy
from slipstream.policies.quantised import packed, unpacked

AMPLE = [
    "full", "streaming_llm:64", "h2o:64", "snapkv:64", "quest:64", "kv_int8", "kv_int4",
    "duo_attention:64:1", "duo_attention:64:none", "duo_attention:1:0+1",
]  # fmt: skip
SMALL = [
    "streaming_llm:6", "h2o:9", "snapkv:7:34", "quest:16", "duo_attention:6:1", "duo_attention:6:none", "kv_int8", "kv_int4",
]  # fmt: skip
LAWS = [
    modes.any_cut_is_forward, modes.steps_are_forward, modes.steps_continue_a_prefill, modes.no_tokens_change_nothing,
    state.state_is_as_declared, state.rows_are_independent, state.states_are_by_rows,
    state.padding_reaches_nothing, state.a_stored_state_goes_on,
]  # fmt: skip
KV = KVHeads(n_heads=4, n_kv_heads=2, k_head_dim=8, v_head_dim=4)
B, HEADS = 2, KV.n_heads // KV.n_kv_heads
PIECES = [("prefill", 5), ("prefill", 20), ("prefill", 18)]  # the second closes a group of 32 with fewer than 32 tokens
CALLS = [("prefill", 70), *[("step", 1)] * 8, *PIECES, *[("step", 1)] * 40]
SETTINGS = {
    "plain": Softmax(),
    "all": Softmax(scale=0.7, cap=3.0, sinks=torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)),
}


def test_no_policy_is_forgotten():
    assert {spec.partition(":")[0] for spec in [*SMALL, "full"]} == set(cache_policies())
    for cls in cache_policies().values():
        assert len(cls.paper) > 20 and cls.__doc__ is None  # the file says what it is


@pytest.mark.parametrize("spec", AMPLE)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_with_an_ample_budget_it_is_full_attention(law, spec):
    """Every law of prefill and step compares with forward, which knows no policies."""
    subject = Subject(Attention)
    subject.mixer = subject.build(cache=spec)
    law(subject)


@pytest.mark.parametrize("spec", AMPLE)
def test_ample_with_every_softmax_setting(spec):
    subject = Subject(Attention)
    subject.mixer = subject.build(cache=spec, softcap=2.0, sinks=True, qk_scale=0.4, gated=True)
    modes.steps_continue_a_prefill(subject)
    modes.any_cut_is_forward(subject)


class Run:
    """A policy on its own: its slots, and calls that go on from one another."""

    def __init__(
        self, spec: str, rows: int, room: int, softmax: Softmax, turn: bool = True, prompt: str = "dense"
    ) -> None:
        self.policy = cache_policy(spec, KV)
        dims = {n: (s.after(room), s.start, s.dtype_beside(torch.float64)) for n, s in self.policy.slots().items()}
        slots = {n: torch.full((rows, *d), start, dtype=dtype) for n, (d, start, dtype) in dims.items()}
        self.state = State(slots, torch.zeros(rows, dtype=torch.long))
        turned = {"turn": lambda k, by: rope(k, by)} if turn else {}
        self.how = Reading(prefill_policy(prompt), softmax, **turned)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        o, slots = self.policy.prefill(q, k, v, self.state, lengths, self.how)
        self.state = self.state.advance(q.shape[1] if lengths is None else lengths, **slots)
        return o

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, slots = self.policy.step(q, k, v, self.state, self.how)
        self.state = self.state.advance(1, **slots)
        return o

    def calls(self, lines: list[Tensor], calls: list[tuple[str, int]]) -> Tensor:
        outputs, at = [], int(self.state.length[0])
        for mode, tokens in calls:
            outputs.append(getattr(self, mode)(*(x[:, at : at + tokens] for x in lines)))
            at += tokens
        return torch.cat(outputs, 1)


def lines(rows: int = B, tokens: int = sum(n for _, n in CALLS), seed: int = 0) -> list[Tensor]:
    """q, k, v: keys differ enough for attention to have favourites."""
    draw = torch.Generator().manual_seed(seed)
    dims = ((KV.n_heads, KV.k_head_dim), (KV.n_kv_heads, KV.k_head_dim), (KV.n_kv_heads, KV.v_head_dim))
    q, k, v = (torch.randn(rows, tokens, *d, dtype=torch.float64, generator=draw) for d in dims)
    return [1.5 * q, k, v]


class Definition:
    """One row and one key head, token by token. held: positions that are kept. Subclasses say what goes, and what is read."""

    def __init__(self, spec: str, g: int, k: Tensor, v: Tensor, softmax: Softmax) -> None:
        _, *numbers = spec.split(":")
        self.n = int(numbers[0]) if numbers else 0
        self.numbers, self.g, self.k, self.v, self.softmax = numbers, g, k, v, softmax
        self.held: list[int] = []

    def weights(self, q: Tensor, positions: list[int], past: int) -> Tensor:
        """Of each of the group's query heads (R S); past: tokens before this call."""
        k = torch.stack([self.key(p, past) for p in positions])
        logits = q @ k.mT * (KV.k_head_dim**-0.5 if self.softmax.scale is None else self.softmax.scale)
        logits = logits if self.softmax.cap is None else self.softmax.cap * torch.tanh(logits / self.softmax.cap)
        e = logits.exp()
        heads = slice(self.g * HEADS, (self.g + 1) * HEADS)
        sinks = torch.zeros(HEADS) if self.softmax.sinks is None else self.softmax.sinks[heads].exp()
        return e / (sinks + e.sum(-1))[:, None]

    def key(self, p: int, past: int) -> Tensor:
        return self.k[p]

    def value(self, p: int, past: int) -> Tensor:
        return self.v[p]

    def call(self, mode: str, q: Tensor, past: int) -> Tensor:
        """q (T R K) of new tokens."""
        outputs = []
        for t in range(len(q)):
            positions = self.read(mode, q[t], past + t, past)
            w = self.weights(q[t], positions, past)
            self.saw(positions, w)
            outputs.append(w @ torch.stack([self.value(p, past) for p in positions]))
        self.held += range(past, past + len(q))
        self.evict(mode, q, past)
        return torch.stack(outputs)

    def read(self, mode: str, q: Tensor, t: int, past: int) -> list[int]:
        return [*self.held, *range(past, t + 1)]

    def saw(self, positions: list[int], weights: Tensor) -> None:
        pass

    def evict(self, mode: str, q: Tensor, past: int) -> None:
        pass


class Streaming(Definition):
    def evict(self, mode, q, past):
        last = past + len(q)
        self.held = [p for p in self.held if p < 4 or p >= last - self.n]

    def key(self, p, past):
        gone = past - len(self.held)
        k = self.k[p][None, None, None]
        return rope(k, torch.tensor([[gone]]))[0, 0, 0] if p < 4 and p in self.held else self.k[p]


class HeavyHitters(Definition):
    def __init__(self, *args):
        super().__init__(*args)
        self.score: dict[int, float] = {}

    def saw(self, positions, weights):
        for p, w in zip(positions, weights.sum(0).tolist()):
            self.score[p] = self.score.get(p, 0.0) + w

    def evict(self, mode, q, past):
        recent = self.n - self.n // 2
        late, early = self.held[-recent:], self.held[:-recent]
        heavy = sorted(early, key=lambda p: (-self.score[p], p))[: self.n // 2]
        if len(self.held) > self.n:
            self.held = sorted(heavy) + late


class Snap(Definition):
    def __init__(self, *args):
        super().__init__(*args)
        self.voted: list[int] = []

    def evict(self, mode, q, past):
        last = past + len(q)
        if mode == "step":
            if len(self.held) > self.n + int(self.numbers[1]):
                self.held.remove(min(p for p in self.held if p not in self.voted))
            return
        early = [p for p in self.held if p < last - 32]
        given = dict.fromkeys(early, 0.0)
        for t in range(max(0, len(q) - 32), len(q)):
            positions = [p for p in self.held if p <= past + t]
            for p, w in zip(positions, self.weights(q[t], positions, past).sum(0).tolist()):
                given |= {p: given[p] + w} if p in given else {}
        pooled = {p: max(given[o] for o in early[max(0, i - 3) : i + 4]) for i, p in enumerate(early)}
        self.voted = sorted(early, key=lambda p: (-pooled[p], p))[: self.n]
        self.held = sorted(self.voted) + [p for p in self.held if p >= last - 32]


class Pages(Definition):
    def read(self, mode, q, t, past):
        seen, own = list(range(t + 1)), t // 16
        if mode == "prefill":
            return seen

        def bound(page: int) -> float:
            k = self.k[16 * page : 16 * page + 16]
            return torch.maximum(q * k.amin(0), q * k.amax(0)).sum(-1).max().item()

        best = sorted(range(own), key=lambda page: (-bound(page), page))[: -(-self.n // 16)]
        return [p for p in seen if p // 16 in (*best, own)]


class Duo(Definition):
    def evict(self, mode, q, past):
        last = past + len(q)
        if str(self.g) not in self.numbers[1].split("+"):
            self.held = [p for p in self.held if p < 4 or p >= last - self.n]


class Kivi(Definition):
    def __init__(self, spec, *args):
        super().__init__(spec, *args)
        self.steps, self.closed = 2 ** int(spec.removeprefix("kv_int")) - 1, {}

    def key(self, p, past):
        if p >= past // 32 * 32:
            return self.k[p]
        first = p // 32 * 32
        if first not in self.closed:
            group = self.k[first : first + 32]
            self.closed[first] = torch.stack([rounded(group[:, c], self.steps) for c in range(group.shape[1])], 1)
        return self.closed[first][p - first]

    def value(self, p, past):
        return rounded(self.v[p], self.steps) if p < past // 32 * 32 else self.v[p]


def rounded(x: Tensor, steps: int) -> Tensor:
    """To the nearest of so many steps between the least and the largest."""
    ladder = torch.linspace(0, 1, steps + 1, dtype=x.dtype) * (x.max() - x.min()) + x.min()
    return ladder[(x[:, None] - ladder).abs().argmin(-1)]


DEFINITIONS = {
    "streaming_llm": Streaming, "h2o": HeavyHitters, "snapkv": Snap, "quest": Pages, "duo_attention": Duo,
    "kv_int8": Kivi, "kv_int4": Kivi,
}  # fmt: skip


def defined(spec: str, q: Tensor, k: Tensor, v: Tensor, calls, softmax: Softmax) -> Tensor:
    cls, rows = DEFINITIONS[spec.partition(":")[0]], []
    for b in range(len(q)):
        heads = []
        for g in range(KV.n_kv_heads):
            one, past, outputs = cls(spec, g, k[b, :, g], v[b, :, g], softmax), 0, []
            for mode, n in calls:
                outputs.append(one.call(mode, q[b, past : past + n, g * HEADS : (g + 1) * HEADS], past))
                past += n
            heads.append(torch.cat(outputs))
        rows.append(torch.cat(heads, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("softmax", SETTINGS)
@pytest.mark.parametrize("spec", SMALL)
def test_with_a_small_budget_it_is_its_definition(spec, softmax):
    q, k, v = lines()
    run = Run(spec, B, q.shape[1], SETTINGS[softmax])
    with torch.no_grad():
        got = run.calls([q, k, v], CALLS)
    close(got, defined(spec, q, k, v, CALLS, SETTINGS[softmax]), 1e-9)
    full = Run("full", B, q.shape[1], SETTINGS[softmax])
    assert not torch.allclose(got, full.calls([q, k, v], CALLS), atol=1e-6), "the budget was meant to be too small"


@pytest.mark.parametrize("spec", SMALL)
def test_ragged_rows_are_as_alone_whatever_the_padding_holds(spec):
    """Rows of pasts of their own, with steps between and after; in the second prefill one of them gets nothing."""
    first, second, whole = [70, 41, 3], [20, 0, 37], lines(3, 200)
    calls = [("prefill", first), *[("step", [1, 1, 1])] * 9, ("prefill", second), *[("step", [1, 1, 1])] * 40]
    for rubbish in (1e4, torch.nan):
        run, ends, got = Run(spec, 3, 200, Softmax()), [0, 0, 0], [[], [], []]
        for mode, lengths in calls:
            padded = [rows_of(x, ends, lengths, rubbish) for x in whole]
            o = run.step(*padded) if mode == "step" else run.prefill(*padded, torch.tensor(lengths))
            for b, n in enumerate(lengths):
                got[b].append(o[b, :n])
                ends[b] += n
        for b in range(3):
            own = [(mode, lengths[b]) for mode, lengths in calls if lengths[b]]
            close(torch.cat(got[b]), Run(spec, 1, 200, Softmax()).calls([x[b : b + 1] for x in whole], own)[0])


def rows_of(x: Tensor, starts: list[int], lengths: list[int], rubbish: float) -> Tensor:
    rows = x.new_full((len(x), max(lengths), *x.shape[2:]), rubbish)
    for b, (start, n) in enumerate(zip(starts, lengths)):
        rows[b, :n] = x[b, start : start + n]
    return rows


@pytest.mark.parametrize("spec", SMALL)
def test_a_state_is_by_rows_is_stored_and_is_as_large_as_declared(spec, tmp_path):
    mixer = Attention(Attention.tiny.model_copy(update={"cache": spec})).double().eval()
    x = torch.randn(3, 90, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, before = mixer.prefill(x[:, :70], mixer.init_state(3, 90))
        _, before = mixer.step(x[:, 70:71], before)
        assert before.nbytes == 3 * mixer.state_bytes(90)

        def rest(state: State, rows) -> Tensor:
            ys = []
            for cut in (slice(71, 80), *(slice(t, t + 1) for t in range(80, 90))):
                y, state = (mixer.prefill if cut.stop - cut.start > 1 else mixer.step)(x[rows, cut], state)
                ys.append(y)
            return torch.cat(ys, 1)

        want, order = rest(before.clone(), slice(None)), torch.tensor([2, 0])
        before.save(tmp_path / "state.safetensors")
        assert torch.equal(rest(State.load(tmp_path / "state.safetensors"), slice(None)), want)
        close(rest(before.clone().rows(order), order), want[order])
        alone = [mixer.prefill(x[b : b + 1, :70], mixer.init_state(1, 90 + 9 * b))[1] for b in range(3)]
        close(rest(mixer.step(x[:, 70:71], State.cat(alone))[1], slice(None)), want)


PROGRAM = """
import sys, torch
from slipstream.mixers.attention.attention import Attention
torch.set_num_threads(1)
x = torch.randn(2, 74, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
for spec in sys.argv[1:]:
    torch._dynamo.reset()
    mixer = Attention(Attention.tiny.model_copy(update={"cache": spec})).double().eval()
    step = torch.compile(mixer.step, fullgraph=True, backend="eager")
    with torch.no_grad():
        _, state = mixer.prefill(x[:, :70], mixer.init_state(2, 74))
        plain = state.clone()
        for t in range(70, 74):
            y, state = step(x[:, t : t + 1], state)
            want, plain = mixer.step(x[:, t : t + 1], plain)
            torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
"""


def test_steps_are_captured_whole_beyond_the_budget():
    """In a process of its own: run-time shape checks are not part of what is captured."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SMALL], capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("spec", [s for s in SMALL if not s.startswith(("snapkv", "quest"))])
def test_a_prefill_of_one_token_is_a_step(spec):
    """The other two have a rule for each: SnapKV votes after a prefill, Quest reads pages in a step."""
    x, calls = lines(), [("prefill", 70), ("step", 1), ("step", 1), ("step", 1)]
    stepped = Run(spec, B, 80, Softmax()).calls(x, calls)
    close(Run(spec, B, 80, Softmax()).calls(x, [("prefill", n) for _, n in calls]), stepped)


@pytest.mark.parametrize("spec", ["streaming_llm:16", "h2o:16", "snapkv:16:32"])
def test_memory_of_an_evicting_policy_does_not_grow(spec):
    mixer = Attention(Attention.tiny.model_copy(update={"cache": spec}))
    assert mixer.state_bytes(100) == mixer.state_bytes(100_000)


def test_bytes_are_as_many_as_they_say():
    """16 wide keys and values in float32, two key heads: what a policy keeps of a token, and its own numbers beside."""
    kv, tokens = KVHeads(n_heads=4, n_kv_heads=2, k_head_dim=32, v_head_dim=64), 640

    def size(spec: str) -> int:
        slots = cache_policy(spec, kv).slots().values()
        return sum(torch.Size(s.after(tokens)).numel() * s.dtype_beside(torch.float32).itemsize for s in slots)

    token = 4 * 2 * (32 + 64)
    bounds = (
        (tokens // 32) * 2 * (2 * 32 + 32 * 2 * 2) * 4
    )  # keys: two a channel; values: two for each 32 channels of a token
    assert size("full") == tokens * token
    assert size("streaming_llm:100") == 104 * token
    assert size("h2o:100") == 100 * (token + 2 * (4 + 4))
    assert size("snapkv:100:50") == 150 * (token + 2 * (4 + 1))
    assert size("quest:100") == tokens * token + tokens // 16 * 2 * (2 * 32 * 4)
    assert size("duo_attention:100:0") == (tokens + 104) * token // 2
    assert size("kv_int8") == tokens * token // 4 + bounds + 32 * token
    assert size("kv_int4") == tokens * token // 8 + bounds + 32 * token


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_off_by_half_a_step(bits):
    mixer_kv, tokens = KVHeads(2, 2, 64, 96), 64
    policy = cache_policy(f"kv_int{bits}", mixer_kv)
    draw = torch.Generator().manual_seed(5)
    k, v = (torch.randn(2, tokens, 2, d, dtype=torch.float64, generator=draw) for d in (64, 96))
    k[:, :, :, 3] += 50  # a channel that is large in every token, and one that never changes
    k[:, :, :, 4] = 2.5
    dims = {n: (s.after(tokens), s.dtype_beside(k.dtype)) for n, s in policy.slots().items()}
    fresh = State(
        {n: torch.zeros(2, *d, dtype=dtype) for n, (d, dtype) in dims.items()}, torch.zeros(2, dtype=torch.long)
    )
    _, kept = policy.prefill(k, k, v, fresh, None, Reading(prefill_policy("dense")))
    for name, x in (("k", k), ("v", v)):
        off = (policy._decoded(kept, name, slice(None)) - x).abs()
        groups = x.unflatten(1, (-1, 32)) if name == "k" else x.unflatten(3, (-1, 32))
        dim = 2 if name == "k" else 4
        step = (groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)) / (2**bits - 1)
        assert bool((off.reshape(groups.shape) <= step / 2 + 1e-12).all())
    codes = torch.randint(0, 2**bits, (3, 5, 8), dtype=torch.uint8)
    assert torch.equal(unpacked(packed(codes, bits), bits), codes)
    assert packed(codes, bits).numel() == codes.numel() * bits // 8


def test_long_prompts_are_voted_on_in_tiles(monkeypatch):
    """Tiles that do not divide anything give what one tile gives."""
    x = lines(B, 100)
    want = {
        spec: Run(spec, B, 100, Softmax()).calls(x, [("prefill", 80), ("prefill", 20)])
        for spec in ("h2o:9", "snapkv:7")
    }
    monkeypatch.setattr("slipstream.policies.votes.QUERIES", 7)
    monkeypatch.setattr("slipstream.policies.votes.KEYS", 13)
    for spec, o in want.items():
        close(Run(spec, B, 100, Softmax()).calls(x, [("prefill", 80), ("prefill", 20)]), o)


def test_codes_are_read_in_tiles(monkeypatch):
    x, calls = lines(B, 230), [("prefill", 150), ("prefill", 70), *[("step", 1)] * 10]
    want = Run("kv_int8", B, 230, Softmax()).calls(x, calls)
    monkeypatch.setattr("slipstream.policies.quantised.QUERIES", 11)
    monkeypatch.setattr("slipstream.policies.quantised.TILE", 1)
    close(Run("kv_int8", B, 230, Softmax()).calls(x, calls), want)


@pytest.mark.parametrize("spec", SMALL)
def test_a_prefill_policy_reads_what_is_kept(spec):
    """At a threshold of one, xattention reads all there is: the same as dense, laid out in whichever way."""
    x, calls = lines(), [("prefill", 70), ("prefill", 30), ("step", 1), ("prefill", 20)]
    dense = Run(spec, B, 130, Softmax()).calls(x, calls)
    close(Run(spec, B, 130, Softmax(), prompt="xattention:1").calls(x, calls), dense)


@pytest.mark.parametrize("softmax", SETTINGS)
def test_heavy_hitters_hold_what_they_have_collected(softmax):
    """Positions and scores of every key head, whatever comes of them."""
    q, k, v = lines()
    run = Run("h2o:9", B, q.shape[1], SETTINGS[softmax])
    run.calls([q, k, v], CALLS)
    for b, g in itertools.product(range(B), range(KV.n_kv_heads)):
        one, past = HeavyHitters("h2o:9", g, k[b, :, g], v[b, :, g], SETTINGS[softmax]), 0
        for mode, n in CALLS:
            one.call(mode, q[b, past : past + n, g * HEADS : (g + 1) * HEADS], past)
            past += n
        found = dict(zip(run.state["at"][b, :, g].tolist(), run.state["score"][b, :, g].tolist()))
        assert found == pytest.approx({p: one.score[p] for p in one.held}, abs=1e-9)


def test_of_equal_scores_the_earlier_stays():
    """All attention goes to the first token, and to the others none at all: scores of exactly 0."""
    q, k, v = (torch.ones(1, 30, *d, dtype=torch.float64) for d in ((4, 8), (2, 8), (2, 4)))
    k[:, 1:] = -1
    for calls in ([("prefill", 30)], [("prefill", 10), *[("step", 1)] * 20], [("step", 1)] * 30):
        run = Run("h2o:8", 1, 30, Softmax(), turn=False)
        run.calls([200 * q, 200 * k, v], calls)
        at, score = run.state["at"][0, :, 0], run.state["score"][0, :, 0]
        assert sorted(at.tolist()) == [0, 1, 2, 3, 26, 27, 28, 29]
        assert int((score == 0).sum()) == 7


def test_those_who_vote_share_no_votes_with_what_stands_before_them():
    """All attention goes to the first of the last 32 tokens: of the others, all without a vote, the earliest stay."""
    q, k, v = (torch.ones(1, 60, *d, dtype=torch.float64) for d in ((4, 8), (2, 8), (2, 4)))
    k[:, [*range(28), *range(29, 60)]] = -1
    run = Run("snapkv:5", 1, 60, Softmax())
    run.prefill(200 * q, 200 * k, v)
    assert sorted(run.state["at"][0, :, 0].tolist())[-37:] == [0, 1, 2, 3, 4, *range(28, 60)]


def test_bounds_of_pages_are_those_of_their_keys():
    """Of keys that are all positive, or all negative: what a page held before it began is not among them."""
    lengths = torch.tensor([37, 16, 0])
    for offset in (9.0, -9.0):
        q, k, v = lines(3, 60)
        k = k + offset
        run = Run("quest:16", 3, 60, Softmax())
        run.state.slots["k_min"].fill_(0.5)
        run.state.slots["k_max"].fill_(-0.5)
        run.prefill(*(x[:, :37].masked_fill((torch.arange(37) >= lengths[:, None])[..., None, None], torch.nan) for x in (q, k, v)),
                    lengths)  # fmt: skip
        for t in range(20):
            run.step(*(torch.stack([x[b, n + t] for b, n in enumerate(lengths)])[:, None] for x in (q, k, v)))
        for b, n in enumerate((lengths + 20).tolist()):
            for page in range(-(-n // 16)):
                held = k[b, 16 * page : min(n, 16 * page + 16)]
                assert torch.equal(run.state["k_min"][b, page], held.amin(0))
                assert torch.equal(run.state["k_max"][b, page], held.amax(0))


def test_extreme_inputs_make_no_nan():
    q, k, v = (50 * x.sign().float() for x in lines(1, 160))
    for spec in SMALL:
        run = Run(spec, 1, 160, Softmax())
        run.state = run.state.map(lambda x: x.float() if x.is_floating_point() else x)
        o = run.calls([q, k, v], [("prefill", 100), *[("step", 1)] * 60])
        assert bool(o.isfinite().all()), spec


@pytest.mark.parametrize(("spec", "said"), [
    ("h20:5", "did you mean h2o"),
    ("h2o:0", "whole number from 2"),
    ("h2o:", "whole number"),
    ("h2o:many", "got 'many'"),
    ("streaming_llm:-3", "whole number from 1"),
    ("quest:1.5", "whole number"),
    ("snapkv:8:31", "whole number from 32"),
    ("snapkv:8:40:2", "N or N:R"),
    ("duo_attention:8", "0+3"),
    ("duo_attention:8:0+x", "0+3"),
    ("duo_attention:8:0+2", "names key head 2; there are 2"),
    ("kv_int8:3", "takes no argument"),
    ("full:3", "takes no argument"),
])  # fmt: skip
def test_mistakes_are_told_in_words(spec, said):
    with pytest.raises(InputError, match=said.replace("+", r"\+")):
        cache_policy(spec, KV)


def test_what_cannot_be():
    with pytest.raises(InputError, match="two numbers in a byte"):
        cache_policy("kv_int4", KVHeads(1, 1, 5, 4))
    with pytest.raises(InputError, match="with causal=false only full"):
        cache_policy("h2o:8", KV, causal=False)


@pytest.mark.parametrize("spec", [s for s in SMALL if not s.startswith(("quest", "kv_int"))])
def test_keys_read_are_those_that_a_step_meets(spec):
    """Counted: a value that is read, when changed, changes the output."""
    q, k, v = lines(1, 71)
    met = 0
    for t in range(71):
        changed, outputs = v.clone(), []
        changed[:, t] += 1.0
        for values in (v, changed):
            run = Run(spec, 1, 71, Softmax())
            run.prefill(q[:, :70], k[:, :70], values[:, :70])
            outputs.append(run.step(q[:, 70:], k[:, 70:], values[:, 70:]))
        differs = (outputs[0] - outputs[1]).abs().amax((0, 1, 3)) > 1e-12
        met += int(differs.unflatten(0, (KV.n_kv_heads, -1)).any(1).sum())
    assert met / KV.n_kv_heads == cache_policy(spec, KV).keys_read(70)


def test_keys_read_where_all_are_kept():
    """Quest: one page of 16 beside the newest one's seven keys, and two bounds for each of the five pages."""
    assert cache_policy("quest:16", KV).keys_read(70) == 16 + 7 + 2 * 5
    assert cache_policy("kv_int8", KV).keys_read(70) == cache_policy("kv_int4", KV).keys_read(70) == 71

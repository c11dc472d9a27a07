"""What the papers claim of each task of docs/capabilities.md, in words and as a check on the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

Found = dict[str, Callable[[str], list[float]]]  # architecture -> exam -> what each seed got

KNOWS, GUESSES = 0.95, 0.15  # an exam is passed by the best seed; or by none better than chance and this much more
CLEAR = 0.03  # by so much a median has to be greater to count as greater


@dataclass(frozen=True)
class Claim:
    """holds: None where an architecture is missing."""

    text: str
    holds: Callable[[Found], bool | None]


@dataclass(frozen=True)
class Section:
    """One task's part of the page. unit: of the exams. reported: what the paper has beside an architecture."""

    task: str
    title: str
    about: str
    paper: str
    differs: str
    means: str
    unit: str = "at"
    reported_as: str = "paper"
    reported: dict[str, str] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()


def passes(arch: str, exam: str, text: str) -> Claim:
    """Its best seed knows, as papers count that report the best of some."""
    return Claim(text, lambda found: max(found[arch](exam)) >= KNOWS if arch in found else None)


def fails(arch: str, exam: str, chance: float, text: str) -> Claim:
    """No seed of it does better than a guess, or not by much."""
    return Claim(text, lambda found: max(found[arch](exam)) <= chance + GUESSES if arch in found else None)


def beats(better: str, worse: str, exam: str, text: str = "") -> Claim:
    """In the median over seeds, clearly."""

    def holds(found: Found) -> bool | None:
        if better not in found or worse not in found:
            return None
        return median(found[better](exam)) > median(found[worse](exam)) + CLEAR

    return Claim(text or f"{better} recalls more than {worse}", holds)


def below(arch: str, exam: str, error: float, text: str) -> Claim:
    """The best seed's error is that small."""
    return Claim(text, lambda found: min(found[arch](exam)) < error if arch in found else None)


def above(arch: str, exam: str, error: float, text: str) -> Claim:
    """Every seed's error is larger."""
    return Claim(text, lambda found: min(found[arch](exam)) > error if arch in found else None)


NEGATIVE = "(negative_eigenvalues=true)"
GRAZZI = (
    "Grazzi et al. 2024, arXiv:2411.12537, section 5 and table 3 "
    "(scaled: 1 is perfect, 0 a guess; lengths 40 to 256, best of 3)"
)
MAMBA = "Gu & Dao 2023, arXiv:2312.00752, section 4.1 and appendix E"
TCN = "Bai, Kolter & Koltun 2018, arXiv:1803.01271, table 1"

SECTIONS = (
    Section(
        "parity",
        "Parity: is the number of ones so far odd?",
        "The smallest task that needs a state to be tracked. In percent; a guess is 50. Learned at 40 bits; each "
        "further column "
        "asks only beyond the one before it.",
        GRAZZI,
        "The paper asks at the end of a string and learns for far longer; here every prefix is asked about, which "
        "is learned sooner.",
        "to count, toggle or follow a ledger, take a non-linear recurrence (`lstm`, `gru`, `slstm`), or `mamba` or a "
        "delta rule with `negative_eigenvalues=true`. Attention and recurrences whose decay lies between 0 and 1 learn the lengths "
        "they have "
        "seen, if those, and guess beyond; for the latter that is a theorem.",
        reported_as="paper, scaled",
        reported={
            "attention": "0.022", "attention(rope_base=10000)": "0.022", "mlstm": "0.087", "slstm": "1.000", "mamba": "0.000",
            f"mamba{NEGATIVE}": "1.000", "deltanet": "0.017", f"deltanet{NEGATIVE}": "1.000",
        },
        claims=(
            fails("mamba", "256", 0.5, "mamba, decay in [0, 1], fails"),
            passes(f"mamba{NEGATIVE}", "256", "mamba, decay in [-1, 1], solves it"),
            fails("deltanet", "256", 0.5, "deltanet, beta in (0, 1), fails"),
            passes(f"deltanet{NEGATIVE}", "256", "deltanet, beta in (0, 2), solves it"),
            passes("slstm", "256", "slstm solves it"),
            fails("mlstm", "256", 0.5, "mlstm fails"),
            passes("lstm", "256", "lstm solves it"),
            fails("attention", "256", 0.5, "attention fails at lengths it has not learned"),
        ),
    ),
    Section(
        "modular_arithmetic",
        "Modular arithmetic without brackets",
        "Sums, differences and products modulo 5: 25 states, and multiplying by 0 cannot be undone. In percent; a guess "
        "is 20. Learned at 39 symbols (20 numbers); each further column asks only beyond the one before it.",
        GRAZZI,
        "The paper learns at 3 to 40 symbols, for far longer, and asks at the end of an expression only.",
        "state that changes in more ways than on and off is learned by non-linear recurrences first; linear ones need "
        "`negative_eigenvalues=true`, and much more training.",
        reported_as="paper, scaled",
        reported={
            "attention": "0.031", "attention(rope_base=10000)": "0.031", "mlstm": "0.040", "slstm": "0.787", "mamba": "0.095",
            f"mamba{NEGATIVE}": "0.241", "deltanet": "0.314", f"deltanet{NEGATIVE}": "0.971",
        },
        claims=(
            passes("lstm", "79", "lstm solves it"),
            passes("slstm", "79", "slstm solves it"),
            beats(f"deltanet{NEGATIVE}", "deltanet", "39", "deltanet knows more with beta in (0, 2) than in (0, 1)"),
            beats(f"mamba{NEGATIVE}", "mamba", "39", "mamba knows more with decay in [-1, 1] than in [0, 1]"),
            beats(f"deltanet{NEGATIVE}", f"mamba{NEGATIVE}", "39", "deltanet, beta in (0, 2), knows more than such a mamba"),
            fails("attention", "255", 0.2, "attention fails at lengths it has not learned"),
        ),
    ),
    Section(
        "mqar",
        "Multi-query associative recall, by load, at equal state",
        "Key-value pairs, then every key once more: which value was it? In percent of the answers, by number of "
        "pairs; a guess is 1.6. Learned "
        "with 16 pairs; the matrix state of a layer is 32 x 32, so that it can hold 32 pairs at the very most.",
        "Arora et al. 2023, arXiv:2312.04927, and the figure of recall against state size in their repository "
        "(Zoology)",
        "64 keys and 64 values instead of 4,096 of each; d_model 32 instead of 64 to 512.",
        "what must be looked up by key in constant memory wants a delta rule; forgetting at will comes next, decay "
        "that is the same for "
        "every token last. Attention keeps everything, at a price that grows with the text.",
        unit="pairs",
        claims=(
            beats("deltanet", "gated_linear_attention", "32", "the delta rule recalls more than a decay chosen by content"),
            beats("gated_linear_attention", "retnet", "32", "a decay chosen by content recalls more than a fixed one"),
            beats("gated_deltanet", "mamba2", "32"),
            beats("mamba2", "retnet", "32"),
            beats("attention", "deltanet", "32", "attention, whose memory grows, recalls more than any"),
        ),
    ),
    Section(
        "selective_copying",
        "Selective copying",
        "Eight letters strewn among blanks, to be written down in order. In percent of the letters; a guess is 7. "
        "Learned at length 128, with blanks from none to 120.",
        MAMBA + " (16 letters in length 4096, 400,000 steps of 64 rows: S4 18.3, Mamba 99.8)",
        "8 letters in length 128 instead of 16 in 4096, and 270 times fewer steps.",
        "where the input decides what matters, the recurrence has to depend on the input: filters that are the same "
        "for every input "
        "(`s4d`) cannot pick letters out at random places.",
        reported={"s4d": "18.3 (S4)", "mamba": "99.8"},
        claims=(
            passes("mamba", "128", "mamba solves it"),
            beats("mamba", "s4d", "128", "mamba knows more than s4d, whose recurrence is the same for every input"),
        ),
    ),
    Section(
        "induction",
        "Induction heads, far beyond the length that was learned",
        "What stood behind the special token when it was last seen? In percent; a guess is 7. Learned at length 256.",
        MAMBA + "; attention falls off from 512 on, Mamba holds to 2^20",
        "400 steps instead of 200,000, and rows grow to length 256 while learning: the paper's model has had far longer to "
        "learn to leave its state alone, which is what the greatest lengths ask for.",
        "models with a constant state can use what they learned on short texts on much longer ones, when they have "
        "learned to leave the "
        "state alone in between; attention needs positions that carry over.",
        reported_as="paper at 512, 1024, 4096, 16384",
        reported={
            "attention": "58.6, 26.6, 9.8, 7.8 (absolute positions)", "attention(rope_base=10000)": "83.6, 31.3, "
            "8.6, 5.5",
            "mamba": "100 at all",
        },
        claims=(
            passes("mamba", "256", "mamba solves it at the length learned"),
            passes("mamba", "1024", "mamba still knows at 1,024"),
            passes("mamba", "16384", "mamba still knows at 16,384"),
            beats("mamba2", "attention(rope_base=10000)", "1024", "so does mamba2, where rotary attention has lost it"),
            fails("attention(rope_base=10000)", "4096", 1 / 15, "attention with rotary positions knows nothing at 4,096"),
        ),
    ),
    Section(
        "copy_memory",
        "Copy memory",
        "Ten digits, 200 steps of silence, and the digits again. In percent of the digits; a guess is 12.5.",
        TCN + " (T = 1000, 16K parameters; cross-entropy: TCN 3.5e-5, LSTM 0.0204, GRU 0.0197, a guess 0.0204)",
        "T = 200 instead of 1000. The TCN has to reach 211 tokens back: give it `n_levels=5` or more.",
        "a fixed delay is what convolutions that reach far enough are for; an LSTM or GRU has to carry the digits "
        "through every step and "
        "hardly learns to.",
        reported_as="paper, loss over a guess's",
        reported={"tcn(n_levels=5)": "0.002", "lstm": "1.00", "gru": "0.97"},
        claims=(
            passes("tcn(n_levels=5)", "200", "the TCN solves it"),
            fails("lstm", "200", 0.125, "the LSTM does not get beyond guessing"),
            fails("gru", "200", 0.125, "nor does the GRU"),
        ),
    ),
    Section(
        "adding",
        "The adding problem",
        "Two of many random numbers are marked; what is their sum? Mean squared error, median and best; always "
        "saying 1 costs 0.167. Learned "
        "at lengths up to 200; solved is below 0.001 there.",
        TCN + " (T = 600, 70K parameters)",
        "Rows of all lengths up to 200 instead of 600 alone; a tenth of the parameters.",
        "carrying a few numbers over hundreds of steps is no difficulty for most; what differs is how soon it is "
        "learned.",
        reported_as="paper, T = 600",
        reported={"lstm": "0.164", "gru": "5.3e-5", "tcn(n_levels=5)": "5.8e-5"},
        claims=(
            below("tcn(n_levels=5)", "200", 1e-3, "the TCN solves it"),
            below("gru", "200", 1e-3, "the GRU solves it"),
            above("lstm", "200", 1e-2, "the LSTM does not"),
        ),
    ),
)  # fmt: skip

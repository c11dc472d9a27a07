"""Axis letters and the glossary: one word for one thing, in every file."""

AXES = {
    "B": "batch",
    "T": "tokens (time), always axis 1",
    "D": "d_model, or the channels of a convolution",
    "H": "heads, always axis 2 at a public boundary",
    "K": "query and key width per head",
    "V": "value width per head",
    "N": "state width per channel (state-space models)",
    "C": "tokens of one chunk",
    "W": "window",
    "E": "experts",
}

GLOSSARY = {
    "S": "matrix state, B H K V",
    "h": "vector state",
    "log_decay": "natural logarithm of the decay, <= 0 (papers: alpha, gamma, a, f, w, g)",
    "beta": "write strength of the delta rule",
    "gate": "output gate",
    "scale": "factor on q . k",
    "q k v": "query, key, value (state-space papers: C, B, x)",
    "cu_seqlens": "cumulative lengths of packed documents, 0 first: int (N+1)",
    "lengths": "tokens that are real in each right-padded row: int (B)",
}

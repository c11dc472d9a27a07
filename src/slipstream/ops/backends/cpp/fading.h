// What decay does to the pairs of tokens of a block, and the products of a block with the state.
//
// With G_t the log decay summed from the start of a block through token t, what was written at j has decayed by
// exp(G_i - G_j) <= 1 when it is read at i >= j, or by exp(G_{i-1} - G_j) when i reads before its own decay ("early").
// Nothing else is ever exponentiated, so nothing overflows.
#pragma once
#include "matrix_state.h"

constexpr int64_t SHORT = 16;  // tokens of a block where each channel has a decay of its own

// P_ij = row_i . key_j for j <= i, and what whole tiles hold beyond. keys (K x step) is transposed.
template <class R>
void pairs(const R* rows, int64_t token, const R* keys, int64_t step, int64_t n, int64_t K, R* P) {
    tiles<R>(n, padded<R>(n), [&](auto t, int64_t i, int64_t j) LAMBDA {
        if (j >= i + t.rows) return;
        t.add(rows + i * token, token, 1, keys + j, step, K);
        t.store(P + i * step + j, step);
    });
}

// One decay a head. G is summed in double and kept in two parts, rounded and what rounding lost: in a difference of two large
// sums, that may be all there is.
template <class R> struct Fall {
    using S = Simd<R>;
    static constexpr int64_t room = CHUNK + 1 + S::lanes;
    R high[room], low[room], since[room];  // of G_{i-1}; exp(G_{i-1})
    R until[CHUNK + S::lanes];             // exp(G_end - G_j)
    R whole;

    // log_decay null: none
    void fill(const R* log_decay, int64_t token, int64_t n) {
        double G[CHUNK + 1] = {0};
        for (int64_t i = 0; i < n; i++) G[i + 1] = G[i] + (log_decay ? (double)log_decay[i * token] : 0.);
        for (int64_t i = 0; i <= n; i++) {
            high[i] = (R)G[i];
            low[i] = (R)(G[i] - (double)high[i]);
        }
        for (int64_t i = 0; i < n; i++) until[i] = (R)(G[n] - G[i + 1]);
        for (int64_t i = 0; i < n; i += S::lanes) store(until + i, S::exp(load(until + i)));
        for (int64_t i = 0; i <= n; i += S::lanes) store(since + i, S::exp(load(high + i)));
        whole = since[n];
    }

    // exp(G_i - G_j) of the lanes from j on
    typename S::vec between(int64_t i, int64_t j, bool early) const {
        const int64_t row = early ? i : i + 1;
        return S::exp((high[row] - load(high + j + 1)) + (low[row] - load(low + j + 1)));
    }
};

// to_ij = by_i from_ij exp(G_i - G_j) for j <= i, or j < i where strict, and zero beyond. fall null: no decay; by null: one.
template <class R>
void fade(const R* from, R* to, int64_t step, int64_t n, const Fall<R>* fall, bool early, bool strict, const R* by) {
    using S = Simd<R>;
    typename S::ivec lane;
    for (int l = 0; l < S::lanes; l++) lane[l] = l;
    for (int64_t i = 0; i < n; i++) {
        const int64_t end = strict ? i : i + 1;
        for (int64_t j = 0; j < step; j += S::lanes) {
            typename S::vec p = {};
            if (j < end) {
                p = load(from + i * step + j);
                if (fall) p *= fall->between(i, j, early);
                if (by) p *= by[i];
                p = lane < (typename Integer<R>::type)(end - j) ? p : typename S::vec{};
            }
            store(to + i * step + j, p);
        }
    }
}

// Token i meets G keys: how far they have faded when it reads, and then by its own decay.
template <class R, int G, int early, int late>
INLINE void meet(R* keys, const R* w, int64_t step, const R* const* rows, typename Simd<R>::vec (*dots)[SHORT], int64_t j) {
    using vec = typename Simd<R>::vec;
    vec sums[early + late][G] = {};
    for (int64_t d = 0; d < step; d += Simd<R>::lanes) {
        vec r[early + late];
        for (int s = 0; s < early + late; s++) r[s] = load(rows[s] + d);
        const vec decay = load(w + d);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            vec x = load(keys + g * step + d);
#pragma GCC unroll 2
            for (int s = 0; s < early; s++) sums[s][g] += r[s] * x;
            x *= decay;
            store(keys + g * step + d, x);
#pragma GCC unroll 2
            for (int s = early; s < early + late; s++) sums[s][g] += r[s] * x;
        }
    }
    for (int s = 0; s < early + late; s++)
        for (int g = 0; g < G; g++) dots[s][j + g] = sums[s][g];
}

// A decay a channel: P_ij of j <= i for rows that read before their own decay, then for those that read after it; P_ii has no
// decay. The keys (n x step) fade token by token, and are at the end what the leaving state sees of them. w = exp(log_decay).
template <class R, int early, int late>
void fading_pairs(R* keys, const R* w, int64_t step, int64_t n, const R* const* lines, R* const* P, int64_t P_step) {
    using vec = typename Simd<R>::vec;
    constexpr int L = Simd<R>::lanes;
    for (int64_t i = 0; i < n; i++) {
        vec dots[early + late][SHORT] = {};
        const R* rows[early + late];
        for (int s = 0; s < early + late; s++) rows[s] = lines[s] + i * step;
        int64_t j = 0;
        for (; j + 4 <= i; j += 4) meet<R, 4, early, late>(keys + j * step, w + i * step, step, rows, dots, j);
        for (; j < i; j++) meet<R, 1, early, late>(keys + j * step, w + i * step, step, rows, dots, j);
        for (int s = 0; s < early + late; s++) {
            for (int64_t d = 0; d < step; d += L) dots[s][i] += load(rows[s] + d) * load(keys + i * step + d);
            for (int64_t g = 0; g < P_step; g += L) store(P[s] + i * P_step + g, g <= i ? sums<R>(&dots[s][g]) : vec{});
        }
    }
}

// sum a b weight
template <class R> R dot(const R* a, const R* b, const R* weight, int64_t n) {
    using S = Simd<R>;
    typename S::vec total = {};
    for (int64_t d = 0; d < n; d += S::lanes) {
        const int left = (int)std::min<int64_t>(n - d, S::lanes);
        total += S::load(a + d, left) * S::load(b + d, left) * S::load(weight + d, left);
    }
    return S::sum(total);
}

// w_t = exp(log_decay_t) of n tokens, padded with ones' logs; whole = exp(G_end).
template <class R>
void exponentials(const R* log_decay, int64_t token, int64_t n, int64_t K, R* w, R* whole, int64_t step) {
    using S = Simd<R>;
    for (int64_t d = 0; d < step; d += S::lanes) {
        typename S::vec G = {};
        for (int64_t i = 0; i < n; i++) {
            const auto x = S::load(log_decay + i * token + d, (int)std::min<int64_t>(K - d, S::lanes));
            store(w + i * step + d, S::exp(x));
            G += x;
        }
        store(whole + d, S::exp(G));
    }
}

// Rows times what has decayed since the block began: exp(G_i), or exp(G_{i-1}) where early.
template <class R> void fade_rows(R* rows, const R* w, int64_t step, int64_t n, bool early) {
    for (int64_t d = 0; d < step; d += Simd<R>::lanes) {
        auto since = Simd<R>::splat(R(1));
        for (int64_t i = 0; i < n; i++) {
            const auto own = load(w + i * step + d), before = since;
            since *= own;
            store(rows + i * step + d, load(rows + i * step + d) * (early ? before : since));
        }
    }
}

// A (any two strides) B, B's rows v_step apart.
template <class R> struct Product {
    const R* a;
    int64_t row, step;
    const R* b;
};

// o_i = scale (by_i q_i S + sum over j <= i of P_ij v_j), of one or two P. The next place's v and o are asked for meanwhile.
template <class R, int terms>
void read_out(const Worker<R>& w, const Place<R>& at, const R* q, const R* by, const Product<R> (&of)[terms]) {
    const Problem<R>& p = w.p;
    const Place<R> next = w.next(at);
    const R* const v = p.v.at(w.s.b, next.t, next.h) + w.s.column;
    const int64_t apart = p.H * p.V;
    tiles<R>(at.n, w.v_step, [&](auto t, int64_t i, int64_t j) LAMBDA {
        ahead<false>(v + i * p.v.token + j, p.v.token, t.rows, t.columns);
        ahead<true>(next.o + i * apart + j, apart, t.rows, t.columns);
        t.add(q + i * w.k_step, w.k_step, 1, at.S + j, w.v_step, p.K);
        t.times(by + i);
        for (const Product<R>& x : of) t.add(x.a + i * x.row, x.row, x.step, x.b + j, w.v_step, i + t.rows);
        t.times(p.scale);
        t.store(at.o + i * apart + j, apart, w.s.columns - j);
    });
}

// S_k = whole_k S_k + sum over j of key_jk v_j, of one or two lines of keys. The next place's q and k are asked for meanwhile.
template <class R, int terms>
void write_in(const Worker<R>& w, const Place<R>& at, const R* whole, const Product<R> (&of)[terms]) {
    const Problem<R>& p = w.p;
    const Place<R> next = w.next(at);
    const R *const q = p.q.at(w.s.b, next.t, next.h), *const k = p.k.at(w.s.b, next.t, next.h);
    tiles<R>(p.K, w.v_step, [&](auto t, int64_t i, int64_t j) LAMBDA {
        if (i + t.rows <= at.n && j < p.K) {
            ahead<false>(q + i * p.q.token + j, p.q.token, t.rows, t.columns);
            ahead<false>(k + i * p.k.token + j, p.k.token, t.rows, t.columns);
        }
        R* const S = at.S + i * w.v_step + j;
        t.load(S, w.v_step);
        t.times(whole + i);
        for (const Product<R>& x : of) t.add(x.a + i * x.row, x.row, x.step, x.b + j, w.v_step, at.n);
        t.store(S, w.v_step);
    });
}

// u_i = by_i e_i S + sum over j < i of A_ij u_j + more_i, a triangular system solved by substitution: block by block, and row by
// row in registers. more(tile, i, j) adds to the right-hand side.
template <class R, class More>
void erase(const Worker<R>& w, const Place<R>& at, const R* e, const R* by, const R* A, R* u, More more) {
    tiles<R>(at.n, w.v_step, [&](auto t, int64_t i, int64_t j) LAMBDA {
        t.add(e + i * w.k_step, w.k_step, 1, at.S + j, w.v_step, w.p.K);
        t.times(by + i);
        more(t, i, j);
        t.add(A + i * w.step, w.step, 1, u + j, w.v_step, i);
        t.solve(A + i * w.step + i, w.step);
        t.store(u + i * w.v_step + j, w.v_step);
    });
}

// Gradients of the scans with a matrix state whose decay is one number a head, or none.
//
// A thread takes a head through time twice, a block of tokens at a time: forwards for the states that enter the blocks, which
// the forward pass did not keep, and backwards. States and their gradients lie transposed (V x K), so that every product finds
// rows of what it multiplies with. With g = scale dO, what is written in a token called v, and R_ij = g_i v_j exp(G_i - G_j):
//
//     dV = P^T g + D(exp(G_end - G)) K dS       dQ = D(exp G) g S^T + R K       dK = D(exp(G_end - G)) V dS^T + R^T Q
//     dS <- exp(G_end) dS + Q^T D(exp G) g
//
// A log decay takes part in all that is read after it of what was written before it: sums of those parts, never differences.
#pragma once
#include "fading.h"

template <class R> struct Slopes {
    Line<R> q, k, v, decay, beta;  // beta: of the delta rule
    const R* start;                // (B H K V), or null: zeros
    const int64_t* lengths;        // null: all rows are T long
    const R *g_o, *g_final;        // (B T H V), (B H K V)
    R *gq, *gk, *gv, *g_decay, *g_beta, *g_start;  // contiguous; the last three may be null
    int64_t B, T, H, K, V;
    bool fading;
    R scale;
};

// One head of a row: what is common to the rules. `Rule` says how a block passes its state on, and what its slopes are.
template <class R> struct HeadSlopes {
    using S = Simd<R>;
    static constexpr int64_t ROOMY = CHUNK + S::lanes;
    const Slopes<R>& p;
    const int64_t b, h, length, blocks, step, k_width, k_step, v_step;  // rows of pairs, of k (and how far apart), of v
    Room room;
    R *states, *gS;                           // what enters each block, and the last; the gradient of what leaves one: (V x K)
    R *q, *k, *part, *faded, *columns;        // rows of K, and k transposed
    R *g, *rows, *turned;                     // rows of V, and such transposed
    R *L, *raw, *P, *of_P;                    // pairs: exp(G_i - G_j) of j <= i, what is made of them, P, R
    R read[CHUNK], written[CHUNK];            // a row's part in the slopes of decays
    Fall<R> fall;

    HeadSlopes(const Slopes<R>& p, int64_t b, int64_t h, int64_t pairs_more, int64_t v_more, int64_t kept)
        : p(p), b(b), h(h), length(p.lengths ? p.lengths[b] : p.T), blocks((length + CHUNK - 1) / CHUNK),
          step(padded<R>(CHUNK)),
          k_width(padded<R>(p.K)), k_step(spread(k_width)), v_step(spread(padded<R>(p.V))),
          room(sizeof(R) * (p.V * k_step * (blocks + 2) + CHUNK * (4 * k_step + (2 + v_more + kept * blocks) * v_step) +
                            step * (k_step + v_step + CHUNK * (4 + pairs_more)) + 4096)) {
        states = take((blocks + 1) * p.V * k_step), gS = take(p.V * k_step);
        q = k_rows(), k = k_rows(), part = k_rows(), faded = k_rows(), columns = take(k_step * step);
        g = v_rows(), rows = v_rows(), turned = take(v_step * step);
        L = pairs_rows(), raw = pairs_rows(), P = pairs_rows(), of_P = pairs_rows();
    }

    // Rows an odd number of vectors apart do not fall onto the same few places of a cache.
    static int64_t spread(int64_t width) { return width / S::lanes % 2 ? width : width + S::lanes; }

    R* take(int64_t numbers) { return room.template take<R>(numbers); }
    R* k_rows() { return take(CHUNK * k_step); }
    R* v_rows() { return take(CHUNK * v_step); }
    R* pairs_rows() { return take(CHUNK * step); }
    R* entering(int64_t block) { return states + block * p.V * k_step; }
    int64_t tokens(int64_t block) const { return std::min(CHUNK, length - block * CHUNK); }
    int64_t at(int64_t block) const { return (b * p.T + block * CHUNK) * p.H + h; }

    template <class Rule> void walk(Rule& rule) {
        for (int64_t t = length; t < p.T; t++) blank((b * p.T + t) * p.H + h);
        if (p.start) copy_columns(p.start + (b * p.H + h) * p.K * p.V, p.V, p.K, p.V, states, k_step);
        else std::fill_n(states, p.V * k_step, R(0));
        for (int64_t c = 0; c < blocks; c++) rule.pass_on(c, tokens(c), entering(c), entering(c + 1));
        copy_columns(p.g_final + (b * p.H + h) * p.K * p.V, p.V, p.K, p.V, gS, k_step);
        for (int64_t c = blocks - 1; c >= 0; c--) rule.slopes(c, tokens(c), entering(c));
        if (p.g_start)
            for (int64_t i = 0; i < p.K; i++)
                for (int64_t j = 0; j < p.V; j++) p.g_start[((b * p.H + h) * p.K + i) * p.V + j] = gS[j * k_step + i];
    }

    void blank(int64_t token) {
        std::fill_n(p.gq + token * p.K, p.K, R(0));
        std::fill_n(p.gk + token * p.K, p.K, R(0));
        std::fill_n(p.gv + token * p.V, p.V, R(0));
        if (p.g_decay) p.g_decay[token] = 0;
        if (p.g_beta) p.g_beta[token] = 0;
    }

    // Keys as they lie and transposed, and the decays.
    void gather_keys(int64_t c, int64_t n) {
        copy_rows(p.k.at(b, c * CHUNK, h), p.k.token, n, p.K, k, k_step);
        copy_columns(k, k_step, n, p.K, columns, step);
        fall.fill(p.fading ? p.decay.at(b, c * CHUNK, h) : nullptr, p.decay.token, n);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j += S::lanes)
                store(L + i * step + j, p.fading ? fall.between(i, j, false) : S::splat(R(1)));
    }

    // to_ij = from_ij L_ij for j <= i, or j < i where strict, and zero beyond.
    void fade(const R* from, R* to, int64_t n, bool strict) const {
        for (int64_t i = 0; i < n; i++) {
            const int64_t end = strict ? i : i + 1;
            for (int64_t j = 0; j < step; j += S::lanes) {
                const auto kept = j < end ? first(load(from + i * step + j) * load(L + i * step + j), end - j) : typename S::vec{};
                store(to + i * step + j, kept);
            }
        }
    }

    // The same, queries, g, and what queries read of keys.
    void gather(int64_t c, int64_t n) {
        gather_keys(c, n);
        copy_rows(p.q.at(b, c * CHUNK, h), p.q.token, n, p.K, q, k_step);
        copy_rows(p.g_o + at(c) * p.V, p.H * p.V, n, p.V, g, v_step);
        for (int64_t i = 0; i < n * v_step; i += S::lanes) store(g + i, load(g + i) * p.scale);
        pairs(q, k_step, columns, step, n, p.K, raw);
        fade(raw, P, n, false);
    }

    // to = whole from + (D(until) v)^T K
    void write_in(const R* v, int64_t n, const R* from, R* to) {
        scale_rows(v, fall.until, n, rows, v_step);
        tiles<R>(p.V, k_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.load(from + i * k_step + j, k_step);
            t.times(fall.whole);
            t.add(rows + i, 1, v_step, k + j, k_step, n);
            t.store(to + i * k_step + j, k_step);
        });
    }

    // to = P^T g + D(until) K dS, rows of V: of what is written
    void written_slopes(int64_t n, R* to) {
        tiles<R>(p.V, padded<R>(n), [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.add(gS + i * k_step, k_step, 1, columns + j, step, p.K);
            t.times_columns(fall.until + j);
            t.add(g + j * v_step + i, 1, v_step, P + j * step + j, step, n - j);
            t.store(turned + i * step + j, step);
        });
        copy_columns(turned, step, p.V, n, to, v_step);
    }

    // of_P = R, and raw = g v^T times P; v stays transposed in turned
    void pair_slopes(const R* v, int64_t n) {
        copy_columns(v, v_step, n, p.V, turned, step);
        pairs(g, v_step, turned, step, n, p.V, raw);
        fade(raw, of_P, n, false);
        for (int64_t i = 0; i < n * step; i += S::lanes) store(raw + i, load(raw + i) * load(P + i));
    }

    void put_v(int64_t c, int64_t n, const R* rows) {
        for (int64_t i = 0; i < n; i++) std::copy_n(rows + i * v_step, p.V, p.gv + (at(c) + i * p.H) * p.V);
    }

    void query_slopes(int64_t c, int64_t n, const R* entering) {
        tiles<R>(n, k_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.add(g + i * v_step, v_step, 1, entering + j, k_step, p.V);
            t.times(fall.since + 1 + i);
            t.store(part + i * k_step + j, k_step);
            t.add(of_P + i * step, step, 1, k + j, k_step, i + t.rows);
            t.store(p.gq + (at(c) + i * p.H) * p.K + j, p.H * p.K, p.K - j);
        });
        for (int64_t i = 0; i < n; i++) read[i] = inner(q + i * k_step, part + i * k_step);
    }

    // more(tile, i, j) adds to the gradient of the keys
    template <class More> void key_slopes(int64_t c, int64_t n, const R* v, More more) {
        tiles<R>(n, k_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.add(v + i * v_step, v_step, 1, gS + j, k_step, p.V);
            t.times(fall.until + i);
            t.store(part + i * k_step + j, k_step);
            t.add(of_P + i * step + i, 1, step, q + i * k_step + j, k_step, n - i);
            more(t, i, j);
            t.store(p.gk + (at(c) + i * p.H) * p.K + j, p.H * p.K, p.K - j);
        });
        for (int64_t i = 0; i < n; i++) written[i] = inner(k + i * k_step, part + i * k_step);
    }

    // more(tile, i, j) adds to the gradient of the state that enters
    template <class More> void state_slopes(int64_t n, More more) {
        scale_rows(q, fall.since + 1, n, faded, k_step);
        tiles<R>(p.V, k_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.load(gS + i * k_step + j, k_step);
            t.times(fall.whole);
            t.add(g + i, 1, v_step, faded + j, k_step, n);
            more(t, i, j);
            t.store(gS + i * k_step + j, k_step);
        });
    }

    // Of a token's log decay, which is crossed by the state, by what is read of the one that enters, by what is written into the
    // one that leaves, and by pairs: raw_ij is by now what j gives i, times its gradient.
    void decay_slopes(int64_t c, int64_t n, const R* entering) {
        typename S::vec kept = {}, since[ROOMY / S::lanes] = {};
        for (int64_t i = 0; i < p.V; i++)
            for (int64_t d = 0; d < k_width; d += S::lanes) kept += load(entering + i * k_step + d) * load(gS + i * k_step + d);
        const R state = S::sum(kept) * fall.whole;
        R later = 0, earlier[ROOMY];
        earlier[0] = 0;
        for (int64_t t = 1; t < n; t++) earlier[t] = earlier[t - 1] + written[t - 1];
        for (int64_t t = n - 1; t >= 0; t--) {
            typename S::vec by_pairs = {};
            for (int64_t j = 0; j < t; j += S::lanes) {
                since[j / S::lanes] += load(raw + t * step + j);
                by_pairs += first(since[j / S::lanes], t - j);
            }
            later += read[t];
            p.g_decay[at(c) + t * p.H] = state + earlier[t] + later + S::sum(by_pairs);
        }
    }

    // The first n lanes.
    static typename S::vec first(typename S::vec x, int64_t n) {
        typename S::ivec lane;
        for (int l = 0; l < S::lanes; l++) lane[l] = l;
        return lane < (typename Integer<R>::type)n ? x : typename S::vec{};
    }

    R inner(const R* a, const R* b) const {
        typename S::vec total = {};
        for (int64_t d = 0; d < k_width; d += S::lanes) total += load(a + d) * load(b + d);
        return S::sum(total);
    }
};

// Every head of every row by a Rule of its own.
template <class R, class Rule> void backward(const Slopes<R>& p) {
    const int threads = 8. * p.B * p.T * p.H * p.K * p.V > WORTH_THREADS ? (int)n_threads() : 1;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < p.B; b++)
        for (int64_t h = 0; h < p.H; h++) {
            const FlushTiny guard;
            Rule rule(p, b, h);
            rule.walk(rule);
        }
}

// The C function of a kernel. beta and its gradient: null but for the delta rule.
#define GRADIENTS(R, suffix, Rule)                                                                                        \
    extern "C" void backward_##suffix(const R* q, const R* k, const R* v, const R* decay, const R* beta, const R* start,  \
                                      const int64_t* lengths, const R* g_o, const R* g_final, R* gq, R* gk, R* gv,        \
                                      R* g_decay, R* g_beta, R* g_start, int64_t B, int64_t T, int64_t H, int64_t K,      \
                                      int64_t V, int64_t kind, double scale, STRIDES(q), STRIDES(k), STRIDES(v),          \
                                      STRIDES(decay), STRIDES(beta)) {                                                    \
        backward<R, Rule<R>>({LINE(q), LINE(k), LINE(v), LINE(decay), LINE(beta), start, lengths, g_o, g_final, gq, gk,   \
                              gv, g_decay, g_beta, g_start, B, T, H, K, V, kind == HEAD, (R)scale});                      \
    }

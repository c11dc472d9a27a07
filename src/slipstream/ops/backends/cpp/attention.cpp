// Softmax attention of every query to a range of keys, a block of keys at a time: the rule of ops/tiled_attention.py.
//
//     S = scale K_j Q^T      m' = max(m, max S)      P = 2^(S - m')
//     d <- 2^(m - m') d + sum P      O <- 2^(m - m') O + P^T V_j      m <- m'         at the end  O <- O / d
//
// Logits stand keys by queries. A query is a lane, so neither its largest logit nor its denominator is sought across a
// vector. The query heads that share a key head are queries of one line. Exponents are to base 2: the scale takes that in.
#include <limits>

#include "matrix_state.h"

namespace {

constexpr int64_t KEYS = 96;   // of a block: whole tiles and vectors of any CPU, which stay in its cache
constexpr int64_t PANELS = 8;  // of queries, for which a block of keys is laid out once
constexpr double LOG2_E = 1.4426950408889634;

// A tile here has few rows and is wide: it reads less than a square one, and there is no triangle to waste it on.
#ifdef __AVX512F__
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = TILE_ROWS, VECTORS = TILE_VECTORS;
#endif

template <class R> struct Given {
    Line<R> q, k, v;
    const R* sinks;          // (H), or null
    const int64_t* past;     // (B), or null: none
    const int64_t* lengths;  // (B), or null: all of T
    R* o;                    // (B T H V)
    int64_t B, T, S, H, G, K, V, window, causal;
    R scale, cap;  // cap 0: none

    int64_t shared() const { return H / G; }  // query heads of a key head
};

struct Range {
    int64_t from, until;
};

// The keys that query t of row b sees. Those of a window begin with the window - 1 tokens before the first query.
template <class R> Range seen(const Given<R>& p, int64_t b, int64_t t) {
    const int64_t before = p.past ? p.past[b] : 0, own = p.lengths ? p.lengths[b] : p.T;
    const int64_t first = p.window ? p.window - 1 : before;
    const int64_t until = std::min(p.S, first + (p.causal ? std::min(t + 1, own) : own));
    return {p.window ? std::max(t, p.window - 1 - before) : 0, until};
}

// As many queries as a tile has columns.
template <class R, int N> struct Panel {
    using S = Simd<R>;
    static constexpr int64_t lanes = N * S::lanes;
    typename S::ivec from[N], until[N];  // keys seen by each
    typename S::vec top[N], sum[N];      // m, d
    Range any, all;                      // keys that some of them see, and that all see
    R *q, *o;                            // (K x lanes), scaled; (lanes x v_step)
};

// Some queries of one key head of a row, in panels of N vectors.
template <class R, int N> struct Reader {
    using S = Simd<R>;
    using vec = typename S::vec;
    using ivec = typename S::ivec;
    using P = Panel<R, N>;
    static constexpr int64_t L = S::lanes, lanes = P::lanes;

    const Given<R>& p;
    const int64_t b, g, first, count, panels, v_step;  // queries first .. first + count of this head's line
    Room room;
    R *const keys, *const values, *const weights, *const shrink;
    P panel[PANELS];

    Reader(const Given<R>& p, int64_t b, int64_t g, int64_t first, int64_t count)
        : p(p), b(b), g(g), first(first), count(count), panels((count + lanes - 1) / lanes), v_step(padded<R>(p.V)),
          room(sizeof(R) * ((KEYS + panels * lanes) * (padded<R>(p.K) + v_step) + (KEYS + 1) * lanes) + 4096),
          keys(room.template take<R>(p.K * KEYS)), values(room.template take<R>(KEYS * v_step)),
          weights(room.template take<R>(KEYS * lanes)), shrink(room.template take<R>(lanes)) {}

    void read() {
        Range whole = {p.S, 0};
        for (int64_t i = 0; i < panels; i++) {
            begin(panel[i], i * lanes);
            whole = {std::min(whole.from, panel[i].any.from), std::max(whole.until, panel[i].any.until)};
        }
        for (int64_t s = whole.from; s < whole.until; s += KEYS) {
            const int64_t n = std::min(KEYS, whole.until - s), more = std::min(KEYS, whole.until - s - n);
            copy_columns(p.k.at(b, s, g), p.k.token, n, p.K, keys, KEYS);
            copy_rows(p.v.at(b, s, g), p.v.token, n, p.V, values, v_step);
            for (int64_t i = 0; i < panels; i++)
                meet(panel[i], s, n, {s + n + more * i / panels, s + n + more * (i + 1) / panels});
        }
        for (int64_t i = 0; i < panels; i++) end(panel[i], i * lanes);
    }

    // Token and head. Lanes beyond the last query do as that one does.
    int64_t token(int64_t i) const { return (first + std::min(i, count - 1)) / p.shared(); }
    int64_t head(int64_t i) const { return g * p.shared() + (first + std::min(i, count - 1)) % p.shared(); }

    void begin(P& to, int64_t at) {
        to.q = room.template take<R>(p.K * lanes), to.o = room.template take<R>(lanes * v_step);
        std::fill_n(to.o, lanes * v_step, R(0));
        to.any = {p.S, 0}, to.all = {0, p.S};
        for (int64_t i = 0; i < lanes; i++) {
            const Range range = seen(p, b, token(at + i));
            to.from[i / L][i % L] = range.from, to.until[i / L][i % L] = range.until;
            to.any = {std::min(to.any.from, range.from), std::max(to.any.until, range.until)};
            to.all = {std::max(to.all.from, range.from), std::min(to.all.until, range.until)};
        }
        const R scale = p.cap ? p.scale / p.cap : p.scale * R(LOG2_E);
        for (int n = 0; n < N; n++) {
            to.top[n] = S::splat(std::numeric_limits<R>::lowest()), to.sum[n] = vec{};
            for (int64_t d = 0; d < p.K; d += L) turn(to.q + d * lanes + n * L, at + n * L, d, scale);
        }
    }

    // Numbers d, d + 1, ... of as many queries as a vector has lanes, transposed.
    void turn(R* to, int64_t at, int64_t d, R scale) {
        const int width = (int)std::min<int64_t>(p.K - d, L);
        vec block[L];
        for (int r = 0; r < L; r++) block[r] = S::load(p.q.at(b, token(at + r), head(at + r)) + d, width) * scale;
        transpose<R>(block);
        for (int r = 0; r < width; r++) store(to + r * lanes, block[r]);
    }

    // A panel reads what it sees of n keys from s on. Some of the next keys and values are asked for meanwhile.
    void meet(P& by, int64_t s, int64_t n, Range next) {
        const int64_t from = std::max(by.any.from, s), until = std::min(by.any.until, s + n), met = until - from;
        if (met <= 0) return;
        const auto logits = [&](auto t, int64_t i, int64_t) LAMBDA {
            const int64_t soon = next.from + i * (next.until - next.from) / met;
            const int64_t rows = next.from + (i + t.rows) * (next.until - next.from) / met - soon;
            ahead<false>(p.k.at(b, soon, g), p.k.token, rows, p.K);
            ahead<false>(p.v.at(b, soon, g), p.v.token, rows, p.V);
            t.add(keys + (from - s + i), 1, KEYS, by.q, lanes, p.K);
            t.store(weights + i * lanes, lanes);
        };
        tiles_of_rows<R, ROWS, N>(0, met, 0, logits);
        const bool masked = from < by.all.from || until > by.all.until;
        for (int j = 0; j < N; j++) {
            if (p.cap) cap(weights + j * L, met);
            if (masked) mask(weights + j * L, by.from[j], by.until[j], from, met);
            store(shrink + j * L, weigh(weights + j * L, by.top[j], by.sum[j], met));
        }
        const auto outputs = [&](auto t, int64_t i, int64_t j) LAMBDA {
            const int64_t last = i + t.rows - 1;  // of these queries; what none of them sees is left out
            const int64_t begin = std::max<int64_t>(from, by.from[i / L][i % L]);
            const int64_t end = std::min<int64_t>(until, by.until[last / L][last % L]);
            t.load(by.o + i * v_step + j, v_step);
            t.times(shrink + i);
            t.add(weights + (begin - from) * lanes + i, 1, lanes, values + (begin - s) * v_step + j, v_step, end - begin);
            t.store(by.o + i * v_step + j, v_step);
        };
        int64_t j = 0;
        for (; j + VECTORS * L <= v_step; j += VECTORS * L) tiles_of_rows<R, ROWS, VECTORS>(0, lanes, j, outputs);
        for (; j < v_step; j += L) tiles_of_rows<R, ROWS, 1>(0, lanes, j, outputs);
    }

    // cap tanh(x) of n logits of a vector of queries, to base 2
    void cap(R* x, int64_t n) const {
        for (; n > 0; n--, x += lanes) {
            const vec power = S::exp(load(x) * R(2));
            store(x, (R(1) - R(2) / (R(1) + power)) * (p.cap * R(LOG2_E)));
        }
    }

    static void mask(R* x, ivec from, ivec until, int64_t key, int64_t n) {
        for (int64_t i = 0; i < n; i++, x += lanes) {
            const ivec s = ivec{} + (typename Integer<R>::type)(key + i);
            store(x, ((s >= from) & (s < until)) ? load(x) : S::splat(-INFINITY));
        }
    }

    // n logits become weights over the largest so far, and are summed; what is left of those before.
    static vec weigh(R* x, vec& top, vec& sum, int64_t n) {
        vec largest = top;
        for (int64_t i = 0; i < n; i++) {
            const vec logit = load(x + i * lanes);
            largest = logit > largest ? logit : largest;
        }
        const vec left = S::exp2(top - largest);
        vec total = sum * left;
        for (int64_t i = 0; i < n; i++) {
            const vec weight = S::exp2(load(x + i * lanes) - largest);
            total += weight;
            store(x + i * lanes, weight);
        }
        top = largest, sum = total;
        return left;
    }

    void end(const P& of, int64_t at) {
        for (int64_t i = 0; i < lanes && at + i < count; i++) {
            const int64_t t = token(at + i), h = head(at + i);
            R whole = of.sum[i / L][i % L];
            if (p.sinks) whole += std::exp2(p.sinks[h] * R(LOG2_E) - of.top[i / L][i % L]);
            const bool none = of.from[i / L][i % L] >= of.until[i / L][i % L];
            R* const o = p.o + ((b * p.T + t) * p.H + h) * p.V;
            for (int64_t v = 0; v < p.V; v += L) {
                const vec read = none ? vec{} : load(of.o + i * v_step + v) * (R(1) / whole);
                S::store(o + v, read, (int)std::min<int64_t>(p.V - v, L));
            }
        }
    }
};

template <class R, int N> void forward(const Given<R>& p) {
    const double work = (double)p.B * p.H * p.T * (p.window ? std::min(p.S, p.window) : p.S) * (p.K + p.V);
    const int threads = work > WORTH_THREADS ? (int)n_threads() : 1;
    const int64_t queries = p.T * p.shared(), lines = p.B * p.G;
    int64_t most = PANELS * Panel<R, N>::lanes;  // queries of a part, fewer where there would be too few parts
    while (most > Panel<R, N>::lanes && lines * ((queries + most - 1) / most) < 2 * threads && threads > 1) most /= 2;
    const int64_t parts = (queries + most - 1) / most;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < lines * parts; i++) {
        const FlushTiny guard;
        const int64_t first = (parts - 1 - i % parts) * most;  // of a head, what sees most comes first
        Reader<R, N>(p, i / parts / p.G, i / parts % p.G, first, std::min(most, queries - first)).read();
    }
}

// Few queries do not fill a wide panel.
template <class R> void attention(const Given<R>& p) {
    if (p.T * p.shared() <= Simd<R>::lanes) forward<R, 1>(p);
    else forward<R, VECTORS>(p);
}

}  // namespace

#define KERNELS(R, suffix)                                                                                                 \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* sinks, const int64_t* past,              \
                                     const int64_t* lengths, R* o, int64_t B, int64_t T, int64_t S, int64_t H, int64_t G,  \
                                     int64_t K, int64_t V, int64_t window, int64_t causal, STRIDES(q), STRIDES(k),         \
                                     STRIDES(v), double scale, double cap) {                                               \
        attention<R>({LINE(q), LINE(k), LINE(v), sinks, past, lengths, o, B, T, S, H, G, K, V, window, causal, (R)scale,   \
                      (R)cap});                                                                                            \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

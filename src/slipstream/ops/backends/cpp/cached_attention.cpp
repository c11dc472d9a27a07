// Softmax attention of one query a row over the tokens of a cache that are filled, read once and in the order they lie.
//
//     o = sum_{s < ends} softmax_s(scale * q . k_s) v_s
//
// The tokens are dealt out to threads in runs; each keeps, for every head, the largest logit so far, the sum of weights
// relative to it, and the weighted sum of values, which are merged at the end (online softmax).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "tile.h"

namespace {

constexpr int64_t TILE = 32;                  // tokens whose weights are made together
constexpr int64_t WORTH_THREADS = 1 << 16;  // numbers read; fewer are done before a thread has woken

template <class R> struct Problem {
    const R *q, *k, *v, *sinks;  // q (B H K); k v: a cache's rows, far apart as the steps say; sinks (H) or null
    const int64_t* ends;         // (B)
    R* o;                        // (B H V)
    int64_t batch, S, H, K, V, G, k_row, k_token, k_head, v_row, v_token, v_head;
    double scale, cap;  // cap 0: none

    int64_t end(int64_t b) const { return std::min(ends[b], S); }
};

// What a run of tokens has given, for every head.
template <class R> struct Partial {
    std::vector<R> top, total, o;
    explicit Partial(const Problem<R>& p) : top(p.H, -INFINITY), total(p.H, R(0)), o(p.H * p.V, R(0)) {}
};

// Numbers of a row from d on, as many as a vector has lanes; of a row that is no whole number of vectors, zeros behind its end.
template <bool WHOLE, class R> typename Simd<R>::vec part(const R* row, int64_t d, int64_t width) {
    return Simd<R>::load(row + d, WHOLE ? Simd<R>::lanes : (int)std::min<int64_t>(Simd<R>::lanes, width - d));
}

// Products of one query with n keys, as many at a time as a vector has lanes: their sums are made together.
template <bool WHOLE, class R>
void products(const R* q, const R* keys, int64_t step, int64_t n, int64_t width, R scale, R* to) {
    using S = Simd<R>;
    for (int64_t j = 0; j < n; j += S::lanes) {
        const R* row[S::lanes];
        typename S::vec of[S::lanes];
#pragma GCC unroll 16
        for (int i = 0; i < S::lanes; i++) row[i] = keys + std::min(j + i, n - 1) * step, of[i] = typename S::vec{};
        for (int64_t d = 0; d < width; d += S::lanes) {
            const auto query = part<WHOLE>(q, d, width);
#pragma GCC unroll 16
            for (int i = 0; i < S::lanes; i++) of[i] += query * part<WHOLE>(row[i], d, width);
        }
        S::store(to + j, sums<R>(of) * scale, (int)std::min<int64_t>(S::lanes, n - j));
    }
}

// out += sum over n rows of weight * row, M vectors of it at a time, which stay in registers
template <bool WHOLE, int M, class R>
void weighted(R* out, const R* rows, int64_t step, const R* weights, int64_t n, int64_t width) {
    using S = Simd<R>;
    int64_t d = 0;
    for (; d + (M - 1) * S::lanes < width; d += M * S::lanes) {
        typename S::vec total[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) total[m] = part<WHOLE>(out, d + m * S::lanes, width);
        for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) total[m] += part<WHOLE>(rows + j * step, d + m * S::lanes, width) * weights[j];
        for (int m = 0; m < M; m++) S::store(out + d + m * S::lanes, total[m], (int)std::min<int64_t>(S::lanes, width - d - m * S::lanes));
    }
    if constexpr (M > 1) {
        if (d < width) weighted<WHOLE, 1>(out + d, rows + d, step, weights, n, width - d);
    }
}

// Logits become weights relative to the largest so far, to which what was summed before is brought.
template <class R> void weigh(Partial<R>& sum, R* logits, int64_t n, int64_t h, int64_t V) {
    using S = Simd<R>;
    R top = sum.top[h];
    for (int64_t j = 0; j < n; j++)
        if (!(logits[j] <= top)) top = logits[j];  // a NaN becomes the top, and all weights NaN
    const R fade = std::exp(sum.top[h] - top);
    R total = 0;
    for (int64_t j = 0; j < n; j += S::lanes) {
        const int here = (int)std::min<int64_t>(S::lanes, n - j);
        S::store(logits + j, S::exp(S::load(logits + j, here) - top), here);
        total += S::sum(S::load(logits + j, here));
    }
    for (int64_t d = 0; d < V && fade != 1; d++) sum.o[h * V + d] *= fade;
    sum.top[h] = top, sum.total[h] = sum.total[h] * fade + total;
}

template <bool WHOLE, class R> void run(const Problem<R>& p, int64_t b, int64_t from, int64_t to, Partial<R>& sum) {
    const int64_t heads = p.H / p.G;
    R logits[TILE];
    for (int64_t s = from; s < to; s += TILE)
        for (int64_t h = 0, n = std::min(TILE, to - s); h < p.H; h++) {
            const R* k = p.k + b * p.k_row + s * p.k_token + h / heads * p.k_head;
            const R* v = p.v + b * p.v_row + s * p.v_token + h / heads * p.v_head;
            products<WHOLE>(p.q + (b * p.H + h) * p.K, k, p.k_token, n, p.K, R(p.scale), logits);
            for (int64_t j = 0; j < n && p.cap != 0; j++) logits[j] = R(p.cap) * std::tanh(logits[j] / R(p.cap));
            weigh(sum, logits, n, h, p.V);
            weighted<WHOLE, 4>(&sum.o[h * p.V], v, p.v_token, logits, n, p.V);
        }
}

template <class R> void merge(const Problem<R>& p, int64_t b, const Partial<R>* sums, int64_t n) {
    for (int64_t h = 0; h < p.H; h++) {
        R* o = p.o + (b * p.H + h) * p.V;
        R top = p.sinks ? p.sinks[h] : -INFINITY;
        for (int64_t i = 0; i < n; i++)
            if (!(sums[i].top[h] <= top)) top = sums[i].top[h];
        std::fill_n(o, p.V, R(0));
        if (top == -INFINITY) continue;  // no key: nothing is read
        R total = p.sinks ? std::exp(p.sinks[h] - top) : R(0);
        for (int64_t i = 0; i < n; i++) {
            const R share = std::exp(sums[i].top[h] - top);
            total += share * sums[i].total[h];
            weighted<false, 1>(o, &sums[i].o[h * p.V], 0, &share, 1, p.V);
        }
        for (int64_t d = 0; d < p.V; d++) o[d] /= total;
    }
}

template <class R> void forward(const Problem<R>& p) {
    int64_t filled = 0;
    for (int64_t b = 0; b < p.batch; b++) filled += p.end(b);
    const int64_t runs = filled * p.G * (p.K + p.V) > WORTH_THREADS ? n_threads() : 1;
    std::vector<Partial<R>> sums(p.batch * runs, Partial<R>(p));
#pragma omp parallel for schedule(static) if (runs > 1)
    for (int64_t i = 0; i < p.batch * runs; i++) {
        const int64_t b = i / runs, end = p.end(b), length = (end + runs - 1) / runs, from = i % runs * length;
        const int64_t until = std::min(from + length, end);
        if (p.K % Simd<R>::lanes == 0 && p.V % Simd<R>::lanes == 0) run<true>(p, b, std::min(from, end), until, sums[i]);
        else run<false>(p, b, std::min(from, end), until, sums[i]);
    }
    for (int64_t b = 0; b < p.batch; b++) merge(p, b, &sums[b * runs], runs);
}

}  // namespace

#define KERNELS(R, suffix)                                                                                               \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* sinks, const int64_t* ends, R* o,      \
                                     int64_t batch, int64_t S, int64_t H, int64_t K, int64_t V, int64_t G,               \
                                     int64_t k_row, int64_t k_token, int64_t k_head, int64_t v_row, int64_t v_token, int64_t v_head,    \
                                     double scale, double cap) {                                                         \
        forward<R>({q, k, v, sinks, ends, o, batch, S, H, K, V, G, k_row, k_token, k_head, v_row, v_token, v_head, scale,  \
                    cap});                                                                                               \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

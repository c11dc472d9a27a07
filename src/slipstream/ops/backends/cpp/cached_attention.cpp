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

#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t TILE = 32;                     // tokens whose weights are made together
constexpr int64_t WORTH_THREADS = 1 << 16;  // numbers read; fewer are done before a thread has woken

template <class R> struct Problem {
    const R *q, *k, *v, *sinks;  // q (B H K); k v: a cache's rows, far apart as the steps say; sinks (H) or null
    const int64_t* ends;         // (B)
    R* o;                        // (B H V)
    int64_t batch, H, K, V, G, k_row, k_token, k_head, v_row, v_token, v_head;
    double scale, cap;  // cap 0: none
};

// What a run of tokens has given, for every head.
template <class R> struct Partial {
    std::vector<R> top, total, o;
    explicit Partial(const Problem<R>& p) : top(p.H, -INFINITY), total(p.H, R(0)), o(p.H * p.V, R(0)) {}
};

template <class R> typename Simd<R>::vec part(const R* row, int64_t d, int64_t width) {
    return Simd<R>::load(row + d, (int)std::min<int64_t>(Simd<R>::lanes, width - d));
}

template <class R> R dot(const R* a, const R* b, int64_t width) {
    typename Simd<R>::vec total = {};
    for (int64_t d = 0; d < width; d += Simd<R>::lanes) total += part(a, d, width) * part(b, d, width);
    return Simd<R>::sum(total);
}

// out += a * row
template <class R> void add(R* out, const R* row, R a, int64_t width) {
    for (int64_t d = 0; d < width; d += Simd<R>::lanes) {
        const int n = (int)std::min<int64_t>(Simd<R>::lanes, width - d);
        Simd<R>::store(out + d, Simd<R>::load(out + d, n) + Simd<R>::load(row + d, n) * a, n);
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
        for (int i = 0; i < here; i++) total += logits[j + i];
    }
    for (int64_t d = 0; d < V && fade != 1; d++) sum.o[h * V + d] *= fade;
    sum.top[h] = top, sum.total[h] = sum.total[h] * fade + total;
}

template <class R> void run(const Problem<R>& p, int64_t b, int64_t from, int64_t to, Partial<R>& sum) {
    const int64_t heads = p.H / p.G;
    const R *q = p.q + b * p.H * p.K, *k = p.k + b * p.k_row, *v = p.v + b * p.v_row;
    std::vector<R> logits(p.H * TILE);
    for (int64_t s = from; s < to; s += TILE) {
        const int64_t n = std::min(TILE, to - s);
        for (int64_t j = 0; j < n; j++)
            for (int64_t h = 0; h < p.H; h++) {
                const R logit = R(p.scale) * dot(q + h * p.K, k + (s + j) * p.k_token + h / heads * p.k_head, p.K);
                logits[h * TILE + j] = p.cap == 0 ? logit : R(p.cap) * std::tanh(logit / R(p.cap));
            }
        for (int64_t h = 0; h < p.H; h++) weigh(sum, &logits[h * TILE], n, h, p.V);
        for (int64_t j = 0; j < n; j++)
            for (int64_t h = 0; h < p.H; h++)
                add(&sum.o[h * p.V], v + (s + j) * p.v_token + h / heads * p.v_head, logits[h * TILE + j], p.V);
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
            add(o, &sums[i].o[h * p.V], share, p.V);
        }
        for (int64_t d = 0; d < p.V; d++) o[d] /= total;
    }
}

template <class R> void forward(const Problem<R>& p) {
    int64_t filled = 0;
    for (int64_t b = 0; b < p.batch; b++) filled += p.ends[b];
    const int64_t runs = filled * p.G * (p.K + p.V) > WORTH_THREADS ? n_threads() : 1;
    std::vector<Partial<R>> sums(p.batch * runs, Partial<R>(p));
#pragma omp parallel for schedule(static) if (runs > 1)
    for (int64_t i = 0; i < p.batch * runs; i++) {
        const int64_t b = i / runs, end = p.ends[b], length = (end + runs - 1) / runs, from = i % runs * length;
        run(p, b, std::min(from, end), std::min(from + length, end), sums[i]);
    }
    for (int64_t b = 0; b < p.batch; b++) merge(p, b, &sums[b * runs], runs);
}

}  // namespace

#define KERNELS(R, suffix)                                                                                               \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* sinks, const int64_t* ends, R* o,      \
                                     int64_t batch, int64_t H, int64_t K, int64_t V, int64_t G, int64_t k_row,           \
                                     int64_t k_token, int64_t k_head, int64_t v_row, int64_t v_token, int64_t v_head,    \
                                     double scale, double cap) {                                                         \
        forward<R>({q, k, v, sinks, ends, o, batch, H, K, V, G, k_row, k_token, k_head, v_row, v_token, v_head, scale, cap}); \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

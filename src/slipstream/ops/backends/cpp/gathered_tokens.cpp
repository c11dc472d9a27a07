// Softmax attention of each query over keys it has chosen, read where they lie: nothing is gathered first.
//
//     o = sum_n softmax_n(scale * q . k_n) v_n        over chosen (B T C n), -1 for none; C choices serve H query heads
//
// A chosen key is one row that is read for all query heads of its choice, and asked of the memory some rows ahead.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t AHEAD = 8;  // rows between asking for one and reading it
constexpr int64_t WORTH_THREADS = 1 << 16;  // numbers read; fewer are done before a thread has woken

template <class R> struct Problem {
    const R *q, *k, *v, *sinks;  // q (B T H K); k v: rows of a cache, far apart as the steps say; sinks (H) or null
    const int64_t* chosen;
    R* o;
    int64_t batch, T, H, K, V, C, n, G, k_row, k_token, k_head, v_row, v_token, v_head;
    double scale, cap;  // cap 0: none
};

template <class R> void ask(const R* row, int64_t width) {
    for (int64_t i = 0; i < width; i += 64 / (int64_t)sizeof(R)) __builtin_prefetch(row + i);
}

template <class R> typename Simd<R>::vec part(const R* row, int64_t d, int64_t width) {
    return Simd<R>::load(row + d, (int)std::min<int64_t>(Simd<R>::lanes, width - d));
}

template <class R> R dot(const R* a, const R* b, int64_t width) {
    typename Simd<R>::vec total = {};
    for (int64_t d = 0; d < width; d += Simd<R>::lanes) total += part(a, d, width) * part(b, d, width);
    return Simd<R>::sum(total);
}

// Logits (heads n) become weights that sum to one, or to less where there is a sink; none where nothing is met.
template <class R> void weigh(const Problem<R>& p, R* logits, const int64_t* chosen, int64_t head) {
    R top = p.sinks ? p.sinks[head] : -INFINITY, sum = 0;
    for (int64_t i = 0; i < p.n; i++)
        if (chosen[i] >= 0 && !(logits[i] <= top)) top = logits[i];  // a NaN becomes the top, and all weights NaN
    for (int64_t i = 0; i < p.n; i++) {
        logits[i] = chosen[i] < 0 ? R(0) : std::exp(logits[i] - top);
        sum += logits[i];
    }
    if (p.sinks) sum += std::exp(p.sinks[head] - top);
    for (int64_t i = 0; i < p.n && sum != 0; i++) logits[i] /= sum;
}

template <class R> void one_choice(const Problem<R>& p, int64_t b, int64_t t, int64_t c, R* logits) {
    using S = Simd<R>;
    const int64_t heads = p.H / p.C, group = c * p.G / p.C, first = c * heads;
    const int64_t* chosen = p.chosen + ((b * p.T + t) * p.C + c) * p.n;
    const R *q = p.q + ((b * p.T + t) * p.H + first) * p.K;
    const R *k = p.k + b * p.k_row + group * p.k_head, *v = p.v + b * p.v_row + group * p.v_head;
    R* o = p.o + ((b * p.T + t) * p.H + first) * p.V;
    for (int64_t i = 0; i < p.n; i++) {
        if (i + AHEAD < p.n && chosen[i + AHEAD] >= 0) ask(k + chosen[i + AHEAD] * p.k_token, p.K);
        for (int64_t h = 0; h < heads && chosen[i] >= 0; h++) {
            const R logit = R(p.scale) * dot(q + h * p.K, k + chosen[i] * p.k_token, p.K);
            logits[h * p.n + i] = p.cap == 0 ? logit : R(p.cap) * std::tanh(logit / R(p.cap));
        }
    }
    for (int64_t h = 0; h < heads; h++) weigh(p, logits + h * p.n, chosen, first + h);
    std::fill_n(o, heads * p.V, R(0));
    for (int64_t i = 0; i < p.n; i++) {
        if (i + AHEAD < p.n && chosen[i + AHEAD] >= 0) ask(v + chosen[i + AHEAD] * p.v_token, p.V);
        for (int64_t h = 0; h < heads && chosen[i] >= 0; h++)
            for (int64_t d = 0; d < p.V; d += S::lanes) {
                R* out = o + h * p.V + d;
                const auto value = part(v + chosen[i] * p.v_token, d, p.V);
                S::store(out, part(o + h * p.V, d, p.V) + value * logits[h * p.n + i], (int)std::min<int64_t>(S::lanes, p.V - d));
            }
    }
}

template <class R> void forward(const Problem<R>& p) {
    const int64_t work = p.batch * p.T * p.C;
#pragma omp parallel if (work * p.n * (p.K + p.V) > WORTH_THREADS)
    {
        std::vector<R> logits(p.H / p.C * p.n);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < work; i++) one_choice(p, i / p.C / p.T, i / p.C % p.T, i % p.C, logits.data());
    }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                                \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* sinks, const int64_t* chosen, R* o,     \
                                     int64_t batch, int64_t T, int64_t H, int64_t K, int64_t V, int64_t C, int64_t n,     \
                                     int64_t G, int64_t k_row, int64_t k_token, int64_t k_head, int64_t v_row,            \
                                     int64_t v_token, int64_t v_head, double scale, double cap) {                         \
        forward<R>({q, k, v, sinks, chosen, o, batch, T, H, K, V, C, n, G, k_row, k_token, k_head, v_row, v_token, v_head, \
                    scale, cap});                                                                                         \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

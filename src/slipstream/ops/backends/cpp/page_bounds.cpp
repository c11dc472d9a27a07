// The most a query can give any key of a page: sum_i max(q_i low_pi, q_i high_pi), and of the queries of a key head the largest.
//
// Pages are read in the order they lie, all key heads of one together.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // numbers read; fewer are done before a thread has woken

template <class R> struct Problem {
    const R *q, *low, *high;  // q (B H K); low high (B P G K), contiguous
    R* bounds;                // (B G P)
    int64_t batch, P, H, G, K;
};

template <class R> R bound(const R* q, const R* low, const R* high, int64_t K) {
    using S = Simd<R>;
    typename S::vec total = {};
    for (int64_t d = 0; d < K; d += S::lanes) {
        const int n = (int)std::min<int64_t>(S::lanes, K - d);
        const auto query = S::load(q + d, n), a = query * S::load(low + d, n), b = query * S::load(high + d, n);
        total += a >= b ? a : b;
    }
    return S::sum(total);
}

template <class R> void forward(const Problem<R>& p) {
    const int64_t heads = p.H / p.G;
#pragma omp parallel for schedule(static) if (p.batch * p.P * p.G * p.K > WORTH_THREADS)
    for (int64_t i = 0; i < p.batch * p.P; i++) {
        const int64_t b = i / p.P, page = i % p.P;
        for (int64_t g = 0; g < p.G; g++) {
            const int64_t at = (i * p.G + g) * p.K;
            R top = -INFINITY;
            for (int64_t h = g * heads; h < (g + 1) * heads; h++) {
                const R found = bound(p.q + (b * p.H + h) * p.K, p.low + at, p.high + at, p.K);
                if (!(found <= top)) top = found;  // a NaN stays to be seen
            }
            p.bounds[(b * p.G + g) * p.P + page] = top;
        }
    }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                            \
    extern "C" void forward_##suffix(const R* q, const R* low, const R* high, R* bounds, int64_t batch, int64_t P,    \
                                     int64_t H, int64_t G, int64_t K) {                                               \
        forward<R>({q, low, high, bounds, batch, P, H, G, K});                                                        \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

// RWKV-4's weighted mean of values (WKV) in one pass over time. Layouts: k v y (B T D), w u (D), states (B D).
//
//     y_t = (e^(p - o) a + e^(u + k_t - o) v_t) / (e^(p - o) b + e^(u + k_t - o))        o = max(p, u + k_t)
//     a, b <- e^(p - w - p') a + e^(k_t - p') v_t, e^(p - w - p') b + e^(k_t - p')       p' = max(p - w, k_t)
//
// a and b stand divided by e^p, so that nothing overflows. Channels lie in vector lanes.
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 14;  // numbers; fewer are done before a thread has woken

template <class R> typename Simd<R>::vec larger(typename Simd<R>::vec a, typename Simd<R>::vec b) {
    return (a > b) | (a != a) ? a : b;  // NaN stays
}

template <class R>
void forward(const R* k, const R* v, const R* w, const R* u, const int64_t* lengths, R* y, R* num, R* den, R* top,
             int64_t batch, int64_t T, int64_t D) {
    using S = Simd<R>;
    using vec = typename S::vec;
    const int64_t strips = (D + S::lanes - 1) / S::lanes;
#pragma omp parallel for collapse(2) schedule(static) if (batch * T * D > WORTH_THREADS)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t strip = 0; strip < strips; strip++) {
            const int64_t d = strip * S::lanes, at = b * D + d, length = lengths ? lengths[b] : T;
            const int n = (int)std::min<int64_t>(S::lanes, D - d);
            const vec fade = S::load(w + d, n), bonus = S::load(u + d, n);
            vec a = S::load(num + at, n), c = S::load(den + at, n), p = S::load(top + at, n);
            for (int64_t t = 0; t < length; t++) {
                const vec key = S::load(k + (b * T + t) * D + d, n), value = S::load(v + (b * T + t) * D + d, n);
                const vec own = bonus + key, o = larger<R>(p, own), past = S::exp(p - o), now = S::exp(own - o);
                S::store(y + (b * T + t) * D + d, (past * a + now * value) / (past * c + now), n);
                const vec next = larger<R>(p - fade, key), kept = S::exp(p - fade - next), write = S::exp(key - next);
                a = kept * a + write * value;
                c = kept * c + write;
                p = next;
            }
            for (int64_t t = length; t < T; t++) S::store(y + (b * T + t) * D + d, vec{}, n);
            S::store(num + at, a, n);
            S::store(den + at, c, n);
            S::store(top + at, p, n);
        }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                            \
    extern "C" void forward_##suffix(const R* k, const R* v, const R* w, const R* u, const int64_t* lengths, R* y,    \
                                     R* num, R* den, R* top, int64_t batch, int64_t T, int64_t D) {                   \
        forward<R>(k, v, w, u, lengths, y, num, den, top, batch, T, D);                                               \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

// c_t = f_t c_{t-1} + (1 - f_t) u_t with f_t = sigmoid(a_t + v c_{t-1}), and its gradient. Layouts (B T D), states (B D), v (D).
//
// A thread carries a few vectors of channels through time: independent ones, so that one waits less for its own last value.
#include <algorithm>

#include "simd.h"

namespace {

constexpr int ABREAST = 4;

template <class R> struct Problem {
    const R *u, *a, *v, *start;
    const int64_t* lengths;  // null: all rows are T long
    int64_t batch, T, D;

    int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
};

// body(row, channels): every vector of channels, several of them abreast.
template <class R, class Body> void over_channels(const Problem<R>& p, const Body& body) {
    const int64_t wide = ABREAST * Simd<R>::lanes;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t d = 0; d < p.D; d += wide) body(b, d);
}

// One row's channels from d on.
template <class R> struct Strip {
    using S = Simd<R>;
    using vec = typename S::vec;
    const Problem<R>& p;
    int64_t b, d;

    int left(int i) const { return (int)std::clamp<int64_t>(p.D - d - i * S::lanes, 0, S::lanes); }
    vec get(const R* row, int i) const { return S::load(row + d + i * S::lanes, left(i)); }
    void put(R* row, int i, vec x) const { S::store(row + d + i * S::lanes, x, left(i)); }
    vec get(const R* line, int64_t t, int i) const { return get(line + (b * p.T + t) * p.D, i); }
    void put(R* line, int64_t t, int i, vec x) const { put(line + (b * p.T + t) * p.D, i, x); }
};

template <class R> void forward(const Problem<R>& p, R* out, R* last) {
    using vec = typename Simd<R>::vec;
    over_channels(p, [&](int64_t b, int64_t d) {
        const Strip<R> s{p, b, d};
        vec c[ABREAST], v[ABREAST];
        for (int i = 0; i < ABREAST; i++) c[i] = s.get(p.start + b * p.D, i), v[i] = s.get(p.v, i);
        const int64_t length = p.length(b);
        for (int64_t t = 0; t < length; t++)
            for (int i = 0; i < ABREAST; i++) {
                const vec u = s.get(p.u, t, i);
                c[i] = u + Simd<R>::sigmoid(s.get(p.a, t, i) + v[i] * c[i]) * (c[i] - u);
                s.put(out, t, i, c[i]);
            }
        for (int64_t t = length; t < p.T; t++)
            for (int i = 0; i < ABREAST; i++) s.put(out, t, i, vec{});
        for (int i = 0; i < ABREAST; i++) s.put(last + b * p.D, i, c[i]);
    });
}

// gv (B D) by row: whoever calls sums them. g_start holds the last state's gradient at first.
template <class R> void backward(const Problem<R>& p, const R* out, const R* g_out, R* gu, R* ga, R* gv, R* g_start) {
    using vec = typename Simd<R>::vec;
    over_channels(p, [&](int64_t b, int64_t d) {
        const Strip<R> s{p, b, d};
        vec g[ABREAST], v[ABREAST], of_v[ABREAST] = {};
        for (int i = 0; i < ABREAST; i++) g[i] = s.get(g_start + b * p.D, i), v[i] = s.get(p.v, i);
        const int64_t length = p.length(b);
        for (int64_t t = p.T - 1; t >= length; t--)
            for (int i = 0; i < ABREAST; i++) s.put(gu, t, i, vec{}), s.put(ga, t, i, vec{});
        for (int64_t t = length - 1; t >= 0; t--)
            for (int i = 0; i < ABREAST; i++) {
                const vec before = t ? s.get(out, t - 1, i) : s.get(p.start + b * p.D, i), u = s.get(p.u, t, i);
                const vec f = Simd<R>::sigmoid(s.get(p.a, t, i) + v[i] * before);
                g[i] += s.get(g_out, t, i);
                const vec along = g[i] * (before - u) * f * (R(1) - f);
                s.put(gu, t, i, g[i] * (R(1) - f));
                s.put(ga, t, i, along);
                of_v[i] += along * before;
                g[i] = g[i] * f + along * v[i];
            }
        for (int i = 0; i < ABREAST; i++) s.put(g_start + b * p.D, i, g[i]), s.put(gv + b * p.D, i, of_v[i]);
    });
}

}  // namespace

#define KERNELS(R, suffix)                                                                                              \
    extern "C" void forward_##suffix(const R* u, const R* a, const R* v, const R* start, const int64_t* lengths, R* out, \
                                     R* last, int64_t batch, int64_t T, int64_t D) {                                    \
        forward<R>({u, a, v, start, lengths, batch, T, D}, out, last);                                                  \
    }                                                                                                                   \
    extern "C" void backward_##suffix(const R* u, const R* a, const R* v, const R* start, const int64_t* lengths,       \
                                      const R* out, const R* g_out, R* gu, R* ga, R* gv, R* g_start, int64_t batch,     \
                                      int64_t T, int64_t D) {                                                           \
        backward<R>({u, a, v, start, lengths, batch, T, D}, out, g_out, gu, ga, gv, g_start);                           \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

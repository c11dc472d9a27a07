// The selective recurrence of Mamba, and its gradient. Layouts: x dt y (B T D), B C (B T N), A and states (N D).
//
//     h_t = a_t * h_{t-1} + (dt_t x_t) B_t        y_t = sum_n C_tn h_tn
//
// Channels lie in vector lanes; a thread owns a strip of channels and carries its N states through time. The backward
// pass makes a chunk's states again from those it began with.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

enum Decay { EXPONENTIAL, SIGNED, LINEAR };  // e^(dt A); 2 e^(dt A) - 1; 1 - dt B^2
constexpr int CHUNK = 16;

template <class R> struct Problem {
    const R *x, *dt, *A, *B, *C, *start;
    const int64_t* lengths;  // null: all rows are T long
    int64_t batch, T, D, N;

    int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
};

template <class R, Decay kind> struct Strip {
    using S = Simd<R>;
    using vec = typename S::vec;
    const Problem<R>& p;
    int64_t b, d;  // row, first channel
    int n_lanes;

    Strip(const Problem<R>& p, int64_t b, int64_t strip)
        : p(p), b(b), d(strip * S::lanes), n_lanes((int)std::min<int64_t>(S::lanes, p.D - strip * S::lanes)) {}

    vec at(const R* line, int64_t t) const { return S::load(line + (b * p.T + t) * p.D + d, n_lanes); }
    void put(R* line, int64_t t, vec v) const { S::store(line + (b * p.T + t) * p.D + d, v, n_lanes); }
    const R* row(const R* line, int64_t t) const { return line + (b * p.T + t) * p.N; }
    vec state(const R* states, int64_t n) const { return S::load(states + (b * p.N + n) * p.D + d, n_lanes); }
    void put_state(R* states, int64_t n, vec v) const { S::store(states + (b * p.N + n) * p.D + d, v, n_lanes); }

    vec rate(int64_t n, R B) const {
        if constexpr (kind == LINEAR) return S::splat(-B * B);
        return S::load(p.A + n * p.D + d, n_lanes);
    }

    static vec decay(vec dt, vec rate) {
        if constexpr (kind == LINEAR) return dt * rate + R(1);
        const vec a = S::exp(dt * rate);
        if constexpr (kind == SIGNED) return a * R(2) - R(1);
        return a;
    }

    // d decay / d (dt rate), from the decay
    static vec slope(vec a) {
        if constexpr (kind == LINEAR) return S::splat(R(1));
        if constexpr (kind == SIGNED) return a + R(1);
        return a;
    }
};

template <class R, Decay kind>
void forward(const Problem<R>& p, R* y, R* final, R* bounds) {
    using vec = typename Simd<R>::vec;
    const int64_t strips = (p.D + Simd<R>::lanes - 1) / Simd<R>::lanes, chunks = (p.T + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t strip = 0; strip < strips; strip++) {
            const Strip<R, kind> s(p, b, strip);
            std::vector<vec> rates(p.N), h(p.N);
            for (int64_t n = 0; n < p.N; n++) {
                h[n] = s.state(p.start, n);
                if (kind != LINEAR) rates[n] = s.rate(n, 0);
            }
            const int64_t length = p.length(b);
            for (int64_t t = 0; t < length; t++) {
                if (bounds && t % CHUNK == 0)
                    for (int64_t n = 0; n < p.N; n++)
                        Simd<R>::store(bounds + ((b * chunks + t / CHUNK) * p.N + n) * p.D + s.d, h[n], s.n_lanes);
                const vec dt = s.at(p.dt, t), u = dt * s.at(p.x, t);
                const R *B = s.row(p.B, t), *C = s.row(p.C, t);
                vec out = {};
                for (int64_t n = 0; n < p.N; n++) {
                    const vec a = s.decay(dt, kind == LINEAR ? s.rate(n, B[n]) : rates[n]);
                    h[n] = a * h[n] + u * B[n];
                    out += h[n] * C[n];
                }
                s.put(y, t, out);
            }
            for (int64_t t = length; t < p.T; t++) s.put(y, t, vec{});
            for (int64_t n = 0; n < p.N; n++) s.put_state(final, n, h[n]);
        }
}

// gA (B N D) by row; gB and gC (parts B T N) by part of the channels: whoever calls sums them.
template <class R, Decay kind>
void backward(const Problem<R>& p, const R* bounds, const R* gy, const R* g_final, R* gx, R* gdt, R* gA, R* gB, R* gC,
              R* g_start, int64_t parts) {
    using S = Simd<R>;
    using vec = typename S::vec;
    const int64_t strips = (p.D + S::lanes - 1) / S::lanes, chunks = (p.T + CHUNK - 1) / CHUNK;
    const int64_t each = (strips + parts - 1) / parts;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t b = 0; b < p.batch; b++) {
            std::vector<vec> rates(p.N), g(p.N), gr(p.N), a(CHUNK * p.N), h((CHUNK + 1) * p.N);
            R* const gB_part = gB + (part * p.batch + b) * p.T * p.N;
            R* const gC_part = gC + (part * p.batch + b) * p.T * p.N;
            const int64_t length = p.length(b);
            for (int64_t strip = part * each; strip < std::min(strips, (part + 1) * each); strip++) {
                const Strip<R, kind> s(p, b, strip);
                for (int64_t n = 0; n < p.N; n++) {
                    g[n] = s.state(g_final, n);
                    gr[n] = vec{};
                    if (kind != LINEAR) rates[n] = s.rate(n, 0);
                }
                for (int64_t t = length; t < p.T; t++) {
                    s.put(gx, t, vec{});
                    s.put(gdt, t, vec{});
                }
                for (int64_t c = (length + CHUNK - 1) / CHUNK - 1; c >= 0; c--) {
                    const int64_t first = c * CHUNK, last = std::min<int64_t>(first + CHUNK, length);
                    for (int64_t n = 0; n < p.N; n++)
                        h[n] = S::load(bounds + ((b * chunks + c) * p.N + n) * p.D + s.d, s.n_lanes);
                    for (int64_t t = first; t < last; t++) {
                        const vec dt = s.at(p.dt, t), u = dt * s.at(p.x, t);
                        const R* B = s.row(p.B, t);
                        vec *before = &h[(t - first) * p.N], *now = before + p.N, *decay = &a[(t - first) * p.N];
                        for (int64_t n = 0; n < p.N; n++) {
                            decay[n] = s.decay(dt, kind == LINEAR ? s.rate(n, B[n]) : rates[n]);
                            now[n] = decay[n] * before[n] + u * B[n];
                        }
                    }
                    for (int64_t t = last - 1; t >= first; t--) {
                        const vec dt = s.at(p.dt, t), x = s.at(p.x, t), u = dt * x, gy_t = s.at(gy, t);
                        const R *B = s.row(p.B, t), *C = s.row(p.C, t);
                        const vec *before = &h[(t - first) * p.N], *now = before + p.N, *decay = &a[(t - first) * p.N];
                        vec gu = {}, gd = {};
                        for (int64_t n = 0; n < p.N; n++) {
                            g[n] += gy_t * C[n];
                            gC_part[t * p.N + n] += S::sum(gy_t * now[n]);
                            gu += g[n] * B[n];
                            const vec ge = g[n] * before[n] * s.slope(decay[n]);  // of the product dt * rate
                            R of_B = S::sum(g[n] * u);
                            if constexpr (kind == LINEAR) {
                                of_B -= R(2) * B[n] * S::sum(ge * dt);
                                gd -= ge * (B[n] * B[n]);
                            } else {
                                gr[n] += ge * dt;
                                gd += ge * rates[n];
                            }
                            gB_part[t * p.N + n] += of_B;
                            g[n] *= decay[n];
                        }
                        s.put(gx, t, gu * dt);
                        s.put(gdt, t, gd + gu * x);
                    }
                }
                for (int64_t n = 0; n < p.N; n++) {
                    s.put_state(g_start, n, g[n]);
                    if (kind != LINEAR) s.put_state(gA, n, gr[n]);
                }
            }
        }
}

}  // namespace

#define FOR_EACH_DECAY(F, ...)                                   \
    switch (kind) {                                              \
        case EXPONENTIAL: F<R, EXPONENTIAL>(__VA_ARGS__); break; \
        case SIGNED: F<R, SIGNED>(__VA_ARGS__); break;           \
        default: F<R, LINEAR>(__VA_ARGS__);                      \
    }

#define KERNELS(R_, suffix)                                                                                           \
    extern "C" void forward_##suffix(const R_* x, const R_* dt, const R_* A, const R_* B, const R_* C,                \
                                     const R_* start, const int64_t* lengths, R_* y, R_* final, R_* bounds,           \
                                     int64_t batch, int64_t T, int64_t D, int64_t N, int64_t kind) {                  \
        using R = R_;                                                                                                 \
        const Problem<R> p{x, dt, A, B, C, start, lengths, batch, T, D, N};                                           \
        FOR_EACH_DECAY(forward, p, y, final, bounds)                                                                  \
    }                                                                                                                 \
    extern "C" void backward_##suffix(const R_* x, const R_* dt, const R_* A, const R_* B, const R_* C,               \
                                      const int64_t* lengths, const R_* bounds, const R_* gy, const R_* g_final,      \
                                      R_* gx, R_* gdt, R_* gA, R_* gB, R_* gC, R_* g_start, int64_t batch, int64_t T, \
                                      int64_t D, int64_t N, int64_t kind, int64_t parts) {                            \
        using R = R_;                                                                                                 \
        const Problem<R> p{x, dt, A, B, C, nullptr, lengths, batch, T, D, N};                                         \
        FOR_EACH_DECAY(backward, p, bounds, gy, g_final, gx, gdt, gA, gB, gC, g_start, parts)                         \
    }

KERNELS(float, f32)
KERNELS(double, f64)

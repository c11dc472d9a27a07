// The selective recurrence of Mamba, and its gradient. Layouts: x dt gate y (B T D), B C (B T N), A and states (N D).
//
//     h_t = a_t * h_{t-1} + (dt_t x_t) B_t        y_t = sum_n C_tn h_tn
//
// Channels lie in vector lanes: a strip is as many of them as a vector holds. A thread takes strips that lie side by side
// through time, a chunk of tokens at a time, so that what is read of a page is read while it is at hand; within a chunk the
// states of one strip stay in registers. The backward pass makes a chunk's states again from those it began with.
#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace {

enum Decay { EXPONENTIAL, SIGNED, LINEAR };  // e^(dt A); 2 e^(dt A) - 1; 1 - dt B^2
constexpr int CHUNK = 16;
constexpr int64_t ABREAST = 128;                 // strips side by side, as many as states stay in the cache
constexpr int HELD = VECTOR_BYTES == 64 ? 16 : 8;  // states of a strip that registers hold
constexpr double LOG2E = 1.44269504088896340736;

// Lines along time, rows of which stand so far apart.
template <class R> struct Lines {
    const R* at;
    int64_t apart;

    const R* row(int64_t token) const { return at + token * apart; }
};

template <class R> struct Problem {
    Lines<R> x, dt, B, C, gate;  // gate may be null
    const R *A, *skip;           // skip (D) may be null
    const int64_t* lengths;      // null: all rows are T long
    int64_t batch, T, D, N;
    bool softplus;  // of dt

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

    vec at(const Lines<R>& lines, int64_t t) const { return S::load(lines.row(b * p.T + t) + d, n_lanes); }
    void put(R* line, int64_t t, vec v) const { S::store(line + (b * p.T + t) * p.D + d, v, n_lanes); }
    const R* row(const Lines<R>& lines, int64_t t) const { return lines.row(b * p.T + t); }
    vec state(const R* states, int64_t n) const { return S::load(states + (b * p.N + n) * p.D + d, n_lanes); }
    void put_state(R* states, int64_t n, vec v) const { S::store(states + (b * p.N + n) * p.D + d, v, n_lanes); }
    vec rate(int64_t n) const { return S::load(p.A + n * p.D + d, n_lanes); }

    // scaled: rate * log2 e, or of LINEAR -B^2
    static vec decay(vec dt, vec scaled) {
        if constexpr (kind == LINEAR) return dt * scaled + R(1);
        const vec a = S::exp2(dt * scaled);
        if constexpr (kind == SIGNED) return a * R(2) - R(1);
        return a;
    }

    // d decay / d (dt rate), from the decay
    static vec slope(vec a) {
        if constexpr (kind == LINEAR) return S::splat(R(1));
        if constexpr (kind == SIGNED) return a + R(1);
        return a;
    }

    // One chunk: h is what p.N states are and become.
    void forward(R* h, R* y, int64_t first, int64_t last) const {
        vec dt[CHUNK], u[CHUNK], out[CHUNK];
        for (int64_t t = first; t < last; t++) {
            const vec x = at(p.x, t), given = at(p.dt, t), step = p.softplus ? S::softplus(given) : given;
            dt[t - first] = step;
            u[t - first] = step * x;
            out[t - first] = p.skip ? x * S::load(p.skip + d, n_lanes) : vec{};
        }
        int64_t n = 0;
        while (n + HELD <= p.N) n = states<HELD>(h, n, dt, u, out, first, last);
        if (HELD > 8 && n + 8 <= p.N) n = states<8>(h, n, dt, u, out, first, last);
        if (n + 4 <= p.N) n = states<4>(h, n, dt, u, out, first, last);
        while (n < p.N) n = states<1>(h, n, dt, u, out, first, last);
        for (int64_t t = first; t < last; t++)
            put(y, t, p.gate.at ? out[t - first] * S::silu(at(p.gate, t)) : out[t - first]);
    }

    // M of the states from n on, through the chunk.
    template <int M>
    int64_t states(R* states, int64_t n, const vec* dt, const vec* u, vec* out, int64_t first, int64_t last) const {
        vec h[M], scaled[M];
        for (int m = 0; m < M; m++) {
            h[m] = state(states, n + m);
            if constexpr (kind != LINEAR) scaled[m] = rate(n + m) * R(LOG2E);
        }
        for (int64_t t = first; t < last; t++) {
            const vec dt_t = dt[t - first], u_t = u[t - first];
            const R *B = row(p.B, t) + n, *C = row(p.C, t) + n;
            vec even = out[t - first], odd = {};
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                if constexpr (kind == LINEAR) h[m] += (u_t - (dt_t * B[m]) * h[m]) * B[m];
                else h[m] = decay(dt_t, scaled[m]) * h[m] + u_t * B[m];
                (m % 2 ? odd : even) += h[m] * C[m];
            }
            out[t - first] = even + odd;
        }
        for (int m = 0; m < M; m++) put_state(states, n + m, h[m]);
        return n + M;
    }

    // The states that enter a chunk, for the backward pass.
    void keep(const R* h, R* bounds, int64_t chunk, int64_t chunks) const {
        for (int64_t n = 0; n < p.N; n++)
            S::store(bounds + ((b * chunks + chunk) * p.N + n) * p.D + d, state(h, n), n_lanes);
    }
};

// states (B N D): the entering ones in, the last ones out.
template <class R, Decay kind> void forward(const Problem<R>& p, R* states, R* y, R* bounds) {
    using vec = typename Simd<R>::vec;
    const int64_t strips = (p.D + Simd<R>::lanes - 1) / Simd<R>::lanes, chunks = (p.T + CHUNK - 1) / CHUNK;
    const int64_t each = std::clamp<int64_t>(p.batch * strips / n_threads(), 1, ABREAST);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t group = 0; group < strips; group += each) {
            const int64_t length = p.length(b), end = std::min(strips, group + each);
            for (int64_t c = 0; c * CHUNK < p.T; c++)
                for (int64_t strip = group; strip < end; strip++) {
                    const Strip<R, kind> s(p, b, strip);
                    const int64_t first = std::min(length, c * CHUNK), last = std::min(length, (c + 1) * CHUNK);
                    if (bounds && first < last) s.keep(states, bounds, c, chunks);
                    s.forward(states, y, first, last);
                    for (int64_t t = std::max(last, c * CHUNK); t < std::min(p.T, (c + 1) * CHUNK); t++) s.put(y, t, vec{});
                }
        }
}

// What the backward pass holds of one chunk: of a strip its decays and states, of all strips the gradients of B and C, lane by
// lane.
template <class R, Decay kind> struct Chunk {
    using S = Simd<R>;
    using vec = typename S::vec;
    const int64_t N;
    std::vector<vec> rates, a, h, gB, gC;

    explicit Chunk(int64_t N) : N(N), rates(N), a(CHUNK * N), h((CHUNK + 1) * N), gB(CHUNK * N), gC(CHUNK * N) {}

    void clear() {
        std::fill(gB.begin(), gB.end(), vec{});
        std::fill(gC.begin(), gC.end(), vec{});
    }

    void put(R* to_B, R* to_C, int64_t first, int64_t last) const {
        for (int64_t i = 0; i < (last - first) * N; i++) {
            to_B[first * N + i] = S::sum(gB[i]);
            to_C[first * N + i] = S::sum(gC[i]);
        }
    }

    void states(const Strip<R, kind>& s, const R* bound, int64_t first, int64_t last) {
        for (int64_t n = 0; n < N; n++) {
            h[n] = S::load(bound + n * s.p.D + s.d, s.n_lanes);
            if (kind != LINEAR) rates[n] = s.rate(n);
        }
        for (int64_t t = first; t < last; t++) {
            const vec dt = s.at(s.p.dt, t), u = dt * s.at(s.p.x, t);
            const R* B = s.row(s.p.B, t);
            vec *before = &h[(t - first) * N], *now = before + N, *decay = &a[(t - first) * N];
            for (int64_t n = 0; n < N; n++) {
                decay[n] = s.decay(dt, kind == LINEAR ? S::splat(-B[n] * B[n]) : rates[n] * R(LOG2E));
                now[n] = decay[n] * before[n] + u * B[n];
            }
        }
    }

    // g: of the states that leave, and then of those that enter.
    void slopes(const Strip<R, kind>& s, const R* gy, vec* g, vec* gr, R* gx, R* gdt, int64_t first, int64_t last) {
        for (int64_t t = last - 1; t >= first; t--) {
            const vec dt = s.at(s.p.dt, t), x = s.at(s.p.x, t), u = dt * x, gy_t = s.at({gy, s.p.D}, t);
            const R *B = s.row(s.p.B, t), *C = s.row(s.p.C, t);
            const int64_t at = (t - first) * N;
            const vec *before = &h[at], *now = before + N, *decay = &a[at];
            vec gu = {}, gd = {};
            for (int64_t n = 0; n < N; n++) {
                const vec g_n = g[n] + gy_t * C[n], ge = g_n * before[n] * s.slope(decay[n]);  // of the product dt * rate
                gC[at + n] += gy_t * now[n];
                gB[at + n] += g_n * u;
                gu += g_n * B[n];
                if constexpr (kind == LINEAR) {
                    gB[at + n] -= R(2) * B[n] * (ge * dt);
                    gd -= ge * (B[n] * B[n]);
                } else {
                    gr[n] += ge * dt;
                    gd += ge * rates[n];
                }
                g[n] = g_n * decay[n];
            }
            s.put(gx, t, gu * dt);
            s.put(gdt, t, gd + gu * x);
        }
    }
};

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
            const int64_t begin = std::min(strips, part * each), end = std::min(strips, begin + each), length = p.length(b);
            std::vector<vec> g((end - begin) * p.N), gr((end - begin) * p.N);
            Chunk<R, kind> chunk(p.N);
            for (int64_t strip = begin; strip < end; strip++) {
                const Strip<R, kind> s(p, b, strip);
                for (int64_t n = 0; n < p.N; n++) g[(strip - begin) * p.N + n] = s.state(g_final, n);
                for (int64_t t = length; t < p.T; t++) {
                    s.put(gx, t, vec{});
                    s.put(gdt, t, vec{});
                }
            }
            for (int64_t c = (length + CHUNK - 1) / CHUNK - 1; c >= 0; c--) {
                const int64_t first = c * CHUNK, last = std::min<int64_t>(first + CHUNK, length);
                const R* const bound = bounds + (b * chunks + c) * p.N * p.D;
                chunk.clear();
                for (int64_t strip = begin; strip < end; strip++) {
                    const Strip<R, kind> s(p, b, strip);
                    chunk.states(s, bound, first, last);
                    chunk.slopes(s, gy, &g[(strip - begin) * p.N], &gr[(strip - begin) * p.N], gx, gdt, first, last);
                }
                chunk.put(gB + (part * p.batch + b) * p.T * p.N, gC + (part * p.batch + b) * p.T * p.N, first, last);
            }
            for (int64_t strip = begin; strip < end; strip++) {
                const Strip<R, kind> s(p, b, strip);
                for (int64_t n = 0; n < p.N; n++) {
                    s.put_state(g_start, n, g[(strip - begin) * p.N + n]);
                    if (kind != LINEAR) s.put_state(gA, n, gr[(strip - begin) * p.N + n]);
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
    extern "C" void forward_##suffix(const R_* x, const R_* dt, const R_* A, const R_* B, const R_* C, const R_* skip, \
                                     const R_* gate, const int64_t* lengths, R_* states, R_* y, R_* bounds,           \
                                     int64_t batch, int64_t T, int64_t D, int64_t N, int64_t kind, int64_t softplus,  \
                                     int64_t x_apart, int64_t dt_apart, int64_t B_apart, int64_t C_apart,             \
                                     int64_t gate_apart) {                                                            \
        using R = R_;                                                                                                 \
        const Problem<R> p{{x, x_apart}, {dt, dt_apart}, {B, B_apart}, {C, C_apart}, {gate, gate_apart},              \
                           A, skip, lengths, batch, T, D, N, softplus != 0};                                          \
        FOR_EACH_DECAY(forward, p, states, y, bounds)                                                                 \
    }                                                                                                                 \
    extern "C" void backward_##suffix(const R_* x, const R_* dt, const R_* A, const R_* B, const R_* C,               \
                                      const int64_t* lengths, const R_* bounds, const R_* gy, const R_* g_final,      \
                                      R_* gx, R_* gdt, R_* gA, R_* gB, R_* gC, R_* g_start, int64_t batch, int64_t T, \
                                      int64_t D, int64_t N, int64_t kind, int64_t parts) {                            \
        using R = R_;                                                                                                 \
        const Problem<R> p{{x, D}, {dt, D}, {B, N}, {C, N}, {}, A, nullptr, lengths, batch, T, D, N, false};          \
        FOR_EACH_DECAY(backward, p, bounds, gy, g_final, gx, gdt, gA, gB, gC, g_start, parts)                         \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

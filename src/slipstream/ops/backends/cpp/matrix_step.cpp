// One token of every rule with a matrix state (K V) a head: what fades, what is erased, what is written, what is read.
//
//     F = decay * S          u = b^T F (or b^T S)          S' = F + a u^T + k v^T          o = scale S'^T q
//
// The delta rule is a = -beta k, b = k, and a write of beta v. With a bonus, o = scale (S + (bonus * k) v^T)^T q instead.
// S becomes S' where it lies: a row is read before it is written, and stays in the cache since the pass that made u.
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

enum Decay { NONE, ONE, CHANNEL };  // none; a number a head; a number a key channel
constexpr int64_t WORTH_THREADS = 1 << 17;  // numbers of state; fewer are done before a thread has woken

template <class R> struct Problem {
    const R *q, *k, *v, *beta, *erase, *read, *log_decay, *bonus;  // beta, or erase and read; bonus: all may be null
    R *o, *S;
    int64_t batch, heads, K, V, q_row, q_head, k_row, k_head, v_row, v_head, decay_row, kind, undecayed;
    double scale;
};

// u (V) and kept (K), what is left of each row of the state, are room to work in.
template <class R> void one_head(const Problem<R>& p, int64_t b, int64_t h, R* u, R* kept) {
    using S = Simd<R>;
    const int64_t K = p.K, V = p.V, at = b * p.heads + h;
    const R *q = p.q + b * p.q_row + h * p.q_head, *k = p.k + b * p.k_row + h * p.k_head;
    const R* v = p.v + b * p.v_row + h * p.v_head;
    const R *read = p.beta ? k : p.read ? p.read + at * K : nullptr, *erase = p.erase ? p.erase + at * K : nullptr;
    const R* fade = p.kind == NONE ? nullptr : p.log_decay + b * p.decay_row + (p.kind == ONE ? h : h * K);
    R *state = p.S + at * K * V, *o = p.o + at * V;
    const R one = fade && p.kind == ONE ? std::exp(*fade) : R(1), beta = p.beta ? p.beta[at] : R(1);
    for (int64_t i = 0; i < K; i++) kept[i] = p.kind == CHANNEL ? std::exp(fade[i]) : one;
    const auto left = [&](int64_t d) { return (int)(V - d < S::lanes ? V - d : S::lanes); };

    for (int64_t d = 0; d < V; d++) o[d] = u[d] = 0;
    for (int64_t i = 0; read && i < K; i++) {
        const R weight = read[i] * (p.undecayed ? R(1) : kept[i]);
        for (int64_t d = 0; d < V; d += S::lanes)
            S::store(u + d, S::load(u + d, left(d)) + S::load(state + i * V + d, left(d)) * weight, left(d));
    }
    for (int64_t d = 0; p.beta && d < V; d++) u[d] = beta * (v[d] - u[d]);  // the whole write, along k
    for (int64_t i = 0; i < K; i++) {
        const R key = k[i], row = R(p.scale) * q[i], gone = erase ? erase[i] : R(0);
        const R own = p.bonus ? p.bonus[h * K + i] * key : R(0);
        const R* write = p.beta ? u : v;
        for (int64_t d = 0; d < V; d += S::lanes) {
            const int n = left(d);
            const auto before = S::load(state + i * V + d, n), value = S::load(write + d, n);
            auto now = before * kept[i] + value * key;
            if (erase) now += S::load(u + d, n) * gone;
            S::store(state + i * V + d, now, n);
            S::store(o + d, S::load(o + d, n) + (p.bonus ? before + value * own : now) * row, n);
        }
    }
}

template <class R> void step(const Problem<R>& p) {
#pragma omp parallel if (p.batch * p.heads * p.K * p.V > WORTH_THREADS)
    {
        std::vector<R> u(p.V), kept(p.K);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < p.batch * p.heads; at++) one_head(p, at / p.heads, at % p.heads, u.data(), kept.data());
    }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                              \
    extern "C" void step_##suffix(const R* q, const R* k, const R* v, const R* beta, const R* erase, const R* read,     \
                                  const R* log_decay, const R* bonus, R* o, R* S, int64_t batch,                       \
                                  int64_t heads, int64_t K, int64_t V, int64_t q_row, int64_t q_head, int64_t k_row,    \
                                  int64_t k_head, int64_t v_row, int64_t v_head, int64_t decay_row, int64_t kind,       \
                                  int64_t undecayed, double scale) {                                                    \
        step<R>({q, k, v, beta, erase, read, log_decay, bonus, o, S, batch, heads, K, V, q_row, q_head, k_row,    \
                 k_head, v_row, v_head, decay_row, kind, undecayed, scale});                                            \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

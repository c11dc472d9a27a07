// The delta rule, a block of tokens at a time. Layouts as in delta_scan.py.
//
//     S_t = (I - beta_t k_t k_t^T) D(w_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t        w = exp(log_decay)
//
// In a block that S enters, with what is written in place of what was stored, u_t = beta_t (v_t - k_t^T D(w_t) S_{t-1}):
//
//     (I + A) U = D(beta) (V - D(exp G) K S)        A_ij = beta_i k_i exp(G_i - G_j) k_j for j < i
//     O = scale (D(exp G) Q S + P U)                S <- exp(G_end) S + (exp(G_end - G) K)^T U
#include "fading.h"

namespace {

template <class R> struct Delta : Worker<R> {
    using Worker<R>::p, Worker<R>::s, Worker<R>::step, Worker<R>::v_step, Worker<R>::k_step;
    const Line<R> beta;
    R *raw, *A, *P, *keys, *columns, *k, *q, *w, *v, *u, *u_until, *whole;
    R strength[CHUNK], minus[CHUNK], by[CHUNK], ones[CHUNK];  // beta, -beta, what e_i S is multiplied with, 1
    Fall<R> fall;

    Delta(const Problem<R>& p, const Share& s, const Line<R>& beta) : Worker<R>(p, s, 11), beta(beta) {
        raw = this->pairs_buffer(), A = this->pairs_buffer(), P = this->pairs_buffer(), columns = this->columns_buffer();
        k = this->k_buffer(), q = this->k_buffer(), keys = this->k_buffer(), w = this->k_buffer();
        v = this->v_buffer(), u = this->v_buffer(), u_until = this->v_buffer();
        whole = this->room.template take<R>(k_step);
        std::fill_n(ones, CHUNK, R(1));
    }

    void visit(const Place<R>& at) {
        if (p.kind != CHANNEL) return by_head(at);
        for (int64_t i = 0; i < at.n; i += SHORT) by_channel(at.part(i, std::min(SHORT, at.n - i), p.H * p.V));
    }

    void by_head(const Place<R>& at) {
        gather(at);
        copy_columns(k, k_step, at.n, p.K, columns, step);
        const bool fading = p.kind == HEAD;
        fall.fill(fading ? p.decay.at(s.b, at.t, at.h) : nullptr, p.decay.token, at.n);
        for (int64_t i = 0; i < at.n; i++) by[i] = minus[i] * fall.since[i + 1];
        pairs(k, k_step, columns, step, at.n, p.K, raw);
        fade(raw, A, step, at.n, fading ? &fall : nullptr, false, true, minus);
        pairs(q, k_step, columns, step, at.n, p.K, raw);
        fade(raw, P, step, at.n, fading ? &fall : nullptr, false, false, (const R*)nullptr);
        solve(at);
        if (fading) scale_rows(u, fall.until, at.n, u_until, v_step);
        std::fill_n(whole, p.K, fall.whole);
        read_out(*this, at, q, fall.since + 1, {{P, step, 1, u}});
        write_in(*this, at, whole, {{columns, step, 1, fading ? u_until : u}});
    }

    void by_channel(const Place<R>& at) {
        gather(at);
        std::copy_n(k, at.n * k_step, keys);
        exponentials(p.decay.at(s.b, at.t, at.h), p.decay.token, at.n, p.K, w, whole, k_step);
        const R* const rows[] = {k, q};
        R* const of[] = {A, P};
        fading_pairs<R, 0, 2>(keys, w, k_step, at.n, rows, of, step);
        for (int64_t i = 0; i < at.n; i++) {
            by[i] = minus[i];
            for (int64_t j = 0; j < i; j++) A[i * step + j] *= minus[i];
        }
        fade_rows(k, w, k_step, at.n, false);
        fade_rows(q, w, k_step, at.n, false);
        solve(at);
        read_out(*this, at, q, ones, {{P, step, 1, u}});
        write_in(*this, at, whole, {{keys, 1, k_step, u}});
    }

    void gather(const Place<R>& at) {
        copy_rows(p.k.at(s.b, at.t, at.h), p.k.token, at.n, p.K, k, k_step);
        copy_rows(p.q.at(s.b, at.t, at.h), p.q.token, at.n, p.K, q, k_step);
        copy_rows(p.v.at(s.b, at.t, at.h) + s.column, p.v.token, at.n, s.columns, v, v_step);
        for (int64_t i = 0; i < at.n; i++) {
            strength[i] = *beta.at(s.b, at.t + i, at.h);
            minus[i] = -strength[i];
        }
    }

    void solve(const Place<R>& at) {
        erase(*this, at, k, by, A, u, [&](auto& t, int64_t i, int64_t j) LAMBDA {
            t.add_rows(v + i * v_step + j, v_step, strength + i);
        });
    }
};

template <class R> void forward(const Problem<R>& p, const Line<R>& beta) {
    run<R>(p, p.B * p.T * p.H * p.V * (3. * p.K + CHUNK), [&](const Share& s) { return Delta<R>(p, s, beta); });
}

}  // namespace

#define KERNELS(R, suffix)                                                                                               \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* decay, const R* beta, const R* start,  \
                                     const int64_t* lengths, R* o, R* final, int64_t B, int64_t T, int64_t H, int64_t K, \
                                     int64_t V, int64_t kind, double scale, STRIDES(q), STRIDES(k), STRIDES(v),          \
                                     STRIDES(decay), STRIDES(beta)) {                                                    \
        forward<R>({LINE(q), LINE(k), LINE(v), LINE(decay), start, lengths, o, final, B, T, H, K, V, (Decay)kind,        \
                    (R)scale}, LINE(beta));                                                                              \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

// A matrix state that decays and takes one outer product a token, a block of tokens at a time. Layouts as in outer_scan.py.
//
//     S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t, or with a bonus u (S_{t-1} + D(u) k_t v_t^T)^T q_t
//
// In a block that S enters, with P_ij = q_i exp(G_i - G_j) k_j for j <= i:
//
//     O = scale (D(exp G) Q S + P V)        S <- exp(G_end) S + (exp(G_end - G) K)^T V
//
// Heads that share q and k (their stride is zero) share Q K^T.
#include "fading.h"

namespace {

template <class R> struct Outer : Worker<R> {
    using Worker<R>::p, Worker<R>::s, Worker<R>::step, Worker<R>::v_step, Worker<R>::k_step;
    const R* bonus;  // (H K), or null
    R *raw, *P, *keys, *columns, *q, *w, *v, *v_until, *whole, *ones;
    Fall<R> fall;
    const bool shared;

    Outer(const Problem<R>& p, const Share& s, const R* bonus) 
        : Worker<R>(p, s, 10), bonus(bonus), shared(p.q.head == 0 && p.k.head == 0) {
        raw = this->pairs_buffer(), P = this->pairs_buffer(), columns = this->columns_buffer();
        q = this->k_buffer(), keys = this->k_buffer(), w = this->k_buffer();
        v = this->v_buffer(), v_until = this->v_buffer();
        whole = this->room.template take<R>(k_step), ones = this->room.template take<R>(CHUNK);
        std::fill_n(ones, CHUNK, R(1));
    }

    void visit(const Place<R>& at) {
        if (p.kind != CHANNEL) return by_head(at);
        for (int64_t i = 0; i < at.n; i += SHORT) by_channel(at.part(i, std::min(SHORT, at.n - i), p.H * p.V));
    }

    void by_head(const Place<R>& at) {
        if (at.first || !shared) {
            copy_columns(p.k.at(s.b, at.t, at.h), p.k.token, at.n, p.K, columns, step);
            copy_rows(p.q.at(s.b, at.t, at.h), p.q.token, at.n, p.K, q, k_step);
            pairs(q, k_step, columns, step, at.n, p.K, raw);
        }
        const bool fading = p.kind == HEAD;
        fall.fill(fading ? p.decay.at(s.b, at.t, at.h) : nullptr, p.decay.token, at.n);
        copy_rows(p.v.at(s.b, at.t, at.h) + s.column, p.v.token, at.n, s.columns, v, v_step);
        if (fading) scale_rows(v, fall.until, at.n, v_until, v_step);
        fade(raw, P, step, at.n, fading ? &fall : nullptr, bonus, bonus, (const R*)nullptr);
        if (bonus) own(at);
        std::fill_n(whole, p.K, fall.whole);
        read_out(*this, at, q, fall.since + (bonus ? 0 : 1), {{P, step, 1, v}});
        write_in(*this, at, whole, {{columns, step, 1, fading ? v_until : v}});
    }

    void by_channel(const Place<R>& at) {
        copy_rows(p.k.at(s.b, at.t, at.h), p.k.token, at.n, p.K, keys, k_step);
        copy_rows(p.q.at(s.b, at.t, at.h), p.q.token, at.n, p.K, q, k_step);
        copy_rows(p.v.at(s.b, at.t, at.h) + s.column, p.v.token, at.n, s.columns, v, v_step);
        exponentials(p.decay.at(s.b, at.t, at.h), p.decay.token, at.n, p.K, w, whole, k_step);
        const R* const rows[] = {q};
        (bonus ? fading_pairs<R, 1, 0> : fading_pairs<R, 0, 1>)(keys, w, k_step, at.n, rows, &P, step);
        if (bonus) own(at);
        fade_rows(q, w, k_step, at.n, bonus);
        read_out(*this, at, q, ones, {{P, step, 1, v}});
        write_in(*this, at, whole, {{keys, 1, k_step, v}});
    }

    // P_ii: what a token reads of itself, by the bonus.
    void own(const Place<R>& at) {
        for (int64_t i = 0; i < at.n; i++)
            P[i * step + i] = dot(q + i * k_step, p.k.at(s.b, at.t + i, at.h), bonus + at.h * p.K, p.K);
    }
};

template <class R> void forward(const Problem<R>& p, const R* bonus) {
    run<R>(p, p.B * p.T * p.H * p.V * (2. * p.K + CHUNK), [&](const Share& s) { return Outer<R>(p, s, bonus); });
}

}  // namespace

#define KERNELS(R, suffix)                                                                                               \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* decay, const R* bonus, const R* start, \
                                     const int64_t* lengths, R* o, R* final, int64_t B, int64_t T, int64_t H, int64_t K, \
                                     int64_t V, int64_t kind, double scale, STRIDES(q), STRIDES(k), STRIDES(v),          \
                                     STRIDES(decay)) {                                                                   \
        forward<R>({LINE(q), LINE(k), LINE(v), LINE(decay), start, lengths, o, final, B, T, H, K, V, (Decay)kind,        \
                    (R)scale}, bonus);                                                                                   \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

// A transition that is diagonal plus low rank, a block of tokens at a time. Layouts as in delta_scan.py, dplr_scan.
//
//     S_t = D(w_t) S_{t-1} + a_t u_t^T + k_t v_t^T        u_t = S'^T b_t, S' = D(w_t) S_{t-1} or S_{t-1}        w = exp(log_decay)
//
// In a block that S enters, with (x y)_ij = x_i exp(G_i - G_j) y_j, where G_i is G_{i-1} if b reads before the decay:
//
//     (I - (b a)) U = D(exp G) B S + (b k) V        O = scale (D(exp G) Q S + (q a) U + (q k) V)
//     S <- exp(G_end) S + (exp(G_end - G) A)^T U + (exp(G_end - G) K)^T V
#include "fading.h"

namespace {

template <class R> struct LowRank : Worker<R> {
    using Worker<R>::p, Worker<R>::s, Worker<R>::step, Worker<R>::v_step, Worker<R>::k_step;
    const Line<R> read, write;  // b and a
    const bool early;           // b reads before the decay
    R *raw, *ba, *bk, *qa, *qk, *a_columns, *k_columns, *a, *k, *b, *q, *w, *v, *u, *v_until, *u_until, *whole;
    R ones[CHUNK];
    Fall<R> fall;

    LowRank(const Problem<R>& p, const Share& s, const Line<R>& read, const Line<R>& write, bool early)
        : Worker<R>(p, s, 16), read(read), write(write), early(early) {
        for (R** x : {&raw, &ba, &bk, &qa, &qk}) *x = this->pairs_buffer();
        for (R** x : {&a_columns, &k_columns}) *x = this->columns_buffer();
        for (R** x : {&a, &k, &b, &q, &w}) *x = this->k_buffer();
        for (R** x : {&v, &u, &v_until, &u_until}) *x = this->v_buffer();
        whole = this->room.template take<R>(k_step);
        std::fill_n(ones, CHUNK, R(1));
    }

    void visit(const Place<R>& at) {
        if (p.kind != CHANNEL) return by_head(at);
        for (int64_t i = 0; i < at.n; i += SHORT) by_channel(at.part(i, std::min(SHORT, at.n - i), p.H * p.V));
    }

    void by_head(const Place<R>& at) {
        gather(at);
        copy_columns(a, k_step, at.n, p.K, a_columns, step);
        copy_columns(k, k_step, at.n, p.K, k_columns, step);
        fall.fill(p.kind == HEAD ? p.decay.at(s.b, at.t, at.h) : nullptr, p.decay.token, at.n);
        const Fall<R>* const fading = p.kind == HEAD ? &fall : nullptr;
        faded_pairs(at.n, b, a_columns, fading, true, ba);
        faded_pairs(at.n, b, k_columns, fading, true, bk);
        faded_pairs(at.n, q, a_columns, fading, false, qa);
        faded_pairs(at.n, q, k_columns, fading, false, qk);
        solve(at, fall.since + (early ? 0 : 1));
        scale_rows(u, fall.until, at.n, u_until, v_step);
        scale_rows(v, fall.until, at.n, v_until, v_step);
        std::fill_n(whole, p.K, fall.whole);
        read_out(*this, at, q, fall.since + 1, {{qa, step, 1, u}, {qk, step, 1, v}});
        write_in(*this, at, whole, {{a_columns, step, 1, u_until}, {k_columns, step, 1, v_until}});
    }

    void faded_pairs(int64_t n, const R* rows, const R* columns, const Fall<R>* fading, bool erasing, R* to) {
        pairs(rows, k_step, columns, step, n, p.K, raw);
        fade(raw, to, step, n, fading, erasing && early, erasing, (const R*)nullptr);
    }

    void by_channel(const Place<R>& at) {
        gather(at);
        exponentials(p.decay.at(s.b, at.t, at.h), p.decay.token, at.n, p.K, w, whole, k_step);
        const R* const rows[] = {b, q};
        R *const of_a[] = {ba, qa}, *const of_k[] = {bk, qk};
        const auto fading = early ? fading_pairs<R, 1, 1> : fading_pairs<R, 0, 2>;
        fading(a, w, k_step, at.n, rows, of_a, step);
        fading(k, w, k_step, at.n, rows, of_k, step);
        for (int64_t i = 0; i < at.n; i++) bk[i * step + i] = 0;
        fade_rows(b, w, k_step, at.n, early);
        fade_rows(q, w, k_step, at.n, false);
        solve(at, ones);
        read_out(*this, at, q, ones, {{qa, step, 1, u}, {qk, step, 1, v}});
        write_in(*this, at, whole, {{a, 1, k_step, u}, {k, 1, k_step, v}});
    }

    void gather(const Place<R>& at) {
        copy_rows(p.q.at(s.b, at.t, at.h), p.q.token, at.n, p.K, q, k_step);
        copy_rows(p.k.at(s.b, at.t, at.h), p.k.token, at.n, p.K, k, k_step);
        copy_rows(read.at(s.b, at.t, at.h), read.token, at.n, p.K, b, k_step);
        copy_rows(write.at(s.b, at.t, at.h), write.token, at.n, p.K, a, k_step);
        copy_rows(p.v.at(s.b, at.t, at.h) + s.column, p.v.token, at.n, s.columns, v, v_step);
    }

    void solve(const Place<R>& at, const R* since) {
        erase(*this, at, b, since, ba, u, [&](auto& t, int64_t i, int64_t j) LAMBDA {
            t.add(bk + i * step, step, 1, v + j, v_step, i + t.rows);
        });
    }
};

template <class R> void forward(const Problem<R>& p, const Line<R>& read, const Line<R>& write, bool early) {
    const auto made = [&](const Share& s) { return LowRank<R>(p, s, read, write, early); };
    run<R>(p, p.B * p.T * p.H * p.V * (4. * p.K + 2 * CHUNK), made);
}

}  // namespace

#define KERNELS(R, suffix)                                                                                                \
    extern "C" void forward_##suffix(const R* q, const R* k, const R* v, const R* decay, const R* read, const R* write,   \
                                     const R* start, const int64_t* lengths, R* o, R* final, int64_t B, int64_t T,        \
                                     int64_t H, int64_t K, int64_t V, int64_t kind, int64_t early, double scale,          \
                                     STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(decay), STRIDES(read), STRIDES(write)) { \
        forward<R>({LINE(q), LINE(k), LINE(v), LINE(decay), start, lengths, o, final, B, T, H, K, V, (Decay)kind,         \
                    (R)scale}, LINE(read), LINE(write), early);                                                           \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

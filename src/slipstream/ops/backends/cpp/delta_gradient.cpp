// The gradient of delta_scan with one decay a head or none. What is written in a token is u, which a triangular system gives:
//
//     (I + A) U = D(beta) X        X = V - D(exp G) K S        A_ij = beta_i k_i exp(G_i - G_j) k_j for j < i
//
// With dU as in matrix_gradient.h, (I + A)^T Y = dU and Z = D(beta) Y, and W_ij = -exp(G_i - G_j) z_i u_j for j < i:
//
//     dV = Z        dK += W K + W^T K - D(exp G) Z S^T        dS -= K^T D(exp G) Z
//     dbeta_i = y_i x_i - sum over j of y_i u_j exp(G_i - G_j) k_i k_j
#include "matrix_gradient.h"

namespace {

template <class R> struct DeltaSlopes : HeadSlopes<R> {
    using S = Simd<R>;
    using HeadSlopes<R>::p, HeadSlopes<R>::step, HeadSlopes<R>::k_width, HeadSlopes<R>::k_step, HeadSlopes<R>::v_step, HeadSlopes<R>::fall;
    using HeadSlopes<R>::k, HeadSlopes<R>::part, HeadSlopes<R>::faded, HeadSlopes<R>::columns, HeadSlopes<R>::raw;
    using HeadSlopes<R>::turned, HeadSlopes<R>::rows, HeadSlopes<R>::read;
    R *all_x, *all_u, *y;          // of all blocks; y becomes z
    R *between, *minus_A, *of_A;   // keys and keys, faded; -A; W
    const int64_t v_width = padded<R>(this->p.V);
    R beta[CHUNK], minus[CHUNK], minus_since[CHUNK];  // -beta, -exp G

    DeltaSlopes(const Slopes<R>& p, int64_t b, int64_t h) : HeadSlopes<R>(p, b, h, 3, 1, 2) {
        all_x = this->take(this->blocks * CHUNK * v_step), all_u = this->take(this->blocks * CHUNK * v_step);
        y = this->v_rows(), between = this->pairs_rows(), minus_A = this->pairs_rows(), of_A = this->pairs_rows();
    }

    void pass_on(int64_t c, int64_t n, const R* entering, R* leaving) {
        R *const x = all_x + c * CHUNK * v_step, *const u = all_u + c * CHUNK * v_step;
        this->gather_keys(c, n);
        gather_erasing(c, n);
        remaining(c, n, entering, x);
        tiles<R>(n, v_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.add_rows(x + i * v_step + j, v_step, beta + i);
            t.add(minus_A + i * step, step, 1, u + j, v_step, i);
            t.solve(minus_A + i * step + i, step);
            t.store(u + i * v_step + j, v_step);
        });
        this->write_in(u, n, entering, leaving);
    }

    void gather_erasing(int64_t c, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            beta[i] = *p.beta.at(this->b, c * CHUNK + i, this->h);
            minus[i] = -beta[i], minus_since[i] = -fall.since[i + 1];
        }
        pairs(k, k_step, columns, step, n, p.K, raw);
        this->fade(raw, between, n, true);
        scale_rows(between, minus, n, minus_A, step);
    }

    // X, by way of the transpose of what is stored.
    void remaining(int64_t c, int64_t n, const R* entering, R* x) {
        tiles<R>(p.V, padded<R>(n), [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.add(entering + i * k_step, k_step, 1, columns + j, step, p.K);
            t.times_columns(fall.since + 1 + j);
            t.store(turned + i * step + j, step);
        });
        copy_columns(turned, step, p.V, n, x, v_step);
        copy_rows(p.v.at(this->b, c * CHUNK, this->h), p.v.token, n, p.V, rows, v_step);
        for (int64_t i = 0; i < n * v_step; i += S::lanes) store(x + i, load(rows + i) - load(x + i));
    }

    void slopes(int64_t c, int64_t n, const R* entering) {
        const R *const x = all_x + c * CHUNK * v_step, *const u = all_u + c * CHUNK * v_step;
        this->gather(c, n);
        gather_erasing(c, n);
        this->written_slopes(n, y);
        solve_back(n);
        this->pair_slopes(u, n);
        erased_pair_slopes(c, n, x);
        scale_rows(y, beta, n, y, v_step);
        this->put_v(c, n, y);
        this->query_slopes(c, n, entering);
        erased_key_slopes(n, entering);
        this->key_slopes(c, n, u, [&](auto& t, int64_t i, int64_t j) LAMBDA {
            t.add_rows(faded + i * k_step + j, k_step, minus_since + i);
            t.add(of_A + i * step, step, 1, k + j, k_step, i + t.rows);
            t.add(of_A + i * step + i, 1, step, k + i * k_step + j, k_step, n - i);
        });
        if (p.g_decay) this->decay_slopes(c, n, entering);
        scale_rows(k, minus_since, n, part, k_step);
        this->state_slopes(n, [&](auto& t, int64_t i, int64_t j) LAMBDA { t.add(y + i, 1, v_step, part + j, k_step, n); });
    }

    // (I + A)^T Y = dU from the last row up, in place.
    void solve_back(int64_t n) {
        R* const last = y + (n - 1) * v_step;
        const R* const corner = minus_A + (n - 1) * step + n - 1;
        tiles<R>(n, v_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.load(last - i * v_step + j, -v_step);
            t.add(corner - i, -1, -step, last + j, -v_step, i);
            t.solve(corner - i * step - i, -1, -step);
            t.store(last - i * v_step + j, -v_step);
        });
    }

    // Of A and beta. u lies transposed in `turned`.
    void erased_pair_slopes(int64_t c, int64_t n, const R* x) {
        pairs(y, v_step, turned, step, n, p.V, of_A);
        for (int64_t i = 0; i < n; i++) {
            typename S::vec of_beta = {};
            for (int64_t d = 0; d < v_width; d += S::lanes) of_beta += load(y + i * v_step + d) * load(x + i * v_step + d);
            for (int64_t j = 0; j < i; j += S::lanes) {
                const auto met = this->first(load(of_A + i * step + j), i - j);
                of_beta -= met * load(between + i * step + j);
                store(raw + i * step + j, load(raw + i * step + j) + met * load(minus_A + i * step + j));
            }
            p.g_beta[this->at(c) + i * p.H] = S::sum(of_beta);
        }
        this->fade(of_A, of_A, n, true);
        scale_rows(of_A, minus, n, of_A, step);
    }

    // Z S^T, which the faded keys read.
    void erased_key_slopes(int64_t n, const R* entering) {
        tiles<R>(n, k_width, [&](auto t, int64_t i, int64_t j) LAMBDA {
            t.add(y + i * v_step, v_step, 1, entering + j, k_step, p.V);
            t.store(faded + i * k_step + j, k_step);
        });
        for (int64_t i = 0; i < n; i++) read[i] += minus_since[i] * this->inner(k + i * k_step, faded + i * k_step);
    }
};

}  // namespace

FOR_f32(GRADIENTS(float, f32, DeltaSlopes))
FOR_f64(GRADIENTS(double, f64, DeltaSlopes))

// The recurrence of sLSTM, and the loop of its gradient. Layouts: raw (T H B 4K), R (H K 4K), lines (T H B K), states (H B K).
//
// Heads and rows do not see each other: a thread takes one of them through time. Gates lie in the order i f z o.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

template <class R> using S = Simd<R>;

// out += x W, W (n m)
template <class R> void add_product(R* __restrict out, const R* x, const R* W, int64_t n, int64_t m) {
    for (int64_t k = 0; k < n; k++) {
        const R* __restrict row = W + k * m;
        const R factor = x[k];
        for (int64_t j = 0; j < m; j++) out[j] += factor * row[j];
    }
}

// out = W g, W (n m)
template <class R> void product_back(R* out, const R* W, const R* g, int64_t n, int64_t m) {
    for (int64_t k = 0; k < n; k++) {
        typename S<R>::vec total = {};
        for (int64_t j = 0; j < m; j += S<R>::lanes)
            total += S<R>::load(W + k * m + j, (int)(m - j)) * S<R>::load(g + j, (int)(m - j));
        out[k] = S<R>::sum(total);
    }
}

template <class R> typename S<R>::vec sigmoid(typename S<R>::vec x) { return R(1) / (R(1) + S<R>::exp(-x)); }

template <class R> inline R log_sigmoid(R x) { return std::min(x, R(0)) - std::log1p(std::exp(-std::abs(x))); }

// raw: the gates in, the activated gates (i and f as they are) out.
template <class R>
void forward(R* raw, const R* weights, const R* h0, const R* c0, const R* n0, const R* m0, R* hs, R* cs, R* ns, R* ms,
             int64_t T, int64_t H, int64_t B, int64_t K) {
    using vec = typename S<R>::vec;
#pragma omp parallel for schedule(static)
    for (int64_t unit = 0; unit < H * B; unit++) {
        const R *W = weights + unit / B * K * 4 * K, *h = h0 + unit * K, *c = c0 + unit * K, *n = n0 + unit * K, *m = m0 + unit * K;
        std::vector<R> kept(K), write(K);
        for (int64_t t = 0; t < T; t++) {
            const int64_t at = (t * H * B + unit) * K;
            R* gates = raw + at * 4;
            R *i = gates, *f = i + K, *z = f + K, *o = z + K, *m_t = ms + at;
            add_product(gates, h, W, K, 4 * K);
            for (int64_t d = 0; d < K; d++) {
                const R older = log_sigmoid(f[d]) + m[d];
                m_t[d] = older > i[d] ? older : i[d];  // a NaN among the gates stays one
                kept[d] = older - m_t[d];
                write[d] = i[d] - m_t[d];
            }
            for (int64_t d = 0; d < K; d += S<R>::lanes) {
                const int left = (int)(K - d);
                const vec keep = S<R>::exp(S<R>::load(&kept[d], left)), put = S<R>::exp(S<R>::load(&write[d], left));
                const vec z_t = R(2) * sigmoid<R>(R(2) * S<R>::load(z + d, left)) - R(1);
                const vec o_t = sigmoid<R>(S<R>::load(o + d, left));
                const vec c_t = keep * S<R>::load(c + d, left) + put * z_t, n_t = keep * S<R>::load(n + d, left) + put;
                S<R>::store(z + d, z_t, left);
                S<R>::store(o + d, o_t, left);
                S<R>::store(cs + at + d, c_t, left);
                S<R>::store(ns + at + d, n_t, left);
                S<R>::store(hs + at + d, o_t * c_t / n_t, left);
            }
            h = hs + at;
            c = cs + at;
            n = ns + at;
            m = m_t;
        }
    }
}

// What torch has made for all tokens at once: see _local in slipstream/ops/slstm_scan.py.
template <class R> struct Local {
    const R *read, *ratio, *by_o, *by_z, *z, *c0, *n0, *kept, *if_new, *if_old, *older, *fade;
};

// of_h ... of_m: gradients that reach the lines from outside, or null. g: those of the entering states, (4 H B K).
template <class R>
void backward(R* g_raw, const R* weights, const R* of_h, const R* of_c, const R* of_n, const R* of_m, const Local<R>& s, R* g,
              int64_t T, int64_t H, int64_t B, int64_t K) {
#pragma omp parallel for schedule(static)
    for (int64_t unit = 0; unit < H * B; unit++) {
        const R* W = weights + unit / B * K * 4 * K;
        R *gh = g + unit * K, *gc = gh + H * B * K, *gn = gc + H * B * K, *gm = gn + H * B * K;
        for (R* p : {gh, gc, gn, gm}) std::fill_n(p, K, R(0));
        for (int64_t t = T - 1; t >= 0; t--) {
            const int64_t at = (t * H * B + unit) * K;
            R* __restrict out = g_raw + at * 4;
            for (int64_t d = 0; d < K; d++) {
                const int64_t a = at + d;
                const R h = gh[d] + (of_h ? of_h[a] : 0), m = gm[d] + (of_m ? of_m[a] : 0), through = h * s.read[a];
                const R c = gc[d] + (of_c ? of_c[a] : 0) + through;
                const R n = gn[d] + (of_n ? of_n[a] : 0) - through * s.ratio[a];
                const R older = (n * s.n0[a] + c * s.c0[a]) * s.if_new[a] - (n + c * s.z[a]) * s.if_old[a] + m * s.older[a];
                out[d] = m - older;
                out[K + d] = older * s.fade[a];
                out[2 * K + d] = c * s.by_z[a];
                out[3 * K + d] = h * s.by_o[a];
                gc[d] = c * s.kept[a];
                gn[d] = n * s.kept[a];
                gm[d] = older;
            }
            product_back(gh, W, out, K, 4 * K);
        }
    }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                                 \
    extern "C" void forward_##suffix(R* raw, const R* weights, const R* h, const R* c, const R* n, const R* m, R* hs, R* cs, \
                                     R* ns, R* ms, int64_t T, int64_t H, int64_t B, int64_t K) {                           \
        forward<R>(raw, weights, h, c, n, m, hs, cs, ns, ms, T, H, B, K);                                                  \
    }                                                                                                                      \
    extern "C" void backward_##suffix(R* g_raw, const R* weights, const R* of_h, const R* of_c, const R* of_n,             \
                                      const R* of_m, const R* read, const R* ratio, const R* by_o, const R* by_z,          \
                                      const R* z, const R* c0, const R* n0, const R* kept, const R* if_new,                \
                                      const R* if_old, const R* older, const R* fade, R* g, int64_t T, int64_t H,          \
                                      int64_t B, int64_t K) {                                                              \
        const Local<R> s{read, ratio, by_o, by_z, z, c0, n0, kept, if_new, if_old, older, fade};                           \
        backward<R>(g_raw, weights, of_h, of_c, of_n, of_m, s, g, T, H, B, K);                                             \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

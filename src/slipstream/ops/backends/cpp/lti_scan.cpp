// h_t = h_{t-1} + a h_{t-1} + x_t, y_t = Re(sum_n w_n h_tn), of N complex modes a channel. Layouts: x y (B T D); a and w (D N) and
// states (B D N) as real and imaginary parts, (2 ...).
//
// a is the decay less one: a mode that hardly decays would forget by the decay's own rounding.
// Modes lie in vector lanes. A thread takes one channel through time, as many of its modes at once as registers hold.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

constexpr int HELD = VECTOR_BYTES == 64 ? 4 : 2;  // vectors of modes that registers hold
constexpr int64_t ABREAST = 16, CHUNK = 64;       // channels that share what is read of a row, tokens they stay at

template <class R> struct Modes {
    using S = Simd<R>;
    using vec = typename S::vec;
    const R *x, *a, *w;
    const int64_t* lengths;  // null: all rows are T long
    R *h, *y;
    int64_t batch, T, D, N;

    // V vectors of the modes of one channel, from n on, through some tokens; out (tokens) takes what they add to y.
    template <int V> void tokens(int64_t b, int64_t d, int64_t n, int64_t first, int64_t last, vec* out) const {
        R *const re_h = h + (b * D + d) * N + n, *const im_h = re_h + batch * D * N;
        vec re[V], im[V], a_re[V], a_im[V], w_re[V], w_im[V];
        for (int v = 0; v < V; v++) {
            const int64_t at = v * S::lanes, mode = d * N + n + at;
            const int left = (int)std::clamp<int64_t>(N - n - at, 0, S::lanes);
            re[v] = S::load(re_h + at, left), im[v] = S::load(im_h + at, left);
            a_re[v] = S::load(a + mode, left), a_im[v] = S::load(a + D * N + mode, left);
            w_re[v] = S::load(w + mode, left), w_im[v] = S::load(w + D * N + mode, left);
        }
        for (int64_t t = first; t < last; t++) {
            const R u = x[(b * T + t) * D + d];
            vec sum = out[t - first];
            for (int v = 0; v < V; v++) {
                const vec before = re[v];
                re[v] += a_re[v] * before + (u - a_im[v] * im[v]);
                im[v] += a_re[v] * im[v] + a_im[v] * before;
                sum += w_re[v] * re[v] - w_im[v] * im[v];
            }
            out[t - first] = sum;
        }
        for (int v = 0; v < V; v++) {
            const int left = (int)std::clamp<int64_t>(N - n - v * S::lanes, 0, S::lanes);
            S::store(re_h + v * S::lanes, re[v], left), S::store(im_h + v * S::lanes, im[v], left);
        }
    }

    void channel(int64_t b, int64_t d, int64_t first, int64_t last) const {
        vec out[CHUNK] = {};
        int64_t n = 0;
        for (; N - n > (HELD / 2) * S::lanes; n += HELD * S::lanes) tokens<HELD>(b, d, n, first, last, out);
        for (; n < N; n += HELD / 2 * S::lanes) tokens<HELD / 2>(b, d, n, first, last, out);
        for (int64_t t = first; t < last; t++) y[(b * T + t) * D + d] = S::sum(out[t - first]);
    }

    void run() const {
#pragma omp parallel for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t group = 0; group < D; group += ABREAST) {
                const int64_t length = lengths ? lengths[b] : T, end = std::min(D, group + ABREAST);
                for (int64_t first = 0; first < length; first += CHUNK)
                    for (int64_t d = group; d < end; d++) channel(b, d, first, std::min(length, first + CHUNK));
                for (int64_t t = length; t < T; t++) std::fill_n(y + (b * T + t) * D + group, end - group, R(0));
            }
    }
};

}  // namespace

#define KERNELS(R, suffix)                                                                                        \
    extern "C" void forward_##suffix(const R* x, const R* a, const R* w, const int64_t* lengths, R* h, R* y,      \
                                     int64_t batch, int64_t T, int64_t D, int64_t N) {                            \
        Modes<R>{x, a, w, lengths, h, y, batch, T, D, N}.run();                                                   \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

// s_t = f(x_t + U s_{t-1}), f tanh on the first channels and the identity on the others, and its gradient.
// Layouts: x, out and gradients (B T H), states (B H), U (H H) as it stands in the equation.
#include "recurrent.h"

namespace {

template <class R> using Panels = Weights<R, 1, 4>;

// Squashed where the channel is one of the first n_tanh.
template <class R> inline typename Simd<R>::vec where(int64_t channel, int64_t n_tanh, typename Simd<R>::vec yes, typename Simd<R>::vec no) {
    if (channel + Simd<R>::lanes <= n_tanh) return yes;
    for (int64_t i = 0; channel + i < n_tanh; i++) no[i] = yes[i];
    return no;
}

template <class R> struct Forward {
    using S = Simd<R>;
    using vec = typename S::vec;
    const Rows& rows;
    const R *x, *start;
    R *out, *last;
    int64_t n_tanh, t;

    const R* input(int64_t b) const { return t ? rows.at(out, b, t - 1) : start + b * rows.H; }

    void finish(int64_t b, int64_t channel, const vec* sums) const {
        for (int v = 0; v < 4 && channel < rows.H; v++, channel += S::lanes) {
            const int n = (int)std::min<int64_t>(S::lanes, rows.H - channel);
            vec s = {};
            if (t < rows.length(b)) {
                s = sums[v] + S::load(rows.at(x, b, t) + channel, n);
                if (channel < n_tanh) s = where<R>(channel, n_tanh, hyperbolic<R>(s), s);
                if (t == rows.length(b) - 1) S::store(last + b * rows.H + channel, s, n);
            }
            S::store(rows.at(out, b, t) + channel, s, n);
        }
    }
};

// Of the sums' gradients g; at t = -1 of the entering state's. g_start holds the last state's at first.
template <class R> struct Backward {
    using S = Simd<R>;
    using vec = typename S::vec;
    const Rows& rows;
    const R *out, *g_out, *zeros;
    R *g, *g_start;
    int64_t n_tanh, t;

    const R* input(int64_t b) const { return t + 1 < rows.length(b) ? rows.at(g, b, t + 1) : zeros; }

    void finish(int64_t b, int64_t channel, const vec* sums) const {
        const int64_t length = rows.length(b);
        for (int v = 0; v < 4 && channel < rows.H; v++, channel += S::lanes) {
            const int n = (int)std::min<int64_t>(S::lanes, rows.H - channel);
            R* const carried = g_start + b * rows.H + channel;
            vec sum = t + 1 < length ? sums[v] : S::load(carried, n);
            if (t < 0) {
                S::store(carried, sum, n);
                continue;
            }
            vec of_sum = {};
            if (t < length) {
                const vec s = S::load(rows.at(out, b, t) + channel, n);
                sum += S::load(rows.at(g_out, b, t) + channel, n);
                of_sum = channel < n_tanh ? where<R>(channel, n_tanh, sum * (R(1) - s * s), sum) : sum;
            }
            S::store(rows.at(g, b, t) + channel, of_sum, n);
        }
    }
};

template <class R>
void forward(const R* x, const R* U, const R* start, const int64_t* lengths, R* out, R* last, int64_t batch, int64_t T, int64_t H,
             int64_t n_tanh) {
    const Rows rows{lengths, batch, T, H};
    Panels<R>(U, H, H, 0, H, 1).over_time(batch, 0, T, 1, [&](int64_t t) {
        return Forward<R>{rows, x, start, out, last, n_tanh, t};
    });
}

template <class R>
void backward(const R* U, const R* out, const R* g_out, const int64_t* lengths, R* g, R* g_start, int64_t batch, int64_t T,
              int64_t H, int64_t n_tanh) {
    const Rows rows{lengths, batch, T, H};
    const std::vector<R> zeros(H);
    Panels<R>(U, H, H, 0, 1, H).over_time(batch, T - 1, T + 1, -1, [&](int64_t t) {
        return Backward<R>{rows, out, g_out, zeros.data(), g, g_start, n_tanh, t};
    });
}

}  // namespace

#define KERNELS(R, suffix)                                                                                                 \
    extern "C" void forward_##suffix(const R* x, const R* U, const R* start, const int64_t* lengths, R* out, R* last,       \
                                     int64_t batch, int64_t T, int64_t H, int64_t n_tanh) {                                \
        forward<R>(x, U, start, lengths, out, last, batch, T, H, n_tanh);                                                  \
    }                                                                                                                      \
    extern "C" void backward_##suffix(const R* U, const R* out, const R* g_out, const int64_t* lengths, R* g, R* g_start,  \
                                      int64_t batch, int64_t T, int64_t H, int64_t n_tanh) {                               \
        backward<R>(U, out, g_out, lengths, g, g_start, batch, T, H, n_tanh);                                              \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

// The short depthwise causal convolution, and its gradient. Layouts: x y (B T D), weight (D W), state (B W-1 D).
//
//     y_t = bias + sum_{i<W} w_i * x_{t-W+1+i}
//
// Time is cut into blocks for the threads; in a block each row of channels is written once, from the W rows before it, which
// are still in the cache.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t BLOCK = 128;  // tokens of one piece of work

template <class R> struct Line {  // the inputs of one row: its state, then its tokens, zero beyond its length
    const R *x, *state, *zeros;
    int64_t length, past, D, step;  // step: from one token of x to the next

    const R* at(int64_t t) const { return t < 0 ? state + (past + t) * D : t < length ? x + t * step : zeros; }
};

template <class R>
void taps(R* __restrict y, const R* const* rows, const R* weight, const R* bias, int64_t W, int64_t D) {
    if (W == 4) {
        const R *__restrict a = rows[0], *__restrict b = rows[1], *__restrict c = rows[2], *__restrict d = rows[3];
        const R *__restrict w = weight;
        for (int64_t i = 0; i < D; i++)
            y[i] = a[i] * w[i] + b[i] * w[D + i] + c[i] * w[2 * D + i] + d[i] * w[3 * D + i];
    } else {
        for (int64_t i = 0; i < D; i++) y[i] = rows[0][i] * weight[i];
        for (int64_t k = 1; k < W; k++)
            for (int64_t i = 0; i < D; i++) y[i] += rows[k][i] * weight[k * D + i];
    }
    if (bias)
        for (int64_t i = 0; i < D; i++) y[i] += bias[i];
}

template <class R> void silu(R* y, int64_t D) {
    using S = Simd<R>;
    for (int64_t d = 0; d < D; d += S::lanes) {
        const int left = (int)std::min<int64_t>(S::lanes, D - d);
        S::store(y + d, S::silu(S::load(y + d, left)), left);
    }
}

template <class R> std::vector<R> by_tap(const R* weight, int64_t D, int64_t W) {
    std::vector<R> turned(W * D);
    for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < W; i++) turned[i * D + d] = weight[d * W + i];
    return turned;
}

// kept (B W-1 D): the inputs before each row's end; null where they are not wanted.
template <class R>
void forward(const R* x, const R* weight, const R* bias, const R* state, const int64_t* lengths, R* y, R* kept,
             int64_t batch, int64_t T, int64_t D, int64_t W, int64_t x_step, bool activation) {
    const std::vector<R> zeros(D), turned = by_tap(weight, D, W);
    const int64_t blocks = (T + BLOCK - 1) / BLOCK, past = W - 1;
#pragma omp parallel for collapse(2) schedule(static) if (batch * T * D > 1 << 14)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t length = lengths ? lengths[b] : T;
            const Line<R> line{x + b * T * x_step, state + b * past * D, zeros.data(), length, past, D, x_step};
            std::vector<const R*> rows(W);
            for (int64_t t = block * BLOCK; t < std::min(T, (block + 1) * BLOCK); t++) {
                for (int64_t i = 0; i < W; i++) rows[i] = line.at(t - past + i);
                R* const out = y + (b * T + t) * D;
                taps(out, rows.data(), turned.data(), bias, W, D);
                if (activation) silu(out, D);
            }
            for (int64_t i = 0; kept && block == 0 && i < past; i++)
                std::copy_n(line.at(length - past + i), D, kept + (b * past + i) * D);
        }
}

// g_weight (B blocks W D) and g_bias (B blocks D): whoever calls sums them. Inputs beyond a row's length get none.
template <class R>
void backward(const R* x, const R* weight, const R* state, const int64_t* lengths, const R* gy, R* gx, R* g_weight,
              R* g_bias, R* g_state, int64_t batch, int64_t T, int64_t D, int64_t W) {
    const std::vector<R> zeros(D);
    const int64_t blocks = (T + BLOCK - 1) / BLOCK, past = W - 1;
    const std::vector<R> ahead = by_tap(weight, D, W);
    std::vector<R> turned(W * D);  // the gradient of an input is the same convolution, of later gradients
    for (int64_t i = 0; i < W; i++) std::copy_n(ahead.begin() + (W - 1 - i) * D, D, turned.begin() + i * D);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t length = lengths ? lengths[b] : T;
            const Line<R> line{x + b * T * D, state + b * past * D, zeros.data(), length, past, D, D};
            const Line<R> slopes{gy + b * T * D, nullptr, zeros.data(), T, 0, D, D};
            std::vector<const R*> rows(W);
            R *const gw = g_weight + (b * blocks + block) * W * D, *const gb = g_bias + (b * blocks + block) * D;
            const int64_t first = block * BLOCK, last = std::min(T, first + BLOCK);
            for (int64_t t = block ? first : -past; t < last; t++) {
                for (int64_t i = 0; i < W; i++) rows[i] = t + i < 0 ? zeros.data() : slopes.at(t + i);
                R* const g = t < 0 ? g_state + (b * past + past + t) * D : gx + (b * T + t) * D;
                if (t < length) taps(g, rows.data(), turned.data(), (const R*)nullptr, W, D);
                else std::fill_n(g, D, R(0));
                if (t < 0) continue;
                const R* __restrict slope = slopes.at(t);
                for (int64_t d = 0; d < D; d++) gb[d] += slope[d];
                for (int64_t i = 0; i < W; i++) {
                    const R* __restrict in = line.at(t - past + i);
                    R* __restrict out = gw + i * D;
                    for (int64_t d = 0; d < D; d++) out[d] += slope[d] * in[d];
                }
            }
        }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                               \
    extern "C" void forward_##suffix(const R* x, const R* weight, const R* bias, const R* state, const int64_t* lengths, \
                                     R* y, R* kept, int64_t batch, int64_t T, int64_t D, int64_t W, int64_t x_step,      \
                                     int64_t activation) {                                                               \
        forward<R>(x, weight, bias, state, lengths, y, kept, batch, T, D, W, x_step, activation);                        \
    }                                                                                                                    \
    extern "C" void backward_##suffix(const R* x, const R* weight, const R* state, const int64_t* lengths, const R* gy,  \
                                      R* gx, R* g_weight, R* g_bias, R* g_state, int64_t batch, int64_t T, int64_t D,    \
                                      int64_t W) {                                                                       \
        backward<R>(x, weight, state, lengths, gy, gx, g_weight, g_bias, g_state, batch, T, D, W);                       \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

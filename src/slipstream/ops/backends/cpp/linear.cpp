// y = x W^T + bias for few rows of x: the matrix is read once, as fast as memory gives it. Layouts: x (N I), W (O I), y (N O).
//
// Several rows of W are read at a time, each a stream of its own, which keeps the memory busier than one; asking for lines ahead
// by hand made it slower where it was measured.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 17;  // numbers in W; fewer are read before a thread has woken

// N rows of x by M rows of W
template <class R, int N, int M>
inline void block(const R* x, const R* W, const R* bias, R* y, int64_t inputs, int64_t outputs) {
    using S = Simd<R>;
    typename S::vec total[N][M] = {};
    int64_t i = 0;
    for (; i + S::lanes <= inputs; i += S::lanes) {
        typename S::vec xs[N];
        for (int n = 0; n < N; n++) xs[n] = S::load(x + n * inputs + i, S::lanes);
        for (int m = 0; m < M; m++) {
            const typename S::vec v = S::load(W + m * inputs + i, S::lanes);
            for (int n = 0; n < N; n++) total[n][m] += v * xs[n];
        }
    }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) {
            R sum = S::sum(total[n][m]);
            for (int64_t k = i; k < inputs; k++) sum += x[n * inputs + k] * W[m * inputs + k];
            y[n * outputs + m] = sum + (bias ? bias[m] : R(0));
        }
}

template <class R, int N>
void forward(const R* x, const R* W, const R* bias, R* y, int64_t inputs, int64_t outputs) {
    constexpr int M = N == 1 ? 8 : N == 2 ? 4 : 2;
    const int64_t blocks = (outputs + M - 1) / M;
#pragma omp parallel for schedule(static) if (inputs * outputs > WORTH_THREADS)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t o = b * M;
        if (o + M <= outputs) block<R, N, M>(x, W + o * inputs, bias ? bias + o : nullptr, y + o, inputs, outputs);
        else
            for (; o < outputs; o++)
                block<R, N, 1>(x, W + o * inputs, bias ? bias + o : nullptr, y + o, inputs, outputs);
    }
}

template <class R>
void forward(const R* x, const R* W, const R* bias, R* y, int64_t rows, int64_t inputs, int64_t outputs) {
    if (rows == 1) forward<R, 1>(x, W, bias, y, inputs, outputs);
    if (rows == 2) forward<R, 2>(x, W, bias, y, inputs, outputs);
    if (rows == 3) forward<R, 3>(x, W, bias, y, inputs, outputs);
    if (rows == 4) forward<R, 4>(x, W, bias, y, inputs, outputs);
}

// Each row by the matrix of its own expert, zero where it is none of the E. Rows of one expert stand together, so that its matrix
// comes from memory once for all of them.
template <class R>
void by_experts(const R* x, const R* W, const int64_t* experts, R* y, int64_t rows, int64_t inputs, int64_t outputs, int64_t E) {
    constexpr int M = 8;
    const int64_t blocks = (outputs + M - 1) / M;
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return experts[a] < experts[b]; });
#pragma omp parallel for schedule(static) if (rows * inputs * outputs > WORTH_THREADS)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * M, end = std::min(first + M, outputs);
        for (int64_t n : order) {
            R* to = y + n * outputs;
            const R* own = W + experts[n] * outputs * inputs;
            if (experts[n] >= E) std::fill(to + first, to + end, R(0));
            else if (first + M == end)
                block<R, 1, M>(x + n * inputs, own + first * inputs, nullptr, to + first, inputs, outputs);
            else
                for (int64_t o = first; o < end; o++)
                    block<R, 1, 1>(x + n * inputs, own + o * inputs, nullptr, to + o, inputs, outputs);
        }
    }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                           \
    extern "C" void forward_##suffix(const R* x, const R* W, const R* bias, R* y, int64_t rows, int64_t inputs,      \
                                     int64_t outputs) {                                                              \
        forward<R>(x, W, bias, y, rows, inputs, outputs);                                                            \
    }                                                                                                                \
    extern "C" void by_experts_##suffix(const R* x, const R* W, const int64_t* experts, R* y, int64_t rows,          \
                                        int64_t inputs, int64_t outputs, int64_t E) {                                \
        by_experts<R>(x, W, experts, y, rows, inputs, outputs, E);                                                   \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

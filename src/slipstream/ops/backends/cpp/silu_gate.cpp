// x * silu(gate) of rows that may stand apart by more than their width, and its gradient.
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers; fewer are done before a thread has woken

template <class R>
void forward(const R* x, const R* gate, R* y, int64_t rows, int64_t width, int64_t x_step, int64_t gate_step) {
    using S = Simd<R>;
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d += S::lanes) {
            const int left = (int)(width - d < S::lanes ? width - d : S::lanes);
            const auto z = S::load(gate + i * gate_step + d, left), v = S::load(x + i * x_step + d, left);
            S::store(y + i * width + d, v * S::silu(z), left);
        }
}

template <class R>
void backward(const R* x, const R* gate, const R* gy, R* gx, R* g_gate, int64_t rows, int64_t width, int64_t x_step,
              int64_t gate_step) {
    using S = Simd<R>;
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d += S::lanes) {
            const int left = (int)(width - d < S::lanes ? width - d : S::lanes);
            const auto z = S::load(gate + i * gate_step + d, left), v = S::load(x + i * x_step + d, left);
            const auto g = S::load(gy + i * width + d, left), s = S::sigmoid(z), opened = z * s;
            S::store(gx + i * width + d, g * opened, left);
            S::store(g_gate + i * width + d, g * v * (s + opened * (R(1) - s)), left);
        }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                              \
    extern "C" void forward_##suffix(const R* x, const R* gate, R* y, int64_t rows, int64_t width, int64_t x_step,      \
                                     int64_t gate_step) {                                                               \
        forward<R>(x, gate, y, rows, width, x_step, gate_step);                                                         \
    }                                                                                                                   \
    extern "C" void backward_##suffix(const R* x, const R* gate, const R* gy, R* gx, R* g_gate, int64_t rows,           \
                                      int64_t width, int64_t x_step, int64_t gate_step) {                               \
        backward<R>(x, gate, gy, gx, g_gate, rows, width, x_step, gate_step);                                           \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

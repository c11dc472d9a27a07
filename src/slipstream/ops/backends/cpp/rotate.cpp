// Pairs (i, i + P) of the first 2P channels of every head turned by the angles of its token, and the others copied: one pass.
// Turned back, by -sin, that is its gradient.
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers; fewer are done before a thread has woken

// x (B T H K), its last axis contiguous; cos and sin (B T P), y contiguous.
template <class R>
void forward(const R* x, const R* cos, const R* sin, R* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t P, bool back,
             int64_t row, int64_t token, int64_t head) {
    using S = Simd<R>;
#pragma omp parallel for schedule(static) if (B * T * H * K > WORTH_THREADS)
    for (int64_t i = 0; i < B * T; i++)
        for (int64_t h = 0; h < H; h++) {
            const R* const from = x + i / T * row + i % T * token + h * head;
            R* const to = y + (i * H + h) * K;
            for (int64_t d = 0; d < P; d += S::lanes) {
                const int left = (int)std::min<int64_t>(P - d, S::lanes);
                const auto a = S::load(from + d, left), b = S::load(from + P + d, left);
                const auto c = S::load(cos + i * P + d, left), angle = S::load(sin + i * P + d, left);
                const auto s = back ? -angle : angle;
                S::store(to + d, a * c - b * s, left);
                S::store(to + P + d, b * c + a * s, left);
            }
            std::copy(from + 2 * P, from + K, to + 2 * P);
        }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                              \
    extern "C" void forward_##suffix(const R* x, const R* cos, const R* sin, R* y, int64_t B, int64_t T, int64_t H,     \
                                     int64_t K, int64_t P, int64_t back, int64_t row, int64_t token, int64_t head) {    \
        forward<R>(x, cos, sin, y, B, T, H, K, P, back, row, token, head);                                              \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

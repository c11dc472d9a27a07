// Norms of rows, with a weight and a gate where there are, and their gradients: one pass over what is read and written.
//
//     n = u r, r = 1 / sqrt(sum(u^2) / per + eps)        y = n * weight * silu(gate), u = x;  or y = n * weight, u = x silu(gate)
//
// per is the width for a root mean square, 1 for a length. Rows of x and gate may stand apart by more than their width.
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers; fewer are done before a thread has woken

template <class R> struct Problem {
    const R *x, *weight, *gate;  // weight and gate may be null
    int64_t n_rows, width, x_step, gate_step;
    double eps;
    int64_t per, gate_first;
};

template <class R> struct Row {
    using S = Simd<R>;
    using vec = typename S::vec;
    const Problem<R>& p;
    const R *x, *gate;

    Row(const Problem<R>& p, int64_t i) : p(p), x(p.x + i * p.x_step), gate(p.gate ? p.gate + i * p.gate_step : nullptr) {}

    int left(int64_t d) const { return (int)(p.width - d < S::lanes ? p.width - d : S::lanes); }
    vec opened(int64_t d) const { return gate ? S::silu(S::load(gate + d, left(d))) : S::splat(R(1)); }
    vec weight(int64_t d) const { return p.weight ? S::load(p.weight + d, left(d)) : S::splat(R(1)); }
    vec normed(int64_t d) const {  // u
        const vec v = S::load(x + d, left(d));
        return p.gate_first ? v * opened(d) : v;
    }

    R scale() const {  // r
        vec total = {};
        for (int64_t d = 0; d < p.width; d += S::lanes) {
            const vec u = normed(d);
            total += u * u;
        }
        return R(1) / std::sqrt(S::sum(total) / R(p.per) + R(p.eps));
    }
};

template <class R> void forward(const Problem<R>& p, R* y) {
    using S = Simd<R>;
#pragma omp parallel for schedule(static) if (p.n_rows * p.width > WORTH_THREADS)
    for (int64_t i = 0; i < p.n_rows; i++) {
        const Row<R> row(p, i);
        const R r = row.scale();
        for (int64_t d = 0; d < p.width; d += S::lanes) {
            auto n = row.normed(d) * r * row.weight(d);
            if (p.gate && !p.gate_first) n *= row.opened(d);
            S::store(y + i * p.width + d, n, row.left(d));
        }
    }
}

// g_weight has a part (width) for each block of rows, which the caller sums. gy and all gradients are contiguous.
template <class R> void backward(const Problem<R>& p, const R* gy, R* gx, R* g_weight, R* g_gate, int64_t block) {
    using S = Simd<R>;
    using vec = typename S::vec;
    const int64_t blocks = (p.n_rows + block - 1) / block;
#pragma omp parallel for schedule(static) if (p.n_rows * p.width > WORTH_THREADS)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = b * block; i < p.n_rows && i < (b + 1) * block; i++) {
            const Row<R> row(p, i);
            const bool after = p.gate && !p.gate_first;
            const R r = row.scale(), *slope = gy + i * p.width;
            R *const gw = g_weight ? g_weight + b * p.width : nullptr;
            vec along = {};  // sum of gn * n
            for (int64_t d = 0; d < p.width; d += S::lanes) {
                vec g = S::load(slope + d, row.left(d));
                if (after) g *= row.opened(d);
                const vec n = row.normed(d) * r;
                if (gw) S::store(gw + d, S::load(gw + d, row.left(d)) + g * n, row.left(d));
                along += g * row.weight(d) * n;
            }
            const R mean = S::sum(along) / R(p.per);
            for (int64_t d = 0; d < p.width; d += S::lanes) {
                const int left = row.left(d);
                const vec g = S::load(slope + d, left), n = row.normed(d) * r;
                vec gn = g * row.weight(d), s = {}, opened = S::splat(R(1)), rise = {};
                if (p.gate) {
                    const vec z = S::load(row.gate + d, left);
                    s = S::sigmoid(z);
                    opened = z * s;
                    rise = s + opened * (R(1) - s);  // of silu
                }
                if (after) S::store(g_gate + i * p.width + d, gn * n * rise, left);
                if (after) gn *= opened;
                const vec gu = (gn - n * mean) * r;
                S::store(gx + i * p.width + d, p.gate_first ? gu * opened : gu, left);
                if (p.gate_first) S::store(g_gate + i * p.width + d, gu * S::load(row.x + d, left) * rise, left);
            }
        }
}

}  // namespace

#define KERNELS(R, suffix)                                                                                                 \
    extern "C" void forward_##suffix(const R* x, const R* weight, const R* gate, R* y, int64_t rows, int64_t width,        \
                                     int64_t x_step, int64_t gate_step, double eps, int64_t per, int64_t gate_first) {     \
        forward<R>({x, weight, gate, rows, width, x_step, gate_step, eps, per, gate_first}, y);                            \
    }                                                                                                                      \
    extern "C" void backward_##suffix(const R* x, const R* weight, const R* gate, const R* gy, R* gx, R* g_weight,         \
                                      R* g_gate, int64_t rows, int64_t width, int64_t x_step, int64_t gate_step,           \
                                      double eps, int64_t per, int64_t gate_first, int64_t block) {                        \
        backward<R>({x, weight, gate, rows, width, x_step, gate_step, eps, per, gate_first}, gy, gx, g_weight, g_gate,     \
                    block);                                                                                                \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

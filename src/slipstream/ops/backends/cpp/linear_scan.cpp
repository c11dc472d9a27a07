// h_t = a_t * h_{t-1} + b_t of many channels, real or complex, and its gradient. Layouts (B T R); a complex number is a pair.
//
// A thread carries a strip of channels through time, so that each number is read once; the compiler vectorises the strip.
#include <algorithm>
#include <complex>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "precision.h"

namespace {

constexpr int64_t LINE = 64, MOST = 1024;  // channels of the narrowest and of the widest strip

// Wide strips read memory in order; narrow ones are for when there are more threads than rows.
inline int64_t strip_width(int64_t batch, int64_t R) {
#ifdef _OPENMP
    const int64_t threads = omp_get_max_threads();
#else
    const int64_t threads = 1;
#endif
    const int64_t each = std::max<int64_t>(1, threads / std::max<int64_t>(1, batch)), width = (R + each - 1) / each;
    return std::min(MOST, (width + LINE - 1) / LINE * LINE);
}

template <class Z> inline Z conjugate(Z z) { return z; }
template <class R> inline std::complex<R> conjugate(std::complex<R> z) { return {z.real(), -z.imag()}; }

template <class Z> inline Z product(Z a, Z b) { return a * b; }
template <class R> inline std::complex<R> product(std::complex<R> a, std::complex<R> b) {  // no detour for infinities
    return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
}

template <class Z>
void forward(const Z* a, const Z* b, const Z* start, const int64_t* lengths, Z* out, int64_t batch, int64_t T, int64_t R) {
    const int64_t width = strip_width(batch, R), strips = (R + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t row = 0; row < batch; row++)
        for (int64_t strip = 0; strip < strips; strip++) {
            const int64_t first = strip * width, n = std::min(width, R - first), length = lengths ? lengths[row] : T;
            Z h[MOST];
            for (int64_t i = 0; i < n; i++) h[i] = start[row * R + first + i];
            for (int64_t t = 0; t < T; t++) {
                const int64_t at = (row * T + t) * R + first;
                if (t < length)
                    for (int64_t i = 0; i < n; i++) h[i] = product(a[at + i], h[i]) + b[at + i];
                for (int64_t i = 0; i < n; i++) out[at + i] = h[i];
            }
        }
}

template <class Z>
void backward(const Z* a, const Z* h, const Z* start, const int64_t* lengths, const Z* g, Z* ga, Z* gb, Z* g_start,
              int64_t batch, int64_t T, int64_t R) {
    const int64_t width = strip_width(batch, R), strips = (R + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t row = 0; row < batch; row++)
        for (int64_t strip = 0; strip < strips; strip++) {
            const int64_t first = strip * width, n = std::min(width, R - first), length = lengths ? lengths[row] : T;
            Z carry[MOST];
            for (int64_t i = 0; i < n; i++) carry[i] = Z(0);
            for (int64_t t = T - 1; t >= 0; t--) {
                const int64_t at = (row * T + t) * R + first;
                const Z* before = t ? h + at - R : start + row * R + first;
                for (int64_t i = 0; i < n; i++) carry[i] += g[at + i];
                if (t < length) {
                    for (int64_t i = 0; i < n; i++) gb[at + i] = carry[i];
                    for (int64_t i = 0; i < n; i++) ga[at + i] = product(carry[i], conjugate(before[i]));
                    for (int64_t i = 0; i < n; i++) carry[i] = product(carry[i], conjugate(a[at + i]));
                } else {
                    for (int64_t i = 0; i < n; i++) ga[at + i] = gb[at + i] = Z(0);
                }
            }
            for (int64_t i = 0; i < n; i++) g_start[row * R + first + i] = carry[i];
        }
}

}  // namespace

#define KERNELS(Z, suffix)                                                                                               \
    extern "C" void forward_##suffix(const Z* a, const Z* b, const Z* start, const int64_t* lengths, Z* out,             \
                                     int64_t batch, int64_t T, int64_t R) {                                              \
        forward<Z>(a, b, start, lengths, out, batch, T, R);                                                              \
    }                                                                                                                    \
    extern "C" void backward_##suffix(const Z* a, const Z* h, const Z* start, const int64_t* lengths, const Z* g, Z* ga, \
                                      Z* gb, Z* g_start, int64_t batch, int64_t T, int64_t R) {                          \
        backward<Z>(a, h, start, lengths, g, ga, gb, g_start, batch, T, R);                                              \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))
FOR_c64(KERNELS(std::complex<float>, c64))
FOR_c128(KERNELS(std::complex<double>, c128))

// Vectors of the width the CPU has, by the compiler's own vector types: what the kernels are written in.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "precision.h"

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
#else
constexpr int VECTOR_BYTES = 32;
#endif

template <class R> struct Integer;
template <> struct Integer<float> { using type = int32_t; };
template <> struct Integer<double> { using type = int64_t; };

template <class R> struct Simd {
    static constexpr int lanes = VECTOR_BYTES / sizeof(R);
    typedef R vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef typename Integer<R>::type ivec __attribute__((vector_size(VECTOR_BYTES)));

    // The first n lanes from memory, zero in the rest.
    static inline vec load(const R* p, int n) {
        vec v = {};
        if (n >= lanes) std::memcpy(&v, p, sizeof(v));
        else if (n > 0) std::memcpy(&v, p, n * sizeof(R));
        return v;
    }

    static inline void store(R* p, vec v, int n) {
        if (n >= lanes) std::memcpy(p, &v, sizeof(v));
        else if (n > 0) std::memcpy(p, &v, n * sizeof(R));
    }

    // Half of the lanes onto the other half, and so on: few steps that wait for one another.
    static inline R sum(vec v) {
        R part[lanes];
        std::memcpy(part, &v, sizeof(v));
        for (int half = lanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++) part[i] += part[i + half];
        return part[0];
    }

    static inline vec splat(R x) { return x - vec{}; }

    // e^x to within two units in the last place. NaN stays NaN; what underflows is 0, what overflows is inf.
    static inline vec exp(vec x);

    // 2^x, relative error 2e-7 or 4e-16, in half the instructions. NaN stays NaN; what underflows is 0 or 2^-126, 2^-1022.
    static inline vec exp2(vec x);

    static inline vec sigmoid(vec x) { return R(1) / (R(1) + exp(-x)); }
    static inline vec silu(vec x) { return x / (R(1) + exp(-x)); }

    // log(1 + e^x) = max(x, 0) + 2 atanh(u / (2 + u)) with u = e^-|x|: a series in at most 1/3, exact also where it is small.
    static inline vec softplus(vec x) {
        const ivec negative = x < R(0);
        const vec u = exp(negative ? x : -x), s = u / (u + R(2)), s2 = s * s;
        constexpr int terms = sizeof(R) == 4 ? 8 : 17;
        vec series = splat(R(1) / R(2 * terms - 1));
        for (int i = terms - 2; i >= 0; i--) series = series * s2 + R(1) / R(2 * i + 1);
        return (negative ? vec{} : x) + R(2) * s * series;
    }
};

template <> inline Simd<float>::vec Simd<float>::exp(vec x) {
    const float low = -87.33f, high = 88.37f, shift = 12582912.f;  // adding 1.5 * 2^23 rounds to a whole number
    const ivec small = x < low, large = x > high;
    x = small ? splat(low) : large ? splat(high) : x;
    const vec shifted = x * 1.44269504f + shift, n = shifted - shift;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    const vec power = (vec)(((ivec)shifted << 23) + 0x3f800000);
    return small ? vec{} : large ? splat(INFINITY) : p * power;
}

// The series of e^r without its first two terms, divided by r^2.
inline Simd<double>::vec above_linear(Simd<double>::vec r) {
    auto p = r * (1. / 6227020800.) + 1. / 479001600.;
    p = p * r + 1. / 39916800.;
    p = p * r + 1. / 3628800.;
    p = p * r + 1. / 362880.;
    p = p * r + 1. / 40320.;
    p = p * r + 1. / 5040.;
    p = p * r + 1. / 720.;
    p = p * r + 1. / 120.;
    p = p * r + 1. / 24.;
    p = p * r + 1. / 6.;
    return p * r + 0.5;
}

template <> inline Simd<double>::vec Simd<double>::exp(vec x) {
    const double low = -708.0, high = 709.0, shift = 6755399441055744.0;  // 1.5 * 2^52
    const ivec small = x < low, large = x > high;
    x = small ? splat(low) : large ? splat(high) : x;
    const vec shifted = x * 1.4426950408889634 + shift, n = shifted - shift;
    const vec r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    const vec p = above_linear(r) * (r * r) + r + 1.;
    const vec power = (vec)(((ivec)shifted << 52) + (1023ll << 52));
    return small ? vec{} : large ? splat(INFINITY) : p * power;
}

// x as a whole number n and a rest of at most 1/2: times_power makes p * 2^n of both.
template <class R> struct Halves {
    using vec = typename Simd<R>::vec;
    using ivec = typename Simd<R>::ivec;
    vec rest;
#ifdef __AVX512DQ__
    vec whole;

    explicit Halves(vec x) {
        if constexpr (sizeof(R) == 4) rest = (vec)_mm512_reduce_ps((__m512)x, 0);
        else rest = (vec)_mm512_reduce_pd((__m512d)x, 0);
        whole = x - rest;
    }

    vec times_power(vec p) const {
        if constexpr (sizeof(R) == 4) return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
        else return (vec)_mm512_scalef_pd((__m512d)p, (__m512d)whole);
    }
#else
    vec shifted;

    explicit Halves(vec x) {
        const R shift = sizeof(R) == 4 ? R(12582912.) : R(6755399441055744.);  // 1.5 * 2^23, 1.5 * 2^52: adding it rounds
        const R low = sizeof(R) == 4 ? -126 : -1022, high = sizeof(R) == 4 ? 128 : 1024;
        x = x < low ? Simd<R>::splat(low) : x;
        x = x > high ? Simd<R>::splat(high) : x;
        shifted = x + shift;
        rest = x - (shifted - shift);
    }

    vec times_power(vec p) const { return (vec)((ivec)p + ((ivec)shifted << (sizeof(R) == 4 ? 23 : 52))); }
#endif
};

template <> inline Simd<float>::vec Simd<float>::exp2(vec x) {
    const Halves<float> at(x);
    const vec r = at.rest;
    vec p = r * 1.3264723893e-3f + 9.6715128695e-3f;
    p = p * r + 5.5507337542e-2f;
    p = p * r + 2.4022242080e-1f;
    p = p * r + 6.9314697759e-1f;
    return at.times_power(p * r + 1.f);
}

template <> inline Simd<double>::vec Simd<double>::exp2(vec x) {
    const Halves<double> at(x);
    const vec r = at.rest * 0.69314718055994530942;
    const vec p = above_linear(r) * r + 1.;
    return at.times_power(p * r + 1.);
}

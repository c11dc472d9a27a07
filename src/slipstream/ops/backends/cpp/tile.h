// Matrix products of a few rows and vectors, in registers: what the chunked kernels are made of.
//
//     C (M x N) += A (M x depth, any two strides: its numbers are broadcast) B (depth x N, rows contiguous)
//
// A kernel walks a product by `tiles` and does all there is to do with a tile (more products, factors of rows, a triangular
// system) before it leaves the registers. Buffers are padded to whole vectors, so no tile is cut within one.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#ifdef __SSE__
#include <immintrin.h>
#endif

#include "simd.h"

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

// The largest tile: as many accumulators as the CPU has registers, less a row of B and a number of A.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 2;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#endif

template <class R> constexpr int64_t padded(int64_t n) { return (n + Simd<R>::lanes - 1) / Simd<R>::lanes * Simd<R>::lanes; }

template <class R> INLINE typename Simd<R>::vec load(const R* p) {
    typename Simd<R>::vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <class R> INLINE void store(R* p, typename Simd<R>::vec v) { std::memcpy(p, &v, sizeof(v)); }

template <class R, int M, int N> struct Tile {
    using S = Simd<R>;
    using vec = typename S::vec;
    static constexpr int rows = M, columns = N * S::lanes;
    vec at[M][N];

    INLINE void load(const R* c, int64_t step) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) at[m][n] = ::load(c + m * step + n * S::lanes);
    }

    INLINE void store(R* c, int64_t step) const {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) ::store(c + m * step + n * S::lanes, at[m][n]);
    }

    // Only the `first` columns.
    INLINE void store(R* c, int64_t step, int64_t first) const {
        if (first >= N * S::lanes) return store(c, step);
        R all[M * N * S::lanes];
        store(all, N * S::lanes);
        for (int m = 0; m < M; m++) std::copy_n(all + m * N * S::lanes, first, c + m * step);
    }

    // += A B
    INLINE void add(const R* a, int64_t row, int64_t step, const R* b, int64_t b_step, int64_t depth) {
        for (int64_t d = 0; d < depth; d++, a += step, b += b_step) {
            vec bs[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) bs[n] = ::load(b + n * S::lanes);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const R x = a[m * row];
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) at[m][n] += x * bs[n];
            }
        }
    }

    // Row m times rows[m].
    INLINE void times(const R* rows) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) at[m][n] *= rows[m];
    }

    INLINE void times(R x) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) at[m][n] *= x;
    }

    // Column n times columns[n].
    INLINE void times_columns(const R* columns) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const vec x = ::load(columns + n * S::lanes);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) at[m][n] *= x;
        }
    }

    // += rows of c, row m times rows[m]
    INLINE void add_rows(const R* c, int64_t step, const R* rows) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) at[m][n] += rows[m] * ::load(c + m * step + n * S::lanes);
    }

    // (I - strictly lower part of A)^-1 of itself, by substitution.
    INLINE void solve(const R* a, int64_t row, int64_t step = 1) {
#pragma GCC unroll 8
        for (int j = 0; j < M - 1; j++)
#pragma GCC unroll 8
            for (int m = j + 1; m < M; m++)
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) at[m][n] += a[m * row + j * step] * at[j][n];
    }
};

template <class R, int M, int N, class F> INLINE void tiles_of_rows(int64_t i, int64_t rows, int64_t j, F& f) {
    for (; i + M <= rows; i += M) f(Tile<R, M, N>(), i, j);
    if constexpr (M > 1)
        if (i < rows) tiles_of_rows<R, (M > 4 ? 4 : M / 2), N>(i, rows, j, f);
}

// f(tile of zeros, its first row, its first column) over rows x columns, columns a whole number of vectors. The rows of one
// tile's columns come in order, one after the other.
template <class R, class F> INLINE void tiles(int64_t rows, int64_t columns, F f) {
    constexpr int64_t width = TILE_VECTORS * Simd<R>::lanes;
    int64_t j = 0;
    for (; j + width <= columns; j += width) tiles_of_rows<R, TILE_ROWS, TILE_VECTORS>(0, rows, j, f);
    if constexpr (TILE_VECTORS == 2)
        if (j < columns) tiles_of_rows<R, TILE_ROWS, 1>(0, rows, j, f);
}

// Lanes of a and b in a new order, b's numbered on from a's.
template <class R, int... I> INLINE typename Simd<R>::vec mixed(typename Simd<R>::vec a, typename Simd<R>::vec b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename Simd<R>::ivec{I...});
#endif
}

// Of every 2W lanes: the first W of a, then the first W of b; and the same of the last W.
template <class R, int W, int... I>
INLINE void swap_blocks(typename Simd<R>::vec& a, typename Simd<R>::vec& b, std::integer_sequence<int, I...>) {
    constexpr int L = Simd<R>::lanes;
    const typename Simd<R>::vec first = mixed<R, ((I & W) ? L + I - W : I)...>(a, b);
    b = mixed<R, ((I & W) ? L + I : I + W)...>(a, b);
    a = first;
}

template <class R, int W = 1> INLINE void transpose(typename Simd<R>::vec* rows) {
    constexpr int L = Simd<R>::lanes;
#pragma GCC unroll 16
    for (int r = 0; r < L; r++)
        if (!(r & W)) swap_blocks<R, W>(rows[r], rows[r + W], std::make_integer_sequence<int, L>());
    if constexpr (2 * W < L) transpose<R, 2 * W>(rows);
}

// The sum of the lanes of each of as many vectors as one has lanes.
template <class R, int W = Simd<R>::lanes / 2> INLINE typename Simd<R>::vec sums(typename Simd<R>::vec* of) {
#pragma GCC unroll 16
    for (int r = 0; r < W; r++) {
        swap_blocks<R, W>(of[r], of[r + W], std::make_integer_sequence<int, Simd<R>::lanes>());
        of[r] += of[r + W];
    }
    if constexpr (W > 1) return sums<R, W / 2>(of);
    else return of[0];
}

// Asks for rows that will be needed soon: heads lie apart, so no prefetcher of the CPU's own finds them.
template <bool written, class R> INLINE void ahead(const R* from, int64_t token, int64_t tokens, int64_t columns) {
    constexpr int64_t line = 64 / sizeof(R);
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t d = 0; d < columns; d += line) __builtin_prefetch(from + i * token + d, written, 2);
}

// `tokens` rows of `columns` numbers, padded with zeros to whole vectors.
template <class R>
void copy_rows(const R* from, int64_t token, int64_t tokens, int64_t columns, R* to, int64_t step) {
    using S = Simd<R>;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t d = 0; d < columns; d += S::lanes)
            store(to + i * step + d, S::load(from + i * token + d, (int)std::min<int64_t>(columns - d, S::lanes)));
}

// Row i times rows[i].
template <class R> void scale_rows(const R* from, const R* rows, int64_t tokens, R* to, int64_t step) {
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t d = 0; d < step; d += Simd<R>::lanes) store(to + i * step + d, load(from + i * step + d) * rows[i]);
}

// The same, transposed: to (columns x step), whole vectors of tokens.
template <class R> void copy_columns(const R* from, int64_t token, int64_t tokens, int64_t columns, R* to, int64_t step) {
    using S = Simd<R>;
    constexpr int L = S::lanes;
    for (int64_t i = 0; i < tokens; i += L)
        for (int64_t d = 0; d < columns; d += L) {
            const int n_rows = (int)std::min<int64_t>(tokens - i, L), n = (int)std::min<int64_t>(columns - d, L);
            typename S::vec block[L];
            for (int r = 0; r < L; r++)
                block[r] = r < n_rows ? S::load(from + (i + r) * token + d, n) : typename S::vec{};
            transpose<R>(block);
            for (int r = 0; r < n; r++) store(to + (d + r) * step + i, block[r]);
        }
}

// Memory of a thread's own that outlives the call, so that a short call need not ask for any.
class Room {
    struct Kept {
        char* start = nullptr;
        size_t bytes = 0;
        ~Kept() { std::free(start); }
    };
    static constexpr size_t line = 64;
    char* next;

  public:
    explicit Room(size_t bytes) {
        static thread_local Kept kept;
        if (kept.bytes < bytes) {
            std::free(kept.start);
            kept.bytes = 0;
            kept.start = (char*)std::aligned_alloc(line, (bytes + line - 1) / line * line);
            if (!kept.start) throw std::bad_alloc();
            kept.bytes = bytes;
        }
        next = kept.start;
    }

    template <class R> R* take(int64_t numbers) {
        R* const taken = (R*)next;
        next += (numbers * sizeof(R) + line - 1) / line * line;
        return taken;
    }
};

// While it lives, numbers too small to be normal are zero in this thread: a state that fades away would else take a hundred
// times as long as one that does not.
class FlushTiny {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();

  public:
    FlushTiny() { _mm_setcsr(before | 0x8040); }
    ~FlushTiny() { _mm_setcsr(before); }
#else
  public:
    FlushTiny() {}
#endif
};

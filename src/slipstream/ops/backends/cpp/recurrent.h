// What recurrences with weights are made of: h W for a few rows at a time, one token after another.
//
// W is packed into panels as wide as registers hold, so that it is read in order: [panel][input][vectors of the panel]. A panel
// has some channels, and for each of them all gates, so that a token's cell follows its product while the sums are in registers.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

constexpr int ROWS = VECTOR_BYTES == 64 ? 4 : 2;     // rows that share what is read of W
constexpr int64_t WORTH_SPLITTING = 1 << 16;         // numbers of W from which on a wait for other threads pays, every token

// By powers of two, which are cheaper than those of e, and exact enough where one is added to them.
template <class R> inline typename Simd<R>::vec logistic(typename Simd<R>::vec x) {
    return R(1) / (R(1) + Simd<R>::exp2(x * R(-1.44269504088896340736)));
}

template <class R> inline typename Simd<R>::vec hyperbolic(typename Simd<R>::vec x) {
    return R(2) * logistic<R>(R(2) * x) - R(1);
}

// Panels of G gates by C vectors of channels.
template <class R, int G, int C> struct Weights {
    using S = Simd<R>;
    using vec = typename S::vec;
    static constexpr int V = G * C, width = C * S::lanes;
    int64_t inputs, channels, panels;
    std::vector<vec> packed;

    // The weight from input k to gate g of channel c is W[g * gate_apart + c * channel_apart + k * input_apart].
    Weights(const R* W, int64_t inputs, int64_t channels, int64_t gate_apart, int64_t channel_apart, int64_t input_apart)
        : inputs(inputs), channels(channels), panels((channels + width - 1) / width), packed(panels * inputs * V) {
        R* to = (R*)packed.data();
        for (int64_t p = 0; p < panels; p++, to += inputs * V * S::lanes)
            for (int v = 0; v < V; v++) {
                const int64_t first = p * width + v % C * S::lanes;
                const int n = (int)std::clamp<int64_t>(channels - first, 0, S::lanes);
                const R* from = W + v / C * gate_apart + first * channel_apart;
                for (int64_t k = 0; k < inputs; k++)
                    for (int i = 0; i < n; i++) to[(k * V + v) * S::lanes + i] = from[i * channel_apart + k * input_apart];
            }
    }

    // cell.input(row): the inputs of one row; cell.finish(row, first channel, sums[V]): what becomes of its products.
    template <class Cell> void token(const Cell& cell, int64_t row, int64_t end, int64_t first, int64_t last) const {
        for (int64_t p = first; p < last; p++) {
            int64_t r = row;
            for (; r + ROWS <= end; r += ROWS) block<ROWS>(cell, r, p);
            if (ROWS > 2 && r + 2 <= end) block<2>(cell, r, p), r += 2;
            for (; r < end; r++) block<1>(cell, r, p);
        }
    }

    template <int N, class Cell> void block(const Cell& cell, int64_t row, int64_t panel) const {
        constexpr int UNROLL = N == 1 ? 2 : 1;  // a single row has too few sums to keep the units busy
        const vec* w = &packed[panel * inputs * V];
        const R* in[N];
        for (int r = 0; r < N; r++) in[r] = cell.input(row + r);
        vec sums[UNROLL][N][V] = {};
        int64_t k = 0;
        for (; k + UNROLL <= inputs; k += UNROLL)
            for (int u = 0; u < UNROLL; u++, w += V)
                for (int r = 0; r < N; r++)
                    for (int v = 0; v < V; v++) sums[u][r][v] += in[r][k + u] * w[v];
        for (; k < inputs; k++, w += V)
            for (int r = 0; r < N; r++)
                for (int v = 0; v < V; v++) sums[0][r][v] += in[r][k] * w[v];
        for (int r = 0; r < N; r++) {
            if (UNROLL == 2)
                for (int v = 0; v < V; v++) sums[0][r][v] += sums[UNROLL - 1][r][v];
            cell.finish(row + r, panel * width, sums[0][r]);
        }
    }

    // cell(t) for the tokens from begin on, n of them, in steps of +1 or -1. Threads share out the rows; where there are fewer
    // rows than threads, and W is large, they share out its panels and wait for each other after every token.
    template <class Cells> void over_time(int64_t batch, int64_t begin, int64_t n, int64_t step, const Cells& cells) const {
        const int64_t threads = n_threads();
        const bool split = batch < threads && inputs * channels * G >= WORTH_SPLITTING;
        const int64_t parts = std::max<int64_t>(1, std::min(threads, split ? panels : batch));
#pragma omp parallel num_threads(parts)
        {
            const int64_t part = this_thread(), each = ((split ? panels : batch) + parts - 1) / parts;
            for (int64_t i = 0; i < n; i++) {
                const auto cell = cells(begin + i * step);
                if (split) token(cell, 0, batch, std::min(panels, part * each), std::min(panels, (part + 1) * each));
                else token(cell, std::min(batch, part * each), std::min(batch, (part + 1) * each), 0, panels);
                if (split) {
#pragma omp barrier
                }
            }
        }
    }
};

// Lines (B T H) of a recurrence: where each row ends.
struct Rows {
    const int64_t* lengths;  // null: all rows are T long
    int64_t batch, T, H;

    int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
    template <class R> R* at(R* line, int64_t b, int64_t t, int64_t gates = 1) const {
        return line + (b * T + t) * gates * H;
    }
};

// What the scans with a matrix state share: their tensors, how the work is cut for threads, and the walk through time.
//
// A thread takes some heads of a row and goes through time a block of tokens at a time, head by head, so that tokens are read
// as they lie and what a block needs, states included, stays in the cache.
#pragma once
#include "threads.h"
#include "tile.h"

enum Decay : int64_t { NONE, HEAD, CHANNEL };
constexpr int64_t CHUNK = 48;          // tokens of a block: few flops among its own pairs, and many to one pass of a state
constexpr double WORTH_THREADS = 1e6;  // multiplications; fewer are done before a thread has woken

// A tensor (B T H .) whose last axis is contiguous.
template <class R> struct Line {
    const R* start;
    int64_t row, token, head;

    const R* at(int64_t b, int64_t t, int64_t h) const { return start + b * row + t * token + h * head; }
};

#define STRIDES(x) int64_t x##_row, int64_t x##_token, int64_t x##_head
#define LINE(x) {x, x##_row, x##_token, x##_head}

template <class R> struct Problem {
    Line<R> q, k, v, decay;
    const R* start;          // (B H K V), or null: zeros
    const int64_t* lengths;  // null: all rows are T long
    R *o, *final;            // (B T H V), (B H K V)
    int64_t B, T, H, K, V;
    Decay kind;
    R scale;

    int64_t chunk() const { return std::min(T, CHUNK); }
};

// Some heads of a row of the batch, and some columns of v.
struct Share {
    int64_t b, head, heads, column, columns;
};

// The work cut so that every thread gets some: by heads, and where these are too few also by columns.
struct Shares {
    int64_t H, V, each, parts, width, strips, total;

    Shares(int64_t B, int64_t H, int64_t V, int64_t lanes, int64_t threads)
        : H(H), V(V), each(std::max<int64_t>(1, B * H / threads)) {
        each = std::min(each, H);
        parts = (H + each - 1) / each;
        const int64_t cuts = std::max<int64_t>(1, threads / std::max<int64_t>(1, B * parts));
        width = std::max(lanes, ((V + cuts - 1) / cuts + lanes - 1) / lanes * lanes);
        strips = (V + width - 1) / width;
        total = B * parts * strips;
    }

    Share operator[](int64_t i) const {
        const int64_t column = i % strips * width, head = i / strips % parts * each;
        return {i / strips / parts, head, std::min(each, H - head), column, std::min(width, V - column)};
    }
};

// Where a thread is: n tokens from t of one head, its state S (K x v_step), and its outputs.
template <class R> struct Place {
    int64_t h, t, n;
    R *S, *o;
    bool first;  // of the heads of this share

    Place part(int64_t i, int64_t tokens, int64_t apart) const { return {h, t + i, tokens, S, o + i * apart, false}; }
};

// One share of the work, and the memory of whoever does it.
template <class R> struct Worker {
    const Problem<R>& p;
    const Share s;
    const int64_t step, v_step, k_step;  // of rows of pairs, of v and of k, in whole vectors
    Room room;
    R* const states;

    Worker(const Problem<R>& p, const Share& s, int64_t buffers)
        : p(p), s(s), step(padded<R>(p.chunk())), v_step(padded<R>(s.columns)), k_step(padded<R>(p.K)),
          room(sizeof(R) * (s.heads * p.K * v_step + buffers * largest() + 1024)), states(room.take<R>(s.heads * p.K * v_step)) {}

    int64_t largest() const { return std::max({p.chunk() * step, p.chunk() * v_step, p.chunk() * k_step, k_step * step}); }
    R* pairs_buffer() { return room.template take<R>(p.chunk() * step); }
    R* v_buffer() { return room.template take<R>(p.chunk() * v_step); }
    R* k_buffer() { return room.template take<R>(p.chunk() * k_step); }
    R* columns_buffer() { return room.template take<R>(k_step * step); }  // of k, transposed

    template <class Visit> void walk(Visit visit) {
        const int64_t length = p.lengths ? p.lengths[s.b] : p.T;
        for (int64_t h = 0; h < s.heads; h++) enter(h);
        for (int64_t t = 0; t < length; t += CHUNK)
            for (int64_t h = 0; h < s.heads; h++)
                visit(Place<R>{s.head + h, t, std::min(CHUNK, length - t), states + h * p.K * v_step, out(t, h), h == 0});
        for (int64_t h = 0; h < s.heads; h++) leave(h, length);
    }

    void enter(int64_t h) {
        R* const S = states + h * p.K * v_step;
        if (p.start) copy_rows(p.start + global(h), p.V, p.K, s.columns, S, v_step);
        else std::fill_n(S, p.K * v_step, R(0));
    }

    void leave(int64_t h, int64_t length) {
        for (int64_t k = 0; k < p.K; k++)
            std::copy_n(states + (h * p.K + k) * v_step, s.columns, p.final + global(h) + k * p.V);
        for (int64_t t = length; t < p.T; t++) std::fill_n(out(t, h), s.columns, R(0));
    }

    int64_t global(int64_t h) const { return (s.b * p.H + s.head + h) * p.K * p.V + s.column; }
    R* out(int64_t t, int64_t h) const { return p.o + ((s.b * p.T + t) * p.H + s.head + h) * p.V + s.column; }

    // The same tokens of the next head, or the first head's next tokens.
    Place<R> next(const Place<R>& at) const {
        const bool more = at.h + 1 < s.head + s.heads;
        const int64_t h = more ? at.h + 1 : s.head, t = more ? at.t : std::min(at.t + CHUNK, p.T - at.n);
        return {h, t, at.n, nullptr, out(t, h - s.head), false};
    }
};

// made(share) is the worker of a share. work: multiplications.
template <class R, class Made> void run(const Problem<R>& p, double work, Made made) {
    const int threads = work > WORTH_THREADS ? (int)n_threads() : 1;
    const Shares shares(p.B, p.H, p.V, Simd<R>::lanes, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < shares.total; i++) {
        const FlushTiny guard;
        auto worker = made(shares[i]);
        worker.walk([&](const Place<R>& at) { worker.visit(at); });
    }
}

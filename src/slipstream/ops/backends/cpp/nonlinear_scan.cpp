// The loops through time of LSTM and GRU, and those of their gradients. Layouts: x = W x_t + b (B T G H), lines (B T H), states
// (B H), U (G H H) as it stands in the equations; gates lie in the order i f n o of LSTM and r z n of GRU.
//
// kept, or null: the gates (B T 4 H) that the gradient asks for: i f n o, and r z n and U_n h + b' of GRU.
#include "recurrent.h"

namespace {

template <class R> struct Cell {
    using S = Simd<R>;
    using vec = typename S::vec;
    Rows rows;
    int64_t t;

    bool over(int64_t b) const { return t >= rows.length(b); }
    bool ends(int64_t b) const { return t == rows.length(b) - 1; }
    int left(int64_t channel) const { return (int)std::min<int64_t>(S::lanes, rows.H - channel); }
    vec get(const R* p, int64_t channel) const { return S::load(p + channel, left(channel)); }
    void put(R* p, int64_t channel, vec v) const { S::store(p + channel, v, left(channel)); }
};

template <class R> struct LstmForward : Cell<R> {
    using typename Cell<R>::S;
    using typename Cell<R>::vec;
    const R *x, *start;
    R *out, *last, *c, *cs, *kept;  // c: the entering cells in, the last ones out; cs: all of them, or null

    LstmForward(Rows rows, int64_t t, const R* x, const R* start, R* out, R* last, R* c, R* cs, R* kept)
        : Cell<R>{rows, t}, x(x), start(start), out(out), last(last), c(c), cs(cs), kept(kept) {}

    const R* input(int64_t b) const { return this->t ? this->rows.at(out, b, this->t - 1) : start + b * this->rows.H; }

    void finish(int64_t b, int64_t d, const vec* sums) const {
        const int64_t H = this->rows.H, t = this->t;
        if (this->over(b)) return this->put(this->rows.at(out, b, t), d, vec{});
        const R* const given = this->rows.at(x, b, t, 4);
        const vec i = logistic<R>(sums[0] + this->get(given, d)), f = logistic<R>(sums[1] + this->get(given + H, d));
        const vec n = hyperbolic<R>(sums[2] + this->get(given + 2 * H, d)), o = logistic<R>(sums[3] + this->get(given + 3 * H, d));
        const vec cell = f * this->get(c + b * H, d) + i * n, h = o * hyperbolic<R>(cell);
        this->put(c + b * H, d, cell);
        this->put(this->rows.at(out, b, t), d, h);
        if (this->ends(b)) this->put(last + b * H, d, h);
        if (!kept) return;
        R* const keep = this->rows.at(kept, b, t, 4);
        this->put(keep, d, i);
        this->put(keep + H, d, f);
        this->put(keep + 2 * H, d, n);
        this->put(keep + 3 * H, d, o);
        this->put(this->rows.at(cs, b, t), d, cell);
    }
};

// g (B T 4 H): of the sums. gh and gc: of the last states at first, of the entering ones at last (t = -1).
template <class R> struct LstmBackward : Cell<R> {
    using typename Cell<R>::S;
    using typename Cell<R>::vec;
    const R *c0, *cs, *kept, *g_out, *zeros;
    R *g, *gh, *gc;

    LstmBackward(Rows rows, int64_t t, const R* c0, const R* cs, const R* kept, const R* g_out, const R* zeros, R* g, R* gh, R* gc)
        : Cell<R>{rows, t}, c0(c0), cs(cs), kept(kept), g_out(g_out), zeros(zeros), g(g), gh(gh), gc(gc) {}

    const R* input(int64_t b) const {
        return this->t + 1 < this->rows.length(b) ? this->rows.at(g, b, this->t + 1, 4) : zeros;
    }

    void finish(int64_t b, int64_t first, const vec* sums) const {
        for (int v = 0; v < 4; v++)
            if (const int64_t d = first + v * S::lanes; d < this->rows.H) one(b, d, sums[v]);
    }

    void one(int64_t b, int64_t d, vec h) const {
        const int64_t H = this->rows.H, t = this->t;
        R* const of_sums = this->rows.at(g, b, t, 4);
        if (t >= 0 && this->over(b)) {
            for (int k = 0; k < 4; k++) this->put(of_sums + k * H, d, vec{});
            return;
        }
        if (t + 1 >= this->rows.length(b)) h = this->get(gh + b * H, d);
        if (t < 0) return this->put(gh + b * H, d, h);
        const R* const keep = this->rows.at(kept, b, t, 4);
        const vec i = this->get(keep, d), f = this->get(keep + H, d), n = this->get(keep + 2 * H, d), o = this->get(keep + 3 * H, d);
        const vec squashed = hyperbolic<R>(this->get(this->rows.at(cs, b, t), d));
        const vec before = this->get(t ? this->rows.at(cs, b, t - 1) : c0 + b * H, d);
        h += this->get(this->rows.at(g_out, b, t), d);
        const vec c = this->get(gc + b * H, d) + h * o * (R(1) - squashed * squashed);
        this->put(of_sums, d, c * n * i * (R(1) - i));
        this->put(of_sums + H, d, c * before * f * (R(1) - f));
        this->put(of_sums + 2 * H, d, c * i * (R(1) - n * n));
        this->put(of_sums + 3 * H, d, h * squashed * o * (R(1) - o));
        this->put(gc + b * H, d, c * f);
    }
};

template <class R> struct GruForward : Cell<R> {
    using typename Cell<R>::S;
    using typename Cell<R>::vec;
    const R *x, *bias, *start;  // bias (H): b' of n
    R *out, *last, *kept;

    GruForward(Rows rows, int64_t t, const R* x, const R* bias, const R* start, R* out, R* last, R* kept)
        : Cell<R>{rows, t}, x(x), bias(bias), start(start), out(out), last(last), kept(kept) {}

    const R* input(int64_t b) const { return this->t ? this->rows.at(out, b, this->t - 1) : start + b * this->rows.H; }

    void finish(int64_t b, int64_t d, const vec* sums) const {
        const int64_t H = this->rows.H, t = this->t;
        if (this->over(b)) return this->put(this->rows.at(out, b, t), d, vec{});
        const R* const given = this->rows.at(x, b, t, 3);
        const vec r = logistic<R>(sums[0] + this->get(given, d)), z = logistic<R>(sums[1] + this->get(given + H, d));
        const vec inner = sums[2] + this->get(bias, d), n = hyperbolic<R>(this->get(given + 2 * H, d) + r * inner);
        const vec h = n + z * (this->get(input(b), d) - n);
        this->put(this->rows.at(out, b, t), d, h);
        if (this->ends(b)) this->put(last + b * H, d, h);
        if (!kept) return;
        R* const keep = this->rows.at(kept, b, t, 4);
        this->put(keep, d, r);
        this->put(keep + H, d, z);
        this->put(keep + 2 * H, d, n);
        this->put(keep + 3 * H, d, inner);
    }
};

// g (B T 3 H): of U h + b'; gn (B T H): of W_n x + b_n. gh: of the last state at first, of the entering one at last (t = -1), and
// between them what passes by the weights.
template <class R> struct GruBackward : Cell<R> {
    using typename Cell<R>::S;
    using typename Cell<R>::vec;
    const R *start, *out, *kept, *g_out, *zeros;
    R *g, *gn, *gh;

    GruBackward(Rows rows, int64_t t, const R* start, const R* out, const R* kept, const R* g_out, const R* zeros, R* g, R* gn, R* gh)
        : Cell<R>{rows, t}, start(start), out(out), kept(kept), g_out(g_out), zeros(zeros), g(g), gn(gn), gh(gh) {}

    const R* input(int64_t b) const {
        return this->t + 1 < this->rows.length(b) ? this->rows.at(g, b, this->t + 1, 3) : zeros;
    }

    void finish(int64_t b, int64_t first, const vec* sums) const {
        for (int v = 0; v < 4; v++)
            if (const int64_t d = first + v * S::lanes; d < this->rows.H) one(b, d, sums[v]);
    }

    void one(int64_t b, int64_t d, vec h) const {
        const int64_t H = this->rows.H, t = this->t;
        R* const of_sums = this->rows.at(g, b, t, 3);
        if (t >= 0 && this->over(b)) {
            for (int k = 0; k < 3; k++) this->put(of_sums + k * H, d, vec{});
            return this->put(this->rows.at(gn, b, t), d, vec{});
        }
        h += this->get(gh + b * H, d);
        if (t < 0) return this->put(gh + b * H, d, h);
        const R* const keep = this->rows.at(kept, b, t, 4);
        const vec r = this->get(keep, d), z = this->get(keep + H, d), n = this->get(keep + 2 * H, d);
        const vec inner = this->get(keep + 3 * H, d), before = this->get(t ? this->rows.at(out, b, t - 1) : start + b * H, d);
        h += this->get(this->rows.at(g_out, b, t), d);
        const vec of_n = h * (R(1) - z) * (R(1) - n * n);
        this->put(of_sums, d, of_n * inner * r * (R(1) - r));
        this->put(of_sums + H, d, h * (before - n) * z * (R(1) - z));
        this->put(of_sums + 2 * H, d, of_n * r);
        this->put(this->rows.at(gn, b, t), d, of_n);
        this->put(gh + b * H, d, h * z);
    }
};

}  // namespace

#define KERNELS(R, suffix)                                                                                                 \
    extern "C" void lstm_##suffix(const R* x, const R* U, const R* start, const int64_t* lengths, R* out, R* last, R* c,   \
                                  R* cs, R* kept, int64_t batch, int64_t T, int64_t H) {                                   \
        Weights<R, 4, 1>(U, H, H, H * H, H, 1).over_time(batch, 0, T, 1, [&](int64_t t) {                                  \
            return LstmForward<R>({lengths, batch, T, H}, t, x, start, out, last, c, cs, kept);                            \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" void lstm_backward_##suffix(const R* U, const R* c0, const R* cs, const R* kept, const R* g_out,            \
                                           const int64_t* lengths, R* g, R* gh, R* gc, int64_t batch, int64_t T,           \
                                           int64_t H) {                                                                    \
        const std::vector<R> zeros(4 * H);                                                                                 \
        Weights<R, 1, 4>(U, 4 * H, H, 0, 1, H).over_time(batch, T - 1, T + 1, -1, [&](int64_t t) {                         \
            return LstmBackward<R>({lengths, batch, T, H}, t, c0, cs, kept, g_out, zeros.data(), g, gh, gc);               \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" void gru_##suffix(const R* x, const R* U, const R* bias, const R* start, const int64_t* lengths, R* out,    \
                                 R* last, R* kept, int64_t batch, int64_t T, int64_t H) {                                  \
        Weights<R, 3, 1>(U, H, H, H * H, H, 1).over_time(batch, 0, T, 1, [&](int64_t t) {                                  \
            return GruForward<R>({lengths, batch, T, H}, t, x, bias, start, out, last, kept);                              \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" void gru_backward_##suffix(const R* U, const R* start, const R* out, const R* kept, const R* g_out,         \
                                          const int64_t* lengths, R* g, R* gn, R* gh, int64_t batch, int64_t T,            \
                                          int64_t H) {                                                                     \
        const std::vector<R> zeros(3 * H);                                                                                 \
        Weights<R, 1, 4>(U, 3 * H, H, 0, 1, H).over_time(batch, T - 1, T + 1, -1, [&](int64_t t) {                         \
            return GruBackward<R>({lengths, batch, T, H}, t, start, out, kept, g_out, zeros.data(), g, gn, gh);            \
        });                                                                                                                \
    }

FOR_f32(KERNELS(float, f32))
FOR_f64(KERNELS(double, f64))

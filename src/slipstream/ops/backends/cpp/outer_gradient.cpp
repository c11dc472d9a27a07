// The gradient of outer_scan with one decay a head or none, and without a bonus: what is written in a token is v itself.
#include "matrix_gradient.h"

namespace {

template <class R> struct OuterSlopes : HeadSlopes<R> {
    using HeadSlopes<R>::p, HeadSlopes<R>::v_step;
    R *v, *gv;

    OuterSlopes(const Slopes<R>& p, int64_t b, int64_t h) : HeadSlopes<R>(p, b, h, 0, 2, 0) {
        v = this->v_rows(), gv = this->v_rows();
    }

    void gather_v(int64_t c, int64_t n) { copy_rows(p.v.at(this->b, c * CHUNK, this->h), p.v.token, n, p.V, v, v_step); }

    void pass_on(int64_t c, int64_t n, const R* entering, R* leaving) {
        this->gather_keys(c, n);
        gather_v(c, n);
        this->write_in(v, n, entering, leaving);
    }

    void slopes(int64_t c, int64_t n, const R* entering) {
        this->gather(c, n);
        gather_v(c, n);
        this->pair_slopes(v, n);
        this->query_slopes(c, n, entering);
        this->key_slopes(c, n, v, [](auto&, int64_t, int64_t) LAMBDA {});
        this->written_slopes(n, gv);
        this->put_v(c, n, gv);
        if (p.g_decay) this->decay_slopes(c, n, entering);
        this->state_slopes(n, [](auto&, int64_t, int64_t) LAMBDA {});
    }
};

}  // namespace

FOR_f32(GRADIENTS(float, f32, OuterSlopes))
FOR_f64(GRADIENTS(double, f64, OuterSlopes))

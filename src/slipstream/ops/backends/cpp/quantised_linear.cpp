// y = x W^T + bias by a matrix of 8-bit or 4-bit codes. Layouts: x (T I), y (T O), and of W, in tiles of 16 rows, padded:
//
//     codes   8 bits (tiles, I / 4, 16, 4): four columns of 16 rows lie together;  4 bits (tiles, I / 8, 16, 4): a byte holds
//             a column of the next four in its low half, and the one four columns on in its high half
//     scales  float16 (tiles, I / group, 16)
//
//     W = scale * code                         four bits choose one of 16 whole numbers, LEVELS
//     y = sum over groups of 32 of s_x scale (q . code),  x ~ s_x q,  s_x = max |x| / 127
//
// Activations are rounded to 8 bits too, 32 at a time, so that a group is a sum of products of bytes, exact in 32 bits. Each
// output is summed in one order, however many tokens there are: one token gives what it gives among many. A group with a NaN
// or an infinity has a scale of NaN, so that every output of its token is NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int WIDTH = 64;  // bytes of a vector
constexpr int MANY = 6;    // tokens at a time: their sums fill the registers
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
constexpr int MANY = 2;
#else
constexpr int WIDTH = 16;
constexpr int MANY = 2;
#endif
constexpr int LANES = WIDTH / 4;     // rows of W in a vector of sums
constexpr int TILE = 16;             // rows of W that lie together
constexpr int GROUP = 32;            // activations with one scale
constexpr int ALONE = 4;             // strips of rows at a time for a token by itself: sums that do not wait for one another
constexpr int QUADS = GROUP / 4;     // products are summed four at a time
constexpr int64_t CHUNK = 512;       // tokens whose codes are made, and kept, at once
constexpr int64_t SPAN = 96;         // tokens of one piece of work
constexpr int64_t WORTH_THREADS = 1 << 18;  // products; fewer are done before a thread has woken

typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

// What 4-bit codes stand for: the levels of least square error for normal numbers, 32 of which share a scale (Lloyd 1982).
alignas(16) constexpr int8_t LEVELS[16] = {-127, -101, -81, -64, -49, -36, -23, -10, 2, 14, 27, 40, 55, 71, 90, 113};

template <class V> inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

// The ways to multiply bytes. Weights: what a vector of codes becomes, once for all tokens. levels, chosen: the same for codes
// of four bits, which stand for one of 16 levels. dot: adds products with four activations to sums, which begin at START times
// the sum of the activations.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) || defined(__AVXVNNI__)
constexpr int START = -128;  // codes are made positive
typedef Bytes Weights;
inline Weights prepared(Bytes codes) { return codes ^ (int8_t)-128; }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline Bytes levels() { return prepared((Bytes)_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)LEVELS))); }
inline Weights chosen(Bytes table, Bytes index) { return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
inline Ints dot(Ints sums, Weights w, int32_t x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
}
#else
inline Bytes levels() { return prepared((Bytes)_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)LEVELS))); }
inline Weights chosen(Bytes table, Bytes index) { return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
inline Ints dot(Ints sums, Weights w, int32_t x) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, _mm256_set1_epi32(x));
}
#endif

#elif defined(__AVX2__)
constexpr int START = 0;
struct Weights {
    __m256i size, sign;
};
inline Weights prepared(Bytes codes) { return {_mm256_abs_epi8((__m256i)codes), (__m256i)codes}; }
inline Bytes levels() { return (Bytes)_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)LEVELS)); }
inline Weights chosen(Bytes table, Bytes index) {
    return prepared((Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index));
}
inline Ints dot(Ints sums, Weights w, int32_t x) {  // no two products exceed 2 * 127 * 127, which 16 bits hold
    const __m256i pairs = _mm256_maddubs_epi16(w.size, _mm256_sign_epi8(_mm256_set1_epi32(x), w.sign));
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#else
constexpr int START = 0;
struct Weights {
    Floats column[4];
};
inline Weights prepared(Bytes codes) {
    const Ints fours = (Ints)codes;
    return {{__builtin_convertvector(fours << 24 >> 24, Floats), __builtin_convertvector(fours << 16 >> 24, Floats),
             __builtin_convertvector(fours << 8 >> 24, Floats), __builtin_convertvector(fours >> 24, Floats)}};
}
inline Bytes levels() { return Bytes{}; }
inline Weights chosen(const Bytes&, const Bytes& index) {
    int8_t values[WIDTH];
    for (int i = 0; i < WIDTH; i++) values[i] = LEVELS[index[i]];
    return prepared(load<Bytes>(values));
}
inline Ints dot(Ints sums, const Weights& w, int32_t x) {  // whole numbers below 2^24 are exact as floats
    const Floats low = w.column[0] * (float)(int8_t)x + w.column[1] * (float)(int8_t)(x >> 8);
    const Floats high = w.column[2] * (float)(int8_t)(x >> 16) + w.column[3] * (float)(x >> 24);
    return sums + __builtin_convertvector(low + high, Ints);
}
#endif

// A vector of float16
inline Floats halves(const uint16_t* p) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load<__m128i>(p));
#else
    Ints bits;
    for (int l = 0; l < LANES; l++) bits[l] = (int32_t)(p[l] & 0x8000) << 16 | (int32_t)(p[l] & 0x7fff) << 13;
    return (Floats)bits * 0x1p112f;  // the exponent's bias, also of numbers too small for one
#endif
}

struct Matrix {
    const uint8_t* codes;
    const uint16_t* scales;
    const float* bias;  // may be null
    int64_t inputs, outputs, group;

    int64_t columns() const { return (inputs + group - 1) / group * group; }
    int64_t strips() const { return (outputs + LANES - 1) / LANES; }
};

// Activations as bytes with scales: (tokens, columns), (tokens, groups)
struct Activations {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> starts;
    int64_t columns, groups;

    Activations(int64_t tokens, int64_t columns)
        : codes(tokens * columns), scales(tokens * columns / GROUP), starts(scales.size()), columns(columns), groups(columns / GROUP) {}

    void round(const float* x, int64_t token, int64_t inputs) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t n = std::clamp<int64_t>(inputs - g * GROUP, 0, GROUP);
            float some[GROUP] = {};
            std::memcpy(some, x + g * GROUP, n * sizeof(float));
            one_group(n == GROUP ? x + g * GROUP : some, token, g);
        }
    }

    void one_group(const float* x, int64_t token, int64_t g) {
        int32_t bits[GROUP], most = 0, sum = 0;
        std::memcpy(bits, x, sizeof(bits));
        for (int i = 0; i < GROUP; i++) most = std::max(most, bits[i] & 0x7fffffff);  // in the order of |x|, NaN above all
        float top;
        std::memcpy(&top, &most, sizeof(top));
        const bool finite = most < 0x7f800000;
        const float by = finite && top > 1e-36f ? 127.f / top : 0.f;  // what is smaller counts as zero
        int8_t* const q = codes.data() + token * columns + g * GROUP;
        for (int i = 0; i < GROUP; i++) {
            const float shifted = x[i] * by + 12582912.f;  // adding 1.5 * 2^23 rounds to a whole number, in the lowest bits
            int32_t whole;
            std::memcpy(&whole, &shifted, sizeof(whole));
            q[i] = finite ? (int8_t)whole : 0;
        }
        for (int i = 0; i < GROUP; i++) sum += q[i];
        scales[token * groups + g] = finite ? top / 127.f : NAN;
        starts[token * groups + g] = START * sum;
    }
};

// N tokens from t on by M strips of rows from s on
template <bool FOUR, int N, int M>
inline void block(const Matrix& W, const Activations& a, int64_t t, int64_t s, float* y) {
    constexpr int PER_TILE = TILE / LANES, STEP = TILE * 4, HELD = FOUR ? 2 : 1;  // quads of columns that a step of codes holds
    const uint8_t* codes[M];
    const uint16_t* scales[M];
    for (int m = 0; m < M; m++) {
        const int64_t tile = (s + m) / PER_TILE, part = (s + m) % PER_TILE;
        codes[m] = W.codes + tile * W.columns() / 4 / HELD * STEP + part * WIDTH;
        scales[m] = W.scales + tile * (W.columns() / W.group) * TILE + part * LANES;
    }
    const Bytes table = levels();
    const int64_t groups_of_scale = W.group / GROUP;
    Floats total[N][M] = {};
    for (int64_t g = 0; g < a.groups; g++) {
        Ints sums[N][M];
        for (int n = 0; n < N; n++)
            for (int m = 0; m < M; m++) sums[n][m] = Ints{} + (START ? a.starts[(t + n) * a.groups + g] : 0);
        for (int j = 0; j < QUADS / HELD; j++) {
            Bytes read[M];
            for (int m = 0; m < M; m++) read[m] = load<Bytes>(codes[m] + (g * (QUADS / HELD) + j) * STEP);
            for (int h = 0; h < HELD; h++) {
                Weights w[M];
                for (int m = 0; m < M; m++) {
                    if (FOUR) {
                        const Bytes shifted = h ? (Bytes)((Ints)read[m] >> 4) : read[m];
                        w[m] = chosen(table, shifted & (int8_t)15);
                    } else w[m] = prepared(read[m]);
                }
                for (int n = 0; n < N; n++) {
                    const int32_t x = load<int32_t>(a.codes.data() + (t + n) * a.columns + g * GROUP + (j * HELD + h) * 4);
                    for (int m = 0; m < M; m++) sums[n][m] = dot(sums[n][m], w[m], x);
                }
            }
        }
        for (int m = 0; m < M; m++) {
            const Floats scale = halves(scales[m] + g / groups_of_scale * TILE);
            for (int n = 0; n < N; n++)
                total[n][m] += __builtin_convertvector(sums[n][m], Floats) * (scale * a.scales[(t + n) * a.groups + g]);
        }
    }
    for (int m = 0; m < M; m++) {
        const int64_t row = (s + m) * LANES, left = std::min<int64_t>(LANES, W.outputs - row);
        Floats bias = {};
        if (W.bias) std::memcpy(&bias, W.bias + row, left * sizeof(float));
        for (int n = 0; n < N; n++) {
            const Floats out = total[n][m] + bias;
            std::memcpy(y + (t + n) * W.outputs + row, &out, left * sizeof(float));
        }
    }
}

template <bool FOUR, int M>
void strips(const Matrix& W, const Activations& a, int64_t t, int64_t end, int64_t s, float* y) {
    for (; t + MANY <= end; t += MANY) block<FOUR, MANY, M>(W, a, t, s, y);
    for (; t + 2 <= end; t += 2) block<FOUR, 2, M>(W, a, t, s, y);
    for (; t < end; t++) block<FOUR, 1, M>(W, a, t, s, y);
}

template <bool FOUR> void forward(const Matrix& W, const float* x, float* y, int64_t tokens) {
    Activations a(std::min(tokens, CHUNK), W.columns());
    const int64_t abreast = tokens == 1 ? ALONE : 2, parts = (W.strips() + abreast - 1) / abreast;
    for (int64_t first = 0; first < tokens; first += CHUNK, x += CHUNK * W.inputs, y += CHUNK * W.outputs) {
        const int64_t n = std::min(tokens - first, CHUNK), spans = (n + SPAN - 1) / SPAN;
#pragma omp parallel if (n * W.columns() * W.outputs > WORTH_THREADS)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) a.round(x + t * W.inputs, t, W.inputs);
#pragma omp for collapse(2) schedule(static)
            for (int64_t part = 0; part < parts; part++)
                for (int64_t span = 0; span < spans; span++) {
                    const int64_t t = span * SPAN, end = std::min(n, t + SPAN), s = abreast * part;
                    if (abreast == ALONE && s + ALONE <= W.strips()) block<FOUR, 1, ALONE>(W, a, t, s, y);
                    else
                        for (int64_t i = s; i < std::min(s + abreast, W.strips()); i += 2) {
                            if (i + 2 <= W.strips()) strips<FOUR, 2>(W, a, t, end, i, y);
                            else strips<FOUR, 1>(W, a, t, end, i, y);
                        }
                }
        }
    }
}

}  // namespace

// Whether the CPU has products of bytes; without them many tokens are better served by a matrix made again.
extern "C" int64_t multiplies_bytes() {
#ifdef __AVX2__
    return 1;
#else
    return 0;
#endif
}

extern "C" void forward_f32(const float* x, const uint8_t* codes, const uint16_t* scales, const float* bias, float* y,
                            int64_t tokens, int64_t inputs, int64_t outputs, int64_t group, int64_t four) {
    const Matrix W{codes, scales, bias, inputs, outputs, group};
    if (four) forward<true>(W, x, y, tokens);
    else forward<false>(W, x, y, tokens);
}

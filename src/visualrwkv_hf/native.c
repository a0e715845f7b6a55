/* Ops for a CPU, float32 throughout; native.py says what each computes, compiles this file and calls it.
   Letters: N sequences, H heads, K / V key / value size of a head. Every array is contiguous. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* --- recurrences ------------------------------------------------------------------------------------ */

enum { COLUMNS = 64, MAX_KEYS = 256 }; /* of a state: what one thread holds, 16 KB for a head of 64 */
typedef float State[MAX_KEYS][COLUMNS];

/* Columns of a state do not see one another: [K, V] is read and written COLUMNS at a time, the rest as zeros. */
static void load(State S, const float *state, int64_t K, int64_t V, int64_t width) {
    for (int64_t i = 0; i < K; i++) {
        memset(S[i], 0, sizeof S[i]);
        memcpy(S[i], state + i * V, width * sizeof(float));
    }
}

static void store(State S, float *state, int64_t K, int64_t V, int64_t width) {
    for (int64_t i = 0; i < K; i++) memcpy(state + i * V, S[i], width * sizeof(float));
}

static int64_t at_most(int64_t limit, int64_t n) { return n < limit ? n : limit; }

static void step_rwkv6(State S, int64_t K, const float *r, const float *decay, const float *k, const float *u,
                       const float *v, float *y) {
    memset(y, 0, COLUMNS * sizeof(float));
    for (int64_t i = 0; i < K; i++) {
#pragma omp simd
        for (int j = 0; j < COLUMNS; j++) {
            float kv = k[i] * v[j];
            y[j] += r[i] * (S[i][j] + u[i] * kv);
            S[i][j] = decay[i] * S[i][j] + kv;
        }
    }
}

static void step_rwkv7(State S, int64_t K, const float *r, const float *decay, const float *k, const float *a,
                       const float *b, const float *v, float *y) {
    float sa[COLUMNS] = {0};
    for (int64_t i = 0; i < K; i++) {
#pragma omp simd
        for (int j = 0; j < COLUMNS; j++) sa[j] += a[i] * S[i][j];
    }
    memset(y, 0, COLUMNS * sizeof(float));
    for (int64_t i = 0; i < K; i++) {
#pragma omp simd
        for (int j = 0; j < COLUMNS; j++) {
            S[i][j] = decay[i] * S[i][j] + b[i] * sa[j] + k[i] * v[j];
            y[j] += r[i] * S[i][j];
        }
    }
}

/* RWKV-7 where a and b are given, RWKV-6 where u is. Sequence n reads the tokens order[begin[n]:begin[n + 1]],
   ~token is a pad. */
void wkv(int threads, int64_t N, int64_t H, int64_t K, int64_t V, const int64_t *begin, const int64_t *order,
         const float *r, const float *decay, const float *k, const float *v, const float *a, const float *b,
         const float *u, float *state, float *out) {
    int64_t blocks = (V + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < N * H * blocks; task++) {
        int64_t n = task / blocks / H, h = task / blocks % H, column = task % blocks * COLUMNS;
        int64_t width = at_most(COLUMNS, V - column);
        State S;
        load(S, state + (n * H + h) * K * V + column, K, V, width);
        for (int64_t position = begin[n]; position < begin[n + 1]; position++) {
            int64_t entry = order[position], token = entry < 0 ? ~entry : entry;
            int64_t key = (token * H + h) * K, value = (token * H + h) * V + column;
            float y[COLUMNS] = {0}, v_t[COLUMNS] = {0};
            memcpy(v_t, v + value, width * sizeof(float));
            if (entry >= 0 && a)
                step_rwkv7(S, K, r + key, decay + key, k + key, a + key, b + key, v_t, y);
            else if (entry >= 0)
                step_rwkv6(S, K, r + key, decay + key, k + key, u + h * K, v_t, y);
            memcpy(out + value, y, width * sizeof(float));
        }
        store(S, state + (n * H + h) * K * V + column, K, V, width);
    }
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* One token of RWKV-7, from the matrix products to what `output` reads. r to v_first are [B, H K], w0 to norm_bias
   [H K]; value_gate, v_first and v0 are null in layer 0. mask [B] is 0 at pads, or null. */
void rwkv7_decode(int threads, int64_t B, int64_t H, int64_t K, float eps, float decay_scale, const float *r,
                  const float *decay, const float *k, const float *v, const float *rate, const float *gate,
                  const float *value_gate, const float *v_first, const float *w0, const float *a0, const float *v0,
                  const float *k_k, const float *k_a, const float *r_k, const float *norm_weight,
                  const float *norm_bias, const uint8_t *mask, float *state, float *out) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < B * H; task++) {
        int64_t token = task * K, head = task % H * K; /* where its values and its weights begin */
        float w[MAX_KEYS], key[MAX_KEYS], value[MAX_KEYS + COLUMNS] = {0}, a[MAX_KEYS], b[MAX_KEYS];
        float y[MAX_KEYS + COLUMNS], square = 0, bonus = 0, mean = 0, variance = 0;
        if (mask && !mask[task / H]) {
            memset(out + token, 0, K * sizeof(float));
            continue;
        }
        for (int64_t i = 0; i < K; i++) {
            float k_i = k[token + i], eta = sigmoid(a0[head + i] + rate[token + i]);
            w[i] = expf(-decay_scale * sigmoid(w0[head + i] + decay[token + i]));
            key[i] = k_i * (1 + (eta - 1) * k_a[head + i]);
            value[i] = v[token + i];
            if (v0) value[i] += (v_first[token + i] - value[i]) * sigmoid(v0[head + i] + value_gate[token + i]);
            a[i] = k_i * k_k[head + i]; /* not yet of length 1 */
            b[i] = eta;
            square += a[i] * a[i];
            bonus += r[token + i] * key[i] * r_k[head + i];
        }
        float length = fmaxf(sqrtf(square), 1e-12f);
        for (int64_t i = 0; i < K; i++) {
            float kk = a[i] / length;
            a[i] = -kk;
            b[i] *= kk;
        }
        State S;
        for (int64_t column = 0; column < K; column += COLUMNS) {
            float *part = state + token * K + column;
            load(S, part, K, K, at_most(COLUMNS, K - column));
            step_rwkv7(S, K, r + token, w, key, a, b, value + column, y + column);
            store(S, part, K, K, at_most(COLUMNS, K - column));
        }
        for (int64_t i = 0; i < K; i++) mean += y[i] / K;
        for (int64_t i = 0; i < K; i++) variance += (y[i] - mean) * (y[i] - mean) / K;
        for (int64_t i = 0; i < K; i++) {
            float normed = (y[i] - mean) / sqrtf(variance + eps) * norm_weight[head + i] + norm_bias[head + i];
            out[token + i] = (normed + bonus * value[i]) * gate[token + i];
        }
    }
}

/* --- matrix times vector: as fast as the weights come from memory ------------------------------------ */

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16 };
typedef __m512 Lanes;
static inline Lanes lanes_float(const float *w) { return _mm512_loadu_ps(w); }
static inline Lanes lanes_uint16_t(const uint16_t *w) { /* bfloat16: the upper half of a float32 */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)w)), 16));
}
static inline Lanes lanes_int8_t(const int8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)w)));
}
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
typedef __m256 Lanes;
static inline Lanes lanes_float(const float *w) { return _mm256_loadu_ps(w); }
static inline Lanes lanes_uint16_t(const uint16_t *w) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)w)), 16));
}
static inline Lanes lanes_int8_t(const int8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)w)));
}
#else
enum { LANES = 4 };
typedef float Lanes __attribute__((vector_size(16)));
static inline Lanes lanes_float(const float *w) {
    Lanes x;
    memcpy(&x, w, sizeof x);
    return x;
}
static inline Lanes lanes_uint16_t(const uint16_t *w) {
    uint32_t words[LANES];
    for (int j = 0; j < LANES; j++) words[j] = (uint32_t)w[j] << 16;
    return lanes_float((const float *)words);
}
static inline Lanes lanes_int8_t(const int8_t *w) {
    Lanes x;
    for (int j = 0; j < LANES; j++) x[j] = w[j];
    return x;
}
#endif

static float sum(Lanes x) {
    float y = 0;
    for (int j = 0; j < LANES; j++) y += x[j];
    return y;
}

/* Rows of weights at once, and what comes so many bytes behind is fetched meanwhile: left alone, a processor begins
   anew at each row (8 instead of 20 GB/s of int8). */
enum { ROWS = 4, AHEAD = 6144 };
#define DOTS(TYPE)                                                                                              \
    static void dots_##TYPE(int64_t n, const TYPE *w, const float *x, float *y) {                               \
        Lanes y0 = {0}, y1 = {0}, y2 = {0}, y3 = {0};                                                           \
        for (int64_t i = 0; i < n; i += LANES) {                                                                \
            const char *ahead = (const char *)(w + ROWS * i) + AHEAD;                                           \
            for (int64_t byte = 0; byte < (int64_t)(ROWS * LANES * sizeof(TYPE)); byte += 64)                   \
                __builtin_prefetch(ahead + byte);                                                               \
            Lanes xi = lanes_float(x + i);                                                                      \
            y0 += lanes_##TYPE(w + i) * xi;                                                                     \
            y1 += lanes_##TYPE(w + n + i) * xi;                                                                 \
            y2 += lanes_##TYPE(w + 2 * n + i) * xi;                                                             \
            y3 += lanes_##TYPE(w + 3 * n + i) * xi;                                                             \
        }                                                                                                       \
        y[0] = sum(y0), y[1] = sum(y1), y[2] = sum(y2), y[3] = sum(y3);                                         \
    }
DOTS(float)
DOTS(uint16_t)
DOTS(int8_t)

/* y = scale * (x W^T), [count, out], with W [out, in] of float (size 4), bfloat16 (2) or int8 (1). scale [out] may be
   null. `in` is a multiple of 16, `out` of ROWS. */
void linear(int threads, int64_t count, int64_t in, int64_t out, int64_t size, const void *weight,
            const float *scale, const float *x, float *y) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t o = 0; o < out; o += ROWS) {
        const void *w = (const char *)weight + o * in * size;
        for (int64_t n = 0; n < count; n++) {
            float *y_n = y + n * out + o;
            if (size == 4)
                dots_float(in, w, x + n * in, y_n);
            else if (size == 2)
                dots_uint16_t(in, w, x + n * in, y_n);
            else
                dots_int8_t(in, w, x + n * in, y_n);
            for (int j = 0; scale && j < ROWS; j++) y_n[j] *= scale[o + j];
        }
    }
}

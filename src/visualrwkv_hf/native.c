/* Ops for a CPU, float32 throughout; native.py says what each computes, compiles this file and calls it.
   Letters: N sequences, H heads, K / V key / value size of a head. Every array is contiguous. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* --- a vector register ------------------------------------------------------------------------------ */

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
static inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
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
#ifndef __AVX512F__
static inline float sum(Lanes x) {
    float y = 0;
    for (int j = 0; j < LANES; j++) y += x[j];
    return y;
}
#endif
static inline void store_lanes(float *to, Lanes x) { memcpy(to, &x, sizeof x); }

/* --- recurrences ------------------------------------------------------------------------------------ */

enum { COLUMNS = 64, MAX_KEYS = 256 }; /* of a state: what one thread holds, 16 KB for a head of 64 */
enum { WIDTH = COLUMNS / LANES };
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

/* Row i of a state is WIDTH registers, and loops over them are unrolled: their sums over i stay in registers. */
#define EACH_LANES _Pragma("GCC unroll 16") for (int j = 0; j < WIDTH; j++)

/* S_t from S_{t-1}; both may lie in the same place. */
static void step_rwkv6(float (*before)[COLUMNS], float (*after)[COLUMNS], int64_t K, const float *r,
                       const float *decay, const float *k, const float *u, const float *v, float *y) {
    Lanes v_t[WIDTH], y_t[WIDTH];
    EACH_LANES v_t[j] = lanes_float(v + j * LANES), y_t[j] = (Lanes){0};
    for (int64_t i = 0; i < K; i++) {
        float ru = r[i] * u[i];
        EACH_LANES {
            Lanes s = lanes_float(before[i] + j * LANES), kv = k[i] * v_t[j];
            y_t[j] += r[i] * s + ru * kv;
            store_lanes(after[i] + j * LANES, decay[i] * s + kv);
        }
    }
    EACH_LANES store_lanes(y + j * LANES, y_t[j]);
}

static void step_rwkv7(float (*before)[COLUMNS], float (*after)[COLUMNS], int64_t K, const float *r,
                       const float *decay, const float *k, const float *a, const float *b, const float *v, float *sa,
                       float *y) {
    Lanes v_t[WIDTH], sa_t[WIDTH], y_t[WIDTH];
    EACH_LANES v_t[j] = lanes_float(v + j * LANES), sa_t[j] = y_t[j] = (Lanes){0};
    for (int64_t i = 0; i < K; i++) EACH_LANES sa_t[j] += a[i] * lanes_float(before[i] + j * LANES);
    for (int64_t i = 0; i < K; i++) {
        EACH_LANES {
            Lanes s = decay[i] * lanes_float(before[i] + j * LANES) + b[i] * sa_t[j] + k[i] * v_t[j];
            y_t[j] += r[i] * s;
            store_lanes(after[i] + j * LANES, s);
        }
    }
    EACH_LANES store_lanes(sa + j * LANES, sa_t[j]), store_lanes(y + j * LANES, y_t[j]);
}

/* Those steps backward. G, the gradient of S_t, becomes that of S_{t-1}. dv is written, the others are added to. */
static void back_rwkv6(float (*before)[COLUMNS], float (*G)[COLUMNS], int64_t K, const float *r, const float *decay,
                       const float *k, const float *u, const float *v, const float *dy, float *dr, float *dw,
                       float *dk, float *du, float *dv) {
    Lanes v_t[WIDTH], dy_t[WIDTH], dv_t[WIDTH], dy_v = {0};
    float ruk = 0; /* y_t = S_{t-1}^T r_t + ruk v_t */
    for (int64_t i = 0; i < K; i++) ruk += r[i] * u[i] * k[i];
    EACH_LANES {
        v_t[j] = lanes_float(v + j * LANES);
        dy_t[j] = lanes_float(dy + j * LANES);
        dv_t[j] = ruk * dy_t[j];
        dy_v += dy_t[j] * v_t[j];
    }
    float druk = sum(dy_v);
    for (int64_t i = 0; i < K; i++) {
        Lanes dr_i = {0}, ddecay_i = {0}, dk_i = {0};
        EACH_LANES {
            Lanes s = lanes_float(before[i] + j * LANES), g = lanes_float(G[i] + j * LANES);
            dr_i += s * dy_t[j];
            ddecay_i += s * g;
            dk_i += g * v_t[j];
            dv_t[j] += g * k[i];
            store_lanes(G[i] + j * LANES, decay[i] * g + r[i] * dy_t[j]);
        }
        dr[i] += sum(dr_i) + druk * u[i] * k[i];
        dw[i] += sum(ddecay_i) * decay[i];
        dk[i] += sum(dk_i) + druk * u[i] * r[i];
        du[i] += druk * r[i] * k[i];
    }
    EACH_LANES store_lanes(dv + j * LANES, dv_t[j]);
}

static void back_rwkv7(float (*before)[COLUMNS], float (*after)[COLUMNS], float (*G)[COLUMNS], int64_t K,
                       const float *r, const float *decay, const float *k, const float *a, const float *b,
                       const float *v, const float *sa, const float *dy, float *dr, float *dw, float *dk, float *da,
                       float *db, float *dv) {
    Lanes v_t[WIDTH], sa_t[WIDTH], dy_t[WIDTH], dv_t[WIDTH], dsa_t[WIDTH];
    EACH_LANES {
        v_t[j] = lanes_float(v + j * LANES);
        sa_t[j] = lanes_float(sa + j * LANES);
        dy_t[j] = lanes_float(dy + j * LANES);
        dv_t[j] = dsa_t[j] = (Lanes){0};
    }
    for (int64_t i = 0; i < K; i++) {
        Lanes dr_i = {0}, ddecay_i = {0}, dk_i = {0}, db_i = {0};
        EACH_LANES {
            Lanes g = lanes_float(G[i] + j * LANES) + r[i] * dy_t[j];
            dr_i += lanes_float(after[i] + j * LANES) * dy_t[j];
            ddecay_i += lanes_float(before[i] + j * LANES) * g;
            dk_i += g * v_t[j];
            db_i += g * sa_t[j];
            dv_t[j] += g * k[i];
            dsa_t[j] += g * b[i];
            store_lanes(G[i] + j * LANES, g);
        }
        dr[i] += sum(dr_i);
        dw[i] += sum(ddecay_i) * decay[i];
        dk[i] += sum(dk_i);
        db[i] += sum(db_i);
    }
    for (int64_t i = 0; i < K; i++) {
        Lanes da_i = {0};
        EACH_LANES {
            da_i += lanes_float(before[i] + j * LANES) * dsa_t[j];
            store_lanes(G[i] + j * LANES, decay[i] * lanes_float(G[i] + j * LANES) + a[i] * dsa_t[j]);
        }
        da[i] += sum(da_i);
    }
    EACH_LANES store_lanes(dv + j * LANES, dv_t[j]);
}

/* What the state of a head reads, up to COLUMNS columns of it: RWKV-7 where a and b are given, RWKV-6 where u is.
   Position p is token order[p], ~token is a pad. */
typedef struct {
    int64_t H, K, V, h, column, width;
    const int64_t *order;
    const float *r, *decay, *k, *v, *a, *b, *u;
} Head;

typedef struct {
    int is_pad;
    int64_t key, value; /* where its keys and its values begin */
    float v[COLUMNS];
} Token;

static Token token_at(const Head *x, int64_t position) {
    int64_t entry = x->order[position], head = (entry < 0 ? ~entry : entry) * x->H + x->h;
    Token t = {.is_pad = entry < 0, .key = head * x->K, .value = head * x->V + x->column};
    memcpy(t.v, x->v + t.value, x->width * sizeof(float));
    return t;
}

static void step(const Head *x, const Token *t, float (*before)[COLUMNS], float (*after)[COLUMNS], float *sa,
                 float *y) {
    const float *r = x->r + t->key, *decay = x->decay + t->key, *k = x->k + t->key;
    if (t->is_pad) {
        memmove(after, before, x->K * sizeof *before);
        memset(y, 0, COLUMNS * sizeof(float));
    } else if (x->a)
        step_rwkv7(before, after, x->K, r, decay, k, x->a + t->key, x->b + t->key, t->v, sa, y);
    else
        step_rwkv6(before, after, x->K, r, decay, k, x->u + x->h * x->K, t->v, y);
}

/* Sequence n reads the tokens order[begin[n]:begin[n + 1]]. */
void wkv(int threads, int64_t N, int64_t H, int64_t K, int64_t V, const int64_t *begin, const int64_t *order,
         const float *r, const float *decay, const float *k, const float *v, const float *a, const float *b,
         const float *u, float *state, float *out) {
    int64_t blocks = (V + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < N * H * blocks; task++) {
        int64_t n = task / blocks / H, h = task / blocks % H, column = task % blocks * COLUMNS;
        Head x = {H, K, V, h, column, at_most(COLUMNS, V - column), order, r, decay, k, v, a, b, u};
        float y[COLUMNS], sa[COLUMNS], *columns = state + (n * H + h) * K * V + column;
        State S;
        load(S, columns, K, V, x.width);
        for (int64_t position = begin[n]; position < begin[n + 1]; position++) {
            Token t = token_at(&x, position);
            step(&x, &t, S, S, sa, y);
            memcpy(out + t.value, y, x.width * sizeof(float));
        }
        store(S, columns, K, V, x.width);
    }
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* The gradients of what `wkv` reads from those of what it returns, dy and dstate [N, H, K, V]; dstate becomes that of
   `state`. dw is that of log(decay), du [N, H, K] that of u for each sequence, which must come as zeros.
   States are computed again, those before each segment of so many tokens at first, then those within one from
   there: scratch [threads, segments + segment + 1, K, COLUMNS], for as many segments as a sequence has. */
void wkv_backward(int threads, int64_t N, int64_t H, int64_t K, int64_t V, int64_t segment, int64_t segments,
                  const int64_t *begin, const int64_t *order, const float *r, const float *decay, const float *k,
                  const float *v, const float *a, const float *b, const float *u, const float *state,
                  const float *dy, float *scratch, float *dr, float *dw, float *dk, float *dv, float *da, float *db,
                  float *du, float *dstate) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < N * H; task++) {
        int64_t n = task / H, h = task % H, first = begin[n], length = begin[n + 1] - first;
        float(*starts)[K][COLUMNS] = (void *)(scratch + thread_number() * (segments + segment + 1) * K * COLUMNS);
        float(*states)[K][COLUMNS] = starts + segments, y[COLUMNS], sa[segment][COLUMNS];
        float *sums[] = {dr, dw, dk, da, db}; /* over columns */
        State G;
        for (int64_t column = 0; column < V; column += COLUMNS) {
            Head x = {H, K, V, h, column, at_most(COLUMNS, V - column), order + first, r, decay, k, v, a, b, u};
            int64_t columns = task * K * V + column, last = length ? (length - 1) / segment : -1;
            load(starts[0], state + columns, K, V, x.width);
            for (int64_t position = 0; position < last * segment; position++) {
                int64_t s = position / segment;
                Token t = token_at(&x, position);
                step(&x, &t, starts[s + (position % segment > 0)], starts[s + 1], sa[0], y);
            }
            load(G, dstate + columns, K, V, x.width);
            for (int64_t s = last; s >= 0; s--) {
                int64_t begins = s * segment, ends = at_most(length, begins + segment);
                memcpy(states[0], starts[s], sizeof *starts);
                for (int64_t position = begins; position < ends; position++) {
                    int64_t p = position - begins;
                    Token t = token_at(&x, position);
                    for (int i = 0; i < 5 && !column; i++)
                        if (sums[i]) memset(sums[i] + t.key, 0, K * sizeof(float));
                    memset(dv + t.value, 0, x.width * sizeof(float));
                    step(&x, &t, states[p], states[p + 1], sa[p], y);
                }
                for (int64_t p = ends - begins - 1; p >= 0; p--) {
                    Token t = token_at(&x, begins + p);
                    if (t.is_pad) continue;
                    int64_t key = t.key;
                    float dy_t[COLUMNS] = {0}, dv_t[COLUMNS];
                    memcpy(dy_t, dy + t.value, x.width * sizeof(float));
                    if (a)
                        back_rwkv7(states[p], states[p + 1], G, K, r + key, decay + key, k + key, a + key, b + key, t.v,
                                   sa[p], dy_t, dr + key, dw + key, dk + key, da + key, db + key, dv_t);
                    else
                        back_rwkv6(states[p], G, K, r + key, decay + key, k + key, u + h * K, t.v, dy_t, dr + key,
                                   dw + key, dk + key, du + task * K, dv_t);
                    memcpy(dv + t.value, dv_t, x.width * sizeof(float));
                }
            }
            store(G, dstate + columns, K, V, x.width);
        }
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
        float sa[COLUMNS];
        State S;
        for (int64_t column = 0; column < K; column += COLUMNS) {
            float *part = state + token * K + column;
            load(S, part, K, K, at_most(COLUMNS, K - column));
            step_rwkv7(S, S, K, r + token, w, key, a, b, value + column, sa, y + column);
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

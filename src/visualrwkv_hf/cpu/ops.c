/* Ops for a CPU, float32 throughout; native.py says what each computes, compiles this file and calls it.
   Letters: N sequences, B batch, H heads, K / V key / value size of a head, A = H K, C hidden size, F width of the
   channel mix, D rank of a low-rank map. Every array is contiguous. */
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

/* --- one token's time mix, head by head --------------------------------------------------------------- */

typedef float Function(float);
static float itself(float x) { return x; }
static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
static float silu(float x) { return x * sigmoid(x); }
static float squared_relu(float x) { return x > 0 ? x * x : 0; }

/* From the matrix products to what `output` reads: r to v_first, and out, are [B, A], w0 to norm_bias [A]. What a
   version lacks is null, and in layer 0 value_gate. mask [B] is 0 at pads, or null. */
typedef struct {
    int64_t H, K;
    float eps, decay_scale;
    const float *r, *decay, *k, *v, *rate, *gate, *value_gate, *v_first;
    const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *u, *norm_weight, *norm_bias;
    const uint8_t *mask;
    float *state, *out;
} TimeMix;

static void normalize(int64_t K, float eps, const float *weight, const float *bias, float *y) {
    float mean = 0, variance = 0;
    for (int64_t i = 0; i < K; i++) mean += y[i] / K;
    for (int64_t i = 0; i < K; i++) variance += (y[i] - mean) * (y[i] - mean) / K;
    for (int64_t i = 0; i < K; i++) y[i] = (y[i] - mean) / sqrtf(variance + eps) * weight[i] + bias[i];
}

/* RWKV-6, and RWKV-5 without `decay`. */
static void rwkv6_head(const TimeMix *x, int64_t task) {
    int64_t K = x->K, token = task * K, head = task % x->H * K; /* where its values and its weights begin */
    float w[MAX_KEYS], value[MAX_KEYS + COLUMNS] = {0}, y[MAX_KEYS + COLUMNS];
    for (int64_t i = 0; i < K; i++) w[i] = expf(-expf(x->w0[head + i] + (x->decay ? x->decay[token + i] : 0)));
    memcpy(value, x->v + token, K * sizeof(float));
    State S;
    for (int64_t column = 0; column < K; column += COLUMNS) {
        float *part = x->state + token * K + column;
        load(S, part, K, K, at_most(COLUMNS, K - column));
        step_rwkv6(S, S, K, x->r + token, w, x->k + token, x->u + head, value + column, y + column);
        store(S, part, K, K, at_most(COLUMNS, K - column));
    }
    normalize(K, x->eps, x->norm_weight + head, x->norm_bias + head, y);
    for (int64_t i = 0; i < K; i++) x->out[token + i] = y[i] * x->gate[token + i];
}

static void rwkv7_head(const TimeMix *x, int64_t task) {
    int64_t K = x->K, token = task * K, head = task % x->H * K;
    float w[MAX_KEYS], key[MAX_KEYS], value[MAX_KEYS + COLUMNS] = {0}, a[MAX_KEYS], b[MAX_KEYS];
    float y[MAX_KEYS + COLUMNS], sa[COLUMNS], square = 0, bonus = 0;
    for (int64_t i = 0; i < K; i++) {
        float k_i = x->k[token + i], eta = sigmoid(x->a0[head + i] + x->rate[token + i]);
        w[i] = expf(-x->decay_scale * sigmoid(x->w0[head + i] + x->decay[token + i]));
        key[i] = k_i * (1 + (eta - 1) * x->k_a[head + i]);
        value[i] = x->v[token + i];
        if (x->value_gate)
            value[i] += (x->v_first[token + i] - value[i]) * sigmoid(x->v0[head + i] + x->value_gate[token + i]);
        a[i] = k_i * x->k_k[head + i]; /* not yet of length 1 */
        b[i] = eta;
        square += a[i] * a[i];
        bonus += x->r[token + i] * key[i] * x->r_k[head + i];
    }
    float length = fmaxf(sqrtf(square), 1e-12f);
    for (int64_t i = 0; i < K; i++) {
        float kk = a[i] / length;
        a[i] = -kk;
        b[i] *= kk;
    }
    State S;
    for (int64_t column = 0; column < K; column += COLUMNS) {
        float *part = x->state + token * K + column;
        load(S, part, K, K, at_most(COLUMNS, K - column));
        step_rwkv7(S, S, K, x->r + token, w, key, a, b, value + column, sa, y + column);
        store(S, part, K, K, at_most(COLUMNS, K - column));
    }
    normalize(K, x->eps, x->norm_weight + head, x->norm_bias + head, y);
    for (int64_t i = 0; i < K; i++) x->out[token + i] = (y[i] + bonus * value[i]) * x->gate[token + i];
}

/* A "team" function is called by all threads: each does its share, and what others do is there behind a barrier. */

/* Team, with a barrier at its end. */
static void heads(const TimeMix *x, int64_t B, void head(const TimeMix *, int64_t)) {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * x->H; task++) {
        if (x->mask && !x->mask[task / x->H])
            memset(x->out + task * x->K, 0, x->K * sizeof(float));
        else
            head(x, task);
    }
}

void rwkv7_decode(int threads, int64_t B, int64_t H, int64_t K, float eps, float decay_scale, const float *r,
                  const float *decay, const float *k, const float *v, const float *rate, const float *gate,
                  const float *value_gate, const float *v_first, const float *w0, const float *a0, const float *v0,
                  const float *k_k, const float *k_a, const float *r_k, const float *norm_weight,
                  const float *norm_bias, const uint8_t *mask, float *state, float *out) {
    TimeMix x = {H, K, eps, decay_scale, r, decay, k, v, rate, gate, value_gate, v_first,
                 w0, a0, v0, k_k, k_a, r_k, NULL, norm_weight, norm_bias, mask, state, out};
#pragma omp parallel num_threads(threads)
    heads(&x, B, rwkv7_head);
}

/* --- matrix times vector: as fast as the weights come from memory ------------------------------------ */

/* What lies so many bytes ahead is fetched meanwhile: left alone, a processor begins anew at each row. */
enum { AHEAD = 4096 };
#define DOT(TYPE)                                                                                               \
    static float dot_##TYPE(int64_t n, const TYPE *w, const float *x) {                                         \
        Lanes y[4] = {0};                                                                                       \
        int64_t i = 0;                                                                                          \
        for (; i + 4 * LANES <= n; i += 4 * LANES) {                                                            \
            const char *ahead = (const char *)(w + i) + AHEAD;                                                  \
            for (int64_t byte = 0; byte < (int64_t)(4 * LANES * sizeof(TYPE)); byte += 64)                      \
                __builtin_prefetch(ahead + byte, 0, 2);                                                         \
            _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)                                                 \
                y[j] += lanes_##TYPE(w + i + j * LANES) * lanes_float(x + i + j * LANES);                       \
        }                                                                                                       \
        for (; i < n; i += LANES) y[0] += lanes_##TYPE(w + i) * lanes_float(x + i);                             \
        return sum((y[0] + y[1]) + (y[2] + y[3]));                                                              \
    }
DOT(float)
DOT(uint16_t)
DOT(int8_t)

/* W [out, in] of float (size 4), bfloat16 (2) or int8 (1), that with a scale [out]. `in` is a multiple of 16. */
typedef struct {
    const void *weight;
    const float *scale;
} Linear;

/* Team: y = f(x W^T), [count, out]. */
static void multiply(Linear w, int64_t size, Function f, int64_t count, int64_t in, int64_t out, const float *x,
                     float *y) {
#pragma omp for schedule(guided, 32) nowait
    for (int64_t o = 0; o < out; o++) {
        const void *row = (const char *)w.weight + o * in * size;
        for (int64_t n = 0; n < count; n++) {
            const float *x_n = x + n * in;
            float dot = size == 4   ? dot_float(in, row, x_n)
                        : size == 2 ? dot_uint16_t(in, row, x_n)
                                    : dot_int8_t(in, row, x_n);
            y[n * out + o] = f(w.scale ? dot * w.scale[o] : dot);
        }
    }
}

void linear(int threads, int64_t count, int64_t in, int64_t out, int64_t size, const void *weight,
            const float *scale, const float *x, float *y) {
#pragma omp parallel num_threads(threads)
    multiply((Linear){weight, scale}, size, itself, count, in, out, x, y);
}

/* Of float (size 4) or bfloat16 (2). */
static float element(const void *x, int64_t size, int64_t i) {
    if (size == 4) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

enum { ABREAST = 128, ROWS_AT_ONCE = 4 }; /* columns and rows of a low-rank map */
#define ADD_ROWS(TYPE)                                                                                          \
    static void add_rows_##TYPE(int64_t out, int64_t width, const TYPE *w, const float *x, float *y) {          \
        int64_t j = 0;                                                                                          \
        for (; j + LANES <= width; j += LANES) {                                                                \
            Lanes y_j = lanes_float(y + j);                                                                     \
            _Pragma("GCC unroll 4") for (int i = 0; i < ROWS_AT_ONCE; i++)                                      \
                y_j += x[i] * lanes_##TYPE(w + i * out + j);                                                    \
            store_lanes(y + j, y_j);                                                                            \
        }                                                                                                       \
        for (; j < width; j++)                                                                                  \
            for (int i = 0; i < ROWS_AT_ONCE; i++) y[j] += x[i] * element(w, sizeof(TYPE), i * out + j);        \
    }
ADD_ROWS(float)
ADD_ROWS(uint16_t)

/* Team: y = f(x W), [count, out], with W [in, out] as the halves of a low-rank map are stored, of float (size 4) or
   bfloat16 (2), `in` a multiple of ROWS_AT_ONCE. Rows of x lie `stride` apart. */
static void multiply_low_rank(const void *w, int64_t size, Function f, int64_t count, int64_t in, int64_t out,
                              int64_t stride, const float *x, float *y) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t o = 0; o < out; o += ABREAST) {
        int64_t width = at_most(ABREAST, out - o);
        for (int64_t n = 0; n < count; n++) {
            float sums[ABREAST] = {0};
            for (int64_t i = 0; i < in; i += ROWS_AT_ONCE) {
                const void *rows = (const char *)w + (i * out + o) * size;
                if (size == 4)
                    add_rows_float(out, width, rows, x + n * stride + i, sums);
                else
                    add_rows_uint16_t(out, width, rows, x + n * stride + i, sums);
            }
            for (int64_t j = 0; j < width; j++) y[n * out + o + j] = f(sums[j]);
        }
    }
}

/* --- one token through a layer ------------------------------------------------------------------------ */

/* native_layers.py has these names in this order. What a version lacks is null. */
enum { TO_R, TO_K, TO_V, TO_G, TO_W, TO_A, TARGETS }; /* of a token shift */
enum { LN1_WEIGHT, LN1_BIAS, LN2_WEIGHT, LN2_BIAS, FFN_SHIFT_K, FFN_SHIFT_R, SHIFT_X, SHIFT, OF_C = SHIFT + TARGETS };
enum { W0 = OF_C, A0, V0, K_K, K_A, R_K, U, NORM_WEIGHT, NORM_BIAS, VECTORS };
enum { LOW_SHIFT, LOW_W, LOW_A, LOW_V, LOW_G, LOW_RANK };
enum { RECEPTANCE, KEY, VALUE, GATE, OUTPUT, FFN_KEY, FFN_VALUE, FFN_RECEPTANCE, LINEAR };

typedef struct {
    const void *vector[VECTORS]; /* [C], or [A] from W0 on */
    struct {
        const void *down, *up; /* [C, D], [D, A]; of the token shift [C, 5 D], [5, D, C] */
    } low_rank[LOW_RANK];
    Linear linear[LINEAR];
} Weights;

typedef struct {
    int64_t version, B, C, A, F, H;
    int64_t size, linear_size; /* bytes of an element: of a linear layer, of all else */
    int64_t rank[LOW_RANK];    /* columns of `down` */
} Sizes;

typedef struct {
    Sizes s;
    float eps;
    const Weights *weights;
    const float *vector[VECTORS]; /* those of `weights`, in float */
    const uint8_t *mask;
    float *x, *normed, *back, *mixed, *shifted[TARGETS]; /* [B, C]; `back` leads from a token to the one before it */
    float *low[LOW_RANK], *high[LOW_RANK];               /* [B, D], [B, A] */
    float *r, *k, *v, *gate, *out, *inner, *receptance;  /* [B, A], but for [B, F], [B, C] */
} Layer;

static float *take(float **scratch, int64_t n) {
    float *x = *scratch;
    *scratch += n;
    return x;
}

static void layer_norm(int64_t C, float eps, const float *weight, const float *bias, const float *x, float *y) {
    Lanes total = {0}, squares = {0};
    for (int64_t c = 0; c < C; c += LANES) total += lanes_float(x + c);
    float mean = sum(total) / C;
    for (int64_t c = 0; c < C; c += LANES) {
        Lanes centred = lanes_float(x + c) - mean;
        squares += centred * centred;
    }
    float scale = 1 / sqrtf(sum(squares) / C + eps);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

/* back = what was carried - x, and x is carried on; a pad sees itself, and is passed over. */
static void look_back(int64_t C, int64_t size, int is_pad, const float *x, void *carried, float *back) {
    for (int64_t c = 0; c < C; c++) back[c] = is_pad ? 0 : element(carried, size, c) - x[c];
    if (is_pad) return;
    if (size == 4) memcpy(carried, x, C * sizeof(float));
    for (int64_t c = 0; c < C && size == 2; c++) { /* to the nearest bfloat16, to the even one of two */
        uint32_t bits;
        memcpy(&bits, x + c, sizeof bits);
        ((uint16_t *)carried)[c] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

static void enter(const Layer *l, int64_t n, int weight, int bias, void *carried) {
    int64_t C = l->s.C;
    layer_norm(C, l->eps, l->vector[weight], l->vector[bias], l->x + n * C, l->normed + n * C);
    look_back(C, l->s.size, l->mask && !l->mask[n], l->normed + n * C, (char *)carried + n * C * l->s.size,
              l->back + n * C);
}

/* y = x + back (weight + dynamic); weights of RWKV-5 are those of x. */
static void shift(const Layer *l, int64_t n, int name, const float *dynamic, float *y) {
    const float *x = l->normed + n * l->s.C, *back = l->back + n * l->s.C, *weight = l->vector[name];
    for (int64_t c = 0; c < l->s.C; c++) {
        float w = dynamic ? weight[c] + dynamic[n * l->s.C + c] : weight[c];
        y[n * l->s.C + c] = x[c] + back[c] * (l->s.version == 5 ? 1 - w : w);
    }
}

/* Team: a linear layer, and the halves of a low-rank map, where there are such. */
static void product(const Layer *l, int name, Function f, int64_t in, int64_t out, const float *x, float *y) {
    Linear w = l->weights->linear[name];
    if (w.weight) multiply(w, l->s.linear_size, f, l->s.B, in, out, x, y);
}

static void down(const Layer *l, int name, Function f, const float *x) {
    const void *w = l->weights->low_rank[name].down;
    if (w) multiply_low_rank(w, l->s.size, f, l->s.B, l->s.C, l->s.rank[name], l->s.C, x, l->low[name]);
}

static void up(const Layer *l, int name) {
    const void *w = l->weights->low_rank[name].up;
    int64_t D = l->s.rank[name];
    if (w) multiply_low_rank(w, l->s.size, itself, l->s.B, D, l->s.A, D, l->low[name], l->high[name]);
}

/* Team, with a barrier at its end: RWKV-6's token shift, whose weights depend on the token shifted by SHIFT_X. */
static void shift_dynamically(const Layer *l) {
    static const int targets[] = {TO_W, TO_K, TO_V, TO_R, TO_G};
    int64_t C = l->s.C, D = l->s.rank[LOW_SHIFT] / 5, B = l->s.B, size = l->s.size;
    const char *up = l->weights->low_rank[LOW_SHIFT].up;
    float *low = l->low[LOW_SHIFT];
#pragma omp for
    for (int64_t n = 0; n < B; n++) shift(l, n, SHIFT_X, NULL, l->mixed);
    multiply_low_rank(l->weights->low_rank[LOW_SHIFT].down, size, tanhf, B, C, 5 * D, C, l->mixed, low);
#pragma omp barrier
    for (int i = 0; i < 5; i++)
        multiply_low_rank(up + i * D * C * size, size, itself, B, D, C, 5 * D, low + i * D, l->shifted[targets[i]]);
#pragma omp barrier
#pragma omp for
    for (int64_t n = 0; n < B; n++)
        for (int to = 0; to < TARGETS; to++)
            if (l->vector[SHIFT + to]) shift(l, n, SHIFT + to, l->shifted[to], l->shifted[to]);
}

/* Team: what `output` makes of the time mix is in `mixed`, behind a barrier. */
static void time_mix(const Layer *l, const TimeMix *mix, void *carried, float *v_first) {
    int64_t B = l->s.B, C = l->s.C, A = l->s.A;
#pragma omp for
    for (int64_t n = 0; n < B; n++) {
        enter(l, n, LN1_WEIGHT, LN1_BIAS, carried);
        for (int to = 0; to < TARGETS && l->s.version != 6; to++)
            if (l->vector[SHIFT + to]) shift(l, n, SHIFT + to, NULL, l->shifted[to]);
    }
    if (l->s.version == 6) shift_dynamically(l);
    down(l, LOW_W, tanhf, l->shifted[TO_W]);
    down(l, LOW_A, itself, l->shifted[TO_A]);
    down(l, LOW_V, itself, l->shifted[TO_V]);
    down(l, LOW_G, sigmoid, l->shifted[TO_G]);
    product(l, RECEPTANCE, itself, C, A, l->shifted[TO_R], l->r);
    product(l, KEY, itself, C, A, l->shifted[TO_K], l->k);
    product(l, VALUE, itself, C, A, l->shifted[TO_V], l->v);
    product(l, GATE, silu, C, A, l->shifted[TO_G], l->gate);
#pragma omp barrier
    for (int name = LOW_W; name < LOW_RANK; name++) up(l, name);
    if (l->s.version == 7 && !mix->value_gate) {
#pragma omp for nowait
        for (int64_t i = 0; i < B * A; i++) v_first[i] = l->v[i];
    }
#pragma omp barrier
    heads(mix, B, l->s.version == 7 ? rwkv7_head : rwkv6_head);
    product(l, OUTPUT, itself, A, C, l->out, l->mixed);
}

/* Team: the channel mix of `x`, into which it first adds `mixed`. */
static void channel_mix(const Layer *l, void *carried) {
    int64_t B = l->s.B, C = l->s.C, F = l->s.F;
#pragma omp for
    for (int64_t n = 0; n < B; n++) {
        for (int64_t i = n * C; i < (n + 1) * C; i++) l->x[i] += l->mixed[i];
        enter(l, n, LN2_WEIGHT, LN2_BIAS, carried);
        shift(l, n, FFN_SHIFT_K, NULL, l->shifted[TO_K]);
        if (l->vector[FFN_SHIFT_R]) shift(l, n, FFN_SHIFT_R, NULL, l->shifted[TO_R]);
    }
    product(l, FFN_KEY, squared_relu, C, F, l->shifted[TO_K], l->inner);
    product(l, FFN_RECEPTANCE, sigmoid, C, C, l->shifted[TO_R], l->receptance);
#pragma omp barrier
    product(l, FFN_VALUE, itself, F, C, l->inner, l->mixed);
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < B * C; i++)
        l->x[i] += l->vector[FFN_SHIFT_R] ? l->receptance[i] * l->mixed[i] : l->mixed[i];
}

/* x [B, C] becomes what the layer makes of it; att_shift and ffn_shift [B, C], and state [B, H, K, K], are written too.
   v_first [B, A] is written by layer 0 of RWKV-7, which has no LOW_V, and read by the others; mask as in TimeMix.
   scratch: 16 (B + 1) (A + C) + B (F + all ranks). */
void rwkv_layer(int threads, float eps, float norm_eps, float decay_scale, const Sizes *sizes, const Weights *weights,
                void *att_shift, void *ffn_shift, float *state, const uint8_t *mask, float *v_first, float *x,
                float *scratch) {
    Layer l = {.s = *sizes, .eps = eps, .weights = weights, .mask = mask, .x = x};
    int64_t B = l.s.B, C = l.s.C, A = l.s.A;
    for (int i = 0; i < VECTORS; i++) {
        int64_t n = i < OF_C ? C : A;
        l.vector[i] = weights->vector[i];
        if (!l.vector[i] || l.s.size == 4) continue;
        float *vector = take(&scratch, n);
        for (int64_t j = 0; j < n; j++) vector[j] = element(weights->vector[i], l.s.size, j);
        l.vector[i] = vector;
    }
    float **of_C[] = {&l.normed, &l.back, &l.mixed, &l.receptance}, **of_A[] = {&l.r, &l.k, &l.v, &l.gate, &l.out};
    for (int i = 0; i < 4; i++) *of_C[i] = take(&scratch, B * C);
    for (int i = 0; i < 5; i++) *of_A[i] = take(&scratch, B * A);
    for (int i = 0; i < TARGETS; i++) l.shifted[i] = take(&scratch, B * C);
    for (int i = 0; i < LOW_RANK; i++) {
        l.low[i] = take(&scratch, B * l.s.rank[i]);
        l.high[i] = weights->low_rank[i].up ? take(&scratch, B * A) : NULL;
    }
    l.inner = take(&scratch, B * l.s.F);
    TimeMix mix = {.H = l.s.H, .K = A / l.s.H, .eps = norm_eps, .decay_scale = decay_scale};
    mix.mask = mask, mix.state = state, mix.out = l.out;
    mix.r = l.r, mix.k = l.k, mix.v = l.v, mix.gate = l.s.version == 7 ? l.high[LOW_G] : l.gate;
    mix.decay = l.high[LOW_W], mix.rate = l.high[LOW_A], mix.value_gate = l.high[LOW_V], mix.v_first = v_first;
    mix.w0 = l.vector[W0], mix.a0 = l.vector[A0], mix.v0 = l.vector[V0], mix.u = l.vector[U];
    mix.k_k = l.vector[K_K], mix.k_a = l.vector[K_A], mix.r_k = l.vector[R_K];
    mix.norm_weight = l.vector[NORM_WEIGHT], mix.norm_bias = l.vector[NORM_BIAS];
#pragma omp parallel num_threads(threads)
    {
        time_mix(&l, &mix, att_shift, v_first);
#pragma omp barrier
        channel_mix(&l, ffn_shift);
    }
}

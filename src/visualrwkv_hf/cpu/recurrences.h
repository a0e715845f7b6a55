/* The WKV recurrences of RWKV-5, 6 and 7, forward and backward. Every array is contiguous.
   Letters: N sequences, H heads, K / V key / value size of a head. */
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* One thread holds COLUMNS columns of a head's state, of at most MAX_KEYS rows: 16 KB for a head of 64. The backward
   keeps the states of SEGMENT tokens: 256 KB for a head of 64. cpu/ops.py reads these numbers from the library. */
#define COLUMNS 64
#define MAX_KEYS 256
#define SEGMENT 16
enum { WIDTH = COLUMNS / LANES };
typedef float State[MAX_KEYS][COLUMNS];

/* The columns of a state [K, V] are independent of one another, so COLUMNS of them are computed at a time. Where fewer
   are left, the rest of the register is zero. */
static void load(State S, const float *state, int64_t K, int64_t V, int64_t width) {
    for (int64_t i = 0; i < K; i++) {
        memset(S[i], 0, sizeof S[i]);
        memcpy(S[i], state + i * V, width * sizeof(float));
    }
}

static void store(State S, float *state, int64_t K, int64_t V, int64_t width) {
    for (int64_t i = 0; i < K; i++) memcpy(state + i * V, S[i], width * sizeof(float));
}

/* Row i of a state fills WIDTH registers. Loops over them are unrolled so that sums over i stay in registers. */
#define EACH_LANES _Pragma("GCC unroll 16") for (int j = 0; j < WIDTH; j++)

/* Compute S_t from S_{t-1}. Both may be the same memory. */
static void step_rwkv6(float (*before)[COLUMNS], float (*after)[COLUMNS], int64_t K, const float *r,
                       const float *decay, const float *k, const float *u, const float *v, float *y) {
    Lanes v_t[WIDTH], y_t[WIDTH];
    EACH_LANES v_t[j] = lanes_F32(v + j * LANES), y_t[j] = (Lanes){0};
    for (int64_t i = 0; i < K; i++) {
        float ru = r[i] * u[i];
        EACH_LANES {
            Lanes s = lanes_F32(before[i] + j * LANES), kv = k[i] * v_t[j];
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
    EACH_LANES v_t[j] = lanes_F32(v + j * LANES), sa_t[j] = y_t[j] = (Lanes){0};
    for (int64_t i = 0; i < K; i++) EACH_LANES sa_t[j] += a[i] * lanes_F32(before[i] + j * LANES);
    for (int64_t i = 0; i < K; i++) {
        EACH_LANES {
            Lanes s = decay[i] * lanes_F32(before[i] + j * LANES) + b[i] * sa_t[j] + k[i] * v_t[j];
            y_t[j] += r[i] * s;
            store_lanes(after[i] + j * LANES, s);
        }
    }
    EACH_LANES store_lanes(sa + j * LANES, sa_t[j]), store_lanes(y + j * LANES, y_t[j]);
}

/* The backward of those steps. G, the gradient of S_t, becomes that of S_{t-1}. dv is written, the other gradients
   are added to. */
static void back_rwkv6(float (*before)[COLUMNS], float (*G)[COLUMNS], int64_t K, const float *r, const float *decay,
                       const float *k, const float *u, const float *v, const float *dy, float *dr, float *dw,
                       float *dk, float *du, float *dv) {
    Lanes v_t[WIDTH], dy_t[WIDTH], dv_t[WIDTH], dy_v = {0};
    float ruk = 0; /* y_t = S_{t-1}^T r_t + ruk v_t */
    for (int64_t i = 0; i < K; i++) ruk += r[i] * u[i] * k[i];
    EACH_LANES {
        v_t[j] = lanes_F32(v + j * LANES);
        dy_t[j] = lanes_F32(dy + j * LANES);
        dv_t[j] = ruk * dy_t[j];
        dy_v += dy_t[j] * v_t[j];
    }
    float druk = sum(dy_v);
    for (int64_t i = 0; i < K; i++) {
        Lanes dr_i = {0}, ddecay_i = {0}, dk_i = {0};
        EACH_LANES {
            Lanes s = lanes_F32(before[i] + j * LANES), g = lanes_F32(G[i] + j * LANES);
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
        v_t[j] = lanes_F32(v + j * LANES);
        sa_t[j] = lanes_F32(sa + j * LANES);
        dy_t[j] = lanes_F32(dy + j * LANES);
        dv_t[j] = dsa_t[j] = (Lanes){0};
    }
    for (int64_t i = 0; i < K; i++) {
        Lanes dr_i = {0}, ddecay_i = {0}, dk_i = {0}, db_i = {0};
        EACH_LANES {
            Lanes g = lanes_F32(G[i] + j * LANES) + r[i] * dy_t[j];
            dr_i += lanes_F32(after[i] + j * LANES) * dy_t[j];
            ddecay_i += lanes_F32(before[i] + j * LANES) * g;
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
            da_i += lanes_F32(before[i] + j * LANES) * dsa_t[j];
            store_lanes(G[i] + j * LANES, decay[i] * lanes_F32(G[i] + j * LANES) + a[i] * dsa_t[j]);
        }
        da[i] += sum(da_i);
    }
    EACH_LANES store_lanes(dv + j * LANES, dv_t[j]);
}

/* The inputs of up to COLUMNS columns of one head's state: a and b are given in RWKV-7, u in RWKV-6.
   Position p of the recurrence is token order[p]; an entry ~token is a pad. */
typedef struct {
    int64_t H, K, V, h, column, width;
    const int64_t *order;
    const float *r, *decay, *k, *v, *a, *b, *u;
} Head;

typedef struct {
    int is_pad;
    int64_t key, value; /* offsets of its keys and its values */
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

/* The reasons for which a function computes nothing: it returns one of these tags, OK otherwise. Python checks its
   arguments first, so these are a second fence against reading or writing outside of an array. */
#define ERRORS(X) X(OK) X(SIZE_OUT_OF_RANGE) X(ORDER_OUT_OF_RANGE) X(FORMAT_UNKNOWN) X(NO_MEMORY)
enum { ERRORS(AS_ITEM) };

/* Sequence n reads the tokens order[begin[n]:begin[n + 1]] of `tokens` in all. */
static int check_order(int64_t N, int64_t tokens, const int64_t *begin, const int64_t *order) {
    if (begin[0] < 0 || begin[N] > tokens) return ORDER_OUT_OF_RANGE;
    for (int64_t n = 0; n < N; n++)
        if (begin[n + 1] < begin[n]) return ORDER_OUT_OF_RANGE;
    for (int64_t p = begin[0]; p < begin[N]; p++)
        if ((order[p] < 0 ? ~order[p] : order[p]) >= tokens) return ORDER_OUT_OF_RANGE;
    return OK;
}

/* Whether an array of three dimensions has sizes whose bytes can be counted. */
static int is_countable(int64_t a, int64_t b, int64_t c) {
    int64_t bytes;
    return a >= 0 && b >= 0 && c >= 0 && !__builtin_mul_overflow(a, b, &bytes) &&
           !__builtin_mul_overflow(bytes, c, &bytes) && !__builtin_mul_overflow(bytes, 8, &bytes);
}

static int check_recurrence(int64_t N, int64_t tokens, int64_t H, int64_t K, int64_t V, const int64_t *begin,
                            const int64_t *order) {
    if (H < 1 || K < 1 || K > MAX_KEYS || V < 1 || V > INT32_MAX) return SIZE_OUT_OF_RANGE;
    if (!is_countable(tokens, H, K) || !is_countable(tokens, H, V) || !is_countable(N, H, K * V))
        return SIZE_OUT_OF_RANGE;
    return check_order(N, tokens, begin, order);
}

/* Read all sequences: `state` [N, H, K, V] becomes the state after the last token of each, `out` [tokens, H, V]. */
int visualrwkv_wkv(int threads, int64_t N, int64_t tokens, int64_t H, int64_t K, int64_t V, const int64_t *begin,
                   const int64_t *order, const float *r, const float *decay, const float *k, const float *v,
                   const float *a, const float *b, const float *u, float *state, float *out) {
    int error = check_recurrence(N, tokens, H, K, V, begin, order);
    if (error) return error;
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
    return OK;
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Number of segments of the longest sequence. */
static int64_t segments_of(int64_t N, const int64_t *begin) {
    int64_t longest = 0;
    for (int64_t n = 0; n < N; n++)
        if (begin[n + 1] - begin[n] > longest) longest = begin[n + 1] - begin[n];
    return (longest + SEGMENT - 1) / SEGMENT;
}

/* Compute the gradients of what visualrwkv_wkv reads from those of what it returns, dy and dstate [N, H, K, V]. dstate
   becomes the gradient of `state`; dw is that of log(decay); du [N, H, K], which must come as zeros, is that of u for
   each sequence. States are computed again: first those before each segment, then those within one segment. */
int visualrwkv_wkv_backward(int threads, int64_t N, int64_t tokens, int64_t H, int64_t K, int64_t V,
                            const int64_t *begin, const int64_t *order, const float *r, const float *decay,
                            const float *k, const float *v, const float *a, const float *b, const float *u,
                            const float *state, const float *dy, float *dr, float *dw, float *dk, float *dv, float *da,
                            float *db, float *du, float *dstate) {
    int error = check_recurrence(N, tokens, H, K, V, begin, order);
    if (error) return error;
    if (threads < 1) threads = 1;
    int64_t segments = segments_of(N, begin), states_of_thread = segments + SEGMENT + 1;
    float *scratch = malloc(threads * states_of_thread * K * COLUMNS * sizeof(float));
    if (!scratch) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < N * H; task++) {
        int64_t n = task / H, h = task % H, first = begin[n], length = begin[n + 1] - first;
        float(*starts)[K][COLUMNS] = (void *)(scratch + thread_number() * states_of_thread * K * COLUMNS);
        float(*states)[K][COLUMNS] = starts + segments, y[COLUMNS], sa[SEGMENT][COLUMNS];
        float *sums[] = {dr, dw, dk, da, db}; /* gradients that are sums over columns */
        State G;
        for (int64_t column = 0; column < V; column += COLUMNS) {
            Head x = {H, K, V, h, column, at_most(COLUMNS, V - column), order + first, r, decay, k, v, a, b, u};
            int64_t columns = task * K * V + column, last = length ? (length - 1) / SEGMENT : -1;
            load(starts[0], state + columns, K, V, x.width);
            for (int64_t position = 0; position < last * SEGMENT; position++) {
                int64_t s = position / SEGMENT;
                Token t = token_at(&x, position);
                step(&x, &t, starts[s + (position % SEGMENT > 0)], starts[s + 1], sa[0], y);
            }
            load(G, dstate + columns, K, V, x.width);
            for (int64_t s = last; s >= 0; s--) {
                int64_t begins = s * SEGMENT, ends = at_most(length, begins + SEGMENT);
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
    free(scratch);
    return OK;
}


/* Ops for a CPU. They compute in float32, whatever format a weight is stored in. cpu/ops.py and cpu/block.py call them,
   and ask `visualrwkv_contract` for every constant and every order of names that both sides must agree on.
   Letters: B batch, H heads, K key and value size of a head, A = H K, C hidden size, F width of the channel mix,
   D rank of a low-rank map. Every array is contiguous. */
#include "registers.h"

#include "recurrences.h"

#include "token_shift.h"

#include "pool.h"

#include "products.h"

#include "amx.h"

#include "int8.h"

#include "bf16.h"

#include "attention.h"

/* Compute y [count, out] = scale x W^T for x [count, in] and W [out, in]. */
int visualrwkv_linear(int threads, int64_t count, int64_t in, int64_t out, int64_t format, const void *weight,
                      const void *scale, const float *x, float *y) {
    if (in < 1 || in % COLUMN_MULTIPLE || !is_countable(count, in, 1) || !is_countable(count, out, 1) ||
        !is_countable(out, in, 1))
        return SIZE_OUT_OF_RANGE;
    Linear w = {weight, scale, format};
    if (!is_readable(w, in)) return FORMAT_UNKNOWN;
    if (count < 1 || out < 1) return OK;
    Products products = {1, {{w, 0, itself, count, in, out, in, x, y, NULL}}};
    Team team = begin_team(threads);
    share_products(team, &products);
    end_team(team);
    return OK;
}

/* --- what a block is made of -------------------------------------------------------------------------- */

#define SHIFT_TARGETS(X) X(TO_R) X(TO_K) X(TO_V) X(TO_G) X(TO_W) X(TO_A)
#define VECTORS_OF_C(X)                                                                                         \
    X(LN1_WEIGHT) X(LN1_BIAS) X(LN2_WEIGHT) X(LN2_BIAS) X(FFN_SHIFT_K) X(FFN_SHIFT_R) X(SHIFT_X)                \
    X(SHIFT_R) X(SHIFT_K) X(SHIFT_V) X(SHIFT_G) X(SHIFT_W) X(SHIFT_A)
#define VECTORS_OF_A(X) X(W0) X(A0) X(V0) X(K_K) X(K_A) X(R_K) X(U) X(NORM_WEIGHT) X(NORM_BIAS)
#define LOW_RANKS(X) X(LOW_SHIFT) X(LOW_W) X(LOW_A) X(LOW_V) X(LOW_G)
#define LINEARS(X)                                                                                              \
    X(RECEPTANCE) X(KEY) X(VALUE) X(GATE) X(OUTPUT) X(FFN_KEY) X(FFN_VALUE) X(FFN_RECEPTANCE)
enum { SHIFT_TARGETS(AS_ITEM) TARGETS }; /* SHIFT_R + TO_K is SHIFT_K */
enum { VECTORS_OF_C(AS_ITEM) VECTORS_OF_A(AS_ITEM) VECTORS };
enum { LOW_RANKS(AS_ITEM) LOW_RANK };
enum { LINEARS(AS_ITEM) LINEAR };

/* What a version of RWKV lacks is null. Vectors and low-rank maps are of the format `Sizes.format`. */
typedef struct {
    const void *vector[VECTORS]; /* [C], or [A] from W0 on */
    struct {
        const void *down, *up; /* [C, D], [D, A]; those of the token shift are [C, 5 D], [5, D, C] */
    } low_rank[LOW_RANK];
    Linear linear[LINEAR];
} Weights;

#define SIZES(X) X(version) X(B) X(C) X(A) X(F) X(H) X(format)
#define AS_FIELD(NAME) NAME,
typedef struct {
    int64_t SIZES(AS_FIELD) rank[LOW_RANK]; /* columns of each `down` */
} Sizes;

/* Describe what Python has to know: a line for each constant, and one for each list of names in its order. */
const char *visualrwkv_contract(void) {
#define AS_WORD(NAME) " " #NAME
#define NUMBER(X) #X
#define WORDS(NAME) #NAME NAME(AS_WORD) "\n"
#define CONSTANT(NAME, X) #NAME " " NUMBER(X) "\n"
    return CONSTANT(MAX_KEYS, MAX_KEYS) CONSTANT(COLUMN_MULTIPLE, COLUMN_MULTIPLE)
        CONSTANT(LOW_RANK_MULTIPLE, LOW_RANK_MULTIPLE) CONSTANT(GROUP, GROUP) CONSTANT(FAST_INT8, FAST_INT8) CONSTANT(FAST_BF16, FAST_BF16)
            CONSTANT(MOST_DIMS, MOST_DIMS)
            WORDS(FORMATS) WORDS(FLOAT_FORMATS) WORDS(ERRORS)
            WORDS(VECTORS_OF_C) WORDS(VECTORS_OF_A) WORDS(LOW_RANKS) WORDS(LINEARS) WORDS(SIZES);
}

/* --- the heads of one token's time mix ---------------------------------------------------------------- */

/* r to v_first, and out, are [B, A]; w0 to norm_bias are [A]. What a version lacks is null, and so is value_gate in
   layer 0. mask [B] is 0 at pads, or null where there are none. The matrices of a sequence, [H, K, K], begin `stride`
   floats after those of the one before, or at the slot of a pool that `slots` [B] gives. */
typedef struct {
    int64_t H, K, stride;
    const int64_t *slots;
    int is_rwkv7;
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

/* The matrix [K, K] of a head. */
static float *matrix_of(const TimeMix *x, int64_t task) {
    int64_t sequence = task / x->H, slot = x->slots ? x->slots[sequence] : sequence;
    return x->state + slot * x->stride + task % x->H * x->K * x->K;
}

/* One head of RWKV-6, or of RWKV-5, which has no `decay`. */
static void rwkv6_head(const TimeMix *x, int64_t task) {
    int64_t K = x->K, token = task * K, head = task % x->H * K; /* offsets of its values and of its weights */
    float w[MAX_KEYS], value[MAX_KEYS + COLUMNS] = {0}, y[MAX_KEYS + COLUMNS];
    for (int64_t i = 0; i < K; i++) w[i] = expf(-expf(x->w0[head + i] + (x->decay ? x->decay[token + i] : 0)));
    memcpy(value, x->v + token, K * sizeof(float));
    State S;
    for (int64_t column = 0; column < K; column += COLUMNS) {
        float *part = matrix_of(x, task) + column;
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
        a[i] = k_i * x->k_k[head + i]; /* divided by its length below */
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
        float *part = matrix_of(x, task) + column;
        load(S, part, K, K, at_most(COLUMNS, K - column));
        step_rwkv7(S, S, K, x->r + token, w, key, a, b, value + column, sa, y + column);
        store(S, part, K, K, at_most(COLUMNS, K - column));
    }
    normalize(K, x->eps, x->norm_weight + head, x->norm_bias + head, y);
    for (int64_t i = 0; i < K; i++) x->out[token + i] = (y[i] + bonus * value[i]) * x->gate[token + i];
}

static void rwkv_heads(const void *phase, int64_t first, int64_t last) {
    const TimeMix *x = phase;
    for (int64_t task = first; task < last; task++) {
        if (x->mask && !x->mask[task / x->H])
            memset(x->out + task * x->K, 0, x->K * sizeof(float));
        else
            (x->is_rwkv7 ? rwkv7_head : rwkv6_head)(x, task);
    }
}

/* Compute one token of the time mix of B sequences from its matrix products, [B, A] each; see `TimeMix`. `gate` is final.
   state is a pool of N slots, or with null `slots` the matrices of the N = B sequences. */
int visualrwkv_decode(int threads, int64_t B, int64_t H, int64_t K, int64_t N, int64_t stride, int64_t is_rwkv7, float eps,
                      float decay_scale, const float *r, const float *decay, const float *k, const float *v,
                      const float *rate, const float *gate, const float *value_gate, const float *v_first,
                      const float *w0, const float *a0, const float *v0, const float *k_k, const float *k_a,
                      const float *r_k, const float *u, const float *norm_weight, const float *norm_bias,
                      const uint8_t *mask, const int64_t *slots, float *state, float *out) {
    if (K < 1 || K > MAX_KEYS || !is_countable(B, H, K) || !is_countable(N, H, K * K) || stride < H * K * K)
        return SIZE_OUT_OF_RANGE;
    for (int64_t b = 0; b < B; b++)
        if (slots ? slots[b] < 0 || slots[b] >= N : b >= N) return SIZE_OUT_OF_RANGE;
    TimeMix mix = {H, K, stride, slots, is_rwkv7 != 0, eps, decay_scale, r, decay, k, v, rate, gate, value_gate, v_first,
                   w0, a0, v0, k_k, k_a, r_k, u, norm_weight, norm_bias, mask, state, out};
    Team team = begin_team(threads);
    share(team, B * H, rwkv_heads, &mix);
    end_team(team);
    return OK;
}

/* --- one token through a block ------------------------------------------------------------------------ */

/* The previous tokens of a token shift, [C] each in the format of the block's sizes: the one of a sequence begins `stride`
   numbers after that of the sequence before, or at the slot of a pool that `slots` [B] gives. */
typedef struct {
    void *tokens;
    int64_t stride;
} Previous;

typedef struct {
    Sizes s;
    float eps;
    const Weights *weights;
    const float *vector[VECTORS]; /* those of `weights`, in float32 */
    const uint8_t *mask;
    const int64_t *slots;                                /* [B], or null: see `Previous` */
    Previous att_previous, ffn_previous;
    float *x, *normed, *back, *mixed, *shifted[TARGETS]; /* [B, C]; `back` is the previous token minus this one */
    float *low[LOW_RANK], *high[LOW_RANK];               /* [B, D], [B, A] */
    float *r, *k, *v, *gate, *out, *inner, *receptance;  /* [B, A], but for [B, F], [B, C] */
} Block;

static void layer_norm(int64_t C, float eps, const float *weight, const float *bias, const float *x, float *y) {
    Lanes total = {0}, squares = {0};
    for (int64_t c = 0; c < C; c += LANES) total += lanes_F32(x + c);
    float mean = sum(total) / C;
    for (int64_t c = 0; c < C; c += LANES) {
        Lanes centred = lanes_F32(x + c) - mean;
        squares += centred * centred;
    }
    float scale = 1 / sqrtf(sum(squares) / C + eps);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

/* back = previous - x; then x becomes the previous token of the next one. A pad sees itself and is not stored. */
static void look_back(int64_t C, int64_t format, int is_pad, const float *x, void *previous, float *back) {
    if (is_pad) {
        memset(back, 0, C * sizeof(float));
        return;
    }
    WIDEN[format](C, previous, back);
    for (int64_t c = 0; c < C; c++) back[c] -= x[c];
    STORE[format](C, x, previous);
}

static void enter(const Block *l, int64_t n, int weight, int bias, Previous previous) {
    int64_t C = l->s.C, slot = l->slots ? l->slots[n] : n;
    layer_norm(C, l->eps, l->vector[weight], l->vector[bias], l->x + n * C, l->normed + n * C);
    look_back(C, l->s.format, l->mask && !l->mask[n], l->normed + n * C,
              (char *)previous.tokens + slot * previous.stride * (BITS[l->s.format] / 8), l->back + n * C);
}

/* y = x + back (weight + dynamic). In RWKV-5 the stored weight is that of x, so that of `back` is 1 - weight. */
static void shift(const Block *l, int64_t n, int name, const float *dynamic, float *y) {
    const float *x = l->normed + n * l->s.C, *back = l->back + n * l->s.C, *weight = l->vector[name];
    for (int64_t c = 0; c < l->s.C; c++) {
        float w = dynamic ? weight[c] + dynamic[n * l->s.C + c] : weight[c];
        y[n * l->s.C + c] = x[c] + back[c] * (l->s.version == 5 ? 1 - w : w);
    }
}

/* Add a linear layer, or a half of a low-rank map, to the products of a phase, if the block has it. */
static void product(Products *to, const Block *l, int name, Function f, int64_t in, int64_t out, const float *x, float *y) {
    Linear w = l->weights->linear[name];
    if (w.weight) to->list[to->count++] = (Product){w, 0, f, l->s.B, in, out, in, x, y, NULL};
}

static void low_rank(Products *to, const Block *l, const void *half, Function f, int64_t in, int64_t out, int64_t stride,
                     const float *x, float *y) {
    if (half) to->list[to->count++] = (Product){{half, NULL, l->s.format}, 1, f, l->s.B, in, out, stride, x, y, NULL};
}

static void down(Products *to, const Block *l, int name, Function f, const float *x) {
    low_rank(to, l, l->weights->low_rank[name].down, f, l->s.C, l->s.rank[name], l->s.C, x, l->low[name]);
}

static void up(Products *to, const Block *l, int name) {
    int64_t D = l->s.rank[name];
    low_rank(to, l, l->weights->low_rank[name].up, itself, D, l->s.A, D, l->low[name], l->high[name]);
}

/* RWKV-6's token shift, whose weights depend on the token shifted by SHIFT_X. */
static void shift_rows(const void *phase, int64_t first, int64_t last) {
    const Block *l = phase;
    for (int64_t n = first; n < last; n++)
        for (int to = 0; to < TARGETS; to++)
            if (l->vector[SHIFT_R + to]) shift(l, n, SHIFT_R + to, l->s.version == 6 ? l->shifted[to] : NULL, l->shifted[to]);
}

static void shift_dynamically(Team team, const Block *l) {
    static const int targets[] = {TO_W, TO_K, TO_V, TO_R, TO_G};
    int64_t C = l->s.C, D = l->s.rank[LOW_SHIFT] / 5, format = l->s.format;
    const char *halves = l->weights->low_rank[LOW_SHIFT].up;
    float *low = l->low[LOW_SHIFT];
    Products downs = {0}, ups = {0};
    down(&downs, l, LOW_SHIFT, tanhf, l->mixed);
    share_products(team, &downs);
    for (int i = 0; i < 5; i++)
        low_rank(&ups, l, halves + i * D * C * (BITS[format] / 8), itself, D, C, 5 * D, low + i * D,
                 l->shifted[targets[i]]);
    share_products(team, &ups);
}

/* The time mix; its result is in `mixed`. */
static void enter_time_mix(const void *phase, int64_t first, int64_t last) {
    const Block *l = phase;
    for (int64_t n = first; n < last; n++) {
        enter(l, n, LN1_WEIGHT, LN1_BIAS, l->att_previous);
        if (l->s.version == 6) shift(l, n, SHIFT_X, NULL, l->mixed);
    }
}

static void time_mix(Team team, const Block *l, const TimeMix *mix, float *v_first) {
    int64_t B = l->s.B, C = l->s.C, A = l->s.A;
    share(team, B, enter_time_mix, l);
    if (l->s.version == 6) shift_dynamically(team, l);
    share(team, B, shift_rows, l);
    Products first = {0}, ups = {0}, output = {0};
    down(&first, l, LOW_W, tanhf, l->shifted[TO_W]);
    down(&first, l, LOW_A, itself, l->shifted[TO_A]);
    down(&first, l, LOW_V, itself, l->shifted[TO_V]);
    down(&first, l, LOW_G, sigmoid, l->shifted[TO_G]);
    product(&first, l, RECEPTANCE, itself, C, A, l->shifted[TO_R], l->r);
    product(&first, l, KEY, itself, C, A, l->shifted[TO_K], l->k);
    product(&first, l, VALUE, itself, C, A, l->shifted[TO_V], l->v);
    product(&first, l, GATE, silu, C, A, l->shifted[TO_G], l->gate);
    share_products(team, &first);
    for (int name = LOW_W; name < LOW_RANK; name++) up(&ups, l, name);
    share_products(team, &ups);
    if (mix->is_rwkv7 && !mix->value_gate) memcpy(v_first, l->v, B * A * sizeof(float));
    share(team, B * mix->H, rwkv_heads, mix);
    product(&output, l, OUTPUT, itself, A, C, l->out, l->mixed);
    share_products(team, &output);
}

/* Add `mixed` to `x`, then the channel mix of that. */
static void enter_channel_mix(const void *phase, int64_t first, int64_t last) {
    const Block *l = phase;
    for (int64_t n = first; n < last; n++) {
        for (int64_t i = n * l->s.C; i < (n + 1) * l->s.C; i++) l->x[i] += l->mixed[i];
        enter(l, n, LN2_WEIGHT, LN2_BIAS, l->ffn_previous);
        shift(l, n, FFN_SHIFT_K, NULL, l->shifted[TO_K]);
        if (l->vector[FFN_SHIFT_R]) shift(l, n, FFN_SHIFT_R, NULL, l->shifted[TO_R]);
    }
}

static void leave_channel_mix(const void *phase, int64_t first, int64_t last) {
    const Block *l = phase;
    for (int64_t i = first * l->s.C; i < last * l->s.C; i++)
        l->x[i] += l->vector[FFN_SHIFT_R] ? l->receptance[i] * l->mixed[i] : l->mixed[i];
}

static void channel_mix(Team team, const Block *l) {
    int64_t B = l->s.B, C = l->s.C, F = l->s.F;
    share(team, B, enter_channel_mix, l);
    Products inner = {0}, outer = {0};
    product(&inner, l, FFN_KEY, squared_relu, C, F, l->shifted[TO_K], l->inner);
    product(&inner, l, FFN_RECEPTANCE, sigmoid, C, C, l->shifted[TO_R], l->receptance);
    share_products(team, &inner);
    product(&outer, l, FFN_VALUE, itself, F, C, l->inner, l->mixed);
    share_products(team, &outer);
    share(team, B, leave_channel_mix, l);
}

/* Hand out the next n floats of the scratch memory, rounded up to whole cache lines. */
static float *take(float *scratch, int64_t *taken, int64_t n) {
    float *x = scratch ? scratch + *taken : NULL;
    *taken += (n + 15) / 16 * 16;
    return x;
}

/* Place every buffer of a block in `scratch` and return how many floats that takes; a null `scratch` only counts. */
static int64_t lay_out(Block *l, float *scratch) {
    int64_t B = l->s.B, C = l->s.C, A = l->s.A, taken = 0;
    for (int i = 0; i < VECTORS; i++) {
        int64_t n = i < W0 ? C : A;
        l->vector[i] = l->weights->vector[i];
        if (!l->vector[i] || l->s.format == F32) continue;
        float *vector = take(scratch, &taken, n);
        if (scratch) WIDEN[l->s.format](n, l->weights->vector[i], vector);
        l->vector[i] = vector;
    }
    float **of_C[] = {&l->normed, &l->back, &l->mixed, &l->receptance};
    float **of_A[] = {&l->r, &l->k, &l->v, &l->gate, &l->out};
    for (int i = 0; i < 4; i++) *of_C[i] = take(scratch, &taken, B * C);
    for (int i = 0; i < 5; i++) *of_A[i] = take(scratch, &taken, B * A);
    for (int i = 0; i < TARGETS; i++) l->shifted[i] = take(scratch, &taken, B * C);
    for (int i = 0; i < LOW_RANK; i++) {
        l->low[i] = take(scratch, &taken, B * l->s.rank[i]);
        l->high[i] = l->weights->low_rank[i].up ? take(scratch, &taken, B * A) : NULL;
    }
    l->inner = take(scratch, &taken, B * l->s.F);
    return taken;
}

static int check_block(const Sizes *s, const Weights *weights) {
    int64_t most = 1 << 24;
    if (s->version < 5 || s->version > 7 || s->B < 1 || s->C < 1 || s->F < 1 || s->H < 1) return SIZE_OUT_OF_RANGE;
    if (s->B > most || s->C > most || s->A > most || s->F > most) return SIZE_OUT_OF_RANGE;
    if (s->A < 1 || s->A % s->H || s->A / s->H > MAX_KEYS) return SIZE_OUT_OF_RANGE;
    if (s->C % COLUMN_MULTIPLE || s->A % COLUMN_MULTIPLE || s->F % COLUMN_MULTIPLE) return SIZE_OUT_OF_RANGE;
    if (s->version == 6 && s->rank[LOW_SHIFT] % (5 * LOW_RANK_MULTIPLE)) return SIZE_OUT_OF_RANGE;
    for (int i = 0; i < LOW_RANK; i++)
        if (s->rank[i] < 0 || s->rank[i] > most || s->rank[i] % LOW_RANK_MULTIPLE) return SIZE_OUT_OF_RANGE;
    if (!is_float_format(s->format)) return FORMAT_UNKNOWN;
    for (int i = 0; i < LINEAR; i++) {
        int64_t in = i == OUTPUT ? s->A : i == FFN_VALUE ? s->F : s->C;
        if (weights->linear[i].weight && !is_readable(weights->linear[i], in)) return FORMAT_UNKNOWN;
    }
    return OK;
}

/* What the token before has left to a block: `count` sequences, or slots of a pool. */
typedef struct {
    Previous att_previous, ffn_previous;
    float *state; /* [count, H, K, K], of which two begin `stride` floats apart */
    int64_t stride, count;
} LayerState;

static int check_state(const Sizes *s, const LayerState *state, const int64_t *slots) {
    int64_t most = 1 << 24, matrices = s->A * (s->A / s->H);
    if (state->count < 1 || state->count > most || state->stride < matrices || !is_countable(state->count, state->stride, 1))
        return SIZE_OUT_OF_RANGE;
    if (state->att_previous.stride < s->C || !is_countable(state->count, state->att_previous.stride, 1) ||
        state->ffn_previous.stride < s->C || !is_countable(state->count, state->ffn_previous.stride, 1))
        return SIZE_OUT_OF_RANGE;
    for (int64_t b = 0; b < s->B; b++)
        if (slots ? slots[b] < 0 || slots[b] >= state->count : b >= state->count) return SIZE_OUT_OF_RANGE;
    return OK;
}

static void one_block(Team team, Block *l, TimeMix *mix, const LayerState *state, float *v_first) {
    mix->H = l->s.H, mix->K = l->s.A / l->s.H, mix->is_rwkv7 = l->s.version == 7;
    mix->stride = state->stride, mix->slots = l->slots;
    mix->mask = l->mask, mix->state = state->state, mix->out = l->out;
    mix->r = l->r, mix->k = l->k, mix->v = l->v, mix->gate = mix->is_rwkv7 ? l->high[LOW_G] : l->gate;
    mix->decay = l->high[LOW_W], mix->rate = l->high[LOW_A], mix->value_gate = l->high[LOW_V], mix->v_first = v_first;
    mix->w0 = l->vector[W0], mix->a0 = l->vector[A0], mix->v0 = l->vector[V0], mix->u = l->vector[U];
    mix->k_k = l->vector[K_K], mix->k_a = l->vector[K_A], mix->r_k = l->vector[R_K];
    mix->norm_weight = l->vector[NORM_WEIGHT], mix->norm_bias = l->vector[NORM_BIAS];
    time_mix(team, l, mix, v_first);
    channel_mix(team, l);
}

/* Round to a float format, as what one block hands to the next is. */
static void round_to(int64_t format, int64_t n, float *x) {
    uint16_t rounded[256];
    for (int64_t i = 0; i < n && format != F32; i += 256) {
        int64_t some = at_most(256, n - i);
        STORE[format](some, x + i, rounded);
        WIDEN[format](some, rounded, x + i);
    }
}

/* Some blocks, one after the other, which have B, C, A and a format in common. */
typedef struct {
    int64_t count;
    float eps, norm_eps, decay_scale;
    const Sizes *sizes;
    const Weights *weights;
    const LayerState *states;
    const int64_t *slots; /* [B], where in their pools the states of the sequences lie, or null */
    const uint8_t *mask;  /* [B], 0 at pads, or null */
} Blocks;

/* Check all blocks, and count the floats that one of them needs besides. */
static int check_blocks(const Blocks *b, int64_t *most) {
    Block l = {0};
    *most = 0;
    if (b->count < 1) return SIZE_OUT_OF_RANGE;
    for (int64_t i = 0; i < b->count; i++) {
        const Sizes *s = &b->sizes[i];
        int error = check_block(s, &b->weights[i]);
        if (error) return error;
        if (s->B != b->sizes->B || s->C != b->sizes->C || s->A != b->sizes->A || s->format != b->sizes->format)
            return SIZE_OUT_OF_RANGE;
        if ((error = check_state(s, &b->states[i], b->slots))) return error;
        l.s = *s, l.weights = &b->weights[i];
        int64_t needed = lay_out(&l, NULL);
        *most = needed > *most ? needed : *most;
    }
    return OK;
}

/* x [B, C] becomes the last block's output. v_first [B, A] is written by a block of RWKV-7 that has no LOW_V, and read by
   the others. */
static void run_blocks(Team team, const Blocks *b, float *scratch, float *v_first, float *x) {
    Block l = {.eps = b->eps, .mask = b->mask, .slots = b->slots, .x = x};
    TimeMix mix = {.eps = b->norm_eps, .decay_scale = b->decay_scale};
    for (int64_t i = 0; i < b->count; i++) {
        l.s = b->sizes[i], l.weights = &b->weights[i];
        l.att_previous = b->states[i].att_previous, l.ffn_previous = b->states[i].ffn_previous;
        lay_out(&l, scratch);
        one_block(team, &l, &mix, &b->states[i], v_first);
        round_to(l.s.format, l.s.B * l.s.C, x);
        if (mix.is_rwkv7 && !mix.value_gate) round_to(l.s.format, l.s.B * l.s.A, v_first);
    }
}

/* One token through some blocks, whose states are updated; see `Blocks` and `run_blocks`. */
int visualrwkv_blocks(int threads, int64_t count, float eps, float norm_eps, float decay_scale, const Sizes *sizes,
                      const Weights *weights, const LayerState *states, const int64_t *slots, const uint8_t *mask,
                      float *v_first, float *x) {
    Blocks blocks = {count, eps, norm_eps, decay_scale, sizes, weights, states, slots, mask};
    int64_t most;
    int error = check_blocks(&blocks, &most);
    if (error) return error;
    float *scratch = malloc(most * sizeof(float));
    if (!scratch) return NO_MEMORY;
    Team team = begin_team(threads);
    run_blocks(team, &blocks, scratch, v_first, x);
    end_team(team);
    free(scratch);
    return OK;
}

#include "token.h"

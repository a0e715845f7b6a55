/* Fuzz the C ops: sizes, orders, formats and values come from the input. Every array is allocated with exactly the size
   that ops.c may use, so that AddressSanitizer sees each access outside of one. README.md says how to run this. */
#include "../../src/visualrwkv_hf/cpu/ops.c"

#include <stddef.h>
#include <stdio.h>

typedef struct {
    const uint8_t *data;
    size_t size, at;
    uint64_t random; /* continues where the input ends */
} Input;

static uint8_t byte(Input *in) {
    if (in->at < in->size) return in->data[in->at++];
    in->random = in->random * 6364136223846793005u + 1442695040888963407u;
    return in->random >> 56;
}

static int64_t between(Input *in, int64_t low, int64_t high) { return low + byte(in) % (high - low + 1); }

/* One in sixteen sizes is far out of range. */
static int64_t size(Input *in, int64_t low, int64_t high, int64_t step) {
    static const int64_t extremes[] = {0, -1, INT64_MIN, INT64_MAX, INT32_MAX, 1 << 20, 257, 7};
    return byte(in) % 16 ? between(in, low, high) * step : extremes[byte(in) % 8];
}

static int64_t mostly(Input *in, int64_t usual) { return byte(in) % 64 ? usual : (int8_t)byte(in); }

/* At most one block of memory for each pointer; all are freed together. */
enum { MOST_BLOCKS = 512, MOST_BYTES = 1 << 24 };
static void *blocks[MOST_BLOCKS];
static int block_count, is_too_large;

static void *array(int64_t count, int64_t bytes) {
    if (count < 0 || count > MOST_BYTES / bytes || block_count == MOST_BLOCKS) {
        is_too_large = 1;
        return NULL;
    }
    return blocks[block_count++] = calloc(count ? count : 1, bytes);
}

static float number(Input *in) {
    uint8_t kind = byte(in);
    if (kind < 250) return (kind - 125) / 64.0f;
    uint32_t bits = (uint32_t)byte(in) << 24 | byte(in) << 16 | byte(in) << 8 | byte(in); /* NaN, denormal, ... */
    return float_of_bits(bits);
}

static float *floats(Input *in, int64_t count) {
    float *x = array(count, sizeof(float));
    for (int64_t i = 0; x && i < count; i++) x[i] = i < 64 ? number(in) : x[i % 64];
    return x;
}

static int64_t product_of(int64_t a, int64_t b) {
    int64_t ab;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &ab) ? -1 : ab;
}

static void *stored(Input *in, int64_t count, int64_t format) {
    int64_t bytes = product_of(count, format >= 0 && format < FORMAT_COUNT ? BITS[format] : 32) / 8;
    uint8_t *x = array(bytes, 1);
    for (int64_t i = 0; x && i < bytes; i++) x[i] = i < 256 ? byte(in) : x[i % 256];
    return x;
}

static void *scales(Input *in, int64_t rows, int64_t columns, int64_t format) {
    if (byte(in) == 0) return NULL; /* to be refused where a format needs one */
    int64_t bytes = format == INT8 || format == INT4 ? scale_bytes(format, columns) : 0;
    return bytes > 0 ? stored(in, product_of(rows, bytes), INT8) : NULL;
}

/* --- the ops ------------------------------------------------------------------------------------------ */

static void fuzz_recurrence(Input *in) {
    int64_t N = between(in, 0, 3), T = between(in, 0, 40), H = size(in, 1, 3, 1), K = size(in, 1, 70, 1);
    int64_t V = size(in, 1, 140, 1), keys = product_of(product_of(T, H), K), values = product_of(product_of(T, H), V);
    int64_t states = product_of(product_of(product_of(N, H), K), V);
    int is_rwkv7 = byte(in) & 1, has_gradient = byte(in) & 1;
    if (keys < 0 || values < 0 || states < 0) /* ops.c must refuse before it reads */
        keys = values = states = 0;
    int64_t *begin = array(N + 1, sizeof(int64_t)), *order = array(T, sizeof(int64_t));
    for (int64_t n = 0; n <= N; n++) begin[n] = mostly(in, n * T / (N ? N : 1));
    for (int64_t p = 0; p < T; p++) order[p] = mostly(in, byte(in) % 8 ? p : ~p);
    float *r = floats(in, keys), *decay = floats(in, keys), *k = floats(in, keys), *v = floats(in, values);
    float *a = is_rwkv7 ? floats(in, keys) : NULL, *b = is_rwkv7 ? floats(in, keys) : NULL;
    float *u = is_rwkv7 ? NULL : floats(in, keys ? product_of(H, K) : 0), *state = floats(in, states);
    float *out = floats(in, values), *gradients[6];
    if (is_too_large) return;
    if (!has_gradient) {
        visualrwkv_wkv(2, N, T, H, K, V, begin, order, r, decay, k, v, a, b, u, state, out);
        return;
    }
    for (int i = 0; i < 6; i++) gradients[i] = i < 4 || is_rwkv7 ? floats(in, i == 3 ? values : keys) : NULL;
    float *du = is_rwkv7 ? NULL : array(product_of(product_of(N, H), K), sizeof(float)), *dstate = floats(in, states);
    if (is_too_large) return;
    visualrwkv_wkv_backward(2, N, T, H, K, V, begin, order, r, decay, k, v, a, b, u, state, out, gradients[0],
                            gradients[1], gradients[2], gradients[3], gradients[4], gradients[5], du, dstate);
}

static void fuzz_token_shift(Input *in) {
    int64_t M = size(in, 1, 6, 1), N = size(in, 0, 70, 1), C = size(in, 1, 140, 1), S = size(in, 0, 3, 1);
    int64_t tokens = product_of(N, C), states = product_of(S, C), weights = product_of(M, C), all = product_of(M, tokens);
    int has_gradient = byte(in) & 1, is_dynamic = byte(in) & 1;
    if (tokens < 0 || states < 0 || weights < 0 || all < 0) tokens = states = weights = all = 0; /* to be refused */
    int64_t *before = array(tokens ? N : 0, sizeof(int64_t));
    for (int64_t t = 0; before && tokens && t < N; t++) before[t] = mostly(in, between(in, 0, 3) - 1 + (t > 0 ? t - 1 : 0));
    float *x = floats(in, tokens), *carried = floats(in, states), *mix = floats(in, weights);
    float *dynamic = is_dynamic ? floats(in, all) : NULL, *targets[TARGETS_AT_MOST] = {0};
    for (int64_t m = 0; m < M && m < TARGETS_AT_MOST; m++) targets[m] = floats(in, tokens);
    float *dx = floats(in, tokens), *dcarried = floats(in, states), *dmix = floats(in, weights);
    float *ddynamic = is_dynamic ? floats(in, all) : NULL;
    if (is_too_large) return;
    if (!has_gradient)
        visualrwkv_token_shift(2, M, N, C, S, before, x, carried, mix, dynamic, targets);
    else
        visualrwkv_token_shift_backward(2, M, N, C, S, before, x, carried, mix, dynamic, (const float *const *)targets, dx,
                                        dcarried, dmix, ddynamic);
}

static void fuzz_linear(Input *in) {
    int64_t count = size(in, 0, 4, 1), columns = size(in, 1, 9, 16), rows = size(in, 0, 40, 1);
    int64_t format = mostly(in, between(in, 0, FORMAT_COUNT - 1));
    int64_t weights = product_of(rows, columns), inputs = product_of(count, columns), outputs = product_of(count, rows);
    if (weights < 0 || inputs < 0 || outputs < 0) weights = inputs = outputs = 0;
    void *weight = stored(in, weights, format);
    void *scale = scales(in, rows < 0 ? 0 : rows, columns, format);
    float *x = floats(in, inputs), *y = floats(in, outputs);
    if (!is_too_large) visualrwkv_linear(2, count, columns, rows, format, weight, scale, x, y);
}

static void fuzz_linear_int8(Input *in) {
    int64_t count = size(in, 0, 70, 1), columns = size(in, 1, 40, 16), rows = size(in, 0, 140, 1);
    int64_t format = mostly(in, byte(in) & 1 ? INT8 : INT4), x_format = mostly(in, between(in, F32, F16));
    int64_t weights = product_of(rows, columns), inputs = product_of(count, columns), outputs = product_of(count, rows);
    if (weights < 0 || inputs < 0 || outputs < 0) weights = inputs = outputs = 0;
    void *weight = stored(in, weights, format);
    void *scale = scales(in, rows < 0 ? 0 : rows, columns, format);
    void *x = stored(in, inputs, x_format), *y = stored(in, outputs, x_format);
    if (!is_too_large) visualrwkv_linear_int8(2, count, columns, rows, format, weight, scale, x_format, x, y);
}

static void fuzz_linear_bf16(Input *in) {
    int64_t count = size(in, 0, 40, 1), columns = size(in, 1, 40, 16), rows = size(in, 0, 110, 1);
    int64_t weights = product_of(rows, columns), inputs = product_of(count, columns), outputs = product_of(count, rows);
    if (weights < 0 || inputs < 0 || outputs < 0) weights = inputs = outputs = 0;
    void *weight = stored(in, weights, BF16), *bias = byte(in) & 1 ? stored(in, rows < 0 ? 0 : rows, BF16) : NULL;
    void *x = stored(in, inputs, BF16), *y = stored(in, outputs, BF16);
    if (!is_too_large) visualrwkv_linear_bf16(2, count, columns, rows, weight, bias, x, y);
}

static void fuzz_attention_bf16(Input *in) {
    int64_t N = between(in, 0, 2), L = size(in, 1, 40, 1), H = between(in, 1, 3), D = size(in, 1, 50, 2);
    if (L > 64) N = 0; /* its time grows with the square of L */
    int64_t numbers = product_of(product_of(N, L), product_of(H, D));
    if (numbers < 0) numbers = 0; /* ops.c must refuse before it reads */
    void *q = stored(in, numbers, BF16), *k = stored(in, numbers, BF16), *v = stored(in, numbers, BF16);
    void *y = stored(in, numbers, BF16);
    int64_t rows = mostly(in, 1), columns = mostly(in, L);
    int has_bias = byte(in) & 1;
    int64_t queries = product_of(product_of(N, H), L);
    float *across = has_bias ? floats(in, rows > 0 ? product_of(queries < 0 ? 0 : queries, rows) : 0) : NULL;
    float *along = has_bias ? floats(in, columns > 0 ? product_of(queries < 0 ? 0 : queries, columns) : 0) : NULL;
    if (!is_too_large) visualrwkv_attention_bf16(2, N, L, H, D, rows, columns, number(in), q, k, v, across, along, y);
}

static void fuzz_weights(Input *in, Sizes *sizes, Weights *weights, int is_first) {
    Sizes s = *sizes;
    for (int i = 0; i < LOW_RANK; i++) s.rank[i] = between(in, 1, 5) * LOW_RANK_MULTIPLE;
    s.rank[LOW_SHIFT] *= 5;
    int is_rwkv7 = s.version == 7;
    Weights w = {0};
    for (int i = 0; i < VECTORS; i++) w.vector[i] = stored(in, i < W0 ? s.C : s.A, s.format);
    if (is_rwkv7) w.vector[FFN_SHIFT_R] = NULL;
    for (int i = 0; i < LOW_RANK; i++) {
        int is_there = i == LOW_SHIFT ? s.version == 6 : i == LOW_W ? s.version > 5 : is_rwkv7;
        if (!is_there || (i == LOW_V && is_first)) continue;
        w.low_rank[i].down = stored(in, s.C * s.rank[i], s.format);
        w.low_rank[i].up = stored(in, s.rank[i] * (i == LOW_SHIFT ? s.C : s.A), s.format);
    }
    for (int i = 0; i < LINEAR; i++) {
        int64_t columns = i == OUTPUT ? s.A : i == FFN_VALUE ? s.F : s.C, format = between(in, 0, FORMAT_COUNT - 1);
        int64_t rows = i == FFN_KEY ? s.F : i < OUTPUT ? s.A : s.C;
        if (is_rwkv7 && (i == GATE || i == FFN_RECEPTANCE)) continue;
        w.linear[i] = (Linear){stored(in, rows * columns, format), scales(in, rows, columns, format), format};
    }
    *sizes = s, *weights = w;
}

static void fuzz_decode(Input *in) {
    int64_t B = between(in, 1, 4), H = between(in, 1, 3), K = mostly(in, between(in, 1, 70)), N = B + between(in, 0, 2);
    int64_t A = product_of(H, K), matrices = product_of(A, K), stride = mostly(in, matrices + (byte(in) & 3));
    int64_t is_rwkv7 = byte(in) & 1, *slots = byte(in) & 1 ? array(B, sizeof(int64_t)) : NULL;
    for (int64_t b = 0; slots && b < B; b++) slots[b] = mostly(in, N - 1 - b);
    const float *of_tokens[8], *of_A[9];
    for (int i = 0; i < 8; i++) of_tokens[i] = floats(in, product_of(B, A));
    for (int i = 0; i < 9; i++) of_A[i] = floats(in, A);
    int is_first = byte(in) & 1;
    if (is_rwkv7 ? is_first : byte(in) & 1) of_tokens[is_rwkv7 ? 6 : 1] = NULL; /* value_gate; decay of RWKV-6 */
    float *state = floats(in, product_of(N, stride > matrices ? stride : matrices)), *out = floats(in, product_of(B, A));
    uint8_t *mask = byte(in) & 1 ? stored(in, B, INT8) : NULL;
    const float **t = of_tokens, **a = of_A;
    if (!is_too_large)
        visualrwkv_decode(2, B, H, K, N, stride, is_rwkv7, 1e-5f, 0.6f, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], a[0],
                          a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], mask, slots, state, out);
}

static void fuzz_blocks(Input *in) {
    Sizes s = {.version = between(in, 5, 7), .B = between(in, 1, 3), .C = between(in, 1, 4) * 16}, sizes[3];
    s.H = between(in, 1, 3), s.A = s.H * 16 * between(in, 1, 5), s.format = between(in, F32, F16);
    int64_t count = between(in, 1, 3), is_first = byte(in) & 1;
    Weights w[3];
    LayerState states[3];
    int64_t N = s.B + between(in, 0, 2), between_tokens = s.C + 16 * (byte(in) & 1), *slots = NULL;
    int64_t matrices = s.A * (s.A / s.H), between_states = matrices + (byte(in) & 3);
    if (byte(in) & 1) {
        slots = array(s.B, sizeof(int64_t));
        for (int64_t b = 0; slots && b < s.B; b++) slots[b] = N - 1 - b;
    }
    for (int64_t i = 0; i < count; i++) {
        sizes[i] = s;
        sizes[i].F = between(in, 1, 6) * 16;
        fuzz_weights(in, &sizes[i], &w[i], is_first && !i);
        states[i].att_previous = (Previous){stored(in, N * between_tokens, s.format), between_tokens};
        states[i].ffn_previous = (Previous){stored(in, N * between_tokens, s.format), between_tokens};
        states[i].state = floats(in, N * between_states);
        states[i].stride = between_states, states[i].count = N;
    }
    float *v_first = floats(in, s.B * s.A), *x = floats(in, s.B * s.C);
    uint8_t *mask = byte(in) & 1 ? stored(in, s.B, INT8) : NULL;
    Sizes *changed = &sizes[byte(in) % count];
    switch (byte(in) % 32) { /* sizes that must be refused */
    case 0: changed->version = byte(in); changed->version = changed->version >= 5 && changed->version <= 7 ? 8 : changed->version; break;
    case 1: changed->C += 8; break;
    case 2: changed->H = 0; break;
    case 3: changed->A = s.H * 272; break;
    case 4: changed->format = INT8; break;
    case 5: changed->rank[LOW_W] += 2; break;
    case 6: w[0].linear[KEY].format = -1; break;
    case 7: changed->B = INT64_MAX; break;
    case 8: count = byte(in) & 1 ? 0 : -1; break;
    case 9: if (count > 1) sizes[1].C += 16; break;
    case 10: states[0].count = s.B - 1; break;
    case 11: states[0].stride = matrices - 1; break;
    case 12: states[0].att_previous.stride = s.C - 1; break;
    case 13: if (slots) slots[0] = byte(in) & 1 ? N : -1; break;
    case 14: states[0].count = INT64_MAX; break;
    }
    if (!is_too_large) visualrwkv_blocks(2, count, 1e-5f, 1e-5f, 0.6f, sizes, w, states, slots, mask, v_first, x);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t count) {
    Input in = {data, count, 0, count};
    void (*const targets[])(Input *) = {fuzz_recurrence, fuzz_token_shift, fuzz_linear, fuzz_linear_int8, fuzz_linear_bf16,
                                       fuzz_attention_bf16, fuzz_decode, fuzz_blocks};
    block_count = is_too_large = 0;
    targets[byte(&in) % (sizeof targets / sizeof *targets)](&in);
    while (block_count) free(blocks[--block_count]);
    return 0;
}

#ifdef STANDALONE /* without libFuzzer: so many random inputs */
int main(int count, char **arguments) {
    int runs = count > 1 ? atoi(arguments[1]) : 1000;
    uint64_t random = 1;
    for (int run = 0; run < runs; run++) {
        uint8_t data[512];
        for (size_t i = 0; i < sizeof data; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            data[i] = random >> 56;
        }
        data[0] = run; /* each op in turn */
        LLVMFuzzerTestOneInput(data, sizeof data);
    }
    printf("%d inputs\n", runs);
    return 0;
}
#endif

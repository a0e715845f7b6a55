/* Products of many rows in bfloat16, as the instruction of AVX512-BF16 sums them in float32: y = x W^T + bias.
   A thread takes PANEL_OF_BF16 rows of W, brings each block of their columns into the order of the instruction, and
   multiplies it with all rows of x. Vectors of sums hold neighbours of a row of y, so that the bias is added, and the result
   rounded and stored, without a transposition. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512F__)
#define FAST_BF16 1

/* Pairs of columns are words. A tile is ROWS_OF_X rows of x times up to VECTORS_OF_W registers of rows of W: its sums and what
   they are computed from fill the 32 registers. */
enum { WORDS_OF_BLOCK = 128, BLOCK_OF_BF16 = 2 * WORDS_OF_BLOCK, ROWS_OF_X = 8, VECTORS_OF_W = 3,
       PANEL_OF_BF16 = VECTORS_OF_W * 16 };

typedef struct {
    int64_t count, in, out, blocks, padded; /* `padded`: rows of x with those of zeros after the last one */
    const BF16_t *weight, *bias;
    uint32_t *x; /* [blocks, padded, WORDS_OF_BLOCK] */
    BF16_t *y;
} ProductOfBF16;

/* Columns beyond the last one, and rows, are zero. */
static void copy_rows_of_x(const ProductOfBF16 *p, const BF16_t *from, int64_t row) {
    for (int64_t b = 0; b < p->blocks; b++) {
        int64_t n = row < p->count ? at_most(BLOCK_OF_BF16, p->in - b * BLOCK_OF_BF16) : 0;
        char *to = (char *)(p->x + (b * p->padded + row) * WORDS_OF_BLOCK);
        memcpy(to, from + row * p->in + b * BLOCK_OF_BF16, n * sizeof(BF16_t));
        memset(to + n * sizeof(BF16_t), 0, (BLOCK_OF_BF16 - n) * sizeof(BF16_t));
    }
}

/* Transpose 16 x 16 words. */
static inline void transpose_words(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) { /* quarter q of t[4 g + i] is column 4 q + i of rows 4 g ... 4 g + 3 */
        __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x44), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xee);
        __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x44), d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xee);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88), r[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88), r[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* Bring `rows` rows of a block of W to words [WORDS_OF_BLOCK, vectors, 16], with zeros beyond its last row and column. */
static void order_panel(const ProductOfBF16 *p, int64_t row, int64_t rows, int64_t vectors, int64_t block, __m512i *to) {
    int64_t n = at_most(BLOCK_OF_BF16, p->in - block * BLOCK_OF_BF16);
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t word = 0; word < WORDS_OF_BLOCK; word += 16) {
            int64_t left = n - 2 * word;
            __mmask32 some = left >= 32 ? ~(__mmask32)0 : left > 0 ? ((__mmask32)1 << left) - 1 : 0;
            __m512i r[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t at = v * 16 + i;
                const BF16_t *from = p->weight + (row + at) * p->in + block * BLOCK_OF_BF16 + 2 * word;
                r[i] = at < rows && some ? _mm512_maskz_loadu_epi16(some, from) : _mm512_setzero_si512();
            }
            transpose_words(r);
            for (int64_t i = 0; i < 16; i++) to[(word + i) * vectors + v] = r[i];
        }
}


/* y [ROWS_OF_X, 16 VECTORS] += x [ROWS_OF_X, steps] W, where W is words [steps, VECTORS, 16]. Strides are from row to row, in
   words. Names instead of indices: see int8.h. */
#define EACH_OF_X(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define TILE_OF_BF16(VECTORS, IF_2, IF_3)                                                                        \
    static inline __attribute__((always_inline)) void tile_of_##VECTORS(int64_t steps, const uint32_t *x, int64_t x_stride, \
                                                                        const __m512i *w, float *y, int64_t y_stride) { \
        EACH_OF_X(LOAD_##VECTORS)                                                                               \
        for (int64_t s = 0; s < steps; s++, w += VECTORS) {                                                     \
            __m512i w_0 = w[0];                                                                                 \
            IF_2(__m512i w_1 = w[1];)                                                                           \
            IF_3(__m512i w_2 = w[2];)                                                                           \
            EACH_OF_X(ADD_##VECTORS)                                                                            \
        }                                                                                                       \
        EACH_OF_X(SAVE_##VECTORS)                                                                               \
    }
#define YES(...) __VA_ARGS__
#define NO(...)
#define LOAD(r, v) __m512 y##r##_##v = _mm512_loadu_ps(y + r * y_stride + v * 16);
#define SAVE(r, v) _mm512_storeu_ps(y + r * y_stride + v * 16, y##r##_##v);
#define ADD(r, v)                                                                                               \
    y##r##_##v = _mm512_dpbf16_ps(y##r##_##v, (__m512bh)x_##r, (__m512bh)w_##v);                                \
    STAY(y##r##_##v)
#define WORD_OF(r) __m512i x_##r = _mm512_set1_epi32((int)x[r * x_stride + s]);
#define LOAD_1(r) LOAD(r, 0)
#define LOAD_2(r) LOAD(r, 0) LOAD(r, 1)
#define LOAD_3(r) LOAD(r, 0) LOAD(r, 1) LOAD(r, 2)
#define SAVE_1(r) SAVE(r, 0)
#define SAVE_2(r) SAVE(r, 0) SAVE(r, 1)
#define SAVE_3(r) SAVE(r, 0) SAVE(r, 1) SAVE(r, 2)
#define ADD_1(r) WORD_OF(r) ADD(r, 0)
#define ADD_2(r) WORD_OF(r) ADD(r, 0) ADD(r, 1)
#define ADD_3(r) WORD_OF(r) ADD(r, 0) ADD(r, 1) ADD(r, 2)
TILE_OF_BF16(1, NO, NO)
TILE_OF_BF16(2, YES, NO)
TILE_OF_BF16(3, YES, YES)
#undef LOAD
#undef SAVE
#undef ADD

static void multiply_tile_of_bf16(int64_t vectors, const uint32_t *x, const __m512i *w, float *sums) {
    if (vectors == 3)
        tile_of_3(WORDS_OF_BLOCK, x, WORDS_OF_BLOCK, w, sums, PANEL_OF_BF16);
    else if (vectors == 2)
        tile_of_2(WORDS_OF_BLOCK, x, WORDS_OF_BLOCK, w, sums, PANEL_OF_BF16);
    else
        tile_of_1(WORDS_OF_BLOCK, x, WORDS_OF_BLOCK, w, sums, PANEL_OF_BF16);
}

/* Compute rows [row, row + PANEL_OF_BF16) of W times x; `panel` and `sums` [padded, PANEL_OF_BF16] are room. */
static void multiply_panel_of_bf16(const ProductOfBF16 *p, int64_t row, __m512i *panel, float *sums) {
    int64_t rows = at_most(PANEL_OF_BF16, p->out - row), vectors = (rows + 15) / 16;
    for (int64_t v = 0; v < VECTORS_OF_W; v++) {
        int64_t left = rows - v * 16;
        __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        __m512 bias = _mm512_setzero_ps();
        if (p->bias && some)
            bias = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p->bias + row + v * 16)), 16);
        for (int64_t n = 0; n < p->padded; n++) _mm512_storeu_ps(sums + n * PANEL_OF_BF16 + v * 16, bias);
    }
    for (int64_t b = 0; b < p->blocks; b++) {
        order_panel(p, row, rows, vectors, b, panel);
        for (int64_t n = 0; n < p->padded; n += ROWS_OF_X)
            multiply_tile_of_bf16(vectors, p->x + (b * p->padded + n) * WORDS_OF_BLOCK, panel, sums + n * PANEL_OF_BF16);
    }
    for (int64_t n = 0; n < p->count; n++)
        for (int64_t v = 0; v < vectors; v++) {
            int64_t left = rows - v * 16;
            __mmask16 some = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
            __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + n * PANEL_OF_BF16 + v * 16));
            _mm256_mask_storeu_epi16(p->y + n * p->out + row + v * 16, some, rounded);
        }
}
#else
#define FAST_BF16 0
#endif

/* Compute y [count, out] = x W^T + bias for x [count, in], W [out, in] and bias [out], or null, all of them bfloat16. */
int visualrwkv_linear_bf16(int threads, int64_t count, int64_t in, int64_t out, const void *weight, const void *bias,
                           const void *x, void *y) {
    if (in < 1 || in % COLUMN_MULTIPLE || !is_countable(count, in, 1) || !is_countable(count, out, 8) || !is_countable(out, in, 1) ||
        !is_countable(count + 64, in + 256, 4))
        return SIZE_OUT_OF_RANGE;
#if !FAST_BF16
    (void)threads, (void)weight, (void)bias, (void)x, (void)y;
    return FORMAT_UNKNOWN;
#else
    if (count < 1 || out < 1) return OK;
    ProductOfBF16 p = {count, in, out, (in + BLOCK_OF_BF16 - 1) / BLOCK_OF_BF16, (count + ROWS_OF_X - 1) / ROWS_OF_X * ROWS_OF_X,
                       weight, bias, NULL, y};
    p.x = malloc(p.blocks * p.padded * WORDS_OF_BLOCK * sizeof *p.x);
    int error = p.x ? OK : NO_MEMORY;
#pragma omp parallel num_threads(threads) if (!error)
    {
        int64_t room = sizeof(__m512i) * WORDS_OF_BLOCK * VECTORS_OF_W;
        char *memory = error ? NULL : malloc(64 + room + p.padded * PANEL_OF_BF16 * sizeof(float));
        if (!memory) {
#pragma omp atomic write
            error = NO_MEMORY;
        }
#pragma omp barrier
        if (!error) {
            char *panel = memory + (-(uintptr_t)memory & 63);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < p.padded; row++) copy_rows_of_x(&p, x, row);
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < out; row += PANEL_OF_BF16)
                multiply_panel_of_bf16(&p, row, (__m512i *)panel, (float *)(panel + room));
        }
        free(memory);
    }
    free(p.x);
    return error;
#endif
}

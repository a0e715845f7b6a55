/* Attention of a vision tower in bfloat16, y = softmax(scale q k^T) v, by the tiles of bf16.h. A thread takes a head of a
   picture: it brings keys and values into the order of the instruction once, and computes ROWS_OF_X queries at a time, whose
   scores stay in the first-level cache. Scores and sums are float32; weights are rounded to bfloat16 before the second
   product, as the values are. */

/* q, k, v and y are [N, L, H, D]; D is even and at most MOST_DIMS. Where the tokens are a map of `rows` x `columns`, a bias is
   added to the score of each: across [N, H, L, rows] of its row, and along [N, H, L, columns] of its column. Otherwise both
   are null. */
#define MOST_DIMS 256

typedef struct {
    int64_t N, L, H, D, rows, columns;
    float scale;
    const BF16_t *q, *k, *v;
    const float *across, *along;
    BF16_t *y;
} Attention;

#if FAST_BF16
/* Room of a thread. `keys` words [L / 16, D / 2, 16], `values` words [D / 16 / 2, L / 2, 2, 16], both rounded up. */
typedef struct {
    int64_t L, D; /* rounded up to whole registers of keys, and to pairs of registers of dimensions */
    __m512i *keys, *values;
    float *scores, *sums;      /* [ROWS_OF_X, L], [ROWS_OF_X, D] */
    float *bias;               /* [L], of a query */
    uint32_t *query, *weights; /* [ROWS_OF_X, D / 2], [ROWS_OF_X, L / 2] */
} AttentionRoom;

/* e^x for x <= 0, by a polynomial of the fraction of x / ln 2: within 3e-7 of it. */
static inline __m512 exp_of(__m512 x) {
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), n = _mm512_roundscale_ps(t, 0);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x); /* ln 2 in two parts */
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    const float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    _Pragma("GCC unroll 6") for (int i = 0; i < 6; i++) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(y, n);
}

static const BF16_t *row_of(const Attention *a, const BF16_t *x, int64_t n, int64_t l, int64_t h) {
    return x + ((n * a->L + l) * a->H + h) * a->D;
}

static void order_keys(const Attention *a, int64_t n, int64_t h, const AttentionRoom *room) {
    for (int64_t l = 0; l < room->L; l += 16)
        for (int64_t word = 0; word < a->D / 2; word += 16) {
            __m512i r[16];
            int64_t left = a->D - 2 * word;
            __mmask32 some = left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
            for (int64_t i = 0; i < 16; i++)
                r[i] = l + i < a->L ? _mm512_maskz_loadu_epi16(some, row_of(a, a->k, n, l + i, h) + 2 * word)
                                    : _mm512_setzero_si512();
            transpose_words(r);
            for (int64_t i = 0; i < at_most(16, a->D / 2 - word); i++) room->keys[l / 16 * (a->D / 2) + word + i] = r[i];
        }
}

/* Words of a value and the next one. */
static void order_values(const Attention *a, int64_t n, int64_t h, const AttentionRoom *room) {
    for (int64_t d = 0; d < room->D; d += 16) {
        int64_t left = a->D - d;
        __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        for (int64_t l = 0; l < room->L; l += 2) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (l < a->L) even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row_of(a, a->v, n, l, h) + d));
            if (l + 1 < a->L) odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row_of(a, a->v, n, l + 1, h) + d));
            room->values[(d / 32 * (room->L / 2) + l / 2) * 2 + d / 16 % 2] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        }
    }
}

/* Bring the biases of the query at `index` of [N, H, L] to each key. */
static void lay_out_bias(const Attention *a, int64_t index, float *bias) {
    const float *across = a->across + index * a->rows, *along = a->along + index * a->columns;
    for (int64_t row = 0; row < a->rows; row++)
        for (int64_t column = 0; column < a->columns; column++)
            bias[row * a->columns + column] = across[row] + along[column];
}

/* Make weights of the scores of a query and return 1 / their sum. Those of keys beyond the last one are zero. */
static float weigh(const Attention *a, const AttentionRoom *room, float *scores, uint32_t *weights) {
    __m512 most = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(a->scale), total = _mm512_setzero_ps();
    for (int64_t l = 0; l < room->L; l += 16) {
        __mmask16 there = l + 16 <= a->L ? 0xffff : (__mmask16)((1 << (a->L - l)) - 1);
        __m512 s = _mm512_fmadd_ps(_mm512_loadu_ps(scores + l), scale, _mm512_loadu_ps(room->bias + l));
        s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, s);
        _mm512_storeu_ps(scores + l, s);
        most = _mm512_max_ps(most, s);
    }
    __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t l = 0; l < room->L; l += 16) {
        __m512 e = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + l), largest));
        total = _mm512_add_ps(total, e);
        _mm256_storeu_si256((__m256i *)((char *)weights + l * sizeof(BF16_t)), (__m256i)_mm512_cvtneps_pbh(e));
    }
    return 1 / _mm512_reduce_add_ps(total);
}

static void attend(const Attention *a, int64_t task, const AttentionRoom *room) {
    int64_t n = task / a->H, h = task % a->H, words = a->D / 2;
    order_keys(a, n, h, room);
    order_values(a, n, h, room);
    memset(room->bias, 0, room->L * sizeof(float));
    for (int64_t first = 0; first < a->L; first += ROWS_OF_X) {
        int64_t rows = at_most(ROWS_OF_X, a->L - first), l = 0;
        for (int64_t r = 0; r < ROWS_OF_X; r++) /* the last query stands for those after it */
            memcpy(room->query + r * words, row_of(a, a->q, n, at_most(a->L - 1, first + r), h), a->D * sizeof(BF16_t));
        memset(room->scores, 0, ROWS_OF_X * room->L * sizeof(float));
        memset(room->sums, 0, ROWS_OF_X * room->D * sizeof(float));
        for (; l < room->L; l += 16)
            tile_of_1(words, room->query, words, room->keys + l / 16 * words, room->scores + l, room->L);
        float inverse[ROWS_OF_X];
        for (int64_t r = 0; r < ROWS_OF_X; r++) {
            if (a->across) lay_out_bias(a, task * a->L + at_most(a->L - 1, first + r), room->bias);
            inverse[r] = weigh(a, room, room->scores + r * room->L, room->weights + r * (room->L / 2));
        }
        for (int64_t d = 0; d < room->D; d += 32)
            tile_of_2(room->L / 2, room->weights, room->L / 2, room->values + d / 32 * room->L, room->sums + d, room->D);
        for (int64_t r = 0; r < rows; r++) {
            BF16_t *y = a->y + ((n * a->L + first + r) * a->H + h) * a->D;
            for (int64_t d = 0; d < a->D; d += 16) {
                int64_t left = a->D - d;
                __m512 some = _mm512_mul_ps(_mm512_loadu_ps(room->sums + r * room->D + d), _mm512_set1_ps(inverse[r]));
                _mm256_mask_storeu_epi16(y + d, left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1),
                                         (__m256i)_mm512_cvtneps_pbh(some));
            }
        }
    }
}

/* Lay out a thread's room at `memory`, whose address is a multiple of 64, and return its bytes; null only counts. */
static int64_t lay_out_attention(const Attention *a, AttentionRoom *room, char *memory) {
    int64_t L = (a->L + 15) / 16 * 16, D = (a->D + 31) / 32 * 32;
    int64_t sizes[] = {L * a->D * 2,      L * D * 2, ROWS_OF_X * L * 4, ROWS_OF_X * D * 4, L * 4,
                       ROWS_OF_X * D * 2, ROWS_OF_X * L * 2};
    char *at[7];
    int64_t taken = 0;
    for (int i = 0; i < 7; i++) at[i] = memory + taken, taken += (sizes[i] + 63) / 64 * 64;
    if (memory)
        *room = (AttentionRoom){L, D, (__m512i *)at[0], (__m512i *)at[1], (float *)at[2], (float *)at[3],
                                (float *)at[4], (uint32_t *)at[5], (uint32_t *)at[6]};
    return taken;
}
#endif

/* Compute y = softmax(scale q k^T + bias) v of N pictures with L tokens and H heads of D dimensions; see `Attention`. */
int visualrwkv_attention_bf16(int threads, int64_t N, int64_t L, int64_t H, int64_t D, int64_t rows, int64_t columns,
                              float scale, const void *q, const void *k, const void *v, const float *across,
                              const float *along, void *y) {
    if (across && (!along || rows < 1 || columns < 1 || rows > 1 << 24 || columns > 1 << 24 || rows * columns != L))
        return SIZE_OUT_OF_RANGE;
    if (N < 0 || L < 1 || H < 1 || D < 2 || D % 2 || D > MOST_DIMS || L > 1 << 24 || !is_countable(N, L, H * D))
        return SIZE_OUT_OF_RANGE;
#if !FAST_BF16
    (void)threads, (void)scale, (void)q, (void)k, (void)v, (void)along, (void)y;
    return FORMAT_UNKNOWN;
#else
    Attention a = {N, L, H, D, rows, columns, scale, q, k, v, across, along, y};
    int error = OK;
#pragma omp parallel num_threads(threads)
    {
        char *memory = malloc(64 + lay_out_attention(&a, NULL, NULL));
        if (!memory) {
#pragma omp atomic write
            error = NO_MEMORY;
        }
#pragma omp barrier
        if (!error) {
            AttentionRoom room;
            lay_out_attention(&a, &room, memory + (-(uintptr_t)memory & 63));
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < N * H; task++) attend(&a, task, &room);
        }
        free(memory);
    }
    return error;
#endif
}

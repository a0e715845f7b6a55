/* Products of many rows with weights of few bits, in integers: y = x W^T, where x is rounded to 8 bits as well.
   Each row of x has a scale for every BLOCK columns. A weight of INT8 keeps the scale of its row; INT4 is brought to 8 bits
   with one scale for every BLOCK columns of a row. Sums over a block are exact in int32, sums of blocks are float32. */

/* LANES rows of x fill a register, STEP columns of each in a word of 32 bits, and a word of W is multiplied with them all.
   X_ZERO is added to x where the instruction takes it for unsigned; the product's share of it is taken off again. */
typedef int32_t Word;
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define FAST_INT8 1
#define TILE_ROWS 8
typedef __m512i Words;
static inline Words words(const void *from) { return _mm512_loadu_si512(from); }
static inline Words same_words(Word w) { return _mm512_set1_epi32(w); }
static inline Words less_words(Words a, Words b) { return _mm512_sub_epi32(a, b); }
static inline Lanes lanes_of_words(Words w) { return _mm512_cvtepi32_ps(w); }
#elif defined(__AVX2__)
#define FAST_INT8 1
#define TILE_ROWS 4
typedef __m256i Words;
static inline Words words(const void *from) { return _mm256_loadu_si256(from); }
static inline Words same_words(Word w) { return _mm256_set1_epi32(w); }
static inline Words less_words(Words a, Words b) { return _mm256_sub_epi32(a, b); }
static inline Lanes lanes_of_words(Words w) { return _mm256_cvtepi32_ps(w); }
#else
#define FAST_INT8 0
#define TILE_ROWS 4
typedef Word Words __attribute__((vector_size(LANES * sizeof(Word))));
static inline Words words(const void *from) {
    Words x;
    memcpy(&x, from, sizeof x);
    return x;
}
static inline Words same_words(Word w) { return (Words){0} + w; }
static inline Words less_words(Words a, Words b) { return a - b; }
static inline Lanes lanes_of_words(Words w) {
    Lanes x;
    for (int j = 0; j < LANES; j++) x[j] = w[j];
    return x;
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef uint8_t Narrow; /* of x */
typedef int8_t Factor;  /* of W */
enum { X_ZERO = 128 };
static inline Words add_products(Words sums, Words x, Words w) { return _mm512_dpbusd_epi32(sums, x, w); }
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
typedef uint8_t Narrow;
typedef int8_t Factor;
enum { X_ZERO = 128 };
static inline Words add_products(Words sums, Words x, Words w) { return _mm256_dpbusd_avx_epi32(sums, x, w); }
#else /* AVX2's product of 8 bits saturates; that of 16 does not */
typedef int16_t Narrow;
typedef int16_t Factor;
enum { X_ZERO = 0 };
static inline Words add_products(Words sums, Words x, Words w) {
#if defined(__AVX512BW__)
    return _mm512_add_epi32(sums, _mm512_madd_epi16(x, w));
#elif defined(__AVX2__)
    return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w));
#else
    for (int j = 0; j < LANES; j++) {
        int16_t a[2], b[2];
        memcpy(a, (const Word *)&x + j, sizeof a);
        memcpy(b, (const Word *)&w + j, sizeof b);
        sums[j] += a[0] * b[0] + a[1] * b[1];
    }
    return sums;
#endif
}
#endif
enum { STEP = sizeof(Word) / sizeof(Narrow) };

/* A thread multiplies CHUNK rows of W with up to PIECE rows of x at a time: these fit into its second-level cache. */
enum { BLOCK = 256, CHUNK = 64, PIECE = 640, MOST = 127 };

/* --- x in 8 bits ---------------------------------------------------------------------------------------- */

/* Round n <= BLOCK numbers to -MOST ... MOST times the scale that is returned. Each STEP of them become a word, and
   words are LANES apart. What is no number becomes a number of no meaning, as the product would be none either. */
#define NARROW(TAG)                                                                                             \
    static float narrow_##TAG(int64_t n, const void *from, Word *to) {                                          \
        float x[BLOCK];                                                                                         \
        for (int64_t i = 0; i < n; i += LANES) store_lanes(x + i, lanes_##TAG((const TAG##_t *)from + i));       \
        float largest = largest_of(n, x);                                                                       \
        float inverse = largest > LEAST ? MOST / largest : 0;                                                   \
        int32_t rounded[BLOCK];                                                                                 \
        for (int64_t i = 0; i < n; i++) rounded[i] = nearest(x[i] * inverse);                                   \
        Narrow narrow[BLOCK];                                                                                   \
        for (int64_t i = 0; i < n; i++) narrow[i] = (Narrow)(rounded[i] + X_ZERO);                              \
        for (int64_t i = 0; i < n; i += STEP) memcpy(to + i / STEP * LANES, narrow + i, sizeof(Word));          \
        return largest / MOST;                                                                                  \
    }
/* Adding 1.5 x 2^23 leaves the rounded number in the lowest bits. NaN and infinity give some number in range. */
static inline int32_t nearest(float x) {
    int32_t y = (int32_t)(bits_of_float(x + 0x1.8p23f) & 0x7fffff) - 0x400000;
    return y < -MOST ? -MOST : y > MOST ? MOST : y;
}
FLOAT_FORMATS(NARROW)
typedef float NarrowRow(int64_t n, const void *from, Word *to);
#define AS_NARROW(TAG) narrow_##TAG,
static NarrowRow *const NARROWS[] = {FLOAT_FORMATS(AS_NARROW)};

/* --- rows of W in 8 bits -------------------------------------------------------------------------------- */

/* TILE_ROWS rows of n <= BLOCK columns, or CHUNK rows for AMX; those beyond the last row of W are zero. */
enum { PANEL_ROWS = HAS_AMX ? CHUNK : TILE_ROWS };
typedef struct {
    const char *rows; /* Factors, `stride` bytes from row to row */
    int64_t stride;
    float scale[PANEL_ROWS];
    Word share[PANEL_ROWS]; /* X_ZERO times the row's sum */
    Factor room[PANEL_ROWS * BLOCK];
} Panel;

static void widen_INT8(int64_t n, const int8_t *w, Factor *to) {
    for (int64_t i = 0; i < n; i++) to[i] = w[i];
}

/* Look up a group of INT4 in a table of its 16 values. */
static inline void look_up(const int8_t *values, const uint8_t *w, Factor *to) {
#if defined(__SSSE3__)
    __m128i table = _mm_loadu_si128((const void *)values), low = _mm_set1_epi8(15), both = _mm_loadu_si128((const void *)w);
    __m128i halves[] = {_mm_shuffle_epi8(table, _mm_and_si128(both, low)),
                        _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low))};
    int8_t found[GROUP];
    memcpy(found, halves, sizeof found);
    widen_INT8(GROUP, found, to);
#else
    for (int i = 0; i < GROUP / 2; i++) to[i] = values[w[i] & 15], to[GROUP / 2 + i] = values[w[i] >> 4];
#endif
}

/* The multiples -8 ... 7 of a scale as integers. */
static inline void multiples(float scale, int8_t *values) {
#if defined(__AVX512F__)
    const __m512 steps = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_set1_ps(scale), steps));
    _mm_storeu_si128((void *)values, _mm512_cvtsepi32_epi8(rounded));
#else
    for (int q = 0; q < 16; q++) values[q] = (int8_t)nearest(scale * (float)(q - 8));
#endif
}

/* Bring n weights of INT4 to 8 bits and return their scale. */
static float widen_INT4(int64_t n, const uint8_t *w, const BF16_t *scales, Factor *to) {
    float largest = 0;
    for (int64_t g = 0; g < n / GROUP; g++) largest = fmaxf(largest, fabsf(value_BF16(scales[g])));
    float inverse = largest > 0 ? MOST / (8 * largest) : 0;
    for (int64_t g = 0; g < n / GROUP; g++) {
        int8_t values[16];
        multiples(value_BF16(scales[g]) * inverse, values);
        look_up(values, w + g * GROUP / 2, to + g * GROUP);
    }
    return 8 * largest / MOST;
}

static void fill(Panel *panel, Linear w, int64_t in, int64_t row, int64_t rows, int64_t column, int64_t n, int most) {
    int is_read_in_place = w.format == INT8 && sizeof(Factor) == 1 && rows == TILE_ROWS && most == TILE_ROWS;
    const uint8_t *weight = (const uint8_t *)w.weight + (row * in + column) * BITS[w.format] / 8;
    panel->rows = is_read_in_place ? (const char *)weight : (const char *)panel->room;
    panel->stride = is_read_in_place ? in : BLOCK * (int64_t)sizeof(Factor);
    memset(panel->scale, 0, sizeof panel->scale);
    memset(panel->share, 0, sizeof panel->share);
    if (rows < most) memset(panel->room, 0, sizeof panel->room);
    for (int64_t r = 0; r < rows; r++, weight += in * BITS[w.format] / 8) {
        Factor *to = panel->room + r * BLOCK;
        if (w.format == INT4)
            panel->scale[r] = widen_INT4(n, weight, (const BF16_t *)w.scale + ((row + r) * in + column) / GROUP, to);
        else {
            panel->scale[r] = ((const float *)w.scale)[row + r];
            if (!is_read_in_place) widen_INT8(n, (const int8_t *)weight, to);
        }
        const Factor *values = (const void *)(panel->rows + r * panel->stride);
        Word total = 0;
        for (int64_t i = 0; i < n * (X_ZERO != 0); i++) total += values[i];
        panel->share[r] = X_ZERO * total;
    }
}

/* --- their product -------------------------------------------------------------------------------------- */

/* The rows of a tile. Their sums have names instead of indices: gcc keeps an array of this size in memory. */
#if TILE_ROWS == 8
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#else
#define EACH_ROW(X) X(0) X(1) X(2) X(3)
#endif

/* Nothing, but gcc then computes a sum where it is, in its register, before the next one: otherwise it has more products
   under way than there are registers, and copies them to memory and back. */
#if FAST_INT8
#define STAY(sums) __asm__ volatile("" : "+v"(sums));
#else
#define STAY(sums)
#endif

static inline Words same_word(const Panel *w, int64_t row, int64_t s) {
    Word word;
    memcpy(&word, w->rows + row * w->stride + s * sizeof(Word), sizeof word);
    return same_words(word);
}

/* sums [LANES] += the sums of row r of a panel with LANES rows of x. */
static inline void add_sums(const Panel *w, int64_t r, Words total, const float *x_scale, float *sums) {
    Lanes product = lanes_of_words(less_words(total, same_words(w->share[r])));
    store_lanes(sums, lanes_F32(sums) + product * (lanes_F32(x_scale) * w->scale[r]));
}

/* sums [TILE_ROWS, LANES] += a panel times LANES rows of x, each of n columns; x_scale [LANES]. `stride` is from row to
   row of `sums`. The second function takes three times as many rows of x. */
static void multiply_tile(int64_t n, const Panel *w, const Word *x, const float *x_scale, float *sums, int64_t stride) {
#define START(r) Words a##r = same_words(0);
#define ADD(r)                                                                                                  \
    a##r = add_products(a##r, x_a, same_word(w, r, s));                                                         \
    STAY(a##r)
#define END(r) add_sums(w, r, a##r, x_scale, sums + r * stride);
    EACH_ROW(START)
    for (int64_t s = 0; s < n / STEP; s++) {
        Words x_a = words(x + s * LANES);
        EACH_ROW(ADD)
    }
    EACH_ROW(END)
#undef START
#undef ADD
#undef END
}

static void multiply_3_tiles(int64_t n, const Panel *w, const Word *x, const float *x_scale, float *sums,
                             int64_t stride) {
    const Word *second = x + BLOCK / STEP * LANES, *third = second + BLOCK / STEP * LANES;
#define START(r) Words a##r = same_words(0), b##r = a##r, c##r = a##r;
#define ADD(r)                                                                                                  \
    Words w##r = same_word(w, r, s);                                                                            \
    a##r = add_products(a##r, x_a, w##r);                                                                       \
    STAY(a##r)                                                                                                  \
    b##r = add_products(b##r, x_b, w##r);                                                                       \
    STAY(b##r)                                                                                                  \
    c##r = add_products(c##r, x_c, w##r);                                                                       \
    STAY(c##r)
#define END(r)                                                                                                  \
    add_sums(w, r, a##r, x_scale, sums + r * stride);                                                           \
    add_sums(w, r, b##r, x_scale + LANES, sums + r * stride + LANES);                                           \
    add_sums(w, r, c##r, x_scale + 2 * LANES, sums + r * stride + 2 * LANES);
    EACH_ROW(START)
    for (int64_t s = 0; s < n / STEP; s++) {
        Words x_a = words(x + s * LANES), x_b = words(second + s * LANES), x_c = words(third + s * LANES);
        EACH_ROW(ADD)
    }
    EACH_ROW(END)
#undef START
#undef ADD
#undef END
}

/* A panel with all vectors of a piece of x. */
static void multiply_panel(int64_t vectors, int64_t n, const Panel *w, const Word *x, const float *x_scale, float *sums,
                           int64_t stride) {
    for (int64_t v = 0; v < vectors;) {
        int64_t some = vectors - v < 3 ? 1 : 3;
        (some == 3 ? multiply_3_tiles : multiply_tile)(n, w, x + v * (BLOCK / STEP) * LANES, x_scale + v * LANES,
                                                       sums + v * LANES, stride);
        v += some;
    }
}

#if HAS_AMX
/* Products in tiles: of 2 AMX_ROWS rows of W from `row` on with `count` vectors of x, one or two, from `vector` on. */
typedef struct {
    int64_t row, vector, count;
    Word sums[2][2][AMX_ROWS][AMX_ROWS]; /* [vector, half of the rows, row, row of x] */
} InTiles;

/* Add a quarter of the rows of these products to `sums`. */
static inline void add_quarter(const InTiles *p, int64_t quarter, const Panel *w, const float *x_scale, float *sums,
                               int64_t stride) {
    enum { SOME = AMX_ROWS / 2 };
    for (int64_t v = 0; v < p->count; v++)
        for (int64_t i = quarter * SOME; i < (quarter + 1) * SOME; i++) {
            int64_t at = (p->vector + v) * LANES;
            Words total = words(p->sums[v][i / AMX_ROWS][i % AMX_ROWS]);
            add_sums(w, p->row + i, total, x_scale + at, sums + (p->row + i) * stride + at);
        }
}

/* Compute what multiply_panel does, in tiles, for CHUNK rows of W. Products are added while the next tiles are multiplied. */
static void multiply_in_tiles(int64_t vectors, int64_t n, const Panel *w, const Word *x, const float *x_scale, float *sums,
                              int64_t stride) {
    InTiles products[2] = {{0}}; /* of these tiles and of those before */
    int64_t now = 0, steps = (n + AMX_BYTES - 1) / AMX_BYTES;
    for (int64_t v = 0; v < vectors; v += 2)
        for (int64_t r = 0; r < CHUNK; r += 2 * AMX_ROWS, now = !now) {
            InTiles *p = &products[now], *before = &products[!now];
            p->row = r, p->vector = v, p->count = at_most(2, vectors - v);
            const Word *first = x + v * (BLOCK / STEP) * LANES, *second = first + (p->count - 1) * (BLOCK / STEP) * LANES;
            const Factor *upper = w->room + r * BLOCK, *lower = upper + AMX_ROWS * BLOCK;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t s = 0; s < 4; s++) {
                if (s < steps) {
                    _tile_loadd(6, first + s * AMX_ROWS * LANES, AMX_BYTES);
                    _tile_loadd(4, upper + s * AMX_BYTES, BLOCK);
                    _tile_dpbsud(0, 4, 6);
                    _tile_loadd(5, lower + s * AMX_BYTES, BLOCK);
                    _tile_dpbsud(1, 5, 6);
                    _tile_loadd(7, second + s * AMX_ROWS * LANES, AMX_BYTES);
                    _tile_dpbsud(2, 4, 7);
                    _tile_dpbsud(3, 5, 7);
                }
                add_quarter(before, s, w, x_scale, sums, stride);
            }
            _tile_stored(0, p->sums[0][0], AMX_BYTES);
            _tile_stored(1, p->sums[0][1], AMX_BYTES);
            _tile_stored(2, p->sums[1][0], AMX_BYTES);
            _tile_stored(3, p->sums[1][1], AMX_BYTES);
        }
    for (int64_t s = 0; s < 4; s++) add_quarter(&products[!now], s, w, x_scale, sums, stride);
}
#else
#define multiply_in_tiles multiply_panel
#endif

/* x [count, in], of a float format, as words: for each block of columns, LANES rows after the other. */
typedef struct {
    int64_t count, in, vectors, blocks;
    Word *words;  /* [blocks, vectors, BLOCK / STEP, LANES] */
    float *scale; /* [blocks, vectors LANES] */
} Rounded;

static void round_rows(const Rounded *x, int64_t vector, int64_t format, const void *from) {
    for (int64_t b = 0; b < x->blocks; b++)
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t row = vector * LANES + lane, column = b * BLOCK, at = b * x->vectors + vector;
            x->scale[at * LANES + lane] = 0;
            Word *to = x->words + at * (BLOCK / STEP) * LANES + lane;
            int64_t n = row < x->count ? at_most(BLOCK, x->in - column) : 0;
            if (n)
                x->scale[at * LANES + lane] =
                    NARROWS[format](n, (const char *)from + (row * x->in + column) * (BITS[format] / 8), to);
            for (int64_t s = n / STEP; s < BLOCK / STEP; s++) to[s * LANES] = 0; /* beyond the last row or column */
        }
}

/* Multiply rows [row, row + rows) of W with the vectors [first, first + vectors) of x; `sums` [CHUNK, PIECE] is room. */
static void multiply_chunk(const Rounded *x, Linear w, int64_t row, int64_t rows, int64_t first, int64_t vectors,
                           Panel *panel, float *sums) {
    int in_tiles = may_use_tiles();
    int64_t most = in_tiles ? CHUNK : TILE_ROWS;
    memset(sums, 0, CHUNK * PIECE * sizeof(float));
    for (int64_t b = 0; b < x->blocks; b++) {
        int64_t n = at_most(BLOCK, x->in - b * BLOCK), at = b * x->vectors + first;
        const Word *from = x->words + at * (BLOCK / STEP) * LANES;
        for (int64_t r = 0; r < rows; r += most) {
            fill(panel, w, x->in, row + r, at_most(most, rows - r), b * BLOCK, n, most);
            (in_tiles ? multiply_in_tiles : multiply_panel)(vectors, n, panel, from, x->scale + at * LANES,
                                                            sums + r * PIECE, PIECE);
        }
    }
}

#define STORE_SUMS(TAG)                                                                                         \
    static void store_sums_##TAG(int64_t rows, int64_t columns, const float *sums, void *y, int64_t stride) {   \
        for (int64_t n = 0; n < rows; n++)                                                                      \
            for (int64_t o = 0; o < columns; o++)                                                               \
                ((TAG##_t *)y)[n * stride + o] = stored_##TAG(sums[o * PIECE + n]);                             \
    }
FLOAT_FORMATS(STORE_SUMS)
typedef void StoreSums(int64_t rows, int64_t columns, const float *sums, void *y, int64_t stride);
#define AS_STORE_SUMS(TAG) store_sums_##TAG,
static StoreSums *const STORE_SUMS_OF[] = {FLOAT_FORMATS(AS_STORE_SUMS)};

/* Compute y [count, out] = x W^T for x [count, in], both of the float format `x_format`, and W [out, in] of INT8 or
   INT4. */
int visualrwkv_linear_int8(int threads, int64_t count, int64_t in, int64_t out, int64_t format, const void *weight,
                           const void *scale, int64_t x_format, const void *x, void *y) {
    if (in < 1 || in % COLUMN_MULTIPLE || !is_countable(count, in, 8) || !is_countable(count, out, 8) ||
        !is_countable(out, in, 1) || !is_countable(count + LANES, in + BLOCK, sizeof(Word)))
        return SIZE_OUT_OF_RANGE;
    Linear w = {weight, scale, format};
    if ((format != INT8 && format != INT4) || !is_readable(w, in) || !is_float_format(x_format)) return FORMAT_UNKNOWN;
    Rounded rounded = {count, in, (count + LANES - 1) / LANES, (in + BLOCK - 1) / BLOCK, NULL, NULL};
    int64_t places = rounded.blocks * rounded.vectors * LANES;
    rounded.words = malloc((places ? places : 1) * (BLOCK / STEP) * sizeof(Word));
    rounded.scale = malloc((places ? places : 1) * sizeof(float));
    int64_t pieces = (rounded.vectors + PIECE / LANES - 1) / (PIECE / LANES), chunks = (out + CHUNK - 1) / CHUNK;
    int64_t piece = pieces ? (rounded.vectors + pieces - 1) / pieces : 0; /* all of about the same size */
    int error = rounded.words && rounded.scale ? OK : NO_MEMORY;
#pragma omp parallel num_threads(threads) if (!error)
    {
        Panel *panel = error ? NULL : calloc(1, sizeof *panel);
        float *sums = error ? NULL : malloc(CHUNK * PIECE * sizeof(float));
        if (may_use_tiles()) begin_tiles();
        if (!panel || !sums) {
#pragma omp atomic write
            error = NO_MEMORY;
        }
#pragma omp barrier
        if (!error) {
#pragma omp for schedule(dynamic)
            for (int64_t v = 0; v < rounded.vectors; v++) round_rows(&rounded, v, x_format, x);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < chunks * pieces; task++) {
                int64_t row = task / pieces * CHUNK, first = task % pieces * piece;
                int64_t rows = at_most(CHUNK, out - row), vectors = at_most(piece, rounded.vectors - first);
                multiply_chunk(&rounded, w, row, rows, first, vectors, panel, sums);
                int64_t n = first * LANES;
                STORE_SUMS_OF[x_format](at_most(vectors * LANES, count - n), rows, sums,
                                        (char *)y + (n * out + row) * (BITS[x_format] / 8), out);
            }
        }
        if (may_use_tiles()) end_tiles();
        free(panel), free(sums);
    }
    free(rounded.words), free(rounded.scale);
    return error;
}

/* A few rows of x in 16 bits times weights of few bits, so that products are summed in integers: x = scale X.
   The rounding is that of 1/65278 of a row's largest number. Sums of integers are exact. */

/* X is at most this, so that X = 256 upper + lower has an upper part of 8 bits with a sign, as the lower one has.
   Rows of up to LONGEST_16 columns are summed in 32 bits. Below LEAST all numbers count as zero: the reciprocal of it
   times MOST_16 is still finite. */
enum { MOST_16 = 32639, LONGEST_16 = 1 << 15 };
#define LEAST 1e-30f

typedef struct {
    const int16_t *x;            /* [in] where products of 16 bits are summed */
    const int8_t *upper, *lower; /* [in], zero after the last column, where products of 8 bits are */
    const float *sums;           /* [in / GROUP], 8 times the sum of X in each group, for INT4 */
    int64_t total;               /* the sum of X */
    float scale;                 /* infinite where there is a number that nothing can be rounded to */
} Row16;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512F__)
#define SUMS_16 2
#elif defined(__AVX2__) && defined(__FMA__)
#define SUMS_16 1
#else
#define SUMS_16 0
#endif
/* Bytes of a row of weights that are read at a time; of INT4 they hold FOUR_GROUPS columns. */
enum { CHUNK_16 = 64, FOUR_GROUPS = 4 * GROUP };

static int is_in_16_bits(int64_t format, int64_t in) {
    return SUMS_16 && (format == INT4 || format == INT8) && in <= LONGEST_16;
}

static int64_t padded_16(int64_t in) { return (in + FOUR_GROUPS - 1) / FOUR_GROUPS * FOUR_GROUPS; }

/* How many bytes a row takes beside its `Row16`: a multiple of 64. */
static int64_t bytes_of_row_16(int64_t in) { return padded_16(in) * (2 + sizeof(float)); }

/* The largest magnitude of n numbers, infinite if one of them is NaN. Bits of magnitudes are ordered as they are. */
static float largest_of(int64_t n, const float *from) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = bits_of_float(from[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest > 0x7f800000 ? INFINITY : float_of_bits(largest);
}

/* Where INT4's order of columns has column i: the first halves of four groups, then their second halves. */
static int64_t place_in_four(int64_t i) {
    return i / FOUR_GROUPS * FOUR_GROUPS + i / (GROUP / 2) % 2 * CHUNK_16 + i / GROUP % 4 * (GROUP / 2) + i % (GROUP / 2);
}

/* Round a row to 16 bits, into memory of `bytes_of_row_16(n)`. */
static Row16 round_to_16(int64_t n, int64_t format, const float *from, char *memory) {
    float largest = largest_of(n, from);
    float *sums = (float *)memory;
    int16_t *to = (int16_t *)(sums + padded_16(n));
    if (largest > 3e38f) return (Row16){.scale = INFINITY};
    float inverse = largest > LEAST ? MOST_16 / largest : 0;
    int64_t total = 0;
    int8_t *upper = (int8_t *)to, *lower = upper + padded_16(n);
    if (SUMS_16 == 2) {
        int64_t whole = n / FOUR_GROUPS * FOUR_GROUPS;
        memset(upper + whole, 0, padded_16(n) - whole);
        memset(lower + whole, 0, padded_16(n) - whole);
    }
    for (int64_t i = 0; i < n; i += GROUP / 2) { /* n is a multiple of 16 */
        int32_t some[GROUP / 2], sum = 0;
        for (int j = 0; j < GROUP / 2; j++) {
            float x = from[i + j] * inverse;
            some[j] = (int32_t)(x + (x < 0 ? -0.5f : 0.5f));
            sum += some[j];
        }
        total += sum;
        if (format == INT4) sums[i / GROUP] = i % GROUP ? sums[i / GROUP] + 8 * (float)sum : 8 * (float)sum;
        if (SUMS_16 != 2) {
            for (int j = 0; j < GROUP / 2; j++) to[i + j] = (int16_t)some[j];
            continue;
        }
        int64_t place = format == INT4 ? place_in_four(i) : i;
        for (int j = 0; j < GROUP / 2; j++) {
            lower[place + j] = (int8_t)some[j];
            upper[place + j] = (int8_t)((some[j] - (int8_t)some[j]) >> 8);
        }
    }
    return (Row16){to, upper, lower, sums, total, largest / MOST_16};
}

/* The products of a row of n weights, whose scale or scales are at `scale`, with `rows` rows of x. */
typedef void Dots16(int rows, int64_t n, const void *row, const void *scale, const Row16 *x, float *y);

#if SUMS_16 == 2
#define SOME_ROWS(r) _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)

static inline __m512i bytes_from(const void *from) { return _mm512_loadu_si512(from); }

/* W + 128 has no sign, as the instruction wants it; 128 times the sum of X is taken off again. */
static inline __attribute__((always_inline)) void some_dots_INT8(int rows, int64_t n, const int8_t *w, float scale,
                                                                 const Row16 *x, float *y) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i upper[ROWS_AT_ONCE], lower[ROWS_AT_ONCE];
    SOME_ROWS(r) upper[r] = lower[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += CHUNK_16) {
        __mmask64 some = n - i < CHUNK_16 ? ((__mmask64)1 << (n - i)) - 1 : ~(__mmask64)0;
        __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, w + i), flip);
        prefetch(w + i, CHUNK_16);
        SOME_ROWS(r) {
            upper[r] = _mm512_dpbusd_epi32(upper[r], weights, bytes_from(x[r].upper + i));
            lower[r] = _mm512_dpbusd_epi32(lower[r], weights, bytes_from(x[r].lower + i));
        }
    }
    SOME_ROWS(r) {
        int64_t high = _mm512_reduce_add_epi32(upper[r]), low = _mm512_reduce_add_epi32(lower[r]);
        y[r] = scale * x[r].scale * (float)(256 * high + low - 128 * x[r].total);
    }
}

/* Four groups of weights with x, added to `total`. */
static inline __attribute__((always_inline)) void add_four_groups(int rows, __m512i both, __m512 scale, int64_t column,
                                                                  const Row16 *x, __m512 *total) {
    const __m512i four_bits = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512i first = _mm512_and_si512(both, four_bits);
    __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), four_bits);
    SOME_ROWS(r) {
        const int8_t *upper = x[r].upper + column, *lower = x[r].lower + column;
        __m512i high = _mm512_dpbusd_epi32(zero, first, bytes_from(upper));
        high = _mm512_dpbusd_epi32(high, second, bytes_from(upper + CHUNK_16));
        __m512i low = _mm512_dpbusd_epi32(zero, first, bytes_from(lower));
        low = _mm512_dpbusd_epi32(low, second, bytes_from(lower + CHUNK_16));
        __m512i products = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, total[r]);
    }
}

static inline __attribute__((always_inline)) void some_dots_INT4(int rows, int64_t n, const uint8_t *w, const BF16_t *scales,
                                                                 const Row16 *x, float *y) {
    const __m512i each_four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512 total[ROWS_AT_ONCE], less[ROWS_AT_ONCE];
    SOME_ROWS(r) total[r] = less[r] = _mm512_setzero_ps();
    int64_t groups = n / GROUP;
    for (int64_t g = 0; g < groups; g += 16, w += 16 * GROUP / 2) {
        int64_t left = at_most(16, groups - g);
        __mmask16 some = (__mmask16)((1u << left) - 1);
        __m512 scale = _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, scales + g)), 16));
        SOME_ROWS(r) less[r] = _mm512_fmadd_ps(scale, _mm512_maskz_loadu_ps(some, x[r].sums + g), less[r]);
        prefetch(w, 16 * GROUP / 2);
        if (left == 16) {
            _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++)
                add_four_groups(rows, bytes_from(w + q * CHUNK_16),
                                _mm512_permutexvar_ps(_mm512_add_epi32(each_four, _mm512_set1_epi32(4 * q)), scale),
                                g * GROUP + q * FOUR_GROUPS, x, total);
            continue;
        }
        for (int q = 0; 4 * q < left; q++) {
            int64_t bytes = (left - 4 * q) * (GROUP / 2);
            __mmask64 there = bytes < CHUNK_16 ? ((__mmask64)1 << bytes) - 1 : ~(__mmask64)0;
            add_four_groups(rows, _mm512_maskz_loadu_epi8(there, w + q * CHUNK_16),
                            _mm512_permutexvar_ps(_mm512_add_epi32(each_four, _mm512_set1_epi32(4 * q)), scale),
                            g * GROUP + q * FOUR_GROUPS, x, total);
        }
    }
    SOME_ROWS(r) y[r] = x[r].scale * _mm512_reduce_add_ps(_mm512_sub_ps(total[r], less[r]));
}

static void dots_16_INT8(int rows, int64_t n, const void *row, const void *scale, const Row16 *x, float *y) {
    if (rows == ROWS_AT_ONCE)
        some_dots_INT8(ROWS_AT_ONCE, n, row, *(const float *)scale, x, y);
    else
        for (int r = 0; r < rows; r++) some_dots_INT8(1, n, row, *(const float *)scale, x + r, y + r);
}

static void dots_16_INT4(int rows, int64_t n, const void *row, const void *scale, const Row16 *x, float *y) {
    if (rows == ROWS_AT_ONCE)
        some_dots_INT4(ROWS_AT_ONCE, n, row, scale, x, y);
    else
        for (int r = 0; r < rows; r++) some_dots_INT4(1, n, row, scale, x + r, y + r);
}

#elif SUMS_16 == 1
static inline float sum_of_8(__m256 x) {
    float lanes[8], y = 0;
    _mm256_storeu_ps(lanes, x);
    for (int i = 0; i < 8; i++) y += lanes[i];
    return y;
}

/* Sums of 128 products stay below 2^31. */
static float dot_16_INT8(int64_t n, const int8_t *w, const int16_t *x) {
    __m256 y = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 128) {
        __m256i sums = _mm256_setzero_si256();
        prefetch(w + i, 128);
        for (int64_t j = i; j < at_most(i + 128, n); j += 16)
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(w + j))),
                                                            _mm256_loadu_si256((const void *)(x + j))));
        y = _mm256_add_ps(y, _mm256_cvtepi32_ps(sums));
    }
    return sum_of_8(y);
}

static void dots_16_INT8(int rows, int64_t n, const void *row, const void *scale, const Row16 *x, float *y) {
    for (int r = 0; r < rows; r++) y[r] = *(const float *)scale * x[r].scale * dot_16_INT8(n, row, x[r].x);
}

/* 8 scales of a row in float32. */
static inline __m256 scales_of(const BF16_t *scales) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)scales)), 16));
}

/* The products of a group of a row with x, without those that `sums` holds. */
static inline __m256 products_of_group(const uint8_t *w, const int16_t *x) {
    __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)w));
    __m256i first = _mm256_and_si256(both, _mm256_set1_epi16(15)), second = _mm256_srli_epi16(both, 4);
    first = _mm256_madd_epi16(first, _mm256_loadu_si256((const void *)x));
    second = _mm256_madd_epi16(second, _mm256_loadu_si256((const void *)(x + GROUP / 2)));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(first, second));
}

static float dot_16_INT4(int64_t n, const uint8_t *w, const BF16_t *scales, const Row16 *x) {
    const int16_t *x_g = x->x;
    __m256 y[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, less = _mm256_setzero_ps();
    float all[8], total = 0;
    int64_t g = 0;
    for (; g + 8 <= n / GROUP; g += 8) {
        __m256 some = scales_of(scales + g);
        _mm256_storeu_ps(all, some);
        less = _mm256_fmadd_ps(some, _mm256_loadu_ps(x->sums + g), less);
        prefetch(w, 8 * GROUP / 2);
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++, w += GROUP / 2, x_g += GROUP)
            y[i % 2] = _mm256_fmadd_ps(products_of_group(w, x_g), _mm256_broadcast_ss(all + i), y[i % 2]);
    }
    for (; g < n / GROUP; g++, w += GROUP / 2, x_g += GROUP) {
        float one = value_BF16(scales[g]);
        total -= one * x->sums[g];
        y[0] = _mm256_fmadd_ps(products_of_group(w, x_g), _mm256_set1_ps(one), y[0]);
    }
    return x->scale * (total + sum_of_8(_mm256_sub_ps(_mm256_add_ps(y[0], y[1]), less)));
}

static void dots_16_INT4(int rows, int64_t n, const void *row, const void *scale, const Row16 *x, float *y) {
    for (int r = 0; r < rows; r++) y[r] = dot_16_INT4(n, row, scale, x + r);
}

#else /* `is_in_16_bits` is false */
static void dots_16_INT8(int rows, int64_t n, const void *row, const void *scale, const Row16 *x, float *y) {
    (void)rows, (void)n, (void)row, (void)scale, (void)x, (void)y;
}
#define dots_16_INT4 dots_16_INT8
#endif

static Dots16 *const DOTS_16_OF[] = {NULL, NULL, NULL, dots_16_INT8, dots_16_INT4}; /* by format */

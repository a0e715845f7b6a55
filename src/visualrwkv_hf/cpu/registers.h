/* Vector registers, the formats of stored numbers, and how a register is filled from each format. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* The tags that say how a number is stored. cpu/formats.py has one row for each; a test compares the two.
   INT8 and INT4 are for the weights of linear layers only. INT8: a weight is its int8 times the float32 scale of its row.
   INT4: GROUP weights of a row share a bfloat16 scale and lie in GROUP / 2 bytes, weight i in the lower half of byte i,
   weight GROUP / 2 + i in its upper half, each as 8 more than the integer that the scale multiplies. */
#define FORMATS(X) X(F32) X(BF16) X(F16) X(INT8) X(INT4)
#define GROUP 32
#define FLOAT_FORMATS(X) X(F32) X(BF16) X(F16)
#define AS_ITEM(NAME) NAME,
enum { FORMATS(AS_ITEM) FORMAT_COUNT };
typedef float F32_t;
typedef uint16_t BF16_t; /* the upper half of a float32 */
typedef uint16_t F16_t;
typedef int8_t INT8_t;
enum { BITS_F32 = 32, BITS_BF16 = 16, BITS_F16 = 16, BITS_INT8 = 8, BITS_INT4 = 4 };
#define AS_BITS(TAG) BITS_##TAG,
static const int64_t BITS[] = {FORMATS(AS_BITS)}; /* of one weight */

static inline int is_float_format(int64_t format) { return format >= F32 && format <= F16; }

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float value_F32(F32_t x) { return x; }
static inline float value_BF16(BF16_t x) { return float_of_bits((uint32_t)x << 16); }
static inline float value_F16(F16_t x) { /* 10 bits of mantissa and 5 of exponent, whose bias is 112 less */
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = (uint32_t)(x & 0x7fff) << 13;
    if (rest >= 0x7c00 << 13) return float_of_bits(sign | rest | 0x7f800000); /* infinity, NaN */
    float magnitude = float_of_bits(rest) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

/* Round to the nearest number of a format, to the even one of two. */
static inline F32_t stored_F32(float x) { return x; }
static inline BF16_t stored_BF16(float x) {
    uint32_t bits = bits_of_float(x);
    if (x != x) return 0x7fc0; /* rounding could carry a NaN over to infinity */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline F16_t stored_F16(float x) {
    uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00; /* from 65520 on: infinity */
    if (rest < 0x38800000) /* below the least normal number: the sum's last bits are the result */
        return sign | (uint16_t)(bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

#if defined(__SSSE3__)
#include <immintrin.h>
#endif

/* A CPU with half of AVX-512, such as Knights Landing, computes as one with AVX2. */
#if defined(__AVX512F__) && !defined(__AVX512BW__)
#undef __AVX512F__
#endif

/* A vector register of LANES floats. */
#if defined(__AVX512F__)
enum { LANES = 16 };
typedef __m512 Lanes;
static inline Lanes lanes_F32(const F32_t *w) { return _mm512_loadu_ps(w); }
static inline Lanes lanes_BF16(const BF16_t *w) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)w)), 16));
}
static inline Lanes lanes_F16(const F16_t *w) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)w)); }
static inline Lanes lanes_INT8(const INT8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)w)));
}
static inline Lanes lanes_halves(const uint8_t *w, Lanes *upper) { /* both halves of each byte, less 8 */
    const __m512 less_8 = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)w));
    *upper = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), less_8);
    return _mm512_permutexvar_ps(bytes, less_8); /* looks at four bits only */
}
static inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
#elif defined(__AVX2__)
enum { LANES = 8 };
typedef __m256 Lanes;
static inline Lanes lanes_F32(const F32_t *w) { return _mm256_loadu_ps(w); }
static inline Lanes lanes_BF16(const BF16_t *w) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)w)), 16));
}
static inline Lanes lanes_INT8(const INT8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)w)));
}
static inline Lanes lanes_halves(const uint8_t *w, Lanes *upper) {
    const __m256i four = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8);
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)w));
    *upper = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bytes, 4), eight));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(bytes, four), eight));
}
#else
enum { LANES = 4 };
typedef float Lanes __attribute__((vector_size(16)));
static inline Lanes lanes_F32(const F32_t *w) {
    Lanes x;
    memcpy(&x, w, sizeof x);
    return x;
}
static inline Lanes lanes_BF16(const BF16_t *w) {
    Lanes x;
    for (int j = 0; j < LANES; j++) x[j] = value_BF16(w[j]);
    return x;
}
static inline Lanes lanes_INT8(const INT8_t *w) {
    Lanes x;
    for (int j = 0; j < LANES; j++) x[j] = w[j];
    return x;
}
static inline Lanes lanes_halves(const uint8_t *w, Lanes *upper) {
    Lanes lower;
    for (int j = 0; j < LANES; j++) lower[j] = (float)((w[j] & 15) - 8), (*upper)[j] = (float)((w[j] >> 4) - 8);
    return lower;
}
#endif
#if !defined(__AVX512F__)
#if defined(__AVX2__) && defined(__F16C__)
static inline Lanes lanes_F16(const F16_t *w) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)w)); }
#else
static inline Lanes lanes_F16(const F16_t *w) {
    Lanes x;
    for (int j = 0; j < LANES; j++) x[j] = value_F16(w[j]);
    return x;
}
#endif
static inline float sum(Lanes x) {
    float y = 0;
    for (int j = 0; j < LANES; j++) y += x[j];
    return y;
}
#endif
static inline void store_lanes(float *to, Lanes x) { memcpy(to, &x, sizeof x); }

static inline int64_t at_most(int64_t limit, int64_t n) { return n < limit ? n : limit; }

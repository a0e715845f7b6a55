/* Vector registers, the formats of stored numbers, and how a register is filled from each format. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* The tags that say how a number is stored. cpu/formats.py has one row for each; a test compares the two.
   INT8 is for the weights of linear layers only: a weight is its int8 times the scale of its row. */
#define FORMATS(X) X(F32) X(BF16) X(F16) X(INT8)
#define FLOAT_FORMATS(X) X(F32) X(BF16) X(F16)
#define AS_ITEM(NAME) NAME,
enum { FORMATS(AS_ITEM) FORMAT_COUNT };
typedef float F32_t;
typedef uint16_t BF16_t; /* the upper half of a float32 */
typedef uint16_t F16_t;
typedef int8_t INT8_t;
#define SIZE_OF(TAG) sizeof(TAG##_t),
static const int64_t BYTES[] = {FORMATS(SIZE_OF)};

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

/* A vector register of LANES floats. */
#if defined(__AVX512F__)
#include <immintrin.h>
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
static inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
typedef __m256 Lanes;
static inline Lanes lanes_F32(const F32_t *w) { return _mm256_loadu_ps(w); }
static inline Lanes lanes_BF16(const BF16_t *w) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)w)), 16));
}
static inline Lanes lanes_INT8(const INT8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)w)));
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

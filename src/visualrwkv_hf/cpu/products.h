/* Matrix products for few rows, as fast as the weights come from memory. All sums are float32. */

/* Prefetch this many bytes ahead: without it the processor's own prefetching starts again at each row. */
enum { AHEAD = 4096 };

/* The number of columns of every linear layer is a multiple of this, which is the widest register's number of floats. */
#define COLUMN_MULTIPLE 16

typedef float Dot(int64_t n, const void *w, const float *x);
#define DOT(TAG)                                                                                                \
    static float dot_##TAG(int64_t n, const void *row, const float *x) {                                        \
        const TAG##_t *w = row;                                                                                 \
        Lanes y[4] = {0};                                                                                       \
        int64_t i = 0;                                                                                          \
        for (; i + 4 * LANES <= n; i += 4 * LANES) {                                                            \
            const char *ahead = (const char *)(w + i) + AHEAD;                                                  \
            for (int64_t byte = 0; byte < (int64_t)(4 * LANES * sizeof(TAG##_t)); byte += 64)                   \
                __builtin_prefetch(ahead + byte, 0, 2);                                                         \
            _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)                                                 \
                y[j] += lanes_##TAG(w + i + j * LANES) * lanes_F32(x + i + j * LANES);                          \
        }                                                                                                       \
        for (; i < n; i += LANES) y[0] += lanes_##TAG(w + i) * lanes_F32(x + i);                                \
        return sum((y[0] + y[1]) + (y[2] + y[3]));                                                              \
    }
FORMATS(DOT)
#define AS_DOT(TAG) dot_##TAG,
static Dot *const DOTS[] = {FORMATS(AS_DOT)};

/* One element of an array of a float format, and how a float is stored into one. */
typedef float Element(const void *x, int64_t i);
typedef void Store(void *x, int64_t i, float value);
#define ELEMENT(TAG)                                                                                            \
    static float element_##TAG(const void *x, int64_t i) { return value_##TAG(((const TAG##_t *)x)[i]); }        \
    static void store_##TAG(void *x, int64_t i, float value) { ((TAG##_t *)x)[i] = stored_##TAG(value); }
FLOAT_FORMATS(ELEMENT)
#define AS_ELEMENT(TAG) element_##TAG,
#define AS_STORE(TAG) store_##TAG,
static Element *const ELEMENTS[] = {FLOAT_FORMATS(AS_ELEMENT)};
static Store *const STORES[] = {FLOAT_FORMATS(AS_STORE)};

/* The functions that follow a product. */
typedef float Function(float);
static float itself(float x) { return x; }
static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
static float silu(float x) { return x * sigmoid(x); }
static float squared_relu(float x) { return x > 0 ? x * x : 0; }

/* A weight W [out, in] of some format; `scale` [out] multiplies its rows, or is null. */
typedef struct {
    const void *weight;
    const float *scale;
    int64_t format;
} Linear;

/* A "team" function is called by every thread of a parallel region, and each computes a part. The results of the
   others can be read after the next barrier. */

/* Team: y = f(x W^T), [count, out]. */
static void multiply(Linear w, Function f, int64_t count, int64_t in, int64_t out, const float *x, float *y) {
    Dot *dot = DOTS[w.format];
    int64_t bytes = in * BYTES[w.format];
#pragma omp for schedule(guided, 32) nowait
    for (int64_t o = 0; o < out; o++) {
        const char *row = (const char *)w.weight + o * bytes;
        float scale = w.scale ? w.scale[o] : 1;
        for (int64_t n = 0; n < count; n++) y[n * out + o] = f(scale * dot(in, row, x + n * in));
    }
}

/* A low-rank map is computed TILE columns and LOW_RANK_MULTIPLE rows at a time; its rank is a multiple of that. */
enum { TILE = 128 };
#define LOW_RANK_MULTIPLE 4
typedef void AddRows(int64_t out, int64_t width, const void *rows, const float *x, float *y);
#define ADD_ROWS(TAG)                                                                                           \
    static void add_rows_##TAG(int64_t out, int64_t width, const void *rows, const float *x, float *y) {        \
        const TAG##_t *w = rows;                                                                                \
        int64_t j = 0;                                                                                          \
        for (; j + LANES <= width; j += LANES) {                                                                \
            Lanes y_j = lanes_F32(y + j);                                                                       \
            _Pragma("GCC unroll 4") for (int i = 0; i < LOW_RANK_MULTIPLE; i++)                                 \
                y_j += x[i] * lanes_##TAG(w + i * out + j);                                                     \
            store_lanes(y + j, y_j);                                                                            \
        }                                                                                                       \
        for (; j < width; j++)                                                                                  \
            for (int i = 0; i < LOW_RANK_MULTIPLE; i++) y[j] += x[i] * value_##TAG(w[i * out + j]);              \
    }
FLOAT_FORMATS(ADD_ROWS)
#define AS_ADD_ROWS(TAG) add_rows_##TAG,
static AddRows *const ADD_ROWS_OF[] = {FLOAT_FORMATS(AS_ADD_ROWS)};

/* Team: y = f(x W), [count, out], with W [in, out] as the halves of a low-rank map are stored, of a float format.
   Rows of x are `stride` apart. */
static void multiply_low_rank(const void *w, int64_t format, Function f, int64_t count, int64_t in, int64_t out,
                              int64_t stride, const float *x, float *y) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t o = 0; o < out; o += TILE) {
        int64_t width = at_most(TILE, out - o);
        for (int64_t n = 0; n < count; n++) {
            float sums[TILE] = {0};
            for (int64_t i = 0; i < in; i += LOW_RANK_MULTIPLE)
                ADD_ROWS_OF[format](out, width, (const char *)w + (i * out + o) * BYTES[format], x + n * stride + i,
                                    sums);
            for (int64_t j = 0; j < width; j++) y[n * out + o + j] = f(sums[j]);
        }
    }
}

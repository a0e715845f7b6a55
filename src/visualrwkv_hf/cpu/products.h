/* Matrix products for few rows, as fast as the weights come from memory. All sums are float32. */

/* Prefetch this many bytes ahead: without it the processor's own prefetching starts again at each row. */
enum { AHEAD = 4096 };

/* The number of columns of every linear layer is a multiple of this, which is the widest register's number of floats. */
#define COLUMN_MULTIPLE 16

static void prefetch(const void *from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch((const char *)from + AHEAD + byte, 0, 2);
}

/* The product of a row of n weights, whose scale or scales are at `scale`, with x. */
typedef float Dot(int64_t n, const void *row, const void *scale, const float *x);
#define SUM_OF_PRODUCTS(TAG)                                                                                    \
    static float sum_of_products_##TAG(int64_t n, const TAG##_t *w, const float *x) {                           \
        Lanes y[4] = {0};                                                                                       \
        int64_t i = 0;                                                                                          \
        for (; i + 4 * LANES <= n; i += 4 * LANES) {                                                            \
            prefetch(w + i, 4 * LANES * sizeof(TAG##_t));                                                       \
            _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)                                                 \
                y[j] += lanes_##TAG(w + i + j * LANES) * lanes_F32(x + i + j * LANES);                          \
        }                                                                                                       \
        for (; i < n; i += LANES) y[0] += lanes_##TAG(w + i) * lanes_F32(x + i);                                \
        return sum((y[0] + y[1]) + (y[2] + y[3]));                                                              \
    }
#define DOT(TAG)                                                                                                \
    static float dot_##TAG(int64_t n, const void *row, const void *scale, const float *x) {                     \
        (void)scale;                                                                                            \
        return sum_of_products_##TAG(n, row, x);                                                                \
    }
FLOAT_FORMATS(SUM_OF_PRODUCTS)
FLOAT_FORMATS(DOT)
SUM_OF_PRODUCTS(INT8)

static float dot_INT8(int64_t n, const void *row, const void *scale, const float *x) {
    return *(const float *)scale * sum_of_products_INT8(n, row, x);
}

static float dot_INT4(int64_t n, const void *row, const void *scale, const float *x) {
    const uint8_t *w = row;
    const BF16_t *scales = scale;
    Lanes y[4] = {0};
    _Pragma("GCC unroll 4") for (int64_t g = 0; g < n / GROUP; g++, w += GROUP / 2, x += GROUP) {
        Lanes group = {0};
        if (g % 4 == 0) prefetch(w, 64);
        _Pragma("GCC unroll 4") for (int i = 0; i < GROUP / 2; i += LANES) {
            Lanes upper, lower = lanes_halves(w + i, &upper);
            group += lower * lanes_F32(x + i) + upper * lanes_F32(x + GROUP / 2 + i);
        }
        y[g % 4] += value_BF16(scales[g]) * group;
    }
    return sum((y[0] + y[1]) + (y[2] + y[3]));
}
/* The products of a row of weights with ROWS_AT_ONCE rows of x, `stride` apart: each weight is read and widened once. */
enum { ROWS_AT_ONCE = 4 };
typedef void Dots(int64_t n, const void *row, const void *scale, const float *x, int64_t stride, float *y);
#define DOTS(TAG)                                                                                               \
    static void dots_##TAG(int64_t n, const void *row, const void *scale, const float *x, int64_t stride, float *y) { \
        const TAG##_t *w = row;                                                                                 \
        const float *x_b = x + stride, *x_c = x_b + stride, *x_d = x_c + stride;                                \
        Lanes a = {0}, b = {0}, c = {0}, d = {0};                                                               \
        for (int64_t i = 0; i < n; i += LANES) {                                                                \
            Lanes w_i = lanes_##TAG(w + i);                                                                     \
            prefetch(w + i, LANES * sizeof(TAG##_t));                                                           \
            a += w_i * lanes_F32(x + i), b += w_i * lanes_F32(x_b + i);                                         \
            c += w_i * lanes_F32(x_c + i), d += w_i * lanes_F32(x_d + i);                                       \
        }                                                                                                       \
        float factor = scale ? *(const float *)scale : 1;                                                       \
        y[0] = factor * sum(a), y[1] = factor * sum(b), y[2] = factor * sum(c), y[3] = factor * sum(d);         \
    }
FLOAT_FORMATS(DOTS)
DOTS(INT8)

/* The products of WEIGHTS_AT_ONCE rows of weights, `bytes` apart, with ROWS_AT_ONCE rows of x: for many rows, which the
   nearest cache does not hold, so that each is read once for several weights. The next rows of weights are prefetched.
   y[j * ROWS_AT_ONCE + m] is that of weights j and row m, without a scale. */
enum { WEIGHTS_AT_ONCE = LANES >= 16 ? 4 : 2 }; /* as many sums as there are registers for */
typedef void Grid(int64_t n, const char *rows, int64_t bytes, const float *x, int64_t stride, float *y);
#define GRID(TAG)                                                                                               \
    static void grid_##TAG(int64_t n, const char *rows, int64_t bytes, const float *x, int64_t stride, float *y) { \
        Lanes sums[WEIGHTS_AT_ONCE][ROWS_AT_ONCE] = {0};                                                        \
        for (int64_t i = 0; i < n; i += LANES) {                                                                \
            Lanes x_i[ROWS_AT_ONCE];                                                                            \
            _Pragma("GCC unroll 4") for (int m = 0; m < ROWS_AT_ONCE; m++) x_i[m] = lanes_F32(x + m * stride + i); \
            _Pragma("GCC unroll 4") for (int j = 0; j < WEIGHTS_AT_ONCE; j++) {                                 \
                const TAG##_t *w = (const TAG##_t *)(rows + j * bytes) + i;                                     \
                __builtin_prefetch((const char *)w + WEIGHTS_AT_ONCE * bytes, 0, 2);                            \
                Lanes w_i = lanes_##TAG(w);                                                                     \
                _Pragma("GCC unroll 4") for (int m = 0; m < ROWS_AT_ONCE; m++) sums[j][m] += w_i * x_i[m];      \
            }                                                                                                   \
        }                                                                                                       \
        for (int j = 0; j < WEIGHTS_AT_ONCE; j++)                                                               \
            for (int m = 0; m < ROWS_AT_ONCE; m++) y[j * ROWS_AT_ONCE + m] = sum(sums[j][m]);                   \
    }
FLOAT_FORMATS(GRID)
GRID(INT8)

#include "rows16.h"

#define AS_DOT(TAG) dot_##TAG,
static Dot *const DOT_OF[] = {FORMATS(AS_DOT)};
#define AS_DOTS(TAG) dots_##TAG,
static Dots *const DOTS_OF[] = {FLOAT_FORMATS(AS_DOTS) dots_INT8, NULL};
#define AS_GRID(TAG) grid_##TAG,
static Grid *const GRID_OF[] = {FLOAT_FORMATS(AS_GRID) grid_INT8, NULL};

/* Arrays of a float format <-> arrays of float32. */
typedef void Widen(int64_t n, const void *from, float *to);
typedef void Store(int64_t n, const float *from, void *to);
#define CONVERSIONS(TAG)                                                                                        \
    static void widen_##TAG(int64_t n, const void *from, float *to) {                                           \
        const TAG##_t *x = from;                                                                                \
        int64_t i = 0;                                                                                          \
        for (; i + LANES <= n; i += LANES) store_lanes(to + i, lanes_##TAG(x + i));                             \
        for (; i < n; i++) to[i] = value_##TAG(x[i]);                                                           \
    }                                                                                                           \
    static void store_##TAG(int64_t n, const float *from, void *to) {                                           \
        for (int64_t i = 0; i < n; i++) ((TAG##_t *)to)[i] = stored_##TAG(from[i]);                             \
    }
FLOAT_FORMATS(CONVERSIONS)
#define AS_WIDEN(TAG) widen_##TAG,
#define AS_STORE(TAG) store_##TAG,
static Widen *const WIDEN[] = {FLOAT_FORMATS(AS_WIDEN)};
static Store *const STORE[] = {FLOAT_FORMATS(AS_STORE)};

/* The functions that follow a product. */
typedef float Function(float);
static float itself(float x) { return x; }
static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
static float silu(float x) { return x * sigmoid(x); }
static float squared_relu(float x) { return x > 0 ? x * x : 0; }

/* A weight W [out, in] of some format. `scale` is float32 [out] for INT8 and bfloat16 [out, in / GROUP] for INT4. */
typedef struct {
    const void *weight, *scale;
    int64_t format;
} Linear;

static int64_t scale_bytes(int64_t format, int64_t in) { /* of one row */
    return format == INT8 ? sizeof(F32_t) : format == INT4 ? in / GROUP * sizeof(BF16_t) : 0;
}

/* Whether there is such a format, with a scale where it needs one and a number of columns that it can have. */
static int is_readable(Linear w, int64_t in) {
    if (w.format < 0 || w.format >= FORMAT_COUNT || (scale_bytes(w.format, GROUP) && !w.scale)) return 0;
    return w.format != INT4 || in % GROUP == 0;
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

/* y [ROWS_AT_ONCE, COLUMNS_AT_ONCE] = x W for as many columns of W [in, out], each of which is read once for all rows. */
enum { COLUMNS_AT_ONCE = 2 * LANES };
typedef void LowRankGrid(int64_t in, int64_t out, const void *columns, const float *x, int64_t stride, float *y);
#define LOW_RANK_GRID(TAG)                                                                                      \
    static void low_rank_grid_##TAG(int64_t in, int64_t out, const void *columns, const float *x, int64_t stride, \
                                    float *y) {                                                                 \
        Lanes sums[ROWS_AT_ONCE][2] = {0};                                                                      \
        for (int64_t i = 0; i < in; i++) {                                                                      \
            const TAG##_t *w = (const TAG##_t *)columns + i * out;                                              \
            Lanes w_i[2] = {lanes_##TAG(w), lanes_##TAG(w + LANES)};                                            \
            _Pragma("GCC unroll 4") for (int m = 0; m < ROWS_AT_ONCE; m++)                                      \
                _Pragma("GCC unroll 2") for (int j = 0; j < 2; j++) sums[m][j] += x[m * stride + i] * w_i[j];   \
        }                                                                                                       \
        for (int m = 0; m < ROWS_AT_ONCE; m++)                                                                  \
            for (int j = 0; j < 2; j++) store_lanes(y + m * COLUMNS_AT_ONCE + j * LANES, sums[m][j]);           \
    }
FLOAT_FORMATS(LOW_RANK_GRID)
#define AS_LOW_RANK_GRID(TAG) low_rank_grid_##TAG,
static LowRankGrid *const LOW_RANK_GRID_OF[] = {FLOAT_FORMATS(AS_LOW_RANK_GRID)};
#define AS_ADD_ROWS(TAG) add_rows_##TAG,
static AddRows *const ADD_ROWS_OF[] = {FLOAT_FORMATS(AS_ADD_ROWS)};

/* y = f(x W^T), or f(x W) with W [in, out] of a float format, as the halves of a low-rank map are stored: [count, out].
   Rows of x are `stride` apart. */
typedef struct {
    Linear w;
    int is_low_rank;
    Function *f;
    int64_t count, in, out, stride;
    const float *x;
    float *y;
    const Row16 *rows; /* [count], x in 16 bits for a weight of few bits, or null */
} Product;

/* A task is UNIT rows of a weight, or TILE columns of a low-rank map. */
enum { UNIT = 8, MOST_PRODUCTS = 12 };
static int64_t tasks_of(const Product *p) {
    return p->is_low_rank ? (p->out + TILE - 1) / TILE : (p->out + UNIT - 1) / UNIT;
}

/* From this many rows on grids are faster; fewer stay in the nearest cache while a row of weights is read. */
enum { MANY_ROWS = 8 };

/* Multiply the weights from row o on with the rows of x, as far as both fill whole grids. Returns the first row of weights
   that is left. */
static int64_t multiply_grids(const Product *p, int64_t o, int64_t end) {
    int64_t bytes = p->in * BITS[p->w.format] / 8;
    const float *scale = p->w.format == INT8 ? p->w.scale : NULL;
    for (; o + WEIGHTS_AT_ONCE <= end; o += WEIGHTS_AT_ONCE) {
        const char *rows = (const char *)p->w.weight + o * bytes;
        for (int64_t n = 0; n + ROWS_AT_ONCE <= p->count; n += ROWS_AT_ONCE) {
            float y[WEIGHTS_AT_ONCE * ROWS_AT_ONCE];
            GRID_OF[p->w.format](p->in, rows, bytes, p->x + n * p->stride, p->stride, y);
            for (int j = 0; j < WEIGHTS_AT_ONCE; j++)
                for (int m = 0; m < ROWS_AT_ONCE; m++)
                    p->y[(n + m) * p->out + o + j] = p->f((scale ? scale[o + j] : 1) * y[j * ROWS_AT_ONCE + m]);
        }
    }
    return o;
}

static void multiply(const Product *p, int64_t first, int64_t last) {
    int64_t bytes = p->in * BITS[p->w.format] / 8, scales = scale_bytes(p->w.format, p->in), format = p->w.format;
    int64_t end = at_most(p->out, last * UNIT), begin = first * UNIT, in_grids = begin, whole = 0;
    if (GRID_OF[format] && !p->rows && p->count >= MANY_ROWS) {
        in_grids = multiply_grids(p, begin, end);
        whole = p->count / ROWS_AT_ONCE * ROWS_AT_ONCE;
    }
    for (int64_t o = begin; o < end; o++) {
        const char *row = (const char *)p->w.weight + o * bytes;
        const char *scale = scales ? (const char *)p->w.scale + o * scales : NULL;
        for (int64_t n = o < in_grids ? whole : 0; n < p->count;) {
            const float *x = p->x + n * p->stride;
            float y[ROWS_AT_ONCE];
            int64_t some = (p->rows || DOTS_OF[format]) && n + ROWS_AT_ONCE <= p->count ? ROWS_AT_ONCE : 1;
            if (p->rows)
                DOTS_16_OF[format]((int)some, p->in, row, scale, &p->rows[n], y);
            else if (some == 1)
                y[0] = DOT_OF[format](p->in, row, scale, x);
            else
                DOTS_OF[format](p->in, row, scale, x, p->stride, y);
            for (int64_t i = 0; i < some; i++, n++) p->y[n * p->out + o] = p->f(y[i]);
        }
    }
}

/* Multiply columns [o, o + width) with the rows of x, as far as both fill whole grids. Returns the first row that is left. */
static int64_t multiply_low_rank_grids(const Product *p, int64_t o, int64_t width) {
    if (width % COLUMNS_AT_ONCE || p->count < MANY_ROWS) return 0;
    int64_t n = 0;
    for (; n + ROWS_AT_ONCE <= p->count; n += ROWS_AT_ONCE)
        for (int64_t j = o; j < o + width; j += COLUMNS_AT_ONCE) {
            float y[ROWS_AT_ONCE * COLUMNS_AT_ONCE];
            const char *columns = (const char *)p->w.weight + j * (BITS[p->w.format] / 8);
            LOW_RANK_GRID_OF[p->w.format](p->in, p->out, columns, p->x + n * p->stride, p->stride, y);
            for (int64_t m = 0; m < ROWS_AT_ONCE; m++)
                for (int64_t i = 0; i < COLUMNS_AT_ONCE; i++)
                    p->y[(n + m) * p->out + j + i] = p->f(y[m * COLUMNS_AT_ONCE + i]);
        }
    return n;
}

static void multiply_low_rank(const Product *p, int64_t first, int64_t last) {
    for (int64_t o = first * TILE; o < at_most(p->out, last * TILE); o += TILE) {
        int64_t width = at_most(TILE, p->out - o), format = p->w.format;
        for (int64_t n = multiply_low_rank_grids(p, o, width); n < p->count; n++) {
            float sums[TILE] = {0};
            for (int64_t i = 0; i < p->in; i += LOW_RANK_MULTIPLE)
                ADD_ROWS_OF[format](p->out, width, (const char *)p->w.weight + (i * p->out + o) * (BITS[format] / 8),
                                    p->x + n * p->stride + i, sums);
            for (int64_t j = 0; j < width; j++) p->y[n * p->out + o + j] = p->f(sums[j]);
        }
    }
}

/* Products that need nothing of one another. */
typedef struct {
    int64_t count;
    Product list[MOST_PRODUCTS];
} Products;

static void multiply_all(const void *phase, int64_t first, int64_t last) {
    const Products *products = phase;
    for (int64_t i = 0; i < products->count && first < last; i++) {
        int64_t tasks = tasks_of(&products->list[i]);
        if (first < tasks) (products->list[i].is_low_rank ? multiply_low_rank : multiply)(&products->list[i], first, at_most(tasks, last));
        first = first > tasks ? first - tasks : 0;
        last -= tasks;
    }
}

/* Round x of the products with few bits to 16 bits, in memory that is returned. Without memory they multiply it as it is. */
static void *round_inputs(Products *products) {
    int64_t rows = 0, bytes = 0;
    for (int64_t i = 0; i < products->count; i++) {
        Product *p = &products->list[i];
        if (p->is_low_rank || !is_in_16_bits(p->w.format, p->in)) continue;
        rows += p->count, bytes += p->count * bytes_of_row_16(p->in);
    }
    if (!rows) return NULL;
    char *memory = malloc(CHUNK_16 + bytes + rows * sizeof(Row16));
    char *next = memory ? memory + (-(uintptr_t)memory & (CHUNK_16 - 1)) : NULL; /* so that no register crosses a cache line */
    Row16 *row = memory ? (Row16 *)(next + bytes) : NULL;
    for (int64_t i = 0; i < products->count && memory; i++) {
        Product *p = &products->list[i];
        if (p->is_low_rank || !is_in_16_bits(p->w.format, p->in)) continue;
        p->rows = row;
        for (int64_t n = 0; n < p->count; n++, row++, next += bytes_of_row_16(p->in)) {
            *row = round_to_16(p->in, p->w.format, p->x + n * p->stride, next);
            if (row->scale == INFINITY) p->rows = NULL;
        }
    }
    return memory;
}

static void share_products(Team team, Products *products) {
    int64_t tasks = 0;
    void *memory = round_inputs(products);
    for (int64_t i = 0; i < products->count; i++) tasks += tasks_of(&products->list[i]);
    share(team, tasks, multiply_all, products);
    free(memory);
}

/* The token shift, forward and backward. Every array is contiguous.
   Letters: M targets, N tokens of all rows, C hidden size, S tokens that are carried over from before the rows.

   The columns of a token are independent of one another. In the backward each thread takes COLUMNS of them and reads all
   tokens, so that no two threads add to the same gradient, however many tokens see one. */
enum { TARGETS_AT_MOST = 16, TOKENS_OF_A_SUM = 64 };

typedef struct {
    int64_t M, N, C, S;
    const int64_t *before; /* [N], the token seen by each one; ~s is carried token s */
    const float *x, *carried, *mix, *dynamic; /* [N, C], [S, C], [M, C], [M, N, C] or null */
} Shift;

static int check_shift(const Shift *s) {
    if (s->M < 1 || s->M > TARGETS_AT_MOST || s->C < 1 || !is_countable(s->M, s->N, s->C) || !is_countable(s->S, s->C, 1))
        return SIZE_OUT_OF_RANGE;
    for (int64_t t = 0; t < s->N; t++)
        if (s->before[t] >= s->N || s->before[t] < -s->S) return ORDER_OUT_OF_RANGE;
    return OK;
}

static const float *seen_by(const Shift *s, int64_t token) {
    int64_t entry = s->before[token];
    return entry < 0 ? s->carried + ~entry * s->C : s->x + entry * s->C;
}

/* out_m [N, C] = x + (p - x) (mix_m + dynamic_m), where p is the token that each one sees. */
int visualrwkv_token_shift(int threads, int64_t M, int64_t N, int64_t C, int64_t S, const int64_t *before, const float *x,
                           const float *carried, const float *mix, const float *dynamic, float *const *out) {
    Shift s = {M, N, C, S, before, x, carried, mix, dynamic};
    int error = check_shift(&s);
    if (error) return error;
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < N; token++) {
        const float *now = x + token * C, *seen = seen_by(&s, token);
        for (int64_t m = 0; m < M; m++) {
            float *restrict target = out[m] + token * C;
            const float *weight = mix + m * C, *added = dynamic ? dynamic + (m * N + token) * C : NULL;
            for (int64_t c = 0; c < C; c++) target[c] = now[c] + (seen[c] - now[c]) * (weight[c] + (added ? added[c] : 0));
        }
    }
    return OK;
}

/* Add the gradients of a token's `width` columns: those of its targets, dout, to those of what it was made of. */
static void back_shift(const Shift *s, int64_t token, int64_t column, int64_t width, const float *const *dout,
                       float (*restrict sums)[COLUMNS], float *dx, float *dcarried, float *ddynamic) {
    int64_t entry = s->before[token], here = token * s->C + column;
    const float *now = s->x + here, *seen = seen_by(s, token) + column;
    float mine[COLUMNS], theirs[COLUMNS] = {0}, difference[COLUMNS], all[COLUMNS] = {0};
    for (int64_t c = 0; c < width; c++) difference[c] = seen[c] - now[c];
    for (int64_t m = 0; m < s->M; m++) {
        const float *given = dout[m] + here, *weight = s->mix + m * s->C + column;
        const float *added = s->dynamic ? s->dynamic + m * s->N * s->C + here : NULL;
        for (int64_t c = 0; c < width; c++) {
            all[c] += given[c];
            theirs[c] += given[c] * (weight[c] + (added ? added[c] : 0));
            sums[m][c] += given[c] * difference[c];
        }
        for (int64_t c = 0; added && c < width; c++) ddynamic[m * s->N * s->C + here + c] = given[c] * difference[c];
    }
    for (int64_t c = 0; c < width; c++) mine[c] = all[c] - theirs[c];
    float *source = entry < 0 ? dcarried + ~entry * s->C + column : dx + entry * s->C + column;
    for (int64_t c = 0; c < width; c++) dx[here + c] += mine[c];
    for (int64_t c = 0; c < width; c++) source[c] += theirs[c];
}

/* Compute the gradients of what visualrwkv_token_shift reads from those of its M targets, dout. dx [N, C] and dcarried
   [S, C] must come as zeros; ddynamic is null if `dynamic` is. Sums over tokens are kept in double precision;
   TOKENS_OF_A_SUM tokens at a time are added in single precision first. */
int visualrwkv_token_shift_backward(int threads, int64_t M, int64_t N, int64_t C, int64_t S, const int64_t *before,
                                    const float *x, const float *carried, const float *mix, const float *dynamic,
                                    const float *const *dout, float *dx, float *dcarried, float *dmix, float *ddynamic) {
    Shift s = {M, N, C, S, before, x, carried, mix, dynamic};
    int error = check_shift(&s);
    if (error) return error;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t column = 0; column < C; column += COLUMNS) {
        int64_t width = at_most(COLUMNS, C - column);
        double totals[TARGETS_AT_MOST][COLUMNS] = {{0}};
        for (int64_t begin = 0; begin < N; begin += TOKENS_OF_A_SUM) {
            float sums[TARGETS_AT_MOST][COLUMNS] = {{0}};
            for (int64_t token = begin; token < at_most(N, begin + TOKENS_OF_A_SUM); token++)
                back_shift(&s, token, column, width, dout, sums, dx, dcarried, ddynamic);
            for (int64_t m = 0; m < M; m++)
                for (int64_t c = 0; c < width; c++) totals[m][c] += sums[m][c];
        }
        for (int64_t m = 0; m < M; m++)
            for (int64_t c = 0; c < width; c++) dmix[m * C + column + c] = totals[m][c];
    }
    return OK;
}

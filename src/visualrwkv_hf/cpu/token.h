/* One token of a whole language model: embedding, its norm, all blocks, the last norm, the head, and the likeliest next id. */

/* What is before and after the blocks. Vectors and the embedding are of the blocks' format. */
typedef struct {
    int64_t embeddings, vocab; /* rows of the embedding, and of the head */
    const void *embedding;     /* [embeddings, C] */
    const void *first_weight, *first_bias, *last_weight, *last_bias; /* [C] each */
    Linear head;               /* [vocab, C] */
} Ends;

static float rounded_BF16(float x) { return value_BF16(stored_BF16(x)); }
static float rounded_F16(float x) { return value_F16(stored_F16(x)); }
/* Logits are rounded as the head of a model of that format rounds them. */
static Function *const ROUNDED[] = {itself, rounded_BF16, rounded_F16};

/* Normalise a row [C] and round it to the format. `vectors` has room for 2 C floats. */
static void norm_row(int64_t format, int64_t C, float eps, const void *weight, const void *bias, const float *x,
                     float *vectors, float *y) {
    WIDEN[format](C, weight, vectors);
    WIDEN[format](C, bias, vectors + C);
    layer_norm(C, eps, vectors, vectors + C, x, y);
    round_to(format, C, y);
}

/* The index of the first of the largest numbers; a NaN counts as larger than any, as in torch. */
static int64_t argmax(int64_t n, const float *x) {
    enum { SOME = 64 };
    float most[SOME];
    int is_nan[SOME] = {0};
    for (int j = 0; j < SOME; j++) most[j] = -INFINITY;
    int64_t whole = n / SOME * SOME;
    for (int64_t i = 0; i < whole; i += SOME)
        for (int j = 0; j < SOME; j++) {
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
            is_nan[j] |= x[i + j] != x[i + j];
        }
    float largest = -INFINITY;
    int has_nan = 0;
    for (int j = 0; j < SOME; j++) largest = most[j] > largest ? most[j] : largest, has_nan |= is_nan[j];
    for (int64_t i = whole; i < n; i++) largest = x[i] > largest ? x[i] : largest, has_nan |= x[i] != x[i];
    for (int64_t i = 0; i < n; i++)
        if (has_nan ? x[i] != x[i] : x[i] == largest) return i;
    return 0;
}

typedef struct {
    int64_t vocab;
    const float *logits;
    int64_t *next;
} Choice;

static void choose(const void *phase, int64_t first, int64_t last) {
    const Choice *c = phase;
    for (int64_t n = first; n < last; n++) c->next[n] = argmax(c->vocab, c->logits + n * c->vocab);
}

/* Read ids [B], which follow what the states have read: logits [B, vocab] becomes the scores of the next ids, and next [B] the
   likeliest of each row. `ends` are those of `blocks`; see `visualrwkv_blocks`. */
int visualrwkv_token(int threads, int64_t count, float eps, float norm_eps, float decay_scale, const Sizes *sizes,
                     const Weights *weights, const LayerState *states, float first_eps, float last_eps, const Ends *ends,
                     const int64_t *ids, float *logits, int64_t *next) {
    Blocks blocks = {count, eps, norm_eps, decay_scale, sizes, weights, states, NULL, NULL};
    int64_t most, B = sizes->B, C = sizes->C, format = sizes->format;
    int error = check_blocks(&blocks, &most);
    if (error) return error;
    if (!is_countable(ends->embeddings, C, 1) || !is_countable(ends->vocab, C, 1) || !is_countable(B, ends->vocab, 1))
        return SIZE_OUT_OF_RANGE;
    if (ends->vocab < 1 || !is_readable(ends->head, C)) return FORMAT_UNKNOWN;
    for (int64_t n = 0; n < B; n++)
        if (ids[n] < 0 || ids[n] >= ends->embeddings) return SIZE_OUT_OF_RANGE;
    float *scratch = malloc((most + 2 * B * C + B * sizes->A + 2 * C) * sizeof(float));
    if (!scratch) return NO_MEMORY;
    float *x = scratch + most, *y = x + B * C, *v_first = y + B * C, *vectors = v_first + B * sizes->A;
    for (int64_t n = 0; n < B; n++) {
        WIDEN[format](C, (const char *)ends->embedding + ids[n] * C * (BITS[format] / 8), y);
        norm_row(format, C, first_eps, ends->first_weight, ends->first_bias, y, vectors, x + n * C);
    }
    Team team = begin_team(threads);
    run_blocks(team, &blocks, scratch, v_first, x);
    for (int64_t n = 0; n < B; n++)
        norm_row(format, C, last_eps, ends->last_weight, ends->last_bias, x + n * C, vectors, y + n * C);
    Products head = {1, {{ends->head, 0, ROUNDED[format], B, C, ends->vocab, C, y, logits, NULL}}};
    share_products(team, &head);
    Choice choice = {ends->vocab, logits, next};
    share(team, B, choose, &choice);
    end_team(team);
    free(scratch);
    return OK;
}

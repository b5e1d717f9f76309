/* The search for one width of floats. Included with KEY and UNSIGNED, the integers of that width; HIGHEST and LOWEST, of KEY;
 * INFINITY_BITS, the bits of infinity; and NAME(f), f's name for this width.
 *
 * Floats above 0 order as their bits do. KEYs that order as all floats do, NaN above all, take some instructions more. */

typedef KEY NAME(vector) __attribute__((vector_size(64)));
enum { NAME(LANES) = 64 / sizeof(KEY) };

static inline NAME(vector) NAME(load)(const KEY *from) {
    NAME(vector) v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline KEY NAME(key)(KEY bits) {
    KEY magnitude = bits & HIGHEST;
    return magnitude > INFINITY_BITS ? HIGHEST : bits < 0 ? bits ^ HIGHEST : bits;
}

static inline int NAME(any)(NAME(vector) mask) {
    int64_t words[8], any = 0;
    memcpy(words, &mask, sizeof mask);
    for (int i = 0; i < 8; i++) any |= words[i];
    return any != 0;
}

/* The k-th largest of n keys by bisection, at least `low`; n is a multiple of LANES. */
static KEY NAME(kth)(const KEY *keys, int64_t n, int64_t k, int64_t low) {
    KEY most = LOWEST;
    for (int64_t i = 0; i < n; i++) most = most > keys[i] ? most : keys[i];
    int64_t high = most;
    while (low < high) {
        int64_t middle = low + ((high - low + 1) >> 1), count = 0;
        for (int64_t start = 0; start < n; start += COUNTED_AT_ONCE) {
            NAME(vector) counts = {0};
            int64_t end = n - start < COUNTED_AT_ONCE ? n : start + COUNTED_AT_ONCE;
            for (int64_t i = start; i < end; i += NAME(LANES)) counts -= NAME(load)(keys + i) >= (KEY)middle;
            for (int lane = 0; lane < NAME(LANES); lane++) count += counts[lane];
        }
        if (count >= k) low = middle;
        else high = middle - 1;
    }
    return (KEY)low;
}

/* A bound that at least k of the keys reach, and few more: the k-th largest of the maxima of n stripes, which are columns
 * j, j + n, j + 2n, ... Also the largest key when its sign is read as one more bit. */
static KEY NAME(bound)(const KEY *restrict keys, int64_t P, int64_t k, int64_t n, KEY *restrict maxima,
                       UNSIGNED *largest) {
    UNSIGNED most = 0;
    KEY least = HIGHEST;
    for (int64_t j = 0; j < n; j++) maxima[j] = LOWEST;
    for (int64_t start = 0; start < P; start += n) {
        int64_t width = P - start < n ? P - start : n;
        for (int64_t j = 0; j < width; j++) {
            KEY key = keys[start + j];
            maxima[j] = maxima[j] > key ? maxima[j] : key;
            most = most > (UNSIGNED)key ? most : (UNSIGNED)key;
        }
    }
    for (int64_t j = 0; j < n; j++) least = least < maxima[j] ? least : maxima[j];
    *largest = most;
    return NAME(kth)(maxima, n, k, least);
}

/* Which of some columns reach the bound, and maybe some that do not. `keys` are the row's, if they are known. Otherwise
 * the bound is above 0, and only floats above it reach it, and NaN with a sign. */
static inline NAME(vector) NAME(reaching)(const KEY *row, const KEY *keys, int64_t column, KEY bound) {
    if (keys) return NAME(load)(keys + column) >= bound;
    NAME(vector) bits = NAME(load)(row + column);
    return (bits >= bound) | ((bits < 0) & (bits > (KEY)(LOWEST | INFINITY_BITS)));
}

/* How many of the row reach the bound; their keys and columns, ascending. */
static int64_t NAME(collect)(const KEY *restrict row, const KEY *restrict keys, int64_t P, KEY bound,
                             KEY *restrict found_keys, int32_t *restrict columns) {
    enum { L = NAME(LANES), SEVERAL = 4 * L, WORD = 8 / sizeof(KEY) };
    int64_t found = 0, column = 0;
    for (; column + SEVERAL <= P; column += SEVERAL) {
        NAME(vector) reaching[4];
        for (int i = 0; i < 4; i++) reaching[i] = NAME(reaching)(row, keys, column + i * L, bound);
        if (!NAME(any)(reaching[0] | reaching[1] | reaching[2] | reaching[3])) continue;
        int64_t words[SEVERAL / WORD];
        memcpy(words, reaching, sizeof words);
        uint32_t hits = 0; /* a bit per word, so that there is one branch per word that has something */
        for (int word = 0; word < SEVERAL / WORD; word++) hits |= (uint32_t)(words[word] != 0) << word;
        for (; hits; hits &= hits - 1) {
            int64_t first = column + WORD * __builtin_ctz(hits);
            for (int i = 0; i < WORD; i++) {
                found_keys[found] = NAME(key)(row[first + i]);
                columns[found] = (int32_t)(first + i);
                found += found_keys[found] >= bound;
            }
        }
    }
    for (; column < P; column++) {
        found_keys[found] = NAME(key)(row[column]);
        columns[found] = (int32_t)column;
        found += found_keys[found] >= bound;
    }
    return found;
}

/* One row of `update`. found_keys and columns have room for k + P, and some more. */
static void NAME(update_row)(const KEY *restrict ranked, const KEY *restrict pre, int64_t P, int64_t k, int64_t n,
                             int64_t first_column, int is_first, KEY *restrict scratch, KEY *restrict found_keys,
                             int32_t *restrict columns, KEY *restrict best, KEY *restrict values,
                             int64_t *restrict indices) {
    int64_t known = is_first ? 0 : k; /* what is found comes after what was found before */
    KEY bound = HIGHEST, *keys = NULL;
    if (known) {
        for (int64_t j = 0; j < k; j++) bound = best[j] < bound ? best[j] : bound;
        if (bound == HIGHEST) return; /* all are NaN */
        bound++;                      /* of equal ones the first count */
    }
    UNSIGNED largest = 0;
    if (!known) bound = NAME(bound)(ranked, P, k, n, found_keys, &largest);
    if (bound <= 0 || largest > (UNSIGNED)(LOWEST | INFINITY_BITS)) {
        keys = scratch;
        for (int64_t i = 0; i < P; i++) keys[i] = NAME(key)(ranked[i]);
        if (!known) bound = NAME(bound)(keys, P, k, n, found_keys, &largest);
    }
    int64_t total = known + NAME(collect)(ranked, keys, P, bound, found_keys + known, columns + known), kept = 0;
    if (total == known) return;
    memcpy(found_keys, best, known * sizeof(KEY));
    if (total > k) {
        int64_t padded = (total + NAME(LANES) - 1) / NAME(LANES) * NAME(LANES);
        for (int64_t i = total; i < padded; i++) found_keys[i] = LOWEST;
        bound = NAME(kth)(found_keys, padded, k, known ? bound - 1 : bound);
    }
    int64_t ties = k; /* how many may equal the bound: the first ones */
    for (int64_t i = 0; i < total; i++) ties -= found_keys[i] > bound;
    for (int64_t i = 0; i < total && kept < k; i++) {
        int is_tie = found_keys[i] == bound;
        best[kept] = found_keys[i]; /* at most at i, which has been read */
        values[kept] = i < known ? values[i] : pre[columns[i]];
        indices[kept] = i < known ? indices[i] : first_column + columns[i];
        kept += found_keys[i] > bound || (is_tie && ties > 0);
        ties -= is_tie;
    }
}

/* The k largest of each of R rows, of which a part after the other is given: P columns from `first_column` on.
 *
 * ranked: What is compared, as bits; rows begin ranked_stride apart. pre: What is returned of it, likewise.
 * n: Stripes, a multiple of LANES, from k to P.
 * best, values, indices: [R, k], of the parts before unless is_first; by ascending column.
 *
 * Returns nonzero if there is no memory. */
int NAME(update)(const KEY *ranked, int64_t ranked_stride, const KEY *pre, int64_t pre_stride, int64_t R, int64_t P,
                 int64_t k, int64_t n, int64_t first_column, int64_t is_first, KEY *best, KEY *values,
                 int64_t *indices) {
    int failed = 0;
    #pragma omp parallel reduction(|:failed)
    {
        KEY *keys = malloc((2 * P + k + NAME(LANES)) * sizeof(KEY));
        int32_t *columns = malloc((P + k + 1) * sizeof(int32_t));
        failed = !keys || !columns;
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < R; r++)
            if (!failed)
                NAME(update_row)(ranked + r * ranked_stride, pre + r * pre_stride, P, k, n, first_column, is_first,
                                 keys, keys + P, columns, best + r * k, values + r * k, indices + r * k);
        free(keys);
        free(columns);
    }
    return failed;
}

#undef KEY
#undef UNSIGNED
#undef HIGHEST
#undef LOWEST
#undef INFINITY_BITS
#undef NAME

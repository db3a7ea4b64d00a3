// Attention of many bf16 rows over KV slots that lie in runs, with AVX512-BF16 products.
// See README.md. Knows nothing about pages or tensors.

#include <stdlib.h>

#include "cpu_products.h"

enum { TILE = 96 };  // rows that read the keys together

typedef struct {
    const uint16_t *q, *k, *v;
    uint16_t *out;                 // [batch][rows][q_heads][d]
    const int64_t *run_first;      // in slots; slot s is the d elements from s * d on
    const int32_t *run_length;
    const int64_t *run_begin;      // [batch * kv_heads + 1]
    int64_t rows, q_heads, kv_heads, d;
    int64_t q_batch, q_row;        // elements from one sequence, and one row, to the next
    int64_t slot_step;             // slots from one key of a run to the next
    float factor;                  // of a raw score, times log2(e)
    int is_causal;
} Problem;

// the keys and values of one KV head as the products want them
typedef struct {
    int64_t length, padded;  // slots, and those with the zeros behind them, a multiple of KEYS
    uint32_t *k;             // [padded / PANEL][d / 2][PANEL], pairs of channels
    uint32_t *v;             // [padded / 2][channels], pairs of keys
} Packed;

INLINE int64_t channels_of(const Problem *problem) { return (problem->d + 15) / 16 * 16; }

static int64_t length_of(const Problem *problem, int64_t head) {
    int64_t length = 0;
    for (int64_t run = problem->run_begin[head]; run < problem->run_begin[head + 1]; run++)
        length += problem->run_length[run];
    return length;
}

static void pack(const Problem *problem, int64_t head, Packed *to) {
    int64_t d = problem->d, pairs = d / 2, channels = channels_of(problem), key = 0;
    uint16_t *v = (uint16_t *)to->v;
    for (int64_t run = problem->run_begin[head]; run < problem->run_begin[head + 1]; run++) {
        for (int32_t at = 0; at < problem->run_length[run]; at++, key++) {
            int64_t slot = problem->run_first[run] + at * problem->slot_step;
            const uint32_t *from = (const uint32_t *)(problem->k + slot * d);
            uint32_t *panel = to->k + key / PANEL * pairs * PANEL + key % PANEL;
            for (int64_t pair = 0; pair < pairs; pair++) panel[pair * PANEL] = from[pair];
            const uint16_t *value = problem->v + slot * d;
            uint16_t *row = v + key / 2 * channels * 2 + key % 2;
            for (int64_t channel = 0; channel < d; channel++) row[channel * 2] = value[channel];
        }
    }
}

typedef struct {
    float acc[TILE][MAX_D], top[TILE], sum[TILE], worth[ROWS], scores[ROWS][KEYS];
    uint16_t weights[ROWS][KEYS];
    const uint32_t *q[TILE];
    int64_t limit[TILE];  // keys that a row sees
} Scratch;

// Rows [first, first + count) of one KV head: row r is query head r % group of position r / group.
static void run_tile(const Problem *problem, const Packed *packed, int64_t head, int64_t first, int count,
                     Scratch *scratch) {
    int64_t group = problem->q_heads / problem->kv_heads, d = problem->d, pairs = d / 2;
    int64_t batch = head / problem->kv_heads, base = head % problem->kv_heads * group;
    int64_t channels = channels_of(problem), older = packed->length - problem->rows;
    for (int r = 0; r < TILE; r++) {
        // what fills the last group of rows up repeats the last row
        int64_t row = first + (r < count ? r : count - 1), position = row / group;
        const uint16_t *q = problem->q + batch * problem->q_batch + position * problem->q_row;
        scratch->q[r] = (const uint32_t *)(q + (base + row % group) * d);
        scratch->limit[r] = problem->is_causal ? older + position + 1 : packed->length;
        scratch->top[r] = -1e30f;
        scratch->sum[r] = 0.0f;
    }
    memset(scratch->acc, 0, sizeof scratch->acc);
    int groups = (count + ROWS - 1) / ROWS;
    for (int64_t key = 0; key < scratch->limit[count - 1]; key += KEYS) {
        for (int g = 0; g < groups; g++) {
            int at = g * ROWS;
            if (scratch->limit[at + ROWS - 1] <= key) continue;
            for (int part = 0; part < KEYS; part += 64)
                score(scratch->q + at, packed->k + (key + part) * pairs, pairs,
                      (float(*)[KEYS])(scratch->scores[0] + part));
            for (int r = 0; r < ROWS; r++) {
                __mmask16 seen[KEYS / PANEL];
                int64_t visible = scratch->limit[at + r] - key;
                if (visible < KEYS) mark_first(visible, seen);
                scratch->worth[r] = weigh(scratch->scores[r], scratch->weights[r], visible < KEYS ? seen : NULL,
                                          problem->factor, &scratch->top[at + r], &scratch->sum[at + r]);
            }
            add_all((const uint16_t(*)[KEYS])scratch->weights, packed->v + key / 2 * channels, channels,
                    scratch->worth, scratch->acc[at]);
        }
    }
    for (int r = 0; r < count; r++) {
        int64_t row = first + r, position = row / group;
        int64_t place = (batch * problem->rows + position) * problem->q_heads + base + row % group;
        write_row(scratch->acc[r], 1.0f / scratch->sum[r], problem->out + place * d, d);
    }
}

static int run_all(const Problem *problem, Packed *packed, int64_t heads, int threads) {
    int64_t total = problem->rows * (problem->q_heads / problem->kv_heads);
    int64_t tiles = (total + TILE - 1) / TILE;
    int failed = 0;
    #pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Scratch *scratch = aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
        failed = scratch == NULL;
        #pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; head++) pack(problem, head, &packed[head]);
        // the last tiles see most keys: they come first
        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * tiles; task++) {
            int64_t first = (tiles - 1 - task / heads) * TILE, head = task % heads;
            int64_t count = total - first < TILE ? total - first : TILE;
            if (scratch != NULL) run_tile(problem, &packed[head], head, first, (int)count, scratch);
        }
        free(scratch);
    }
    return failed;
}

// 0, or what went wrong: 1 no memory, 2 a run leaves the arrays or a head has fewer keys than rows
int prefill_attention(const void *q, const void *k, const void *v, const int64_t *run_first,
                      const int32_t *run_length, const int64_t *run_begin, void *out, int64_t batch,
                      int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t d, int64_t slots,
                      int64_t q_batch, int64_t q_row, int64_t slot_step, float factor, int is_causal,
                      int threads) {
    Problem problem = {q, k, v, out, run_first, run_length, run_begin, rows, q_heads, kv_heads, d,
                       q_batch, q_row, slot_step, factor, is_causal};
    int64_t heads = batch * kv_heads, channels = channels_of(&problem), words = 0;
    for (int64_t run = 0; run < run_begin[heads]; run++) {
        int64_t last = run_first[run] + (run_length[run] - 1) * slot_step;
        if (run_length[run] < 0 || (run_length[run] > 0 && (run_first[run] < 0 || last >= slots))) return 2;
    }
    Packed *packed = calloc(heads, sizeof(Packed));
    if (packed == NULL) return 1;
    for (int64_t head = 0; head < heads; head++) {
        packed[head].length = length_of(&problem, head);
        packed[head].padded = (packed[head].length + KEYS - 1) / KEYS * KEYS;
        words += packed[head].padded * (d / 2) + packed[head].padded / 2 * channels;
        if (packed[head].length < (is_causal ? rows : 1)) {
            free(packed);
            return 2;
        }
    }
    // zeros: keys behind the last are not seen, but they are multiplied
    uint32_t *memory = calloc(words + PANEL, sizeof(uint32_t));
    int failed = memory == NULL;
    for (int64_t head = 0, at = 0; head < heads && !failed; head++) {
        packed[head].k = memory + at;
        packed[head].v = packed[head].k + packed[head].padded * (d / 2);
        at += packed[head].padded * (d / 2) + packed[head].padded / 2 * channels;
    }
    if (!failed) failed = run_all(&problem, packed, heads, threads);
    free(memory);
    free(packed);
    return failed;
}

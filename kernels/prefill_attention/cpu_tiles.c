// Attention of an AttentionIndex on a CPU: bf16 tiles, whose keys are gathered into what the products want.
// See README.md. Knows nothing about patterns or tensors.

#include <limits.h>
#include <math.h>
#include <stdlib.h>

#include "cpu_products.h"

enum {
    FIELDS = 10,  // of a record of `tiles`
    BATCH = 192,  // rows that share what was gathered
};

typedef struct {
    const uint16_t *q, *k, *v;
    uint16_t *out;                // [rows][q_heads][d]
    float *lse;                   // [rows][q_heads]
    const int32_t *tiles, *rows, *runs, *blocks, *columns, *row_order;
    const int64_t *key_begin;     // [sequences][kv_heads]
    const int32_t *key_order, *key_slot;  // or NULL
    const int32_t *tables;        // [sequences][kv_heads][max_pages], or NULL
    int64_t q_heads, kv_heads, d, block_size, places, storage, max_pages, page_size;
    int64_t q_row, q_head;        // elements from one row, and one head, to the next
    int64_t kv_row, kv_head;      // the same of contiguous k and v
    float factor;                 // of a raw score, times log2(e)
    float margin;                 // below 0: raw scores so far below a row's largest count for nothing
} Problem;

typedef struct {
    float acc[BATCH][MAX_D], top[BATCH], sum[BATCH], worth[ROWS], scores[ROWS][KEYS];
    uint16_t weights[ROWS][KEYS];
    const uint32_t *q[BATCH];
    int32_t limit[BATCH];         // the order of each row
    uint32_t k[KEYS / PANEL * (MAX_D / 2) * PANEL], v[KEYS / 2 * MAX_D];
    int32_t orders[KEYS];
    const uint16_t *key[KEYS], *value[KEYS];
} Scratch;

static const uint16_t NOTHING[MAX_D];

// one record of `tiles`, and the part of its head's axis that its keys are places on
typedef struct {
    int64_t sequence, head, kv_head, begin, count;
    const int32_t *rows;
    int32_t latest;               // order of its last row
} Tile;

// what of a tile's keys comes next; runs, then blocks, then columns
typedef struct {
    const int32_t *record;
    int64_t list, at, place;      // which list, which entry of it, how far into that entry
} Cursor;

// the next key's place on the axis, or -1
INLINE int64_t next_place(const Problem *problem, Cursor *cursor) {
    const int32_t *record = cursor->record;
    if (cursor->list == 0) {
        while (cursor->at < record[5]) {
            const int32_t *run = problem->runs + 3 * (record[4] + cursor->at);
            if (cursor->place < run[2]) return run[0] + cursor->place++ * (int64_t)run[1];
            cursor->at++, cursor->place = 0;
        }
        cursor->list = 1, cursor->at = cursor->place = 0;
    }
    if (cursor->list == 1) {
        while (cursor->at < record[7]) {
            if (cursor->place < problem->block_size)
                return problem->blocks[record[6] + cursor->at] * problem->block_size + cursor->place++;
            cursor->at++, cursor->place = 0;
        }
        cursor->list = 2, cursor->at = 0;
    }
    return cursor->at < record[9] ? problem->columns[record[8] + cursor->at++] : -1;
}

// rows of a 16 x 16 matrix of words become its columns
INLINE void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// K of KEYS keys as [KEYS / PANEL][d / 2][PANEL] pairs of channels
static void pack_keys(const uint16_t *const *from, int64_t d, uint32_t *to) {
    int64_t pairs = d / 2;
    for (int first = 0; first < KEYS; first += PANEL, to += pairs * PANEL) {
        for (int64_t at = 0; at < pairs; at += 16) {
            int64_t left = pairs - at < 16 ? pairs - at : 16;
            __mmask16 mask = (__mmask16)((1u << left) - 1);
            __m512i r[16];
            #pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_maskz_loadu_epi32(mask, (const uint32_t *)from[first + i] + at);
            transpose(r);
            for (int64_t i = 0; i < left; i++) _mm512_storeu_si512(to + (at + i) * PANEL, r[i]);
        }
    }
}

// V of KEYS keys as [KEYS / 2][channels] pairs of keys, zeros in the channels from d on
static void pack_values(const uint16_t *const *from, int64_t d, int64_t channels, uint32_t *to) {
    uint16_t turn[2][32];
    for (int i = 0; i < 16; i++) {
        turn[0][2 * i] = (uint16_t)i, turn[0][2 * i + 1] = (uint16_t)(i + 32);
        turn[1][2 * i] = (uint16_t)(i + 16), turn[1][2 * i + 1] = (uint16_t)(i + 48);
    }
    __m512i low = _mm512_loadu_si512(turn[0]), high = _mm512_loadu_si512(turn[1]);
    for (int key = 0; key < KEYS; key += 2, to += channels) {
        for (int64_t at = 0; at < channels; at += 32) {
            int64_t left = d - at < 32 ? d - at : 32;
            __mmask32 mask = (__mmask32)((1ull << left) - 1);
            __m512i a = _mm512_maskz_loadu_epi16(mask, from[key] + at);
            __m512i b = _mm512_maskz_loadu_epi16(mask, from[key + 1] + at);
            _mm512_storeu_si512(to + at, _mm512_permutex2var_epi16(a, low, b));
            if (channels - at > 16) _mm512_storeu_si512(to + at + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// Gather the next keys that some row sees; returns how many, less than KEYS at the end, or -1 if one is nowhere.
static int gather(const Problem *problem, const Tile *tile, Cursor *cursor, Scratch *scratch) {
    int count = 0;
    while (count < KEYS) {
        int64_t place = next_place(problem, cursor);
        if (place < 0) break;
        int64_t at = tile->begin + place;
        if ((problem->key_order != NULL || problem->key_slot != NULL) && at >= problem->places) return -1;
        int32_t order = problem->key_order != NULL ? problem->key_order[at] : (int32_t)place;
        if (order > tile->latest) continue;
        int64_t slot = problem->key_slot != NULL ? problem->key_slot[at] : place, offset;
        if (slot < 0) return -1;
        if (problem->tables == NULL) {
            if (tile->begin + slot >= problem->storage) return -1;
            offset = (tile->begin + slot) * problem->kv_row + tile->kv_head * problem->kv_head;
        } else {
            int64_t page = slot / problem->page_size, row = tile->sequence * problem->kv_heads + tile->kv_head;
            if (page >= problem->max_pages) return -1;
            page = problem->tables[row * problem->max_pages + page];
            if (page < 0 || page >= problem->storage) return -1;
            offset = (page * problem->page_size + slot % problem->page_size) * problem->d;
        }
        scratch->orders[count] = order;
        scratch->key[count] = problem->k + offset;
        scratch->value[count++] = problem->v + offset;
    }
    for (int at = count; at < KEYS; at++) {
        scratch->orders[at] = INT_MAX;
        scratch->key[at] = scratch->value[at] = NOTHING;
    }
    return count;
}

// Whether the scores of all rows are too far below the largest ones so far to count.
INLINE int is_negligible(const float (*scores)[KEYS], const float *top, float margin) {
    for (int r = 0; r < ROWS; r++) {
        __m512 most = _mm512_loadu_ps(scores[r]);
        for (int c = 1; c < KEYS / PANEL; c++) most = _mm512_max_ps(most, _mm512_loadu_ps(scores[r] + c * PANEL));
        if (_mm512_reduce_max_ps(most) > top[r] + margin) return 0;
    }
    return 1;
}

// One step of the softmax of all rows, over the keys that were gathered.
static void attend(const Problem *problem, Scratch *scratch, int rows) {
    int64_t pairs = problem->d / 2, channels = (problem->d + 15) / 16 * 16;
    int32_t first = INT_MAX, last = INT_MIN;
    for (int at = 0; at < KEYS; at++) {
        if (scratch->orders[at] < first) first = scratch->orders[at];
        if (scratch->orders[at] > last) last = scratch->orders[at];
    }
    for (int at = 0; at < rows; at += ROWS) {
        int32_t earliest = INT_MAX, latest = INT_MIN;
        for (int r = at; r < at + ROWS; r++) {
            if (scratch->limit[r] < earliest) earliest = scratch->limit[r];
            if (scratch->limit[r] > latest) latest = scratch->limit[r];
        }
        if (first > latest) continue;
        for (int part = 0; part < KEYS; part += 64)
            score(scratch->q + at, scratch->k + part * pairs, pairs, (float(*)[KEYS])(scratch->scores[0] + part));
        if (problem->margin < 0.0f &&
            is_negligible((const float(*)[KEYS])scratch->scores, scratch->top + at, problem->margin))
            continue;
        for (int r = 0; r < ROWS; r++) {
            __mmask16 seen[KEYS / PANEL];
            __m512i limit = _mm512_set1_epi32(scratch->limit[at + r]);
            if (last > earliest)
                for (int c = 0; c < KEYS / PANEL; c++)
                    seen[c] = _mm512_cmple_epi32_mask(_mm512_loadu_si512(scratch->orders + c * PANEL), limit);
            scratch->worth[r] = weigh(scratch->scores[r], scratch->weights[r], last > earliest ? seen : NULL,
                                      problem->factor, &scratch->top[at + r], &scratch->sum[at + r]);
        }
        add_all((const uint16_t(*)[KEYS])scratch->weights, scratch->v, channels, scratch->worth, scratch->acc[at]);
    }
}

// Rows [first, first + count) of a tile; 0, or 2 where a key is nowhere.
static int run_rows(const Problem *problem, const Tile *tile, const int32_t *record, int64_t first, int count,
                    Scratch *scratch) {
    int padded = (count + ROWS - 1) / ROWS * ROWS;
    for (int r = 0; r < padded; r++) {
        // what fills the last group of rows up repeats the last row
        int64_t row = tile->rows[first + (r < count ? r : count - 1)];
        scratch->q[r] = (const uint32_t *)(problem->q + row * problem->q_row + tile->head * problem->q_head);
        scratch->limit[r] = problem->row_order[row];
        scratch->top[r] = -1e30f;
        scratch->sum[r] = 0.0f;
    }
    memset(scratch->acc, 0, sizeof scratch->acc[0] * padded);
    Cursor cursor = {record, 0, 0, 0};
    int found;
    while ((found = gather(problem, tile, &cursor, scratch)) > 0) {
        pack_keys(scratch->key, problem->d, scratch->k);
        pack_values(scratch->value, problem->d, (problem->d + 15) / 16 * 16, scratch->v);
        attend(problem, scratch, padded);
        if (found < KEYS) break;
    }
    for (int r = 0; r < count; r++) {
        int64_t place = tile->rows[first + r] * problem->q_heads + tile->head;
        float sum = scratch->sum[r], share = sum > 0.0f ? 1.0f / sum : 0.0f;
        write_row(scratch->acc[r], share, problem->out + place * problem->d, problem->d);
        problem->lse[place] =
            sum > 0.0f ? (scratch->top[r] * problem->factor + log2f(sum)) * (float)M_LN2 : -INFINITY;
    }
    return found < 0 ? 2 : 0;
}

static int run_tile(const Problem *problem, const int32_t *record, Scratch *scratch) {
    Tile tile = {.sequence = record[0], .head = record[1], .count = record[3], .rows = problem->rows + record[2]};
    tile.kv_head = tile.head / (problem->q_heads / problem->kv_heads);
    tile.begin = problem->key_begin[tile.sequence * problem->kv_heads + tile.kv_head];
    tile.latest = INT_MIN;
    for (int64_t r = 0; r < tile.count; r++) {
        int32_t order = problem->row_order[tile.rows[r]];
        if (order > tile.latest) tile.latest = order;
    }
    int failed = 0;
    for (int64_t first = 0; first < tile.count; first += BATCH) {
        int64_t count = tile.count - first < BATCH ? tile.count - first : BATCH;
        failed |= run_rows(problem, &tile, record, first, (int)count, scratch);
    }
    return failed;
}

// 0, or what went wrong: 1 no memory, 2 a key is nowhere
int tile_attention(const void *q, const void *k, const void *v, void *out, void *lse, const int32_t *tiles,
                   const int32_t *rows, const int32_t *runs, const int32_t *blocks, const int32_t *columns,
                   const int32_t *row_order, const int64_t *key_begin, const int32_t *key_order,
                   const int32_t *key_slot, const int32_t *tables, int64_t count, int64_t q_heads,
                   int64_t kv_heads, int64_t d, int64_t block_size, int64_t places, int64_t storage,
                   int64_t max_pages, int64_t page_size, int64_t q_row, int64_t q_head, int64_t kv_row,
                   int64_t kv_head, float factor, float skip_log2, int threads) {
    Problem problem = {q, k, v, out, lse, tiles, rows, runs, blocks, columns, row_order, key_begin, key_order,
                       key_slot, tables, q_heads, kv_heads, d, block_size, places, storage, max_pages, page_size,
                       q_row, q_head, kv_row, kv_head, factor, skip_log2 / factor};
    int failed = 0;
    #pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Scratch *scratch = aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
        failed = scratch == NULL;
        // the longest tiles come first
        #pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < count; tile++)
            if (scratch != NULL && tiles[tile * FIELDS + 3] > 0)
                failed |= run_tile(&problem, tiles + tile * FIELDS, scratch);
        free(scratch);
    }
    return failed;
}

// Decode attention over KV slots that lie in runs: one query row per sequence and query head.
// See README.md. Knows nothing about pages or tensors.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    TILE = 128,      // slots per step of the online softmax
    PIECE = 512,     // slots per task; fixed, so that threads and neighbours never change a result
    AHEAD = 256,     // slots between what is read and what is prefetched (into the second cache: the first
                     // has too few places for reads under way)
    MAX_GROUP = 16,  // query heads per KV head
    MAX_D = 256,
    BLOCK = 8,       // query heads at a time: their accumulators fit into registers
};

struct Quantized;

typedef struct {
    const char *q, *k, *v;  // rows of d elements, contiguous
    int64_t group, d;       // query heads per KV head, elements of a row
    const int64_t *run_first;
    const int32_t *run_length;
    int64_t num_runs;
    float scale;  // of a raw score, times log2(e)
    int is_bf16;
    const struct Quantized *pages;  // NULL where all slots are floats
} Problem;

typedef struct {
    int64_t head;    // sequence * kv_heads + KV head
    int64_t run;     // where its slots begin: this run ...
    int32_t offset;  // ... and this many slots into it
    int32_t count;
} Piece;

typedef char Queries[][MAX_D * 4];  // of a group, packed

// a piece's result, for the query heads of a group: the output is acc / sum
typedef struct {
    float *top;  // [MAX_GROUP] largest raw score
    float *sum;  // [MAX_GROUP] of 2^((score - top) * scale)
    float *acc;  // [group][padded(d)]
} Partial;

static inline int smaller(int a, int b) { return a < b ? a : b; }

static inline int64_t row_size(const Problem *problem) { return problem->d * (problem->is_bf16 ? 2 : 4); }

static inline int64_t padded(int64_t d) { return (d + 31) / 32 * 32; }

static int64_t partial_floats(const Problem *problem) {
    return 2 * MAX_GROUP + problem->group * padded(problem->d);
}

static Partial partial_at(const Problem *problem, float *scratch, int64_t piece) {
    float *base = scratch + piece * partial_floats(problem);
    return (Partial){base, base + MAX_GROUP, base + 2 * MAX_GROUP};
}

// 2^x for x <= 0, at least 2^-126; NaN stays NaN
static inline float exp2_negative(float x) {
    x = x < -126.0f ? -126.0f : x;
    union { float f; uint32_t u; } rounded = {x + 12582912.0f}, power;
    float y = x - (rounded.f - 12582912.0f);
    float poly = 1.5403530e-4f;
    poly = poly * y + 1.3333558e-3f;
    poly = poly * y + 9.6181291e-3f;
    poly = poly * y + 5.5504109e-2f;
    poly = poly * y + 2.4022651e-1f;
    poly = poly * y + 6.9314718e-1f;
    poly = poly * y + 1.0f;
    power.u = (rounded.u + 127) << 23;
    return poly * power.f;
}

static inline uint16_t narrowed(float x) {
    union { float f; uint32_t u; } bits = {x};
    return x != x ? 0x7fc0 : (uint16_t)((bits.u + 0x7fff + ((bits.u >> 16) & 1)) >> 16);
}

#define INLINE static inline __attribute__((always_inline))

// both define pack_queries and attend_tile
#ifdef __AVX512BF16__
#include "cpu_avx512.h"
#else
#include "cpu_portable.h"
#endif
#include "cpu_quantized.h"

// where a piece's rows begin in K and V, in bytes, and those of AHEAD rows that follow, to be prefetched
static void piece_rows(const Problem *problem, const Piece *piece, int64_t row_bytes, int64_t *rows) {
    int64_t run = piece->run, offset = piece->offset;
    int64_t at = 0, wanted = piece->count;
    while (1) {
        for (; at < wanted && run < problem->num_runs; run++, offset = 0) {
            int64_t left = problem->run_length[run] - offset, take = left < wanted - at ? left : wanted - at;
            int64_t start = (problem->run_first[run] + offset) * row_bytes;
            for (int64_t i = 0; i < take; i++) rows[at + i] = start + i * row_bytes;
            at += take;
            if (take < left) {
                offset += take;
                break;
            }
        }
        if (wanted > piece->count) break;
        // rows are read in eights: repeat the last one
        for (; at % 8; at++) rows[at] = rows[at - 1];
        wanted = at + AHEAD;
    }
    for (; at < wanted; at++) rows[at] = rows[at - 1];
}

// fills `queries`, as attend_tile reads them, and the partial result of no slot
static void begin_piece(const Problem *problem, const Piece *piece, Queries queries, Partial partial) {
    int group = (int)problem->group;
    int64_t row_bytes = row_size(problem);
    const char *q = problem->q + piece->head * group * row_bytes;
    for (int g = 0; g < group; g += BLOCK)
        pack_queries(problem, q + g * row_bytes, smaller(group - g, BLOCK), queries[g]);
    for (int g = 0; g < MAX_GROUP; g++) partial.top[g] = -INFINITY, partial.sum[g] = 0;
    memset(partial.acc, 0, group * padded(problem->d) * sizeof(float));
}

// one step of the online softmax for all queries of a group
static void attend_group(const Problem *problem, Queries queries, const int64_t *rows, int count,
                         Partial partial) {
    int group = (int)problem->group;
    for (int g = 0; g < group; g += BLOCK)
        attend_tile(problem, queries[g], rows, count, smaller(group - g, BLOCK), partial.top + g,
                    partial.sum + g, partial.acc + g * padded(problem->d));
}

static void attend_piece(const Problem *problem, const Piece *piece, Partial partial) {
    int64_t rows[PIECE + AHEAD];
    char queries[MAX_GROUP][MAX_D * 4] __attribute__((aligned(64)));
    piece_rows(problem, piece, row_size(problem), rows);
    begin_piece(problem, piece, queries, partial);
    for (int s = 0; s < piece->count; s += TILE)
        attend_group(problem, queries, rows + s, smaller(piece->count - s, TILE), partial);
}

static void attend_quantized_piece(const Problem *problem, const Piece *piece, Partial partial) {
    int64_t slots[PIECE + AHEAD], rows[TILE + AHEAD] = {0};
    char queries[MAX_GROUP][MAX_D * 4] __attribute__((aligned(64)));
    char k[TILE * MAX_D * 4] __attribute__((aligned(64))), v[TILE * MAX_D * 4] __attribute__((aligned(64)));
    Problem expanded = *problem;
    expanded.k = k, expanded.v = v;
    piece_rows(problem, piece, 1, slots);
    begin_piece(problem, piece, queries, partial);
    for (int s = 0; s < TILE; s++) rows[s] = s * row_size(problem);
    for (int s = 0; s < piece->count; s += TILE) {
        int count = smaller(piece->count - s, TILE);
        expand_tile(problem, slots + s, (count + 7) / 8 * 8, k, v);
        attend_group(&expanded, queries, rows, count, partial);
    }
}

// outputs of one KV head's query heads from its pieces
static void merge_head(const Problem *problem, int64_t head, int64_t first, int64_t last, float *scratch,
                       char *out) {
    int64_t d = problem->d, stride = padded(d), group = problem->group;
    for (int64_t g = 0; g < group; g++) {
        float top = -INFINITY, sum = 0, total[MAX_D] = {0};
        for (int64_t p = first; p < last; p++) {
            float other = partial_at(problem, scratch, p).top[g];
            top = other > top ? other : top;
        }
        for (int64_t p = first; p < last; p++) {
            Partial partial = partial_at(problem, scratch, p);
            float weight = exp2_negative((partial.top[g] - top) * problem->scale);
            sum += weight * partial.sum[g];
            for (int64_t i = 0; i < d; i++) total[i] += weight * partial.acc[g * stride + i];
        }
        int64_t at = (head * group + g) * d;
        for (int64_t i = 0; i < d; i++) {
            if (problem->is_bf16)
                ((uint16_t *)out)[at + i] = narrowed(total[i] / sum);
            else
                ((float *)out)[at + i] = total[i] / sum;
        }
    }
}

// pieces of every head, in order; `first` [heads + 1] gets where each head's pieces begin
static void cut_pieces(const Problem *problem, int64_t heads, const int64_t *run_begin, Piece *pieces,
                       int64_t *first) {
    int64_t made = 0;
    for (int64_t head = 0; head < heads; head++) {
        first[head] = made;
        int32_t room = 0;
        for (int64_t run = run_begin[head]; run < run_begin[head + 1]; run++) {
            int32_t length = problem->run_length[run], offset = 0;
            while (offset < length) {
                if (room == 0) {
                    pieces[made++] = (Piece){head, run, offset, 0};
                    room = PIECE;
                }
                int32_t take = length - offset < room ? length - offset : room;
                pieces[made - 1].count += take;
                offset += take, room -= take;
            }
        }
    }
    first[heads] = made;
}

// how many pieces there are; -1 when a run leaves the arrays or a head has no slot
static int64_t count_pieces(const Problem *problem, int64_t heads, int64_t slots, const int64_t *run_begin) {
    int64_t pieces = 0;
    for (int64_t head = 0; head < heads; head++) {
        int64_t length = 0;
        for (int64_t run = run_begin[head]; run < run_begin[head + 1]; run++) {
            int64_t start = problem->run_first[run], count = problem->run_length[run];
            if (start < 0 || count < 0 || start > slots - count) return -1;
            length += count;
        }
        if (length == 0) return -1;
        pieces += (length + PIECE - 1) / PIECE;
    }
    return pieces;
}

// 0, or 1: out of memory, 2: a run leaves the arrays or a head has no slot
static int decode(const Problem *problem, int64_t heads, int64_t slots, const int64_t *run_begin, void *out,
                  int threads) {
    int64_t num_pieces = count_pieces(problem, heads, slots, run_begin);
    if (num_pieces < 0) return 2;
    Piece *pieces = malloc(num_pieces * sizeof(Piece));
    int64_t *first = malloc((heads + 1) * sizeof(int64_t));
    float *scratch = aligned_alloc(64, num_pieces * partial_floats(problem) * sizeof(float));
    if (pieces && first && scratch) {
        cut_pieces(problem, heads, run_begin, pieces, first);
        #pragma omp parallel num_threads(threads) if (threads > 1 && num_pieces > 1)
        {
            // several in a row, because the end of one prefetches the next
            #pragma omp for schedule(dynamic, 1 + num_pieces / (8 * threads))
            for (int64_t p = 0; p < num_pieces; p++) {
                Partial partial = partial_at(problem, scratch, p);
                if (problem->pages)
                    attend_quantized_piece(problem, &pieces[p], partial);
                else
                    attend_piece(problem, &pieces[p], partial);
            }
            #pragma omp for schedule(static)
            for (int64_t head = 0; head < heads; head++)
                merge_head(problem, head, first[head], first[head + 1], scratch, out);
        }
    }
    int failed = !(pieces && first && scratch);
    free(pieces), free(first), free(scratch);
    return failed;
}

int paged_decode(const void *q, const void *k, const void *v, const int64_t *run_first,
                 const int32_t *run_length, const int64_t *run_begin, void *out, int64_t batch,
                 int64_t q_heads, int64_t kv_heads, int64_t d, int64_t slots, float scale, int is_bf16,
                 int threads) {
    int64_t heads = batch * kv_heads;
    Problem problem = {
        .q = q, .k = k, .v = v, .group = q_heads / kv_heads, .d = d, .is_bf16 = is_bf16,
        .run_first = run_first, .run_length = run_length, .num_runs = run_begin[heads],
        .scale = scale * 1.44269504f,
    };
    return decode(&problem, heads, slots, run_begin, out, threads);
}

// The same where `slots` of the newest pages, in k and v, follow those of quantized pages.
int paged_decode_quantized(const void *q, const void *k, const void *v, const int64_t *run_first,
                           const int32_t *run_length, const int64_t *run_begin, void *out,
                           const void *k_pages, const void *v_pages, const void *k_scale,
                           const void *k_zero, const void *v_scale, const void *v_zero, int64_t batch,
                           int64_t q_heads, int64_t kv_heads, int64_t d, int64_t slots,
                           int64_t quantized_slots, int64_t page_size, float scale, int is_bf16,
                           int threads, int kind) {
    int64_t heads = batch * kv_heads;
    Quantized pages = {
        .k = k_pages, .v = v_pages, .k_scale = k_scale, .k_zero = k_zero, .v_scale = v_scale,
        .v_zero = v_zero, .slots = quantized_slots, .page_size = page_size, .kind = kind,
    };
    Problem problem = {
        .q = q, .k = k, .v = v, .group = q_heads / kv_heads, .d = d, .is_bf16 = is_bf16,
        .run_first = run_first, .run_length = run_length, .num_runs = run_begin[heads],
        .scale = scale * 1.44269504f, .pages = &pages,
    };
    return decode(&problem, heads, quantized_slots + slots, run_begin, out, threads);
}

// Attention of many bf16 rows over KV slots that lie in runs, with AVX512-BF16 products.
// See README.md. Knows nothing about pages or tensors.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __AVX512BF16__
#error this CPU has no AVX512-BF16
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    ROWS = 6,      // rows at a time: with 4 registers of keys or channels each, all sums stay in registers
    TILE = 96,     // rows that read the keys together
    KEYS = 256,    // keys per step of the online softmax
    PANEL = 16,    // keys of one register
    MAX_D = 256,
    GROUPS = TILE / ROWS,
};

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

// raw scores of ROWS rows against 64 keys
INLINE void score(const uint32_t *const *q, const uint32_t *k, int64_t pairs, float (*scores)[KEYS]) {
    __m512 acc[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512bh key[4];
        #pragma GCC unroll 4
        for (int c = 0; c < 4; c++) key[c] = (__m512bh)_mm512_loadu_si512(k + (c * pairs + pair) * PANEL);
        #pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            __m512bh each = (__m512bh)_mm512_set1_epi32(q[r][pair]);
            #pragma GCC unroll 4
            for (int c = 0; c < 4; c++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], each, key[c]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(scores[r] + c * PANEL, acc[r][c]);
}

// 2^x for x <= 0, at least 2^-126; NaN stays NaN; relative error 1e-4, below the rounding of a weight
INLINE __m512 exp2_16(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    __m512 rounded = _mm512_add_ps(x, magic);
    __m512 y = _mm512_sub_ps(x, _mm512_sub_ps(rounded, magic));
    __m512 poly = _mm512_fmadd_ps(_mm512_set1_ps(0.0555041f), y, _mm512_set1_ps(0.2402265f));
    poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(6.9314718e-1f));
    poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(1.0f));
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(poly), exponent));
}

// one row's scores become weights, of which `visible` count; returns what earlier sums are worth now
INLINE float weigh(float *scores, uint16_t *weights, int64_t visible, float factor, float *top, float *sum) {
    __mmask16 seen[KEYS / PANEL];
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 most = _mm512_set1_ps(*top), x[KEYS / PANEL];
    #pragma GCC unroll 16
    for (int c = 0; c < KEYS / PANEL; c++) {
        x[c] = _mm512_loadu_ps(scores + c * PANEL);
        if (visible < KEYS) {
            seen[c] = _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32((int)visible - c * PANEL));
            x[c] = _mm512_mask_blend_ps(seen[c], _mm512_set1_ps(-1e30f), x[c]);
        }
        most = _mm512_max_ps(most, x[c]);
    }
    float highest = _mm512_reduce_max_ps(most);
    __m512 shift = _mm512_set1_ps(highest), scale = _mm512_set1_ps(factor), total = _mm512_setzero_ps();
    #pragma GCC unroll 4
    for (int c = 0; c < KEYS / PANEL; c += 2) {
        __m512 a = exp2_16(_mm512_mul_ps(_mm512_sub_ps(x[c], shift), scale));
        __m512 b = exp2_16(_mm512_mul_ps(_mm512_sub_ps(x[c + 1], shift), scale));
        if (visible < KEYS) {  // exp2_16 never gives 0
            a = _mm512_maskz_mov_ps(seen[c], a);
            b = _mm512_maskz_mov_ps(seen[c + 1], b);
        }
        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
        _mm512_storeu_si512(weights + c * PANEL, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    float worth = _mm512_cvtss_f32(exp2_16(_mm512_set1_ps((*top - highest) * factor)));
    *sum = *sum * worth + _mm512_reduce_add_ps(total);
    *top = highest;
    return worth;
}

// acc = acc * worth + weights @ V for ROWS rows and `count` registers of channels
INLINE void add(const uint16_t (*weights)[KEYS], const uint32_t *v, int64_t channels, const float *worth,
                float *acc, int count) {
    __m512 sums[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < count; c++)
            sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * MAX_D + c * 16), _mm512_set1_ps(worth[r]));
    for (int pair = 0; pair < KEYS / 2; pair++) {
        __m512bh value[4];
        #pragma GCC unroll 4
        for (int c = 0; c < count; c++) value[c] = (__m512bh)_mm512_loadu_si512(v + pair * channels + c * 16);
        #pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int32_t both;
            memcpy(&both, weights[r] + 2 * pair, 4);
            __m512bh each = (__m512bh)_mm512_set1_epi32(both);
            #pragma GCC unroll 4
            for (int c = 0; c < count; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], each, value[c]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < count; c++) _mm512_storeu_ps(acc + r * MAX_D + c * 16, sums[r][c]);
}

static void add_all(const uint16_t (*weights)[KEYS], const uint32_t *v, int64_t channels, const float *worth,
                    float *acc) {
    for (int64_t at = 0; at < channels; at += 64) {
        int64_t registers = (channels - at) / 16;
        if (registers >= 4) add(weights, v + at, channels, worth, acc + at, 4);
        else if (registers == 3) add(weights, v + at, channels, worth, acc + at, 3);
        else if (registers == 2) add(weights, v + at, channels, worth, acc + at, 2);
        else add(weights, v + at, channels, worth, acc + at, 1);
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
            for (int r = 0; r < ROWS; r++)
                scratch->worth[r] = weigh(scratch->scores[r], scratch->weights[r], scratch->limit[at + r] - key,
                                          problem->factor, &scratch->top[at + r], &scratch->sum[at + r]);
            add_all((const uint16_t(*)[KEYS])scratch->weights, packed->v + key / 2 * channels, channels,
                    scratch->worth, scratch->acc[at]);
        }
    }
    for (int r = 0; r < count; r++) {
        int64_t row = first + r, position = row / group;
        int64_t place = (batch * problem->rows + position) * problem->q_heads + base + row % group;
        __m512 share = _mm512_set1_ps(1.0f / scratch->sum[r]);
        for (int64_t at = 0; at < d; at += 16) {
            __mmask16 mask = d - at < 16 ? (1u << (d - at)) - 1 : 0xffff;
            __m256bh narrow = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(scratch->acc[r] + at), share));
            _mm256_mask_storeu_epi16(problem->out + place * d + at, mask, (__m256i)narrow);
        }
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

// Tiles of decode attention with AVX512-BF16, for cpu.c: up to 8 query heads against up to TILE slots.

#include <immintrin.h>

// acc += a * b in each 32-bit element: one float, or a pair of bf16
INLINE __m512 dot(__m512 acc, __m512i a, __m512i b, int is_bf16) {
    return is_bf16 ? _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b)
                   : _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
}

// sums of the four 128-bit lanes of a, b, c and d
INLINE __m512 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    a = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    c = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd));
}

// raw scores of 8 slots. Elements of a lane belong to four queries, and each lane to other columns: so a
// key's element is repeated within its lane only, which is free beside the products. Loads of it are not.
INLINE void score_8(const char *queries, const char *k, const int64_t *rows, int64_t row_bytes,
                    float (*scores)[BLOCK], int quads, int is_bf16) {
    __m512 acc[8][2];
    for (int s = 0; s < 8; s++) acc[s][0] = acc[s][1] = _mm512_setzero_ps();
    for (int64_t at = 0; at < row_bytes; at += 64) {
        __mmask64 mask = row_bytes - at < 64 ? (1ull << (row_bytes - at)) - 1 : ~0ull;
        const __m512i *query = (const __m512i *)(queries + at * BLOCK);
        #pragma GCC unroll 8
        for (int s = 0; s < 8; s++) {
            __m512i row = _mm512_maskz_loadu_epi8(mask, k + rows[s] + at);
            __builtin_prefetch(k + rows[s + AHEAD] + at, 0, 2);
            __m512i each[4] = {_mm512_shuffle_epi32(row, 0x00), _mm512_shuffle_epi32(row, 0x55),
                               _mm512_shuffle_epi32(row, 0xaa), _mm512_shuffle_epi32(row, 0xff)};
            #pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                for (int u = 0; u < quads; u++)
                    acc[s][u] = dot(acc[s][u], each[j], query[2 * j + u], is_bf16);
        }
    }
    for (int s = 0; s < 8; s += 2)
        _mm512_store_ps(scores[s], sum_lanes(acc[s][0], acc[s][1], acc[s + 1][0], acc[s + 1][1]));
}

// exp2_negative of 16
INLINE __m512 exp2_16(__m512 x, int is_bf16) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    __m512 rounded = _mm512_add_ps(x, magic);
    __m512 y = _mm512_sub_ps(x, _mm512_sub_ps(rounded, magic));
    __m512 poly;
    if (is_bf16) {  // relative error 1e-4, far below a weight's rounding
        poly = _mm512_fmadd_ps(_mm512_set1_ps(0.0555041f), y, _mm512_set1_ps(0.2402265f));
    } else {
        poly = _mm512_fmadd_ps(_mm512_set1_ps(1.5403530e-4f), y, _mm512_set1_ps(1.3333558e-3f));
        poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(9.6181291e-3f));
        poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(5.5504109e-2f));
        poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(2.4022651e-1f));
    }
    poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(6.9314718e-1f));
    poly = _mm512_fmadd_ps(poly, y, _mm512_set1_ps(1.0f));
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(poly), exponent));
}

// both halves of the result hold op(low half, high half)
#define ACROSS(op, x) op(x, _mm512_shuffle_f32x4(x, x, 0x4e))

// scores become weights in place: floats, or pairs of bf16 (two slots) for each query
INLINE void softmax(float (*scores)[BLOCK], int count, float scale, float *top, float *sum, float *decay,
                    int is_bf16) {
    const __m512i pairs = _mm512_set_epi16(31, 23, 30, 22, 29, 21, 28, 20, 27, 19, 26, 18, 25, 17, 24, 16,  //
                                           15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    __m512 old = _mm512_broadcast_f32x8(_mm256_load_ps(top)), tops = old;
    for (int s = 0; s < count; s += 2) tops = _mm512_max_ps(tops, _mm512_load_ps(scores[s]));
    tops = ACROSS(_mm512_max_ps, tops);
    __m512 factor = _mm512_set1_ps(scale), sums = _mm512_setzero_ps();
    for (int s = 0; s < count; s += 4) {
        __m512 x = _mm512_sub_ps(_mm512_load_ps(scores[s]), tops);
        __m512 y = _mm512_sub_ps(_mm512_load_ps(scores[s + 2]), tops);
        x = exp2_16(_mm512_mul_ps(x, factor), is_bf16);
        y = exp2_16(_mm512_mul_ps(y, factor), is_bf16);
        sums = _mm512_add_ps(sums, _mm512_add_ps(x, y));
        if (is_bf16) {
            __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh(y, x);
            _mm512_store_si512((char *)scores + 16 * s, _mm512_permutexvar_epi16(pairs, narrow));
        } else {
            _mm512_store_ps(scores[s], x);
            _mm512_store_ps(scores[s + 2], y);
        }
    }
    __m512 worth = exp2_16(_mm512_mul_ps(_mm512_sub_ps(old, tops), factor), 0);
    sums = ACROSS(_mm512_add_ps, sums);
    sums = _mm512_fmadd_ps(_mm512_broadcast_f32x8(_mm256_load_ps(sum)), worth, sums);
    _mm256_store_ps(sum, _mm512_castps512_ps256(sums));
    _mm256_store_ps(top, _mm512_castps512_ps256(tops));
    _mm256_store_ps(decay, _mm512_castps512_ps256(worth));
}

// acc [heads][stride] = acc * decay + weights @ V of an even number of slots; 32 columns, bf16
INLINE void add_bf16(const char *weights, const char *v, const int64_t *rows, int count, __mmask32 mask,
                     float *acc, int64_t stride, const float *decay, int heads) {
    // unpacking two rows leaves these columns in a register, and this brings them back
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 sums[BLOCK][2];
    for (int g = 0; g < heads; g++) {
        __m512 a = _mm512_load_ps(acc + g * stride), b = _mm512_load_ps(acc + g * stride + 16);
        __m512 factor = _mm512_set1_ps(decay[g]);
        sums[g][0] = _mm512_mul_ps(_mm512_permutex2var_ps(a, low, b), factor);
        sums[g][1] = _mm512_mul_ps(_mm512_permutex2var_ps(a, high, b), factor);
    }
    for (int s = 0; s < count; s += 2) {
        __m512i one = _mm512_maskz_loadu_epi16(mask, v + rows[s]);
        __m512i other = _mm512_maskz_loadu_epi16(mask, v + rows[s + 1]);
        __builtin_prefetch(v + rows[s + AHEAD], 0, 2);
        __builtin_prefetch(v + rows[s + AHEAD + 1], 0, 2);
        __m512i a = _mm512_unpacklo_epi16(one, other), b = _mm512_unpackhi_epi16(one, other);
        #pragma GCC unroll 8
        for (int g = 0; g < heads; g++) {
            int32_t pair;
            memcpy(&pair, weights + 16 * s + 4 * g, 4);
            sums[g][0] = dot(sums[g][0], a, _mm512_set1_epi32(pair), 1);
            sums[g][1] = dot(sums[g][1], b, _mm512_set1_epi32(pair), 1);
        }
    }
    for (int g = 0; g < heads; g++) {
        _mm512_store_ps(acc + g * stride, _mm512_permutex2var_ps(sums[g][0], first, sums[g][1]));
        _mm512_store_ps(acc + g * stride + 16, _mm512_permutex2var_ps(sums[g][0], second, sums[g][1]));
    }
}

// the same for 16 columns, fp32
INLINE void add_fp32(const char *weights, const char *v, const int64_t *rows, int count, __mmask16 mask,
                     float *acc, int64_t stride, const float *decay, int heads) {
    __m512 sums[BLOCK];
    for (int g = 0; g < heads; g++)
        sums[g] = _mm512_mul_ps(_mm512_load_ps(acc + g * stride), _mm512_set1_ps(decay[g]));
    for (int s = 0; s < count; s++) {
        __m512 row = _mm512_maskz_loadu_ps(mask, v + rows[s]);
        __builtin_prefetch(v + rows[s + AHEAD], 0, 2);
        #pragma GCC unroll 8
        for (int g = 0; g < heads; g++)
            sums[g] = _mm512_fmadd_ps(row, _mm512_set1_ps(((const float *)weights)[s * BLOCK + g]), sums[g]);
    }
    for (int g = 0; g < heads; g++) _mm512_store_ps(acc + g * stride, sums[g]);
}

// `call` with H, a constant, for the number of heads: so the accumulators stay in registers
#define WITH_HEADS(heads, call)                   \
    switch (heads) {                              \
        case 1: { enum { H = 1 }; call; break; }  \
        case 2: { enum { H = 2 }; call; break; }  \
        case 3: { enum { H = 3 }; call; break; }  \
        case 4: { enum { H = 4 }; call; break; }  \
        case 5: { enum { H = 5 }; call; break; }  \
        case 6: { enum { H = 6 }; call; break; }  \
        case 7: { enum { H = 7 }; call; break; }  \
        default: { enum { H = 8 }; call; break; } \
    }

// 32-bit elements of up to 8 queries, as score_8 reads them:
// [64 bytes of a row][element of a lane][four queries][lane][query]
static void pack_queries(const Problem *problem, const char *q, int heads, char *queries) {
    int64_t row_bytes = row_size(problem);
    memset(queries, 0, (row_bytes + 63) / 64 * 64 * BLOCK);
    for (int g = 0; g < heads; g++)
        for (int64_t i = 0; i < row_bytes / 4; i++) {
            int64_t vector = i / 16 * 8 + i % 4 * 2 + g / 4;
            memcpy(queries + 64 * vector + 16 * (i / 4 % 4) + 4 * (g % 4), q + g * row_bytes + 4 * i, 4);
        }
}

INLINE void tile(const Problem *problem, const char *queries, const int64_t *rows, int count, int heads,
                 float *top, float *sum, float *acc, int is_bf16) {
    float scores[TILE][BLOCK] __attribute__((aligned(64))), decay[BLOCK] __attribute__((aligned(64)));
    const char *weights = (const char *)scores;
    int64_t row_bytes = row_size(problem), stride = padded(problem->d);
    for (int s = 0; s < count; s += 8) {
        if (heads > 4)
            score_8(queries, problem->k, rows + s, row_bytes, scores + s, 2, is_bf16);
        else
            score_8(queries, problem->k, rows + s, row_bytes, scores + s, 1, is_bf16);
    }
    int whole = (count + 3) / 4 * 4;
    // slots that are not there
    for (int s = count; s < whole; s++) _mm256_store_ps(scores[s], _mm256_set1_ps(-INFINITY));
    softmax(scores, whole, problem->scale, top, sum, decay, is_bf16);
    for (int64_t at = 0; at < row_bytes; at += 64) {
        const char *v = problem->v + at;
        int64_t left = row_bytes - at;
        if (is_bf16) {
            __mmask32 mask = left < 64 ? (1u << left / 2) - 1 : ~0u;
            WITH_HEADS(heads, add_bf16(weights, v, rows, whole, mask, acc + at / 2, stride, decay, H))
        } else {
            __mmask16 mask = left < 64 ? (1u << left / 4) - 1 : ~0u;
            WITH_HEADS(heads, add_fp32(weights, v, rows, whole, mask, acc + at / 4, stride, decay, H))
        }
    }
}

// one step of the online softmax for up to BLOCK queries
static void attend_tile(const Problem *problem, const char *queries, const int64_t *rows, int count,
                        int heads, float *top, float *sum, float *acc) {
    if (problem->is_bf16)
        tile(problem, queries, rows, count, heads, top, sum, acc, 1);
    else
        tile(problem, queries, rows, count, heads, top, sum, acc, 0);
}

// Products and one step of the online softmax, for attention of bf16 rows with AVX512-BF16: ROWS rows against
// KEYS keys that are packed. Knows nothing about where keys lie or which of them count.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#ifndef __AVX512BF16__
#error this CPU has no AVX512-BF16
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    ROWS = 6,      // rows at a time: with 4 registers of keys or channels each, all sums stay in registers
    KEYS = 256,    // keys per step of the online softmax
    PANEL = 16,    // keys of one register
    MAX_D = 256,
};

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

// one row's scores become weights; of the keys only those in `seen` count, all where it is NULL; returns what
// earlier sums are worth now
INLINE float weigh(const float *scores, uint16_t *weights, const __mmask16 *seen, float factor, float *top,
                   float *sum) {
    __m512 most = _mm512_set1_ps(*top), x[KEYS / PANEL];
    #pragma GCC unroll 16
    for (int c = 0; c < KEYS / PANEL; c++) {
        x[c] = _mm512_loadu_ps(scores + c * PANEL);
        if (seen != NULL) x[c] = _mm512_mask_blend_ps(seen[c], _mm512_set1_ps(-1e30f), x[c]);
        most = _mm512_max_ps(most, x[c]);
    }
    float highest = _mm512_reduce_max_ps(most);
    __m512 shift = _mm512_set1_ps(highest), scale = _mm512_set1_ps(factor), total = _mm512_setzero_ps();
    #pragma GCC unroll 4
    for (int c = 0; c < KEYS / PANEL; c += 2) {
        __m512 a = exp2_16(_mm512_mul_ps(_mm512_sub_ps(x[c], shift), scale));
        __m512 b = exp2_16(_mm512_mul_ps(_mm512_sub_ps(x[c + 1], shift), scale));
        if (seen != NULL) {  // exp2_16 never gives 0
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

// which of the next KEYS keys are among the first `visible`
INLINE void mark_first(int64_t visible, __mmask16 *seen) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int c = 0; c < KEYS / PANEL; c++)
        seen[c] = _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32((int)visible - c * PANEL));
}

// one row of the result: sums over their weights, as bf16
INLINE void write_row(const float *acc, float share, uint16_t *out, int64_t d) {
    for (int64_t at = 0; at < d; at += 16) {
        __mmask16 mask = d - at < 16 ? (1u << (d - at)) - 1 : 0xffff;
        __m512 shared = _mm512_mul_ps(_mm512_loadu_ps(acc + at), _mm512_set1_ps(share));
        _mm256_mask_storeu_epi16(out + at, mask, (__m256i)_mm512_cvtneps_pbh(shared));
    }
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

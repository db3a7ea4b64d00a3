// Quantizes pages of keys and values, scales of keys by channel or by slot. See README.md.
// The numbers are those of naive.py, bit for bit: so no product and sum may become one operation.

#pragma GCC optimize("fp-contract=off")
#pragma STDC FP_CONTRACT OFF

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { INT8, INT4, FP8, MAX_D = 256 };

INLINE float widened(uint16_t x) {
    union { uint32_t u; float f; } bits = {(uint32_t)x << 16};
    return bits.f;
}

INLINE void load_row(const char *rows, int64_t row, int64_t d, int is_bf16, float *out) {
    if (is_bf16) {
        const uint16_t *narrow = (const uint16_t *)rows + row * d;
        for (int64_t c = 0; c < d; c++) out[c] = widened(narrow[c]);
    } else {
        memcpy(out, (const float *)rows + row * d, d * sizeof(float));
    }
}

// to e4m3, the nearest or the even one; |x| is at most 448
INLINE uint8_t to_fp8(float x) {
    union { float f; uint32_t u; } bits = {x}, small;
    uint32_t magnitude = bits.u & 0x7fffffff, sign = bits.u >> 24 & 0x80;
    // below 2^-6 all numbers are multiples of 2^-9: added to one whose last bit is that, they are rounded
    small.u = magnitude;
    small.f += 16384.0f;
    uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return sign | (magnitude < 0x3c800000 ? small.u - 0x46800000 : normal);
}

INLINE float between(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

INLINE uint8_t number(float x, float zero, float step, int kind) {
    float scaled = (x - zero) * step;
    if (kind == FP8) return to_fp8(between(scaled, -448.0f, 448.0f));
    if (kind == INT8) return (uint8_t)(int32_t)between(floorf(scaled + 0.5f), -127.0f, 127.0f);
    return (uint8_t)(int32_t)between(floorf(scaled + 0.5f), 0.0f, 15.0f);
}

// as they are stored, and what one step of the numbers is then
INLINE float settle(float low, float high, int kind, _Float16 *scale, _Float16 *zero) {
    if (kind == INT4) {
        *scale = (_Float16)((high - low) / 15.0f);
        *zero = (_Float16)low;
    } else {
        *scale = (_Float16)(fmaxf(high, -low) / (kind == INT8 ? 127.0f : 448.0f));
        *zero = 0;
    }
    return *scale > 0 ? 1.0f / (float)*scale : 0.0f;
}

INLINE void store_row(const float *x, int64_t d, const float *zero, const float *step, uint8_t *out,
                      int kind) {
    uint8_t numbers[MAX_D];
    for (int64_t c = 0; c < d; c++) numbers[c] = number(x[c], zero[c], step[c], kind);
    if (kind != INT4) {
        memcpy(out, numbers, d);
        return;
    }
    for (int64_t c = 0; c < d / 2; c++) out[c] = numbers[c] | numbers[c + d / 2] << 4;
}

// one page of rows [count][d], with a scale and a zero for each channel
INLINE void store_channels(const char *x, int64_t first, int64_t count, int64_t d, int is_bf16,
                           uint8_t *out, _Float16 *scales, _Float16 *zeros, int kind) {
    float row[MAX_D], low[MAX_D], high[MAX_D], zero[MAX_D], step[MAX_D];
    int64_t stored = kind == INT4 ? d / 2 : d;
    load_row(x, first, d, is_bf16, low);
    memcpy(high, low, d * sizeof(float));
    for (int64_t s = 1; s < count; s++) {
        load_row(x, first + s, d, is_bf16, row);
        for (int64_t c = 0; c < d; c++) {
            low[c] = row[c] < low[c] ? row[c] : low[c];
            high[c] = row[c] > high[c] ? row[c] : high[c];
        }
    }
    for (int64_t c = 0; c < d; c++) {
        _Float16 as_stored;
        step[c] = settle(low[c], high[c], kind, &scales[c], &as_stored);
        zero[c] = (float)as_stored;
        if (zeros) zeros[c] = as_stored;
    }
    for (int64_t s = 0; s < count; s++) {
        load_row(x, first + s, d, is_bf16, row);
        store_row(row, d, zero, step, out + s * stored, kind);
    }
}

// one page of rows [count][d], with a scale and a zero for each row
INLINE void store_slots(const char *x, int64_t first, int64_t count, int64_t d, int is_bf16,
                        uint8_t *out, _Float16 *scales, _Float16 *zeros, int kind) {
    float row[MAX_D], zero[MAX_D], step[MAX_D];
    int64_t stored = kind == INT4 ? d / 2 : d;
    for (int64_t s = 0; s < count; s++) {
        load_row(x, first + s, d, is_bf16, row);
        float low = row[0], high = row[0];
        for (int64_t c = 1; c < d; c++) {
            low = row[c] < low ? row[c] : low;
            high = row[c] > high ? row[c] : high;
        }
        _Float16 as_stored;
        float one = settle(low, high, kind, &scales[s], &as_stored);
        if (zeros) zeros[s] = as_stored;
        for (int64_t c = 0; c < d; c++) zero[c] = (float)as_stored, step[c] = one;
        store_row(row, d, zero, step, out + s * stored, kind);
    }
}

#define WITH_KIND(call)                                                                             \
    if (kind == INT8) { enum { K = INT8 }; call; }                                                  \
    else if (kind == INT4) { enum { K = INT4 }; call; }                                             \
    else { enum { K = FP8 }; call; }

// pages x [n][page_size][d] of floats or bf16, of which the first counts[i] rows are there, into page ids[i]
int store_pages(const void *x, const int32_t *ids, const int32_t *counts, void *pages, void *scales,
                void *zeros, int64_t n, int64_t page_size, int64_t d, int kind, int is_bf16,
                int is_by_channel, int threads) {
    int64_t stored = kind == INT4 ? d / 2 : d, groups = is_by_channel ? d : page_size;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) {
        int64_t page = ids[i], first = i * page_size, count = counts[i];
        if (count == 0) continue;
        uint8_t *out = (uint8_t *)pages + page * page_size * stored;
        _Float16 *scale = (_Float16 *)scales + page * groups;
        _Float16 *zero = zeros ? (_Float16 *)zeros + page * groups : 0;
        if (is_by_channel) {
            WITH_KIND(store_channels(x, first, count, d, is_bf16, out, scale, zero, K))
        } else {
            WITH_KIND(store_slots(x, first, count, d, is_bf16, out, scale, zero, K))
        }
    }
    return 0;
}

// Tiles of decode attention over quantized pages, for cpu.c: rows are expanded to the type of the queries, a
// tile at a time, so that they stay in the caches, and attended to as any others.

enum { INT8, INT4, FP8, HALF_D = MAX_D / 2 };

// Slots from `slots` on are those of the newest pages, which are floats: rows of the problem's k and v.
typedef struct Quantized {
    const uint8_t *k, *v;
    const uint16_t *k_scale, *k_zero;  // fp16, by page and channel; only int4 has zeros
    const uint16_t *v_scale, *v_zero;  // fp16, by slot
    int64_t slots, page_size;
    int kind;
} Quantized;

// of a page's keys, each half of the channels aligned
typedef struct {
    float scale[2][HALF_D], zero[2][HALF_D];
} Channels;

// fp8 is read as fp16, whose exponents are larger by 8
static inline float kind_factor(int kind) { return kind == FP8 ? 256.0f : 1.0f; }

#ifdef __AVX512BF16__

INLINE void read_halves(const uint16_t *halves, int64_t count, float factor, float *out) {
    for (int64_t c = 0; c < count; c += 16) {
        __mmask16 mask = count - c < 16 ? (1u << (count - c)) - 1 : 0xffff;
        __m512 x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves + c));
        _mm512_store_ps(out + c, _mm512_mul_ps(x, _mm512_set1_ps(factor)));
    }
}

INLINE float half_float(uint16_t x) { return _cvtsh_ss(x); }

// 16 numbers of a row as floats; int4 lies in the low or in the high halves of its bytes
INLINE __m512 numbers_16(const uint8_t *bytes, __mmask16 mask, int is_high, int kind) {
    __m128i raw = mask == 0xffff ? _mm_loadu_si128((const __m128i *)bytes) : _mm_maskz_loadu_epi8(mask, bytes);
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
    if (kind == INT4) {
        __m512i wide = _mm512_cvtepu8_epi32(raw);
        wide = is_high ? _mm512_srli_epi32(wide, 4) : _mm512_and_epi32(wide, _mm512_set1_epi32(15));
        return _mm512_cvtepi32_ps(wide);
    }
    __m256i wide = _mm256_cvtepu8_epi16(raw);
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
}

// scale * n + zero of 16 channels; each is of its own channel, or the same for all
INLINE __m512 expand_16(const uint8_t *bytes, __mmask16 mask, int is_high, const float *scale,
                        const float *zero, int is_by_channel, int kind) {
    __m512 n = numbers_16(bytes, mask, is_high, kind);
    __m512 factor = is_by_channel ? _mm512_load_ps(scale) : _mm512_set1_ps(*scale);
    if (kind != INT4) return _mm512_mul_ps(n, factor);
    return _mm512_fmadd_ps(n, factor, is_by_channel ? _mm512_load_ps(zero) : _mm512_set1_ps(*zero));
}

// the same of half of a row's channels
INLINE void expand_half(const uint8_t *bytes, int64_t count, int is_high, const float *scale,
                        const float *zero, int is_by_channel, char *out, int kind, int is_bf16) {
    int64_t step = is_by_channel ? 16 : 0, c = 0;
    for (; is_bf16 && c + 32 <= count; c += 32, scale += 2 * step, zero += 2 * step) {
        __m512 first = expand_16(bytes + c, 0xffff, is_high, scale, zero, is_by_channel, kind);
        __m512 second = expand_16(bytes + c + 16, 0xffff, is_high, scale + step, zero + step, is_by_channel, kind);
        _mm512_storeu_si512(out + 2 * c, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    for (; c < count; c += 16, scale += step, zero += step) {
        __mmask16 mask = count - c < 16 ? (1u << (count - c)) - 1 : 0xffff;
        __m512 n = expand_16(bytes + c, mask, is_high, scale, zero, is_by_channel, kind);
        if (is_bf16)
            _mm256_mask_storeu_epi16(out + 2 * c, mask, (__m256i)_mm512_cvtneps_pbh(n));
        else
            _mm512_mask_storeu_ps(out + 4 * c, mask, n);
    }
}

#else

static inline float half_float(uint16_t x) {
    union { uint32_t u; float f; } bits = {(uint32_t)(x & 0x7fff) << 13};
    float value = bits.f * 0x1p112f;
    return x & 0x8000 ? -value : value;
}

INLINE void read_halves(const uint16_t *halves, int64_t count, float factor, float *out) {
    for (int64_t c = 0; c < count; c++) out[c] = half_float(halves[c]) * factor;
}

INLINE void expand_half(const uint8_t *bytes, int64_t count, int is_high, const float *scale,
                        const float *zero, int is_by_channel, char *out, int kind, int is_bf16) {
    for (int64_t c = 0; c < count; c++) {
        float n;
        if (kind == INT8)
            n = (int8_t)bytes[c];
        else if (kind == INT4)
            n = is_high ? bytes[c] >> 4 : bytes[c] & 15;
        else
            n = half_float((bytes[c] & 0x80) << 8 | (bytes[c] & 0x7f) << 7);
        n = n * scale[is_by_channel ? c : 0] + zero[is_by_channel ? c : 0];
        if (is_bf16)
            ((uint16_t *)out)[c] = narrowed(n);
        else
            ((float *)out)[c] = n;
    }
}

#endif

static void read_channels(const Quantized *pages, int64_t page, int64_t half, Channels *channels) {
    for (int high = 0; high < 2; high++) {
        int64_t at = (2 * page + high) * half;
        read_halves(pages->k_scale + at, half, kind_factor(pages->kind), channels->scale[high]);
        if (pages->kind == INT4) read_halves(pages->k_zero + at, half, 1.0f, channels->zero[high]);
    }
}

// K and V of so many slots, row after row
INLINE void expand_rows(const Problem *problem, const int64_t *slots, int count, char *k, char *v, int64_t half,
                        int kind, int is_bf16) {
    const Quantized *pages = problem->pages;
    int64_t row_bytes = half * (is_bf16 ? 4 : 8), stored = kind == INT4 ? half : 2 * half;
    int64_t begin = 0, end = 0;  // slots of the page whose channels were read last
    Channels channels __attribute__((aligned(64))) = {0};
    for (int s = 0; s < count; s++, k += row_bytes, v += row_bytes) {
        int64_t slot = slots[s], ahead = slots[s + AHEAD];
        if (slot >= pages->slots) {
            memcpy(k, problem->k + (slot - pages->slots) * row_bytes, row_bytes);
            memcpy(v, problem->v + (slot - pages->slots) * row_bytes, row_bytes);
            continue;
        }
        for (int64_t at = ahead * stored; at < (ahead + 1) * stored; at += 64) {
            __builtin_prefetch(pages->k + at, 0, 2);
            __builtin_prefetch(pages->v + at, 0, 2);
        }
        if (slot < begin || slot >= end) {
            int64_t page = slot / pages->page_size;
            begin = page * pages->page_size, end = begin + pages->page_size;
            read_channels(pages, page, half, &channels);
        }
        float scale = half_float(pages->v_scale[slot]) * kind_factor(kind);
        float zero = kind == INT4 ? half_float(pages->v_zero[slot]) : 0;
        for (int high = 0; high < 2; high++) {
            int64_t from = slot * stored + (kind == INT4 ? 0 : high * half), to = high * (row_bytes / 2);
            expand_half(pages->k + from, half, high, channels.scale[high], channels.zero[high], 1, k + to,
                        kind, is_bf16);
            expand_half(pages->v + from, half, high, &scale, &zero, 0, v + to, kind, is_bf16);
        }
    }
}

static void expand_tile(const Problem *problem, const int64_t *slots, int count, char *k, char *v) {
    int64_t half = problem->d / 2;
    int kind = problem->pages->kind;
// with constants, so that usual widths need no masks
#define WITH_HALF(kind, is_bf16)                                             \
    if (half == 32)                                                          \
        expand_rows(problem, slots, count, k, v, 32, kind, is_bf16);         \
    else if (half == 64)                                                     \
        expand_rows(problem, slots, count, k, v, 64, kind, is_bf16);         \
    else                                                                     \
        expand_rows(problem, slots, count, k, v, half, kind, is_bf16);
#define WITH_TYPE(kind)                                                      \
    if (problem->is_bf16) {                                                  \
        WITH_HALF(kind, 1)                                                   \
    } else {                                                                 \
        WITH_HALF(kind, 0)                                                   \
    }
    if (kind == INT8) {
        WITH_TYPE(INT8)
    } else if (kind == INT4) {
        WITH_TYPE(INT4)
    } else {
        WITH_TYPE(FP8)
    }
#undef WITH_TYPE
#undef WITH_HALF
}

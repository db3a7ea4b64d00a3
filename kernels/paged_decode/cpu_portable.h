// Tiles of decode attention in portable C, for cpu.c: up to 8 query heads against up to TILE slots.

static inline float widened(uint16_t x) {
    union { uint32_t u; float f; } bits = {(uint32_t)x << 16};
    return bits.f;
}

static inline void load_row(const char *row, int64_t d, int is_bf16, float *out) {
    if (!is_bf16) {
        memcpy(out, row, d * sizeof(float));
        return;
    }
    const uint16_t *narrow = (const uint16_t *)row;
    for (int64_t i = 0; i < d; i++) out[i] = widened(narrow[i]);
}

// queries [heads][d] of floats
static void pack_queries(const Problem *problem, const char *q, int heads, char *queries) {
    for (int g = 0; g < heads; g++)
        load_row(q + g * row_size(problem), problem->d, problem->is_bf16, (float *)queries + g * problem->d);
}

// one step of the online softmax for up to BLOCK queries
static void attend_tile(const Problem *problem, const char *queries, const int64_t *rows, int count,
                        int heads, float *top, float *sum, float *acc) {
    int64_t d = problem->d, stride = padded(d);
    float scores[BLOCK][TILE], row[MAX_D];
    for (int s = 0; s < count; s++) {
        load_row(problem->k + rows[s], d, problem->is_bf16, row);
        for (int g = 0; g < heads; g++) {
            const float *query = (const float *)queries + g * d;
            float score = 0;
            #pragma omp simd reduction(+ : score)
            for (int64_t i = 0; i < d; i++) score += query[i] * row[i];
            scores[g][s] = score;
        }
    }
    for (int g = 0; g < heads; g++) {
        float largest = top[g], total = 0;
        #pragma omp simd reduction(max : largest)
        for (int s = 0; s < count; s++) largest = scores[g][s] > largest ? scores[g][s] : largest;
        #pragma omp simd reduction(+ : total)
        for (int s = 0; s < count; s++) {
            scores[g][s] = exp2_negative((scores[g][s] - largest) * problem->scale);
            total += scores[g][s];
        }
        float decay = exp2_negative((top[g] - largest) * problem->scale);
        sum[g] = sum[g] * decay + total;
        top[g] = largest;
        for (int64_t i = 0; i < d; i++) acc[g * stride + i] *= decay;
    }
    for (int s = 0; s < count; s++) {
        load_row(problem->v + rows[s], d, problem->is_bf16, row);
        for (int g = 0; g < heads; g++)
            for (int64_t i = 0; i < d; i++) acc[g * stride + i] += scores[g][s] * row[i];
    }
}

// Products of integers with integers, y = x W^T + bias, for x86 CPUs with AVX512_VNNI: each 32 inputs of a token are rounded to 8 bits under a scale
// of their own, as llama.cpp rounds them (ggml-quants.c, Q8_0), and each 16 or 32 inputs of a row have a scale. Called by int8_groups.py.
//
// Weights lie in strips of 16 outputs, and a strip in groups of inputs. A word of a register holds four inputs of one output: vpdpbusd multiplies
// them with the same four of a token. The codes are unsigned; what they are too large by is taken off once for each group, times the sum of its inputs.
//
// A thread takes strip after strip until none is left. All that is read and written lies in the arrays of `struct job`, whose sizes stand there.

#include <stdatomic.h>
#include <stdint.h>

#include "avx512.h"

// outputs; inputs of a token under one scale; tokens that are multiplied together, and that all strips take before the next
enum { STRIP = 16, GROUP = 32, BLOCK = 8, TOKENS = 256 };
enum scales { F32, F16 };

// N outputs, K inputs, M tokens; S strips cover N; G = K / group.
struct job {
    const uint16_t *x;      // bf16 [M, K]
    const uint8_t *codes;   // [S, K / 32, 16 outputs side by side: 4 x 64 bytes with 4-bit codes, 8 x 64 with 8-bit ones]
    const uint8_t *scale;   // [S, G, 16] of `scale_kind`
    const uint8_t *offset;  // the same, or none: added to the weights of a group
    const uint16_t *bias;   // bf16 [N], or none
    uint16_t *y;            // bf16 [M, N]
    uint8_t *workspace;     // int8_workspace() bytes, aligned to 64
    parallel_fn *parallel;
    int64_t tokens, outputs, inputs;
    int64_t group;  // inputs under a scale of the weight: 16 or 32
    int32_t nibbles, scale_kind, threads;
    int32_t excess;      // what the codes are too large by
    int64_t start, end;  // the tokens that are multiplied
    atomic_long next;
};

INLINE int64_t round_up(int64_t a) { return (a + 63) / 64 * 64; }

// In the workspace: the codes of tokens, int8 [M, K]; their scales, f32 [M, K / 32]; the sums of the codes of each group of the weight, int32 [M, G].
INLINE int8_t *codes_of(const struct job *job) { return (int8_t *)job->workspace; }
INLINE float *scales_of(const struct job *job) { return (float *)(job->workspace + round_up(job->tokens * job->inputs)); }
INLINE int32_t *sums_of(const struct job *job) {
    return (int32_t *)((uint8_t *)scales_of(job) + round_up(job->tokens * job->inputs / GROUP * 4));
}

int64_t int8_workspace(const struct job *job) {
    return round_up(job->tokens * job->inputs) + round_up(job->tokens * job->inputs / GROUP * 4) + round_up(job->tokens * job->inputs / job->group * 4);
}

INLINE int32_t sum_of(__m128i codes) {
    __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_castsi128_si512(_mm_set1_epi8(1)), _mm512_castsi128_si512(codes));
    return _mm512_mask_reduce_add_epi32(0x000f, products);
}

// Rounds tokens until none is left.
static void round_tokens(void *argument) {
    struct job *job = argument;
    int64_t groups = job->inputs / GROUP, finer = GROUP / job->group;
    for (;;) {
        int64_t token = atomic_fetch_add(&job->next, 1);
        if (token >= job->tokens) return;
        const uint16_t *x = job->x + token * job->inputs;
        int8_t *codes = codes_of(job) + token * job->inputs;
        float *scales = scales_of(job) + token * groups;
        int32_t *sums = sums_of(job) + token * groups * finer;
        for (int64_t group = 0; group < groups; group++, x += GROUP, codes += GROUP) {
            __m512 low = wide(_mm256_loadu_si256((const __m256i *)x)), high = wide(_mm256_loadu_si256((const __m256i *)(x + 16)));
            float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            float scale = largest / 127;
            __m512 by = _mm512_set1_ps(scale > 0 ? scale : 1);
            __m128i first = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_div_ps(low, by)));
            __m128i second = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_div_ps(high, by)));
            _mm_storeu_si128((__m128i *)codes, first);
            _mm_storeu_si128((__m128i *)(codes + 16), second);
            // 0, or NaN where one of them is not finite, over which the largest may pass
            __m512 none = _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high));
            scales[group] = scale + _mm512_reduce_add_ps(none);
            if (finer == 1) {
                sums[group] = sum_of(first) + sum_of(second);
            } else {
                sums[2 * group] = sum_of(first);
                sums[2 * group + 1] = sum_of(second);
            }
        }
    }
}

INLINE __m512 sixteen(const uint8_t *from, int64_t index, int kind) {
    if (kind == F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from + index));
    return _mm512_loadu_ps((const float *)from + 16 * index);
}

// `count` tokens from `token` on, times a strip.
INLINE void multiply(const struct job *job, int64_t strip, int64_t token, int count, int nibbles, int finer, int has_offset) {
    int64_t groups = job->inputs / GROUP;
    int64_t bytes = nibbles ? 256 : 512;
    const uint8_t *codes = job->codes + strip * groups * bytes;
    const int8_t *x = codes_of(job) + token * job->inputs;
    const float *x_scale = scales_of(job) + token * groups;
    const int32_t *x_sum = sums_of(job) + token * groups * finer;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 y[BLOCK];
    for (int t = 0; t < count; t++) y[t] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++, codes += bytes) {
        __m512i weight[8];
        for (int j = 0; j < 4; j++) {
            if (nibbles) {
                __m512i pairs = _mm512_loadu_si512(codes + 64 * j);
                weight[2 * j] = _mm512_and_si512(pairs, low);
                weight[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
            } else {
                weight[2 * j] = _mm512_loadu_si512(codes + 128 * j);
                weight[2 * j + 1] = _mm512_loadu_si512(codes + 128 * j + 64);
            }
        }
        _mm_prefetch((const char *)codes + 2048, _MM_HINT_T0);  // faults nowhere
        _mm_prefetch((const char *)codes + 2048 + 64, _MM_HINT_T0);
        _mm_prefetch((const char *)codes + 2048 + 128, _MM_HINT_T0);
        _mm_prefetch((const char *)codes + 2048 + 192, _MM_HINT_T0);
        for (int part = 0; part < finer; part++) {
            int64_t index = (strip * groups + group) * finer + part;
            __m512 scale = sixteen(job->scale, index, job->scale_kind), offset = _mm512_setzero_ps();
            if (has_offset) offset = sixteen(job->offset, index, job->scale_kind);
            for (int t = 0; t < count; t++) {
                const int32_t *words = (const int32_t *)(x + t * job->inputs + group * GROUP);
                int32_t sum = x_sum[t * groups * finer + group * finer + part];
                __m512i one = _mm512_set1_epi32(-job->excess * sum), two = _mm512_setzero_si512();
                for (int j = part * 8 / finer; j < (part + 1) * 8 / finer; j += 2) {
                    one = _mm512_dpbusd_epi32(one, weight[j], _mm512_set1_epi32(words[j]));
                    two = _mm512_dpbusd_epi32(two, weight[j + 1], _mm512_set1_epi32(words[j + 1]));
                }
                __m512 by = _mm512_set1_ps(x_scale[t * groups + group]);
                y[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(one, two)), by), scale, y[t]);
                if (has_offset) y[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps((float)sum), by), offset, y[t]);
            }
        }
    }
    int64_t first = strip * STRIP;
    __mmask16 mask = first16(job->outputs - first);
    __m512 bias = job->bias ? wide(_mm256_maskz_loadu_epi16(mask, job->bias + first)) : _mm512_setzero_ps();
    for (int t = 0; t < count; t++)
        _mm256_mask_storeu_epi16(job->y + (token + t) * job->outputs + first, mask, narrow(_mm512_add_ps(y[t], bias)));
}

#define STRIPS(name, nibbles, finer, has_offset)                                                                                \
    static void name(void *argument) {                                                                                          \
        struct job *job = argument;                                                                                             \
        int64_t strips = (job->outputs + STRIP - 1) / STRIP;                                                                    \
        for (;;) {                                                                                                              \
            int64_t strip = atomic_fetch_add(&job->next, 1), token = job->start;                                                \
            if (strip >= strips) return;                                                                                        \
            for (; token + BLOCK <= job->end; token += BLOCK) multiply(job, strip, token, BLOCK, nibbles, finer, has_offset); \
            if (token + 4 <= job->end) multiply(job, strip, token, 4, nibbles, finer, has_offset), token += 4;               \
            for (; token < job->end; token++) multiply(job, strip, token, 1, nibbles, finer, has_offset);                    \
        }                                                                                                                       \
    }

STRIPS(nibbles, 1, 1, 0)
STRIPS(nibbles_offset, 1, 1, 1)
STRIPS(bytes, 0, 1, 0)
STRIPS(bytes_offset, 0, 1, 1)
STRIPS(fine_bytes, 0, 2, 0)
STRIPS(fine_bytes_offset, 0, 2, 1)

void int8_linear(struct job *job) {
    int has_offset = job->offset != 0;
    void (*strips)(void *) = job->nibbles ? (has_offset ? nibbles_offset : nibbles)
                             : job->group == GROUP ? (has_offset ? bytes_offset : bytes)
                                                   : (has_offset ? fine_bytes_offset : fine_bytes);
    atomic_store(&job->next, 0);
    if (job->tokens <= 4)
        round_tokens(job);  // sooner done than the threads come together
    else
        job->parallel(round_tokens, job, (unsigned)job->threads, 0);
    for (job->start = 0; job->start < job->tokens; job->start = job->end) {
        job->end = least(job->start + TOKENS, job->tokens);
        atomic_store(&job->next, 0);
        job->parallel(strips, job, (unsigned)job->threads, 0);
    }
}

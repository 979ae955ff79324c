// Attention of single tokens over pages of bf16 keys and values, for x86 CPUs with AVX512. Called by native_decode.py.
//
// A thread takes one head of keys of one token after another, with all heads of queries that share it, until none is left. A page is 16 tokens, so that
// the logits of a page fill a register. Logits are in units of log2; sums are kept under the largest logit so far.

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

#include "avx512.h"

enum { PAGE = 16, WIDEST = 256, MOST_SHARED = 32 };

// T tokens, of which each is the only one of its sequence here; H heads of queries, KH of keys, of D numbers, values of DV.
struct job {
    const uint16_t *q;                // bf16 [T, H, D]
    const uint16_t *k, *v;            // bf16 [pages, KH, 16, D] and DV
    const int32_t *table;             // [rows, columns]
    const int32_t *rows, *positions;  // [T]
    uint16_t *out;                    // bf16 [T, H, DV]
    parallel_fn *parallel;
    int64_t stride_k_page, stride_v_page, columns;
    int64_t tokens, heads, kv_heads, width, v_width;
    int64_t window;  // how many positions a token sees, 0 for all
    int32_t threads;
    float factor;  // of the logits
    atomic_long next;
};

INLINE __m512 sixteen(const uint16_t *from) { return wide(_mm256_loadu_si256((const __m256i *)from)); }

static void attend_head(const struct job *job, int64_t token, int64_t kv_head) {
    int64_t width = job->width, v_width = job->v_width, shared = job->heads / job->kv_heads, first_head = kv_head * shared;
    int64_t last = job->positions[token], low = job->window && last >= job->window ? last - job->window + 1 : 0;
    const int32_t *pages = job->table + job->rows[token] * job->columns;
    float q[MOST_SHARED][WIDEST], sums[MOST_SHARED][WIDEST], values[PAGE][WIDEST], logits[MOST_SHARED][PAGE] __attribute__((aligned(64)));
    float top[MOST_SHARED], total[MOST_SHARED];
    for (int64_t h = 0; h < shared; h++) {
        const uint16_t *from = job->q + (token * job->heads + first_head + h) * width;
        for (int64_t d = 0; d < width; d += 16) _mm512_storeu_ps(q[h] + d, _mm512_mul_ps(sixteen(from + d), _mm512_set1_ps(job->factor)));
        for (int64_t d = 0; d < v_width; d += 16) _mm512_storeu_ps(sums[h] + d, _mm512_setzero_ps());
        top[h] = -INFINITY, total[h] = 0;
    }
    for (int64_t number = low / PAGE; number <= last / PAGE; number++) {
        const uint16_t *k = job->k + pages[number] * job->stride_k_page + kv_head * PAGE * width;
        const uint16_t *v = job->v + pages[number] * job->stride_v_page + kv_head * PAGE * v_width;
        int64_t from = number * PAGE < low ? low - number * PAGE : 0, to = last - number * PAGE + 1 < PAGE ? last - number * PAGE + 1 : PAGE;
        for (int64_t slot = from; slot < to; slot++) {
            __m512 key[WIDEST / 16];
            for (int64_t d = 0; d < width; d += 16) key[d / 16] = sixteen(k + slot * width + d);
            for (int64_t h = 0; h < shared; h++) {
                __m512 products = _mm512_setzero_ps();
                for (int64_t d = 0; d < width; d += 16) products = _mm512_fmadd_ps(key[d / 16], _mm512_loadu_ps(q[h] + d), products);
                logits[h][slot] = _mm512_reduce_add_ps(products);
            }
            for (int64_t d = 0; d < v_width; d += 16) _mm512_storeu_ps(values[slot] + d, sixteen(v + slot * v_width + d));
        }
        // nothing outside of these slots is read: earlier owners may have left NaN there
        __mmask16 seen = (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
        for (int64_t h = 0; h < shared; h++) {
            __m512 all = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), seen, logits[h]);
            float most = fmaxf(top[h], _mm512_reduce_max_ps(all));
            __m512 shares = _mm512_maskz_mov_ps(seen, power_of_two(_mm512_sub_ps(all, _mm512_set1_ps(most))));
            float kept = exp2f(top[h] - most);
            top[h] = most, total[h] = total[h] * kept + _mm512_reduce_add_ps(shares);
            float share[PAGE];
            _mm512_storeu_ps(share, shares);
            for (int64_t d = 0; d < v_width; d += 16) {
                __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums[h] + d), _mm512_set1_ps(kept));
                for (int64_t slot = from; slot < to; slot++) sum = _mm512_fmadd_ps(_mm512_set1_ps(share[slot]), _mm512_loadu_ps(values[slot] + d), sum);
                _mm512_storeu_ps(sums[h] + d, sum);
            }
        }
    }
    for (int64_t h = 0; h < shared; h++) {
        uint16_t *to = job->out + (token * job->heads + first_head + h) * v_width;
        for (int64_t d = 0; d < v_width; d += 16)
            _mm256_storeu_si256((__m256i *)(to + d), narrow(_mm512_div_ps(_mm512_loadu_ps(sums[h] + d), _mm512_set1_ps(total[h]))));
    }
}

static void attend_heads(void *argument) {
    struct job *job = argument;
    for (;;) {
        int64_t number = atomic_fetch_add(&job->next, 1);
        if (number >= job->tokens * job->kv_heads) return;
        attend_head(job, number / job->kv_heads, number % job->kv_heads);
    }
}

void qtool_decode_attention(struct job *job) {
    int64_t positions = 0;
    for (int64_t token = 0; token < job->tokens; token++) positions += job->positions[token] + 1;
    atomic_store(&job->next, 0);
    if (positions * job->kv_heads < 256)
        attend_heads(job);  // sooner done than the threads come together
    else
        job->parallel(attend_heads, job, (unsigned)job->threads, 0);
}

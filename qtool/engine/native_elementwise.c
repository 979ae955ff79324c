// Norms, rotary embedding and gated activations of decoder layers in bf16, for x86 CPUs with AVX512. Called by native_elementwise.py.
//
// Numbers are computed in f32 and rounded to bf16 where the model's own code rounds, see elementwise.py. Threads take one token after another.

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

#include "avx512.h"

enum { PAGE = 16, SERIAL = 1 << 15 };  // SERIAL: up to so many numbers one thread is faster than waking the others

typedef struct {
    float eps;
    int32_t plus_one, late, centered;
} kind;  // `norm_kind.NormKind`

INLINE __m512 rounded(__m512 x) { return wide(narrow(x)); }

INLINE __m512 read(const uint16_t *from, __mmask16 mask) { return wide(_mm256_maskz_loadu_epi16(mask, from)); }

INLINE void store(uint16_t *to, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }

// out = norm(x), all `width` numbers; `bias` may be 0, and `out` may be `x`.
static void normalize(const uint16_t *x, const uint16_t *weight, const uint16_t *bias, kind kind, int64_t width, uint16_t *out) {
    float mean = 0;
    __m512 sums = _mm512_setzero_ps();
    if (kind.centered) {
        for (int64_t i = 0; i < width; i += 16) sums = _mm512_add_ps(sums, read(x + i, first16(width - i)));
        mean = _mm512_reduce_add_ps(sums) / (float)width;
        sums = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 mask = first16(width - i);
        __m512 off = _mm512_maskz_sub_ps(mask, read(x + i, mask), _mm512_set1_ps(mean));
        sums = _mm512_fmadd_ps(off, off, sums);
    }
    __m512 by = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(sums) / (float)width + kind.eps));
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 mask = first16(width - i);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(read(x + i, mask), _mm512_set1_ps(mean)), by), factor = read(weight + i, mask);
        if (!kind.late) y = rounded(y);
        if (kind.plus_one) factor = _mm512_add_ps(factor, _mm512_set1_ps(1));
        y = _mm512_mul_ps(y, factor);
        store(out + i, mask, bias ? _mm512_add_ps(y, read(bias + i, mask)) : y);
    }
}

struct job {
    parallel_fn *parallel;
    int64_t tokens, numbers;  // `numbers` of each token
    int32_t threads;
    atomic_long next;  // the next token that a thread takes
    void (*work)(const struct job *, int64_t token);  // computes one token
};

static void take_tokens(void *argument) {
    struct job *job = argument;
    for (int64_t token; (token = atomic_fetch_add(&job->next, 1)) < job->tokens;) job->work(job, token);
}

static void run(struct job *job, void (*work)(const struct job *, int64_t)) {
    job->work = work;
    atomic_store(&job->next, 0);
    if (job->tokens * job->numbers <= SERIAL)
        take_tokens(job);
    else
        job->parallel(take_tokens, job, (unsigned)job->threads, 0);
}

// out = norm(total), total = residual + other + factor * after(x); all [T, H]. Null pointers are left out; without `residual` x is the total.
struct add_norm {
    struct job job;
    const uint16_t *x, *residual, *other, *after, *after_bias, *weight, *bias;
    uint16_t *total, *out;
    kind after_kind, kind;
    float factor;
};

static void add_norm_of(const struct job *job, int64_t token) {
    const struct add_norm *norm = (const struct add_norm *)job;
    int64_t width = job->numbers, at = token * width;
    const uint16_t *x = norm->x + at;
    if (norm->residual) {
        uint16_t *total = norm->total + at;
        if (norm->after) normalize(x, norm->after, norm->after_bias, norm->after_kind, width, total), x = total;
        for (int64_t i = 0; i < width; i += 16) {
            __mmask16 mask = first16(width - i);
            __m512 added = read(x + i, mask), sum = read(norm->residual + at + i, mask);
            if (norm->factor != 1) added = rounded(_mm512_mul_ps(added, _mm512_set1_ps(norm->factor)));
            if (norm->other) sum = rounded(_mm512_add_ps(sum, read(norm->other + at + i, mask)));
            store(total + i, mask, _mm512_add_ps(sum, added));
        }
        x = total;
    }
    if (norm->weight) normalize(x, norm->weight, norm->bias, norm->kind, width, norm->out + at);
}

void qtool_add_norm(struct add_norm *norm) { run(&norm->job, add_norm_of); }

// out [T, width] = activation(x[gate]) * x[up], the rows of x `stride` apart.
struct gated {
    struct job job;
    const uint16_t *gate, *up;
    uint16_t *out;
    int64_t stride;
    int32_t is_gelu;
};

INLINE __m512 exponential(__m512 x) { return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); }

INLINE __m512 silu(__m512 x) { return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)))); }

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
INLINE __m512 gelu_tanh(__m512 x) {
    __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x), u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    __m512 power = exponential(_mm512_mul_ps(u, _mm512_set1_ps(-2 * 0.79788456f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

static void gated_of(const struct job *job, int64_t token) {
    const struct gated *gated = (const struct gated *)job;
    for (int64_t i = 0; i < job->numbers; i += 16) {
        __mmask16 mask = first16(job->numbers - i);
        __m512 gate = read(gated->gate + token * gated->stride + i, mask);
        gate = rounded(gated->is_gelu ? gelu_tanh(gate) : silu(gate));
        store(gated->out + token * job->numbers + i, mask, _mm512_mul_ps(gate, read(gated->up + token * gated->stride + i, mask)));
    }
}

void qtool_gated(struct gated *gated) { run(&gated->job, gated_of); }

// Queries [T, H, D], normed and rotated, to `out`; keys, likewise, and values to their pages. D is `width`; `rotated` of a head's numbers rotate.
struct rotate {
    struct job job;
    const uint16_t *q, *k, *v;          // [T, ...], tokens `stride` apart, heads of queries `stride_q_head`
    const uint16_t *q_norm, *k_norm;    // [D], [H, D] if `norm_each`, or 0
    const uint16_t *cos, *sin;          // [T, `angles`]
    uint16_t *out, *k_pages, *v_pages;  // pages [pages, KH, 16, D]
    const int32_t *table, *rows, *positions;
    int64_t stride, stride_q_head, heads, kv_heads, width, rotated, angles, columns;
    int32_t norm_each, interleaved;
    kind kind;
};

static void rotate_head(const struct rotate *rotate, const uint16_t *x, const uint16_t *norm, int64_t token, uint16_t *out) {
    int64_t width = rotate->width, half = rotate->rotated / 2;
    const uint16_t *cos = rotate->cos + token * rotate->angles, *sin = rotate->sin + token * rotate->angles;
    uint16_t normed[width];
    if (norm) normalize(x, norm, 0, rotate->kind, width, normed), x = normed;
    if (rotate->interleaved) {
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int64_t i = 0; i < half; i += 16) {
            __mmask16 mask = first16(half - i), left = first16(2 * (half - i)), right = first16(2 * (half - i) - 16);
            __m512 a = read(x + 2 * i, left), b = read(x + 2 * i + 16, right), c = read(cos + i, mask), s = read(sin + i, mask);
            __m512 one = _mm512_permutex2var_ps(a, even, b), other = _mm512_permutex2var_ps(a, odd, b);
            __m512 y = _mm512_sub_ps(rounded(_mm512_mul_ps(one, c)), rounded(_mm512_mul_ps(other, s)));
            __m512 z = _mm512_add_ps(rounded(_mm512_mul_ps(other, c)), rounded(_mm512_mul_ps(one, s)));
            store(out + 2 * i, left, _mm512_permutex2var_ps(y, low, z));
            store(out + 2 * i + 16, right, _mm512_permutex2var_ps(y, high, z));
        }
    } else {
        for (int64_t i = 0; i < half; i += 16) {
            __mmask16 mask = first16(half - i);
            __m512 one = read(x + i, mask), other = read(x + half + i, mask), c = read(cos + i, mask), s = read(sin + i, mask);
            store(out + i, mask, _mm512_sub_ps(rounded(_mm512_mul_ps(one, c)), rounded(_mm512_mul_ps(other, s))));
            store(out + half + i, mask, _mm512_add_ps(rounded(_mm512_mul_ps(other, c)), rounded(_mm512_mul_ps(one, s))));
        }
    }
    for (int64_t i = rotate->rotated; i < width; i++) out[i] = x[i];
}

static void rotate_of(const struct job *job, int64_t token) {
    const struct rotate *rotate = (const struct rotate *)job;
    int64_t width = rotate->width, each = rotate->norm_each ? width : 0, position = rotate->positions[token];
    int64_t page = rotate->table[rotate->rows[token] * rotate->columns + position / PAGE];
    for (int64_t head = 0; head < rotate->heads; head++)
        rotate_head(rotate, rotate->q + token * rotate->stride + head * rotate->stride_q_head, rotate->q_norm ? rotate->q_norm + head * each : 0, token,
                    rotate->out + (token * rotate->heads + head) * width);
    for (int64_t head = 0; head < rotate->kv_heads; head++) {
        int64_t from = token * rotate->stride + head * width, to = ((page * rotate->kv_heads + head) * PAGE + position % PAGE) * width;
        rotate_head(rotate, rotate->k + from, rotate->k_norm ? rotate->k_norm + head * each : 0, token, rotate->k_pages + to);
        for (int64_t i = 0; i < width; i++) rotate->v_pages[to + i] = rotate->v[from + i];
    }
}

void qtool_rotate_and_write(struct rotate *rotate) { run(&rotate->job, rotate_of); }

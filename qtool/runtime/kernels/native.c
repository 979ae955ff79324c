// Products with quantized weights, y = x W^T + bias, for x86 CPUs with AVX512; AVX512_BF16 and AMX make it faster. Called by native.py.
//
// Weights lie in strips of 32 outputs, and a strip in chunks of 128 inputs: 32 rows, of 64 bytes with 4-bit codes and of 128 with 8-bit ones. A chunk
// is decoded into bf16 weights, scaled, in four tiles of 32 rows and 32 inputs, which stay in the L1 or L2 cache while they are multiplied. 4-bit
// codes are looked up in a register with what each of the 16 codes stands for under the scale and the zero point of its row and group; where scales
// have 8 bits, that register comes from a table of them all.
//
// AMX multiplies 16 outputs x 32 inputs of the weight with 32 inputs x 16 tokens, which are transposed into that order first. While one chunk is
// multiplied the next one is decoded. Without AMX, vdpbf16ps multiplies a row of a tile with 32 inputs of a token, or where there is none two products in f32.
//
// A thread takes strip after strip until none is left. All that is read and written lies in the arrays of `struct job`, whose sizes stand there.

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

enum { STRIP = 32, CHUNK = 128, TILE_BYTES = 2048, CHUNK_BYTES = 4 * TILE_BYTES, TOKENS = 128, BLOCK = 16 };
enum { DEEP = 32, SHALLOW = 4 };  // chunks that are decoded at a time: for AMX and many tokens into L2, without AMX into L1
enum { AHEAD = 4096 };  // bytes of codes that are fetched before they are needed
enum { SCRATCH = DEEP * CHUNK_BYTES };  // bytes of a thread
enum codes { NIBBLES, INT8, FP8 };
enum scales { F32, BF16, F16, E4M3, E8M0 };

// N outputs, K inputs, M tokens; S strips and C chunks cover N and K; G groups.
struct job {
    const uint16_t *x;         // bf16 [M, K]
    const uint8_t *codes;      // [S, C, 32, 64 or 128]
    const uint8_t *scale;      // [S, G, 32] of `scale_kind`, or none
    const int8_t *zero;        // [S, G, 32], or none
    const uint8_t *offset;     // the same of `scale_kind`, added after scaling, or none
    const void *table;         // what a 4-bit code stands for, f32 [16]; with scales of 8 bits, times the scale, bf16 [256, 16]
    const float *row_scale;    // [S, 32], multiplies the outputs
    const uint16_t *bias;      // bf16 [N], or none
    uint16_t *y;               // bf16 [M, N]
    uint8_t *workspace;        // qtool_workspace() bytes, aligned to 64
    parallel_fn *parallel;
    int64_t tokens, outputs, inputs;
    int64_t group;             // inputs that share a scale: 16, 32, 64, or a multiple of 128
    int64_t groups;            // G
    int32_t code_kind, scale_kind, threads, amx;
};

// A part of the work that all threads do together: `count` tokens from `start` on, and chunks `from` to `to`.
struct region {
    const struct job *job;
    int64_t start, count, from, to;
    atomic_long next, thread;
};

typedef void decode_fn(const uint8_t *codes, const void *scale, const float *zero, const void *table, uint8_t *tiles);

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t strips(const struct job *job) { return ceil_div(job->outputs, STRIP); }
INLINE int64_t chunks(const struct job *job) { return ceil_div(job->inputs, CHUNK); }
INLINE int has_large_table(const struct job *job) { return job->code_kind == NIBBLES && job->scale && job->scale_kind >= E4M3; }
INLINE int64_t row_bytes(const struct job *job) { return job->code_kind == NIBBLES ? 64 : 128; }

// ---- decoding ----

// 32 halves from the bytes of fp8 in the high half of each word: what they stand for, divided by 256
INLINE __m512i halves(__m512i words) { return _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16((short)0xbf80)); }

// Sixteen scales, from number `index` on, as f32.
INLINE __m512 sixteen_scales(const uint8_t *scale, int kind, int64_t index) {
    switch (kind) {
    case F32:
        return _mm512_loadu_ps((const float *)scale + index);
    case BF16:
        return wide(_mm256_loadu_si256((const __m256i *)(scale + 2 * index)));
    case F16:
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scale + 2 * index)));
    case E4M3: {
        __m512i bytes = _mm512_castsi256_si512(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(scale + index))));
        return _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves(_mm512_slli_epi16(bytes, 8)))), _mm512_set1_ps(256));
    }
    default: {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(scale + index)));
        __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(1 << 22));  // 2^-127 is subnormal
        __mmask16 nan = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
    }
    }
}

INLINE int64_t groups_in_chunk(const struct job *job) { return job->group < CHUNK ? CHUNK / job->group : 1; }

// Where the scales of a chunk begin, [groups in a chunk, 32].
INLINE int64_t scale_index(const struct job *job, int64_t strip, int64_t chunk) {
    int64_t group = job->group < CHUNK ? chunk * groups_in_chunk(job) : chunk / (job->group / CHUNK);
    return (strip * job->groups + group) * STRIP;
}

// The scales and zero points, or offsets, of one chunk, f32 [groups in a chunk, 32] each.
static void expand_scales(const struct job *job, int64_t strip, int64_t chunk, float *scale, float *zero) {
    int64_t count = groups_in_chunk(job), index = scale_index(job, strip, chunk);
    for (int64_t i = 0; i < count * STRIP; i += 16) {
        __m512 scales = job->scale ? sixteen_scales(job->scale, job->scale_kind, index + i) : _mm512_set1_ps(1);
        _mm512_store_ps(scale + i, job->code_kind == FP8 ? _mm512_mul_ps(scales, _mm512_set1_ps(256)) : scales);
        if (job->zero) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(job->zero + index + i));
            _mm512_store_ps(zero + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
        } else if (job->offset) {
            _mm512_store_ps(zero + i, sixteen_scales(job->offset, job->scale_kind, index + i));
        }
    }
}

// 1: `zero` is subtracted before scaling; 2: it is an offset, added after that.
INLINE __m512 scaled(__m512 values, const float *scale, const float *zero, int has_zero) {
    if (has_zero == 2) return _mm512_fmadd_ps(values, _mm512_set1_ps(*scale), _mm512_set1_ps(*zero));
    if (has_zero) values = _mm512_sub_ps(values, _mm512_set1_ps(*zero));
    return _mm512_mul_ps(values, _mm512_set1_ps(*scale));
}

// (index & 15), and 16 more in the second half: where in a table of 16 entries for each half
INLINE __m512i by_halves(__m512i index) {
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    return _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), second, 0xea);
}

#ifdef __AVX512BF16__
INLINE __m512i rounded(__m512 high, __m512 low) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __m512 add_products(__m512 sum, __m512i weight, __m512i inputs) { return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)inputs); }
#else
INLINE __m512i rounded(__m512 high, __m512 low) { return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1); }
INLINE __m512 add_products(__m512 sum, __m512i weight, __m512i inputs) {
    const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weight, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(inputs, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weight, odd)), _mm512_castsi512_ps(_mm512_and_si512(inputs, odd)), sum);
}
#endif

// The functions decode eight rows of a chunk into the four tiles; `scale` and `zero` are f32 [groups in a chunk, 32].

// Nibble j of word i is input 32 j + i. A lookup takes five bits of the word: the table is there twice, or once for each of two groups.
INLINE void decode_nibbles(const uint8_t *codes, const float *scale, const float *zero, const float *table, uint8_t *tiles, int group, int has_zero) {
    const __m512 values = _mm512_loadu_ps(table);
    for (int row = 0; row < 8; row++) {
        __m512i words = _mm512_loadu_si512(codes + 64 * row), lookup = _mm512_setzero_si512();
        for (int j = 0; j < 4; j++) {
            __m512i index = j ? _mm512_srli_epi16(words, 4 * j) : words;
            if (group == 16) {
                int at = 2 * j * STRIP + row;
                lookup = rounded(scaled(values, scale + at + STRIP, zero + at + STRIP, has_zero), scaled(values, scale + at, zero + at, has_zero));
                index = by_halves(index);
            } else if (32 * j % group == 0) {
                int at = 32 * j / group * STRIP + row;
                __m512 entries = scaled(values, scale + at, zero + at, has_zero);
                lookup = rounded(entries, entries);
            }
            _mm512_store_si512(tiles + j * TILE_BYTES + 64 * row, _mm512_permutexvar_epi16(index, lookup));
        }
    }
}

// The same with a table of bf16 [256, 16] for scales of 8 bits, which are [groups in a chunk, 32].
INLINE void decode_scaled_nibbles(const uint8_t *codes, const uint8_t *scale, const uint8_t *table, uint8_t *tiles, int group) {
    for (int row = 0; row < 8; row++) {
        __m512i words = _mm512_loadu_si512(codes + 64 * row), lookup = _mm512_setzero_si512();
        for (int j = 0; j < 4; j++) {
            __m512i index = j ? _mm512_srli_epi16(words, 4 * j) : words;
            const uint8_t *here = scale + 32 * j / group * STRIP + row;
            __m256i entries = _mm256_loadu_si256((const __m256i *)(table + 32 * *here));
            if (group == 16) {
                __m256i others = _mm256_loadu_si256((const __m256i *)(table + 32 * here[STRIP]));
                lookup = _mm512_inserti64x4(_mm512_castsi256_si512(entries), others, 1);
                index = by_halves(index);
            } else if (32 * j % group == 0) {
                lookup = _mm512_broadcast_i64x4(entries);
            }
            _mm512_store_si512(tiles + j * TILE_BYTES + 64 * row, _mm512_permutexvar_epi16(index, lookup));
        }
    }
}

// Byte j of the 32 bits i is input 16 j + i; 64 inputs, then 64 more.
INLINE void decode_int8(const uint8_t *codes, const float *scale, const float *zero, const float *table, uint8_t *tiles, int group, int has_zero) {
    (void)table;
    for (int row = 0; row < 8; row++) {
        for (int j = 0; j < 4; j++) {
            __m512i bytes = _mm512_loadu_si512(codes + 128 * row + 64 * (j / 2));
            __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(bytes, j % 2 ? 8 : 24), 24);
            __m512i odd = _mm512_srai_epi32(j % 2 ? bytes : _mm512_slli_epi32(bytes, 16), 24);
            int at = 32 * j / group * STRIP + row, next = (32 * j + 16) / group * STRIP + row;
            __m512 first = scaled(_mm512_cvtepi32_ps(even), scale + at, zero + at, has_zero);
            __m512 second = scaled(_mm512_cvtepi32_ps(odd), scale + next, zero + next, has_zero);
            _mm512_store_si512(tiles + j * TILE_BYTES + 64 * row, rounded(second, first));
        }
    }
}

// Byte j of word i is input 32 j + i; 64 inputs, then 64 more. `scale` makes up for `halves`.
INLINE void decode_fp8(const uint8_t *codes, const float *scale, const float *zero, const float *table, uint8_t *tiles, int group, int has_zero) {
    (void)table, (void)has_zero;
    for (int row = 0; row < 8; row++) {
        for (int j = 0; j < 4; j++) {
            __m512i words = _mm512_loadu_si512(codes + 128 * row + 64 * (j / 2));
            words = halves(j % 2 ? words : _mm512_slli_epi16(words, 8));
            int at = 32 * j / group * STRIP + row, next = (32 * j + 16) / group * STRIP + row;
            __m512 first = scaled(_mm512_cvtph_ps(_mm512_castsi512_si256(words)), scale + at, zero, 0);
            __m512 second = scaled(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1)), scale + next, zero, 0);
            _mm512_store_si512(tiles + j * TILE_BYTES + 64 * row, rounded(second, first));
        }
    }
}

// The same without scales. The exponent moves by 120; the eight subnormals are looked up.
static void fp8_unscaled(const uint8_t *codes, const void *scale, const float *zero, const void *table, uint8_t *tiles) {
    (void)scale, (void)zero, (void)table;
    const __m512i subnormals = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i magnitude = _mm512_set1_epi16(0x07f0), bias = _mm512_set1_epi16(120 << 7), sign = _mm512_set1_epi16((short)0x8000);
    for (int row = 0; row < 8; row++) {
        for (int j = 0; j < 4; j++) {
            __m512i words = _mm512_loadu_si512(codes + 128 * row + 64 * (j / 2));
            __m512i shifted = j % 2 ? _mm512_srli_epi16(words, 4) : _mm512_slli_epi16(words, 4);
            __m512i high = j % 2 ? words : _mm512_slli_epi16(words, 8), low = j % 2 ? _mm512_srli_epi16(words, 8) : words;
            __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(j % 2 ? 0x7800 : 0x0078));
            __m512i value = _mm512_add_epi16(_mm512_and_si512(shifted, magnitude), bias);
            value = _mm512_mask_permutexvar_epi16(value, small, low, subnormals);
            value = _mm512_ternarylogic_epi32(high, sign, value, 0xea);  // (high & sign) | value
            _mm512_store_si512(tiles + j * TILE_BYTES + 64 * row, value);
        }
    }
}

#define DECODER(kind, group, has_zero)                                                                                                       \
    static void kind##_##group##_##has_zero(const uint8_t *codes, const void *scale, const float *zero, const void *table, uint8_t *tiles) { \
        decode_##kind(codes, scale, zero, table, tiles, group, has_zero);                                                                    \
    }
#define DECODERS(kind, has_zero) DECODER(kind, 16, has_zero) DECODER(kind, 32, has_zero) DECODER(kind, 64, has_zero) DECODER(kind, 128, has_zero)
#define SCALED_NIBBLES(group)                                                                                                                \
    static void scaled_nibbles_##group(const uint8_t *codes, const void *scale, const float *zero, const void *table, uint8_t *tiles) {      \
        (void)zero;                                                                                                                          \
        decode_scaled_nibbles(codes, scale, table, tiles, group);                                                                            \
    }
#define NAMES(kind, has_zero) {kind##_16_##has_zero, kind##_32_##has_zero, kind##_64_##has_zero, kind##_128_##has_zero}

DECODERS(nibbles, 0)
DECODERS(nibbles, 1)
DECODERS(nibbles, 2)
DECODERS(int8, 0)
DECODERS(int8, 1)
DECODERS(int8, 2)
DECODERS(fp8, 0)
SCALED_NIBBLES(16)
SCALED_NIBBLES(32)
SCALED_NIBBLES(64)
SCALED_NIBBLES(128)

static decode_fn *decoder(const struct job *job) {
    static decode_fn *const all[3][3][4] = {{NAMES(nibbles, 0), NAMES(nibbles, 1), NAMES(nibbles, 2)},
                                            {NAMES(int8, 0), NAMES(int8, 1), NAMES(int8, 2)},
                                            {NAMES(fp8, 0), NAMES(fp8, 0), NAMES(fp8, 0)}};
    static decode_fn *const with_large_table[4] = {scaled_nibbles_16, scaled_nibbles_32, scaled_nibbles_64, scaled_nibbles_128};
    int group = job->group >= 128 ? 3 : job->group == 64 ? 2 : job->group == 32 ? 1 : 0;
    if (job->code_kind == FP8 && !job->scale) return fp8_unscaled;
    return has_large_table(job) ? with_large_table[group] : all[job->code_kind][job->zero ? 1 : job->offset ? 2 : 0][group];
}

// Decodes the chunks of a strip, eight rows at a time.
struct source {
    const struct job *job;
    decode_fn *decode;
    const uint8_t *codes;
    int64_t strip, row_bytes;
    float scale[8 * STRIP] __attribute__((aligned(64))), zero[8 * STRIP] __attribute__((aligned(64)));
};

static void begin(struct source *source, const struct job *job, int64_t strip) {
    source->job = job, source->decode = decoder(job), source->strip = strip, source->row_bytes = row_bytes(job);
    source->codes = job->codes + strip * chunks(job) * STRIP * source->row_bytes;
}

INLINE void decode_quarter(struct source *source, int64_t chunk, int quarter, uint8_t *tiles) {
    const struct job *job = source->job;
    int row = 8 * quarter, large = has_large_table(job);
    if (quarter == 0 && !large) expand_scales(job, source->strip, chunk, source->scale, source->zero);
    const void *scale = large ? (const void *)(job->scale + scale_index(job, source->strip, chunk) + row) : source->scale + row;
    const uint8_t *codes = source->codes + (chunk * STRIP + row) * source->row_bytes;
    for (int64_t i = 0; i < 8 * source->row_bytes; i += 64) _mm_prefetch((const char *)codes + AHEAD + i, _MM_HINT_T0);  // faults nowhere
    source->decode(codes, scale, source->zero + row, job->table, tiles + 64 * row);
}

static void decode_chunk(struct source *source, int64_t chunk, uint8_t *tiles) {
    for (int quarter = 0; quarter < 4; quarter++) decode_quarter(source, chunk, quarter, tiles);
}

// ---- 16 x 16 ----

INLINE void transpose(__m512i rows[16]) {
    __m512i pairs[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // rows[i + c]: column c of four rows, in each of four lanes
        rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        pairs[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
        pairs[4 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
        pairs[8 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
        pairs[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(pairs[i], pairs[4 + i], 0x88);
        rows[4 + i] = _mm512_shuffle_i32x4(pairs[8 + i], pairs[12 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(pairs[i], pairs[4 + i], 0xdd);
        rows[12 + i] = _mm512_shuffle_i32x4(pairs[8 + i], pairs[12 + i], 0xdd);
    }
}

// Sixteen outputs of one token, from output `first` on: scaled, biased, rounded, and stored as far as there are outputs.
INLINE void put(const struct job *job, int64_t token, int64_t first, __m512 sums) {
    __mmask16 mask = first16(job->outputs - first);
    __m512 bias = _mm512_setzero_ps();
    if (job->bias) {
        __m256i bits = _mm256_maskz_loadu_epi16(mask, job->bias + first);
        bias = wide(bits);
    }
    __m256i y = narrow(_mm512_fmadd_ps(sums, _mm512_loadu_ps(job->row_scale + first), bias));
    _mm256_mask_storeu_epi16(job->y + token * job->outputs + first, mask, y);
}

// ---- with AMX: tiles 0 to 3 hold sums [16 outputs, tokens], 4 and 5 the weight, 6 and 7 tokens ----

#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, from, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(to, stride, tile) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define TILE_MULTIPLY(sum, weight, tokens) __asm__ volatile("tdpbf16ps %%tmm" #tokens ", %%tmm" #weight ", %%tmm" #sum ::)

static void configure_tiles(int tokens) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = 16;
        config.row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? 64 : 4 * tokens);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

// Tokens of one block: all of them when they are few, so that no more is read than there is.
INLINE int block_tokens(const struct region *region) { return region->count < BLOCK ? (int)region->count : BLOCK; }

// Where the inputs of a block begin, [K / 32, 16 pairs of inputs, tokens, 2].
INLINE uint8_t *packed_block(const struct region *region, int64_t block) {
    return region->job->workspace + block * chunks(region->job) * CHUNK * 2 * block_tokens(region);
}

// Sums that wait for more inputs, [strips, blocks, 2, 16, 16].
INLINE uint8_t *waiting(const struct region *region, int64_t strip, int64_t block) {
    const struct job *job = region->job;
    uint8_t *start = job->workspace + TOKENS * chunks(job) * CHUNK * 2 + (int64_t)job->threads * SCRATCH;
    return start + (strip * (TOKENS / BLOCK) + block) * 2048;
}

static void pack_for_amx(void *argument) {
    struct region *region = argument;
    const struct job *job = region->job;
    int64_t tiles = chunks(job) * 4, blocks = ceil_div(region->count, BLOCK);
    int width = block_tokens(region);
    __mmask16 stored = first16(width);
    for (;;) {
        int64_t number = atomic_fetch_add(&region->next, 1);  // one chunk of one block
        if (number >= blocks * chunks(job)) return;
        int64_t block = number / chunks(job), first = number % chunks(job) * 4;
        int64_t there = least(region->count - block * BLOCK, BLOCK);
        const uint16_t *x = job->x + (region->start + block * BLOCK) * job->inputs;
        for (int64_t tile = first; tile < least(first + 4, tiles); tile++) {
            int64_t left = job->inputs - tile * 32;
            __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
            uint8_t *to = packed_block(region, block) + tile * 64 * width;
            if (width == 1) {
                _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, x + tile * 32));
                continue;
            }
            __m512i rows[16];
            for (int i = 0; i < 16; i++) rows[i] = _mm512_maskz_loadu_epi16(i < there ? mask : 0, x + (i < there ? i * job->inputs : 0) + tile * 32);
            transpose(rows);
            for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(to + i * 4 * width, stored, rows[i]);
        }
    }
}

// Multiplies chunks `from` to `to` of a strip with one or two blocks of tokens, onto what the sums hold. `fresh`: the chunks are not decoded yet.
// `ring`: there is room for two of them, else for all.
INLINE void multiply_tiles(const struct region *region, struct source *source, int64_t block, int two, int fresh, int ring, uint8_t *tiles) {
    int64_t step = 64 * block_tokens(region), from = region->from, to = region->to;
    int stride = 4 * block_tokens(region);
    const uint8_t *first = packed_block(region, block), *second = two ? packed_block(region, block + 1) : NULL;
    if (fresh) decode_chunk(source, from, tiles);
    for (int64_t chunk = from; chunk < to; chunk++) {
        const uint8_t *weight = tiles + (ring ? (chunk - from) % 2 : chunk - from) * CHUNK_BYTES;
        uint8_t *next = tiles + (ring ? (chunk + 1 - from) % 2 : chunk + 1 - from) * CHUNK_BYTES;
        for (int j = 0; j < 4; j++) {
            if (fresh && chunk + 1 < to) decode_quarter(source, chunk + 1, j, next);
            TILE_LOAD(4, weight + j * TILE_BYTES, 64);
            TILE_LOAD(5, weight + j * TILE_BYTES + 1024, 64);
            TILE_LOAD(6, first + (4 * chunk + j) * step, stride);
            if (two) {
                TILE_LOAD(7, second + (4 * chunk + j) * step, stride);
                TILE_MULTIPLY(0, 4, 6);
                TILE_MULTIPLY(1, 5, 6);
                TILE_MULTIPLY(2, 4, 7);
                TILE_MULTIPLY(3, 5, 7);
            } else if (j % 2 == 0) {  // the sums of one block alternate: a product waits for the one before it on the same sum
                TILE_MULTIPLY(0, 4, 6);
                TILE_MULTIPLY(1, 5, 6);
            } else {
                TILE_MULTIPLY(2, 4, 6);
                TILE_MULTIPLY(3, 5, 6);
            }
        }
    }
}

// Puts the outputs of a block: the sums [16 outputs, 16 tokens] of both halves of the strip.
static void put_block(const struct region *region, int64_t strip, int64_t block, const float *sums) {
    int64_t there = least(region->count - block * BLOCK, BLOCK);
    for (int half = 0; half < 2; half++) {
        int64_t first = strip * STRIP + 16 * half;
        if (first >= region->job->outputs) return;
        __m512i rows[16];
        for (int i = 0; i < 16; i++) rows[i] = _mm512_load_si512(sums + 256 * half + 16 * i);
        transpose(rows);
        for (int i = 0; i < there; i++) put(region->job, region->start + block * BLOCK + i, first, _mm512_castsi512_ps(rows[i]));
    }
}

// Multiplies one strip with all tokens of the region; `sums` is 64 bytes aligned.
INLINE void strip_with_amx(const struct region *region, struct source *source, int64_t strip, uint8_t *tiles, float (*sums)[256]) {
    const struct job *job = region->job;
    int64_t blocks = ceil_div(region->count, BLOCK);
    int ring = blocks <= 2, begins = region->from == 0, ends = region->to == chunks(job);
    begin(source, job, strip);
    for (int64_t block = 0; block < blocks; block += 2) {
        int two = block + 1 < blocks;
        TILE_ZERO(2);
        TILE_ZERO(3);
        if (begins) {
            TILE_ZERO(0);
            TILE_ZERO(1);
        } else {
            TILE_LOAD(0, waiting(region, strip, block), 64);
            TILE_LOAD(1, waiting(region, strip, block) + 1024, 64);
            if (two) {
                TILE_LOAD(2, waiting(region, strip, block + 1), 64);
                TILE_LOAD(3, waiting(region, strip, block + 1) + 1024, 64);
            }
        }
        if (two)
            multiply_tiles(region, source, block, 1, block == 0, ring, tiles);
        else
            multiply_tiles(region, source, block, 0, block == 0, ring, tiles);
        TILE_STORE(sums[0], 64, 0);
        TILE_STORE(sums[1], 64, 1);
        TILE_STORE(sums[2], 64, 2);
        TILE_STORE(sums[3], 64, 3);
        if (!two)
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < 256; i++) sums[half][i] += sums[2 + half][i];
        for (int64_t i = 0; i <= two; i++) {
            if (ends)
                put_block(region, strip, block + i, sums[2 * i]);
            else
                memcpy(waiting(region, strip, block + i), sums[2 * i], 2048);
        }
    }
}

static void multiply_with_amx(void *argument) {
    struct region *region = argument;
    const struct job *job = region->job;
    int64_t thread = atomic_fetch_add(&region->thread, 1);
    uint8_t *tiles = job->workspace + TOKENS * chunks(job) * CHUNK * 2 + thread * SCRATCH;
    float sums[4][256] __attribute__((aligned(64))) = {{0}};
    struct source source;
    configure_tiles(block_tokens(region));
    for (;;) {
        int64_t strip = atomic_fetch_add(&region->next, 1);
        if (strip >= strips(job)) break;
        strip_with_amx(region, &source, strip, tiles, sums);
    }
    __asm__ volatile("tilerelease" ::);
}

// ---- without AMX ----

static void pack_rows(void *argument) {
    struct region *region = argument;
    const struct job *job = region->job;
    int64_t width = chunks(job) * CHUNK;
    for (;;) {
        int64_t token = atomic_fetch_add(&region->next, 1);
        if (token >= region->count) return;
        uint16_t *to = (uint16_t *)job->workspace + token * width;
        memcpy(to, job->x + (region->start + token) * job->inputs, (size_t)job->inputs * 2);
        memset(to + job->inputs, 0, (size_t)(width - job->inputs) * 2);
    }
}

// Sixteen sums, one of the sixteen numbers of each.
INLINE __m512 sums_of(__m512 parts[16]) {
    for (int i = 0; i < 8; i++) {  // now parts[i] has two numbers of 2 i and of 2 i + 1 in each lane, in turn
        __m512 a = parts[2 * i], b = parts[2 * i + 1];
        parts[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {  // one number of each of four
        __m512d a = _mm512_castps_pd(parts[2 * i]), b = _mm512_castps_pd(parts[2 * i + 1]);
        parts[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++) {  // two lanes of one four, then two of the other
        __m512 a = parts[2 * i], b = parts[2 * i + 1];
        parts[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(parts[0], parts[1], 0x88), _mm512_shuffle_f32x4(parts[0], parts[1], 0xdd));
}

// Adds the products of `count` tokens with a strip of `depth` tiles onto `sums` [tokens, 32].
INLINE void multiply_rows(const uint8_t *tiles, int64_t depth, const uint16_t *x, int64_t width, float *sums, int count) {
    int step = 16 / count;
    for (int row = 0; row < STRIP; row += step) {
        __m512 parts[16];
        for (int i = 0; i < 16; i++) parts[i] = _mm512_setzero_ps();
        for (int64_t tile = 0; tile < depth; tile++) {
            for (int i = 0; i < step; i++) {
                __m512i weight = _mm512_load_si512(tiles + tile * TILE_BYTES + 64 * (row + i));
                for (int t = 0; t < count; t++) {
                    __m512i inputs = _mm512_load_si512(x + t * width + 32 * tile);
                    parts[t * step + i] = add_products(parts[t * step + i], weight, inputs);
                }
            }
        }
        float all[16] __attribute__((aligned(64)));
        _mm512_store_ps(all, sums_of(parts));
        for (int t = 0; t < count; t++)
            for (int i = 0; i < step; i++) sums[t * STRIP + row + i] += all[t * step + i];
    }
}

INLINE void strip_without_amx(const struct region *region, struct source *source, int64_t strip, uint8_t *tiles) {
    const struct job *job = region->job;
    int64_t width = chunks(job) * CHUNK;
    float *sums = (float *)(tiles + SHALLOW * CHUNK_BYTES);
    begin(source, job, strip);
    memset(sums, 0, (size_t)region->count * STRIP * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks(job); chunk += SHALLOW) {
        int64_t deep = least(SHALLOW, chunks(job) - chunk), token = 0;
        for (int64_t i = 0; i < deep; i++) decode_chunk(source, chunk + i, tiles + i * CHUNK_BYTES);
        const uint16_t *x = (const uint16_t *)job->workspace + chunk * CHUNK;
        for (; token + 4 <= region->count; token += 4) multiply_rows(tiles, 4 * deep, x + token * width, width, sums + token * STRIP, 4);
        for (; token + 2 <= region->count; token += 2) multiply_rows(tiles, 4 * deep, x + token * width, width, sums + token * STRIP, 2);
        for (; token < region->count; token++) multiply_rows(tiles, 4 * deep, x + token * width, width, sums + token * STRIP, 1);
    }
    for (int64_t token = 0; token < region->count; token++)
        for (int64_t first = 0; first < STRIP && strip * STRIP + first < job->outputs; first += 16)
            put(job, region->start + token, strip * STRIP + first, _mm512_load_ps(sums + token * STRIP + first));
}

static void multiply_without_amx(void *argument) {
    struct region *region = argument;
    const struct job *job = region->job;
    int64_t thread = atomic_fetch_add(&region->thread, 1);
    uint8_t *tiles = job->workspace + TOKENS * chunks(job) * CHUNK * 2 + thread * SCRATCH;
    struct source source;
    for (;;) {
        int64_t strip = atomic_fetch_add(&region->next, 1);
        if (strip >= strips(job)) return;
        strip_without_amx(region, &source, strip, tiles);
    }
}

// ---- several jobs of few tokens at once: the experts of a step ----

// `count` jobs of one shape, whose strips all threads take as if they were of one weight.
struct batch {
    const struct job *jobs;
    int64_t count;
    uint8_t *scratch;  // of the threads
    atomic_long next, thread;
};

enum { FEW = 2 * BLOCK };  // tokens of a job in a batch, at most

// Bytes of the packed tokens of a job in a batch.
INLINE int64_t packed_bytes(const struct job *job) { return ceil_div(job->tokens, BLOCK) * BLOCK * chunks(job) * CHUNK * 2; }

static void pack_batch(void *argument) {
    struct batch *batch = argument;
    for (;;) {
        int64_t index = atomic_fetch_add(&batch->next, 1);
        if (index >= batch->count) return;
        struct region region = {.job = batch->jobs + index, .count = batch->jobs[index].tokens};
        (region.job->amx ? pack_for_amx : pack_rows)(&region);
    }
}

static void multiply_batch(void *argument) {
    struct batch *batch = argument;
    int64_t each = strips(batch->jobs), configured = -1;
    uint8_t *tiles = batch->scratch + atomic_fetch_add(&batch->thread, 1) * SCRATCH;
    float sums[4][256] __attribute__((aligned(64))) = {{0}};
    struct source source;
    for (;;) {
        int64_t number = atomic_fetch_add(&batch->next, 1), index = number / each;
        if (index >= batch->count) break;
        const struct job *job = batch->jobs + index;
        struct region region = {.job = job, .count = job->tokens, .to = chunks(job)};
        if (!job->amx) {
            strip_without_amx(&region, &source, number % each, tiles);
            continue;
        }
        if (index != configured) configure_tiles(block_tokens(&region));
        configured = index;
        strip_with_amx(&region, &source, number % each, tiles, sums);
    }
    if (configured >= 0) __asm__ volatile("tilerelease" ::);
}

// ---- what native.py calls ----

// Bytes that `workspace` must have: room for packed tokens, for what each thread decodes, and for sums that wait.
int64_t qtool_workspace(const struct job *job) {
    int64_t bytes = TOKENS * chunks(job) * CHUNK * 2 + (int64_t)job->threads * SCRATCH;
    return job->amx && job->tokens > 2 * BLOCK && chunks(job) > DEEP ? bytes + strips(job) * (TOKENS / BLOCK) * 2048 : bytes;
}

static void together(struct region *region, int64_t from, int64_t to, void (*part)(void *)) {
    region->from = from, region->to = to;
    atomic_store(&region->next, 0);
    atomic_store(&region->thread, 0);
    region->job->parallel(part, region, (unsigned)region->job->threads, 0);
}

void qtool_linear(const struct job *job) {
    struct region region = {.job = job};
    for (; region.start < job->tokens; region.start += TOKENS) {
        region.count = least(TOKENS, job->tokens - region.start);
        void (*pack)(void *) = job->amx ? pack_for_amx : pack_rows;
        atomic_store(&region.next, 0);
        if (region.count <= BLOCK)
            pack(&region);  // sooner done than the threads come together
        else
            together(&region, 0, 0, pack);
        if (!job->amx) {
            together(&region, 0, chunks(job), multiply_without_amx);
            continue;
        }
        int64_t step = region.count <= 2 * BLOCK ? chunks(job) : DEEP;
        for (int64_t from = 0; from < chunks(job); from += step) together(&region, from, least(from + step, chunks(job)), multiply_with_amx);
    }
}

// Bytes that the `workspace` of the first of `count` jobs must have for `qtool_experts`.
int64_t qtool_experts_workspace(const struct job *jobs, int64_t count) {
    int64_t few = (int64_t)jobs->threads * SCRATCH, most = 0;
    for (int64_t i = 0; i < count; i++) {
        if (jobs[i].tokens <= FEW)
            few += packed_bytes(jobs + i);
        else if (qtool_workspace(jobs + i) > most)
            most = qtool_workspace(jobs + i);
    }
    return few > most ? few : most;
}

// Jobs of one shape, those of few tokens first.
void qtool_experts(struct job *jobs, int64_t count) {
    uint8_t *workspace = jobs->workspace;
    struct batch batch = {.jobs = jobs, .scratch = workspace};
    int64_t tokens = 0;
    for (; batch.count < count && jobs[batch.count].tokens <= FEW; batch.count++) {
        tokens += jobs[batch.count].tokens;
        jobs[batch.count].workspace = batch.scratch;
        batch.scratch += packed_bytes(jobs + batch.count);
    }
    if (batch.count) {
        if (tokens <= BLOCK)
            pack_batch(&batch);  // sooner done than the threads come together
        else
            jobs->parallel(pack_batch, &batch, (unsigned)jobs->threads, 0);
        atomic_store(&batch.next, 0);
        jobs->parallel(multiply_batch, &batch, (unsigned)jobs->threads, 0);
    }
    for (int64_t i = batch.count; i < count; i++) {
        jobs[i].workspace = workspace;
        qtool_linear(jobs + i);
    }
}

// Whether the CPU has AMX for bf16 and Linux lets this process use it.
int qtool_amx(void) {
    unsigned a, b, c, d;
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };  // ARCH_REQ_XCOMP_PERM in asm/prctl.h, XFEATURE_XTILEDATA
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

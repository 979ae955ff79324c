// What all C of this package shares: x86 CPUs with AVX512, bf16 in and out, the threads of torch.

#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef void parallel_fn(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel of the OpenMP that torch runs on

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sixteen bf16 as f32.
INLINE __m512 wide(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

// Sixteen f32 as bf16, to the nearest, ties to even. A NaN stays one, as its highest fraction bit is set.
INLINE __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

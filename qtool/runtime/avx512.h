// What all C of this package shares: x86 CPUs with AVX512, bf16 in and out, the threads of torch.

#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef void parallel_fn(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel of the OpenMP that torch runs on

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of 16 numbers; none when it is below 0.
INLINE __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

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

// 2^x, to 2e-7 of itself: the Taylor series of 2^f for |f| <= 1/2, times a power of two.
INLINE __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, whole);
    static const float terms[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};
    __m512 sum = _mm512_set1_ps(terms[0]);
    for (int i = 1; i < 7; i++) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, whole);
}

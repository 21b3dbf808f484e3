// Lane types for philox.h and kernels.inc: the only code that differs between instruction sets.
//
// Lane order of blocks. A register holds one word of `width` Philox blocks (4 elements each). Block number V j + b, with V =
// width / 4 the number of 128-bit parts, sits in lane 4 b + j, so that a transposition inside each part leaves elements in order.
#pragma once

#include "philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ebmfast {
namespace {

#if defined(EBMFAST_SCALAR)

using VectorLane = ScalarLane;

#elif defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct VectorLane {
    static constexpr int width = 16;
    using F = __m512;
    using I = __m512i;
    struct Wide {
        __m512i even, odd;
    };
    using M = __mmask16;

    static EBMFAST_HD F set(float v) { return _mm512_set1_ps(v); }
    static EBMFAST_HD I set_int(uint32_t v) { return _mm512_set1_epi32(int(v)); }
    static EBMFAST_HD F load(const float* p) { return _mm512_loadu_ps(p); }
    static EBMFAST_HD I load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static EBMFAST_HD F load_bf16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
    }
    static EBMFAST_HD void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static EBMFAST_HD void store_blocks(float* p, F a, F b, F c, F d) {
        const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
        const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
        store(p, _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0)));
        store(p + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0)));
        store(p + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1)));
        store(p + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1)));
    }
    static EBMFAST_HD I block_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }

    static EBMFAST_HD I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static EBMFAST_HD I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static EBMFAST_HD I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
    static EBMFAST_HD I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
    template <int n> static EBMFAST_HD I shl(I a) { return _mm512_slli_epi32(a, n); }
    template <int n> static EBMFAST_HD I sar(I a) { return _mm512_srai_epi32(a, n); }

    static EBMFAST_HD Wide widen(I a) { return {a, _mm512_srli_epi64(a, 32)}; }
    static EBMFAST_HD I narrow(Wide a) { return shuffle_into<0xAAAA, _MM_PERM_CCAA>(a.even, a.odd); }
    static EBMFAST_HD I narrow_high(Wide a) { return shuffle_into<0x5555, _MM_PERM_DDBB>(a.odd, a.even); }
    template <int lanes, int order> static EBMFAST_HD I shuffle_into(I to, I from) {
        return _mm512_mask_shuffle_epi32(to, lanes, from, _MM_PERM_ENUM(order));
    }
    static EBMFAST_HD Wide set_wide(uint32_t v) { return {set_int(v), set_int(v)}; }
    static EBMFAST_HD Wide mul_wide(Wide a, uint32_t m) {
        return {_mm512_mul_epu32(a.even, _mm512_set1_epi64(m)), _mm512_mul_epu32(a.odd, _mm512_set1_epi64(m))};
    }
    static EBMFAST_HD Wide high(Wide a) { return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)}; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b) { return {_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)}; }
    static EBMFAST_HD I xor_three(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
    static EBMFAST_HD void store_wide(uint32_t* p, Wide a) {
        _mm512_storeu_si512(p, a.even);
        _mm512_storeu_si512(p + 16, a.odd);
    }
    static EBMFAST_HD Wide load_wide(const uint32_t* p) { return {load_int(p), load_int(p + 16)}; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b, Wide c) {
        return {_mm512_ternarylogic_epi64(a.even, b.even, c.even, 0x96), _mm512_ternarylogic_epi64(a.odd, b.odd, c.odd, 0x96)};
    }

    static EBMFAST_HD I as_int(F a) { return _mm512_castps_si512(a); }
    static EBMFAST_HD F as_float(I a) { return _mm512_castsi512_ps(a); }
    static EBMFAST_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static EBMFAST_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
    static EBMFAST_HD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static EBMFAST_HD F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static EBMFAST_HD F from_int(I a) { return _mm512_cvtepi32_ps(a); }
    static EBMFAST_HD F plus_half(I a) { return add(_mm512_cvtepu32_ps(a), set(0.5f)); }
    static EBMFAST_HD F at_least(F lo, F t) { return _mm512_max_ps(lo, t); }
    static EBMFAST_HD F at_most(F hi, F t) { return _mm512_min_ps(hi, t); }
    static EBMFAST_HD M finite(F a) { return _mm512_cmp_ps_mask(_mm512_abs_ps(a), set(__builtin_inff()), _CMP_LT_OQ); }
    static EBMFAST_HD M sign(I a) { return _mm512_movepi32_mask(a); }
    template <int n> static EBMFAST_HD M bit(I a) { return _mm512_test_epi32_mask(a, set_int(1u << n)); }
    static EBMFAST_HD F flip_sign(F a, I b) { return as_float(_mm512_ternarylogic_epi32(as_int(a), b, set_int(0x80000000u), 0x78)); }
    static EBMFAST_HD F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
    static EBMFAST_HD uint32_t bits(M m) { return m; }
    static EBMFAST_HD uint32_t not_finite(F a) { return _mm512_fpclass_ps_mask(a, 0x99); }  // quiet and signalling NaN, +inf, -inf
    static EBMFAST_HD M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }

    static EBMFAST_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static EBMFAST_HD F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static EBMFAST_HD F div(F a, F b) { return _mm512_div_ps(a, b); }
    static EBMFAST_HD F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static EBMFAST_HD F times_power_of_2(F a, F n) { return _mm512_scalef_ps(a, n); }
    // One Newton step from 14 bits; 1 ulp for normal a with a normal reciprocal.
    static EBMFAST_HD F reciprocal(F a) {
        const F y = _mm512_rcp14_ps(a);
        return fma(y, fnma(a, y, set(1.0f)), y);
    }
#if defined(__AVX512BF16__)
    // Pairs of bfloat16 in 32-bit lanes: acc + a.low b.low + a.high b.high; and the pair (low, high) of two registers.
    static EBMFAST_HD F dot_pairs(I a, I b, F acc) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
    static EBMFAST_HD I pair(F low, F high) {
        const __m512i order = _mm512_add_epi32(
            _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), set_int(0x00010001u)), set_int(0x00100000u)
        );
        return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    static EBMFAST_HD void store_int(uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
#endif
};

#elif defined(__AVX2__)

struct VectorLane {
    static constexpr int width = 8;
    using F = __m256;
    using I = __m256i;
    struct Wide {
        __m256i even, odd;
    };
    using M = __m256;

    static EBMFAST_HD F set(float v) { return _mm256_set1_ps(v); }
    static EBMFAST_HD I set_int(uint32_t v) { return _mm256_set1_epi32(int(v)); }
    static EBMFAST_HD F load(const float* p) { return _mm256_loadu_ps(p); }
    static EBMFAST_HD I load_int(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static EBMFAST_HD F load_bf16(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
    }
    static EBMFAST_HD void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static EBMFAST_HD void store_blocks(float* p, F a, F b, F c, F d) {
        const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
        const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
        store(p, _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0)));
        store(p + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0)));
        store(p + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1)));
        store(p + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1)));
    }
    static EBMFAST_HD I block_order() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }

    static EBMFAST_HD I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static EBMFAST_HD I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static EBMFAST_HD I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
    static EBMFAST_HD I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
    template <int n> static EBMFAST_HD I shl(I a) { return _mm256_slli_epi32(a, n); }
    template <int n> static EBMFAST_HD I sar(I a) { return _mm256_srai_epi32(a, n); }

    static EBMFAST_HD Wide widen(I a) { return {a, _mm256_srli_epi64(a, 32)}; }
    static EBMFAST_HD I narrow(Wide a) { return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA); }
    static EBMFAST_HD I narrow_high(Wide a) { return _mm256_blend_epi32(_mm256_srli_epi64(a.even, 32), a.odd, 0xAA); }
    static EBMFAST_HD Wide set_wide(uint32_t v) { return {set_int(v), set_int(v)}; }
    static EBMFAST_HD Wide mul_wide(Wide a, uint32_t m) {
        return {_mm256_mul_epu32(a.even, _mm256_set1_epi64x(m)), _mm256_mul_epu32(a.odd, _mm256_set1_epi64x(m))};
    }
    static EBMFAST_HD Wide high(Wide a) { return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)}; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b) { return {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)}; }
    static EBMFAST_HD I xor_three(I a, I b, I c) { return bit_xor(a, bit_xor(b, c)); }
    static EBMFAST_HD void store_wide(uint32_t* p, Wide a) {
        store(reinterpret_cast<float*>(p), as_float(a.even));
        store(reinterpret_cast<float*>(p + 8), as_float(a.odd));
    }
    static EBMFAST_HD Wide load_wide(const uint32_t* p) { return {load_int(p), load_int(p + 8)}; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b, Wide c) {
        return {_mm256_xor_si256(a.even, _mm256_xor_si256(b.even, c.even)), _mm256_xor_si256(a.odd, _mm256_xor_si256(b.odd, c.odd))};
    }

    static EBMFAST_HD I as_int(F a) { return _mm256_castps_si256(a); }
    static EBMFAST_HD F as_float(I a) { return _mm256_castsi256_ps(a); }
    static EBMFAST_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static EBMFAST_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
    static EBMFAST_HD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static EBMFAST_HD F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static EBMFAST_HD F from_int(I a) { return _mm256_cvtepi32_ps(a); }
    // float(a) from its 16-bit halves, both exact as 2^39 + 2^16 hi and 2^23 + lo, with one rounding in their sum.
    static EBMFAST_HD F plus_half(I a) {
        const I high = _mm256_or_si256(_mm256_srli_epi32(a, 16), set_int(0x53000000u));
        const I low = _mm256_blend_epi16(a, set_int(0x4B000000u), 0xAA);
        return add(add(sub(as_float(high), set(0x1p39f + 0x1p23f)), as_float(low)), set(0.5f));
    }
    static EBMFAST_HD F at_least(F lo, F t) { return _mm256_max_ps(lo, t); }
    static EBMFAST_HD F at_most(F hi, F t) { return _mm256_min_ps(hi, t); }
    static EBMFAST_HD M finite(F a) {
        return _mm256_cmp_ps(_mm256_andnot_ps(set(-0.0f), a), set(__builtin_inff()), _CMP_LT_OQ);
    }
    static EBMFAST_HD M sign(I a) { return as_float(a); }
    template <int n> static EBMFAST_HD M bit(I a) { return sign(shl<31 - n>(a)); }
    static EBMFAST_HD F flip_sign(F a, I b) { return as_float(bit_xor(as_int(a), bit_and(b, set_int(0x80000000u)))); }
    static EBMFAST_HD F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
    static EBMFAST_HD uint32_t bits(M m) { return uint32_t(_mm256_movemask_ps(m)); }
    static EBMFAST_HD uint32_t not_finite(F a) { return bits(finite(a)) ^ 0xFFu; }
    static EBMFAST_HD M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }

    static EBMFAST_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static EBMFAST_HD F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static EBMFAST_HD F div(F a, F b) { return _mm256_div_ps(a, b); }
    static EBMFAST_HD F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static EBMFAST_HD F times_power_of_2(F a, F n) {
        return mul(a, as_float(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set_int(127)), 23)));
    }
    static EBMFAST_HD F reciprocal(F a) { return div(set(1.0f), a); }
};

#elif defined(__SSE2__)

struct VectorLane {
    static constexpr int width = 4;
    using F = __m128;
    using I = __m128i;
    struct Wide {
        __m128i even, odd;
    };
    using M = __m128;

    static EBMFAST_HD F set(float v) { return _mm_set1_ps(v); }
    static EBMFAST_HD I set_int(uint32_t v) { return _mm_set1_epi32(int(v)); }
    static EBMFAST_HD F load(const float* p) { return _mm_loadu_ps(p); }
    static EBMFAST_HD I load_int(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static EBMFAST_HD F load_bf16(const uint16_t* p) {
        return as_float(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static EBMFAST_HD void store(float* p, F v) { _mm_storeu_ps(p, v); }
    static EBMFAST_HD void store_blocks(float* p, F a, F b, F c, F d) {
        const __m128 ab0 = _mm_unpacklo_ps(a, b), ab1 = _mm_unpackhi_ps(a, b);
        const __m128 cd0 = _mm_unpacklo_ps(c, d), cd1 = _mm_unpackhi_ps(c, d);
        store(p, _mm_movelh_ps(ab0, cd0));
        store(p + 4, _mm_movehl_ps(cd0, ab0));
        store(p + 8, _mm_movelh_ps(ab1, cd1));
        store(p + 12, _mm_movehl_ps(cd1, ab1));
    }
    static EBMFAST_HD I block_order() { return _mm_setr_epi32(0, 1, 2, 3); }

    static EBMFAST_HD I add(I a, I b) { return _mm_add_epi32(a, b); }
    static EBMFAST_HD I sub(I a, I b) { return _mm_sub_epi32(a, b); }
    static EBMFAST_HD I bit_and(I a, I b) { return _mm_and_si128(a, b); }
    static EBMFAST_HD I bit_xor(I a, I b) { return _mm_xor_si128(a, b); }
    template <int n> static EBMFAST_HD I shl(I a) { return _mm_slli_epi32(a, n); }
    template <int n> static EBMFAST_HD I sar(I a) { return _mm_srai_epi32(a, n); }

    static EBMFAST_HD Wide widen(I a) { return {a, _mm_srli_epi64(a, 32)}; }
    static EBMFAST_HD I narrow(Wide a) {
        return _mm_or_si128(_mm_and_si128(a.even, _mm_set1_epi64x(0xFFFFFFFF)), _mm_slli_epi64(a.odd, 32));
    }
    static EBMFAST_HD I narrow_high(Wide a) {
        return _mm_or_si128(_mm_srli_epi64(a.even, 32), _mm_andnot_si128(_mm_set1_epi64x(0xFFFFFFFF), a.odd));
    }
    static EBMFAST_HD Wide set_wide(uint32_t v) { return {set_int(v), set_int(v)}; }
    static EBMFAST_HD Wide mul_wide(Wide a, uint32_t m) {
        return {_mm_mul_epu32(a.even, _mm_set1_epi64x(m)), _mm_mul_epu32(a.odd, _mm_set1_epi64x(m))};
    }
    static EBMFAST_HD Wide high(Wide a) { return {_mm_srli_epi64(a.even, 32), _mm_srli_epi64(a.odd, 32)}; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b) { return {_mm_xor_si128(a.even, b.even), _mm_xor_si128(a.odd, b.odd)}; }
    static EBMFAST_HD I xor_three(I a, I b, I c) { return bit_xor(a, bit_xor(b, c)); }
    static EBMFAST_HD void store_wide(uint32_t* p, Wide a) {
        store(reinterpret_cast<float*>(p), as_float(a.even));
        store(reinterpret_cast<float*>(p + 4), as_float(a.odd));
    }
    static EBMFAST_HD Wide load_wide(const uint32_t* p) { return {load_int(p), load_int(p + 4)}; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b, Wide c) {
        return {_mm_xor_si128(a.even, _mm_xor_si128(b.even, c.even)), _mm_xor_si128(a.odd, _mm_xor_si128(b.odd, c.odd))};
    }

    static EBMFAST_HD I as_int(F a) { return _mm_castps_si128(a); }
    static EBMFAST_HD F as_float(I a) { return _mm_castsi128_ps(a); }
    static EBMFAST_HD F mul(F a, F b) { return _mm_mul_ps(a, b); }
    static EBMFAST_HD F add(F a, F b) { return _mm_add_ps(a, b); }
    static EBMFAST_HD F sub(F a, F b) { return _mm_sub_ps(a, b); }
    static EBMFAST_HD F sqrt(F a) { return _mm_sqrt_ps(a); }
    static EBMFAST_HD F from_int(I a) { return _mm_cvtepi32_ps(a); }
    // As for AVX2: exact halves, one rounding.
    static EBMFAST_HD F plus_half(I a) {
        const I high = _mm_or_si128(_mm_srli_epi32(a, 16), set_int(0x53000000u));
        const I low = _mm_or_si128(_mm_and_si128(a, set_int(0xFFFFu)), set_int(0x4B000000u));
        return add(add(sub(as_float(high), set(0x1p39f + 0x1p23f)), as_float(low)), set(0.5f));
    }
    static EBMFAST_HD F at_least(F lo, F t) { return _mm_max_ps(lo, t); }
    static EBMFAST_HD F at_most(F hi, F t) { return _mm_min_ps(hi, t); }
    static EBMFAST_HD M finite(F a) { return _mm_cmplt_ps(_mm_andnot_ps(set(-0.0f), a), set(__builtin_inff())); }
    static EBMFAST_HD M sign(I a) { return as_float(_mm_srai_epi32(a, 31)); }
    template <int n> static EBMFAST_HD M bit(I a) { return sign(shl<31 - n>(a)); }
    static EBMFAST_HD F flip_sign(F a, I b) { return as_float(bit_xor(as_int(a), bit_and(b, set_int(0x80000000u)))); }
    static EBMFAST_HD F select(M m, F a, F b) { return _mm_or_ps(_mm_and_ps(m, a), _mm_andnot_ps(m, b)); }
    static EBMFAST_HD uint32_t bits(M m) { return uint32_t(_mm_movemask_ps(m)); }
    static EBMFAST_HD uint32_t not_finite(F a) { return bits(finite(a)) ^ 0xFu; }
    static EBMFAST_HD M less(F a, F b) { return _mm_cmplt_ps(a, b); }

    // Two roundings: this level has no fused instruction.
    static EBMFAST_HD F fma(F a, F b, F c) { return add(mul(a, b), c); }
    static EBMFAST_HD F fnma(F a, F b, F c) { return sub(c, mul(a, b)); }
    static EBMFAST_HD F div(F a, F b) { return _mm_div_ps(a, b); }
    // Nearest even, of |a| < 2^22, by an addition that leaves no fraction.
    static EBMFAST_HD F round(F a) { return sub(add(a, set(0x1.8p23f)), set(0x1.8p23f)); }
    static EBMFAST_HD F times_power_of_2(F a, F n) { return mul(a, as_float(_mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n), set_int(127)), 23))); }
    static EBMFAST_HD F reciprocal(F a) { return div(set(1.0f), a); }
};

#else
#error "no lane type for this instruction set: define EBMFAST_SCALAR"
#endif

// Two registers as one lane type, for the noise alone: the long chains of dependent operations of Philox and Box-Muller leave units
// idle, and one call is too long for the processor to look ahead to the next.
template <class L> struct Twice {
    static constexpr int width = 2 * L::width;
    struct F {
        typename L::F a, b;
    };
    struct I {
        typename L::I a, b;
    };
    struct Wide {
        typename L::Wide a, b;
    };
    struct M {
        typename L::M a, b;
    };

    static EBMFAST_HD F set(float v) { return {L::set(v), L::set(v)}; }
    static EBMFAST_HD I set_int(uint32_t v) { return {L::set_int(v), L::set_int(v)}; }
    static EBMFAST_HD I load_int(const uint32_t* p) { return {L::load_int(p), L::load_int(p + L::width)}; }
    static EBMFAST_HD I add(I x, I y) { return {L::add(x.a, y.a), L::add(x.b, y.b)}; }
    static EBMFAST_HD I sub(I x, I y) { return {L::sub(x.a, y.a), L::sub(x.b, y.b)}; }
    static EBMFAST_HD I bit_and(I x, I y) { return {L::bit_and(x.a, y.a), L::bit_and(x.b, y.b)}; }
    static EBMFAST_HD I bit_xor(I x, I y) { return {L::bit_xor(x.a, y.a), L::bit_xor(x.b, y.b)}; }
    template <int n> static EBMFAST_HD I shl(I x) { return {L::template shl<n>(x.a), L::template shl<n>(x.b)}; }
    template <int n> static EBMFAST_HD I sar(I x) { return {L::template sar<n>(x.a), L::template sar<n>(x.b)}; }
    static EBMFAST_HD Wide widen(I x) { return {L::widen(x.a), L::widen(x.b)}; }
    static EBMFAST_HD I narrow(Wide x) { return {L::narrow(x.a), L::narrow(x.b)}; }
    static EBMFAST_HD Wide set_wide(uint32_t v) { return {L::set_wide(v), L::set_wide(v)}; }
    static EBMFAST_HD Wide mul_wide(Wide x, uint32_t m) { return {L::mul_wide(x.a, m), L::mul_wide(x.b, m)}; }
    static EBMFAST_HD Wide high(Wide x) { return {L::high(x.a), L::high(x.b)}; }
    static EBMFAST_HD I narrow_high(Wide x) { return {L::narrow_high(x.a), L::narrow_high(x.b)}; }
    static EBMFAST_HD I xor_three(I x, I y, I z) { return {L::xor_three(x.a, y.a, z.a), L::xor_three(x.b, y.b, z.b)}; }
    static EBMFAST_HD Wide load_wide(const uint32_t* p) { return {L::load_wide(p), L::load_wide(p + 2 * L::width)}; }
    static EBMFAST_HD Wide xor_wide(Wide x, Wide y) { return {L::xor_wide(x.a, y.a), L::xor_wide(x.b, y.b)}; }
    static EBMFAST_HD Wide xor_wide(Wide x, Wide y, Wide z) { return {L::xor_wide(x.a, y.a, z.a), L::xor_wide(x.b, y.b, z.b)}; }
    static EBMFAST_HD I as_int(F x) { return {L::as_int(x.a), L::as_int(x.b)}; }
    static EBMFAST_HD F as_float(I x) { return {L::as_float(x.a), L::as_float(x.b)}; }
    static EBMFAST_HD F mul(F x, F y) { return {L::mul(x.a, y.a), L::mul(x.b, y.b)}; }
    static EBMFAST_HD F add(F x, F y) { return {L::add(x.a, y.a), L::add(x.b, y.b)}; }
    static EBMFAST_HD F sub(F x, F y) { return {L::sub(x.a, y.a), L::sub(x.b, y.b)}; }
    static EBMFAST_HD F sqrt(F x) { return {L::sqrt(x.a), L::sqrt(x.b)}; }
    static EBMFAST_HD F from_int(I x) { return {L::from_int(x.a), L::from_int(x.b)}; }
    static EBMFAST_HD F plus_half(I x) { return {L::plus_half(x.a), L::plus_half(x.b)}; }
    static EBMFAST_HD F at_most(F hi, F t) { return {L::at_most(hi.a, t.a), L::at_most(hi.b, t.b)}; }
    template <int n> static EBMFAST_HD M bit(I x) { return {L::template bit<n>(x.a), L::template bit<n>(x.b)}; }
    static EBMFAST_HD F flip_sign(F x, I y) { return {L::flip_sign(x.a, y.a), L::flip_sign(x.b, y.b)}; }
    static EBMFAST_HD F select(M m, F x, F y) { return {L::select(m.a, x.a, y.a), L::select(m.b, x.b, y.b)}; }
};

}  // namespace
}  // namespace ebmfast

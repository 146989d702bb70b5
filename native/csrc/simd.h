// Vectors of W floats that compile for any CPU (GCC's vector extension), and the few operations kernels need on them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ENGINE_AVX512 1
#if defined(__AVX512BF16__)
#define ENGINE_AVX512_BF16 1
#endif
#endif

namespace simd {

#ifdef ENGINE_AVX512
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// To nearest even; a NaN stays one.
inline void store(bf16* p, vf v) {
#ifdef ENGINE_AVX512_BF16
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu is_nan = (vu)(v != v);
    vh h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), vh);
    std::memcpy(p, &h, sizeof h);
#endif
}

inline vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
inline vf max(vf a, vf b) { return select(a > b, a, b); }
inline vf min(vf a, vf b) { return select(a < b, a, b); }

inline vi iota() {
    vi v;
    for (int i = 0; i < W; i++) v[i] = i;
    return v;
}

// Sums and maxima over the lanes, always in the same order.
inline float sum(vf v) {
    float s[W];
    store(s, v);
    for (int n = W / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}

inline float max(vf v) {
    float s[W];
    store(s, v);
    for (int n = W / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
    return s[0];
}

// r[i] = sum of the lanes of a[i]. The order of additions does not depend on i: equal vectors give equal sums.
inline vf row_sums(const vf (&a)[W]) {
#if defined(ENGINE_AVX512)
    __m512 t[8], u[4], x[2];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]),
                             _mm512_unpackhi_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d p = _mm512_castps_pd(t[2 * i]), q = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    for (int i = 0; i < 2; i++)
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xDD));
    return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xDD));
#elif defined(__AVX2__)
    __m256 t[4];
    for (int i = 0; i < 4; i++) t[i] = _mm256_hadd_ps((__m256)a[2 * i], (__m256)a[2 * i + 1]);
    __m256 x = _mm256_hadd_ps(t[0], t[1]), y = _mm256_hadd_ps(t[2], t[3]);
    return (vf)_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
#else
    vf r;
    for (int i = 0; i < W; i++) r[i] = sum(a[i]);
    return r;
#endif
}

// e^x with a relative error of a few 1e-8 (range reduction by ln 2 in two parts, then the Taylor series to x^7);
// 0 below the smallest normal number, and x is taken as 88.3 above that.
inline vf exp(vf x) {
    vi tiny = x < -87.3f;
    vf y = min(max(x, splat(-87.3f)), splat(88.3f));
    vf n = y * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer nearest ends up in the low bits
    vi exponent = (vi)n << 23;
    n -= 12582912.0f;
    vf r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vf)(~tiny & (vi)((vi)p + exponent));
}

// tanh x: the odd series x + x^3 P(x^2) of Cephes' tanhf below 0.625, 1 - 2 / (e^2x + 1) above.
inline vf tanh(vf x) {
    vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    vf small = x + x * z * p;
    vf large = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
    return select(z < 0.390625f, small, large);
}

}  // namespace simd

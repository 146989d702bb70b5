// The two inner products of attention, over a tile of TILE keys: in floats, and in pairs of bfloat16.
//
// A kernel says how it keeps queries (Query, padded), softmax weights (Weight) and results (State::acc, `padded` floats
// a row, in any order of dimensions that `finish` knows to undo).
#pragma once

#include "simd.h"

namespace attention {

using namespace simd;

constexpr int TILE = 64;
constexpr int MAX_MT = W / 4;  // queries handled at once: as many as the registers hold with 4 vectors each

// Where the keys and values of a tile lie; entries past its last key repeat that key.
template <class T>
struct Tile {
    const T *k[TILE], *v[TILE];
};

// Brings rows of the next tile near while this one is worked on: they lie scattered, and no CPU guesses where. Into L2,
// which doubles the speed of a pool that lies in memory; into L1 there are too few misses under way at a time.
template <class T>
inline void prefetch(const T* const* rows, int count, int64_t head_dim) {
    for (int i = 0; i < count; i++)
        for (int64_t byte = 0; byte < head_dim * (int64_t)sizeof(T); byte += 64)
            __builtin_prefetch((const char*)rows[i] + byte, 0, 2);
}

// Scatters one vector of MT x KT sums to rows of the score matrix.
template <int MT>
inline void store_scores(float* s, vf sums) {
    constexpr int KT = W / MT;
    float flat[W];
    store(flat, sums);
    for (int m = 0; m < MT; m++) std::memcpy(s + m * TILE, flat + m * KT, KT * sizeof(float));
}

// float32, and bfloat16 widened to it.
template <class T>
struct Floats {
    typedef T Value;
    typedef float Query;
    typedef float Weight;
    static constexpr int CHUNK = W;  // dimensions that one vector of values covers
    static constexpr int CHUNKS = 4;

    static int64_t padded(int64_t head_dim) { return head_dim; }

    static void load_query(Query* to, const T* from, int64_t head_dim) {
        for (int64_t d = 0; d < head_dim; d += W) store(to + d, load(from + d));
    }

    static void load_weights(Weight* to, int j, vf p) { store(to + j, p); }

    // s[m][j] = q[m] . k[j]; `next` is the tile whose keys to fetch meanwhile, if any.
    template <int MT>
    static void scores(const Query* q, const Tile<T>& tile, int n, int64_t head_dim, const Tile<T>* next, float* s) {
        constexpr int KT = W / MT;
        for (int j = 0; j < n; j += KT) {
            vf acc[W] = {};
            for (int64_t d = 0; d < head_dim; d += W) {
                vf query[MT];
#pragma GCC unroll 4
                for (int m = 0; m < MT; m++) query[m] = load(q + m * head_dim + d);
#pragma GCC unroll 16
                for (int i = 0; i < KT; i++) {
                    vf key = load(tile.k[j + i] + d);
#pragma GCC unroll 4
                    for (int m = 0; m < MT; m++) acc[m * KT + i] += query[m] * key;
                }
            }
            store_scores<MT>(s + j, row_sums(acc));
            if (next) prefetch(next->k + j, KT, head_dim);
        }
    }

    // acc[m][d..] = acc * rescale[m] + sum over j of p[m][j] v[j][d..], for C vectors of dimensions.
    template <int MT, int C>
    static void values(const Weight* p, const Tile<T>& tile, int n, int64_t d, int64_t head_dim, const float* rescale,
                       const Tile<T>* next, float* acc) {
        vf sums[MT][C];
#pragma GCC unroll 4
        for (int m = 0; m < MT; m++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sums[m][c] = load(acc + m * head_dim + d + c * W) * rescale[m];
        for (int j = 0; j < n; j++) {
            if (next) prefetch(next->v + j, 1, head_dim);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                vf value = load(tile.v[j] + d + c * W);
#pragma GCC unroll 4
                for (int m = 0; m < MT; m++) sums[m][c] += value * p[m * TILE + j];
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < MT; m++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) store(acc + m * head_dim + d + c * W, sums[m][c]);
    }

    static void finish(T* out, const float* acc, float sum, int64_t head_dim) {
        for (int64_t d = 0; d < head_dim; d += W) store(out + d, load(acc + d) / sum);
    }
};

#ifdef ENGINE_AVX512_BF16

// bfloat16 multiplied in pairs, added up in float32. Weights are rounded to bfloat16 for the second product. Values of
// two neighbouring keys are interleaved, which leaves dimensions in the order of `unpack` within every 32.
struct Pairs {
    typedef bf16 Value;
    typedef uint16_t Query;
    typedef uint16_t Weight;
    static constexpr int CHUNK = 32;
    static constexpr int CHUNKS = 2;

    static int64_t padded(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

    static __m512i load32(const void* p, int64_t left) {
        return left >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(0xffff, p);
    }

    static void load_query(Query* to, const bf16* from, int64_t head_dim) {
        for (int64_t d = 0; d < head_dim; d += 32) _mm512_storeu_si512(to + d, load32(from + d, head_dim - d));
    }

    static void load_weights(Weight* to, int j, vf p) {
        __m256bh h = _mm512_cvtneps_pbh((__m512)p);
        std::memcpy(to + j, &h, sizeof h);
    }

    static __m512 dot(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

    template <int MT>
    static void scores(const Query* q, const Tile<bf16>& tile, int n, int64_t head_dim, const Tile<bf16>* next,
                       float* s) {
        constexpr int KT = W / MT;
        const int64_t width = padded(head_dim), whole = head_dim / 32 * 32;
        for (int j = 0; j < n; j += KT) {
            vf acc[W] = {};
            auto step = [&](int64_t d, auto load_key) {
                __m512i query[MT];
#pragma GCC unroll 4
                for (int m = 0; m < MT; m++) query[m] = _mm512_loadu_si512(q + m * width + d);
#pragma GCC unroll 16
                for (int i = 0; i < KT; i++) {
                    __m512i key = load_key(tile.k[j + i] + d);
#pragma GCC unroll 4
                    for (int m = 0; m < MT; m++)
                        acc[m * KT + i] = (vf)dot((__m512)acc[m * KT + i], query[m], key);
                }
            };
            for (int64_t d = 0; d < whole; d += 32) step(d, [](const bf16* p) { return _mm512_loadu_si512(p); });
            if (whole < head_dim) step(whole, [](const bf16* p) { return _mm512_maskz_loadu_epi16(0xffff, p); });
            store_scores<MT>(s + j, row_sums(acc));
            if (next) prefetch(next->k + j, KT, head_dim);
        }
    }

    template <int MT, int C>
    static void values(const Weight* p, const Tile<bf16>& tile, int n, int64_t d, int64_t head_dim,
                       const float* rescale, const Tile<bf16>* next, float* acc) {
        const int64_t width = padded(head_dim);
        __m512 sums[MT][C][2];
#pragma GCC unroll 4
        for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
            for (int c = 0; c < C; c++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
                    sums[m][c][h] = (__m512)(load(acc + m * width + d + c * 32 + h * 16) * rescale[m]);
        for (int j = 0; j < n; j += 2) {
            if (next) prefetch(next->v + j, 2, head_dim);
#pragma GCC unroll 2
            for (int c = 0; c < C; c++) {
                const int64_t at = d + c * 32;
                __m512i a = load32(tile.v[j] + at, head_dim - at), b = load32(tile.v[j + 1] + at, head_dim - at);
                __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
                for (int m = 0; m < MT; m++) {
                    int32_t pair;
                    std::memcpy(&pair, p + m * TILE + j, 4);
                    __m512i weights = _mm512_set1_epi32(pair);
                    sums[m][c][0] = dot(sums[m][c][0], low, weights);
                    sums[m][c][1] = dot(sums[m][c][1], high, weights);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
            for (int c = 0; c < C; c++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) store(acc + m * width + d + c * 32 + h * 16, (vf)sums[m][c][h]);
    }

    static void finish(bf16* out, const float* acc, float sum, int64_t head_dim) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int64_t d = 0; d < head_dim; d += 32) {
            __m512 low = (__m512)(load(acc + d) / sum), high = (__m512)(load(acc + d + 16) / sum);
            store(out + d, (vf)_mm512_permutex2var_ps(low, first, high));
            if (d + 16 < head_dim) store(out + d + 16, (vf)_mm512_permutex2var_ps(low, second, high));
        }
    }
};

typedef Pairs Bfloat16;
#else
typedef Floats<bf16> Bfloat16;
#endif

}  // namespace attention

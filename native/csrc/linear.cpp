// y = x W^T + bias, for weights laid out in the order they are read: panels of 32 outputs, and in a panel, for one k
// (float32) or two (bfloat16) at a time, the weights of all its outputs.
//
// For few rows of x the time is that of reading W, in one stream. For more rows the arithmetic counts: up to MAX_ROWS
// rows share a pass with all their sums in registers, and a panel is taken in pieces that stay near while the next rows
// use them and, between them, fetch the next piece. Sums run over k in one order, so a row's result has the same bits in
// any company.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

using namespace simd;

#ifdef ENGINE_AVX512

constexpr int PANEL = 32;
constexpr int MAX_ROWS = 12;                // 24 vectors of sums, of 32 registers
constexpr int64_t PIECE_BYTES = 64 * 1024;  // of a panel; a few of them fit L2
constexpr int64_t PARALLEL_WORK = 1 << 16;  // multiply-adds below which waking other threads costs more
constexpr int FETCH_AHEAD = 512;            // bytes
constexpr int LINE = 64;                    // bytes that memory sends together

template <class T>
constexpr int STEP = sizeof(T) == 4 ? 1 : 2;  // elements of k that one multiplication takes

typedef vf Sums[2];

template <int R>
inline void multiply(const float* w, const float* x, Sums* sums) {
    const vf a = load(w), b = load(w + W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        const vf factor = splat(x[r]);
        sums[r][0] += a * factor;
        sums[r][1] += b * factor;
    }
}

#ifdef ENGINE_AVX512_BF16
template <int R>
inline void multiply(const bf16* w, const bf16* x, Sums* sums) {
    const __m512bh a = (__m512bh)_mm512_loadu_si512(w), b = (__m512bh)_mm512_loadu_si512(w + 2 * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        int32_t pair;
        std::memcpy(&pair, x + 2 * r, 4);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = (vf)_mm512_dpbf16_ps((__m512)sums[r][0], a, factor);
        sums[r][1] = (vf)_mm512_dpbf16_ps((__m512)sums[r][1], b, factor);
    }
}
#endif

// Memory to fetch while something else is computed: `lines` from `from` on. One for a step of k, the others are left.
struct Fetch {
    const char* from;
    int64_t lines;
};

// acc [R][PANEL] gets (or, from the second piece on, gains) the products of `count` elements of k. x is packed:
// for each step of k, the R rows' elements side by side. Rows that have the weights to themselves (ALONE) fetch what
// lies just ahead; where several blocks of rows use a piece, each fetches its share of the next one meanwhile.
template <class T, int R, bool ALONE>
void piece(const T* w, const T* x, int64_t count, bool is_first, Fetch next, float* acc) {
    Sums sums[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) sums[r][h] = is_first ? splat(0.0f) : load(acc + r * PANEL + h * W);
    int64_t k = 0;
    const int64_t fetching = ALONE ? count : std::min(count, next.lines * STEP<T>);
    for (; k < fetching; k += STEP<T>) {
        if (ALONE) {
            __builtin_prefetch((const char*)(w + k * PANEL) + FETCH_AHEAD);
            __builtin_prefetch((const char*)(w + k * PANEL) + FETCH_AHEAD + LINE);
        } else {
            __builtin_prefetch(next.from + k / STEP<T> * LINE, 0, 2);  // to L2
        }
        multiply<R>(w + k * PANEL, x + k * R, sums);
    }
    if (!ALONE)
        for (; k < count; k += STEP<T>) multiply<R>(w + k * PANEL, x + k * R, sums);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) store(acc + r * PANEL + h * W, sums[r][h]);
}

template <class T>
using Piece = void (*)(const T*, const T*, int64_t, bool, Fetch, float*);
template <class T, bool ALONE>
constexpr Piece<T> PIECES[MAX_ROWS + 1] = {
    nullptr,            piece<T, 1, ALONE>, piece<T, 2, ALONE>,  piece<T, 3, ALONE>,  piece<T, 4, ALONE>,
    piece<T, 5, ALONE>, piece<T, 6, ALONE>, piece<T, 7, ALONE>,  piece<T, 8, ALONE>,  piece<T, 9, ALONE>,
    piece<T, 10, ALONE>, piece<T, 11, ALONE>, piece<T, 12, ALONE>,
};

// One of `parts` even parts of `count`: from .. to - 1.
struct Part {
    int64_t from, to;
    Part(int64_t index, int64_t parts, int64_t count) : from(count * index / parts), to(count * (index + 1) / parts) {}
    int64_t size() const { return to - from; }
};

template <class T>
void store_panel(const float* acc, const T* bias, T* out, int64_t rows, int64_t n, int64_t first) {
    const int64_t width = std::min<int64_t>(PANEL, n - first);
    T added[PANEL] = {}, result[PANEL];
    if (bias) std::memcpy(added, bias + first, width * sizeof(T));
    for (int64_t row = 0; row < rows; row++) {
        for (int h = 0; h < PANEL; h += W) store(result + h, load(acc + row * PANEL + h) + load(added + h));
        std::memcpy(out + row * n + first, result, width * sizeof(T));
    }
}

template <class T>
void linear(const T* x, const T* packed, const T* bias, T* out, int64_t rows, int64_t n, int64_t k, int64_t stride,
            int threads) {
    static thread_local std::vector<T> memory;
    const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    if (rows * n * k < PARALLEL_WORK) threads = 1;
    // Neighbouring panels, so that what is read stays one stream.
    const int64_t share = std::max<int64_t>(threads == 1 ? panels : panels / (8 * threads), 1);
    const T* rows_packed = x;  // one row is packed as it is
    if (rows > 1) memory.resize(rows * k), rows_packed = memory.data();
    T* pack_to = memory.data();
    const int64_t steps = (k + STEP<T> - 1) / STEP<T>, step_bytes = STEP<T> * PANEL * sizeof(T);
    const int64_t pieces = std::max<int64_t>((steps * step_bytes + PIECE_BYTES - 1) / PIECE_BYTES, 1);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> acc(rows * PANEL);
        if (rows > 1) {
#pragma omp for schedule(static)
            for (int64_t index = 0; index < blocks; index++) {
                const Part block(index, blocks, rows);
                T* to = pack_to + block.from * k;
                for (int64_t i = 0; i < k; i += STEP<T>)
                    for (int64_t r = block.from; r < block.to; r++, to += STEP<T>)
                        std::memcpy(to, x + r * stride + i, STEP<T> * sizeof(T));
            }
        }
#pragma omp for schedule(dynamic, share)
        for (int64_t panel = 0; panel < panels; panel++) {
            const T* w = packed + panel * k * PANEL;
            for (int64_t at = 0; at < pieces; at++) {
                const Part piece(at, pieces, steps);
                const int64_t from = piece.from * STEP<T>, count = std::min(piece.to * STEP<T>, k) - from;
                // Nobody has fetched a thread's first piece for it, and what follows its last is another's.
                const bool leads = panel % share == 0 && at == 0;
                const bool ends = (panel % share == share - 1 || panel == panels - 1) && at == pieces - 1;
                const char* next = (const char*)(w + (from + count) * PANEL);
                for (int64_t index = 0; index < blocks; index++) {
                    const Part block(index, blocks, rows);
                    const Part lines(index, blocks, ends ? 0 : piece.size() * step_bytes / LINE);
                    const auto* pass = blocks == 1 || (leads && index == 0) ? PIECES<T, true> : PIECES<T, false>;
                    pass[block.size()](w + from * PANEL, rows_packed + block.from * k + from * block.size(), count,
                                       at == 0, Fetch{next + lines.from * LINE, lines.size()},
                                       acc.data() + block.from * PANEL);
                }
            }
            store_panel(acc.data(), bias, out, rows, n, panel * PANEL);
        }
    }
}

template <class T>
void pack(const T* weight, T* packed, int64_t n, int64_t k, int64_t stride, int threads) {
    const int64_t panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t row = panel * PANEL; row < (panel + 1) * PANEL; row++) {
            T* to = packed + panel * k * PANEL + (row % PANEL) * STEP<T>;
            for (int64_t i = 0; i < k; i += STEP<T>)
                for (int s = 0; s < STEP<T>; s++) to[i * PANEL + s] = row < n ? weight[row * stride + i + s] : T{};
        }
}

#endif

}  // namespace

// Elements of `packed` for a weight [n, k] of dtype 0 (float32) or 1 (bfloat16); 0 where this CPU has no fast way.
extern "C" int64_t packed_linear_size(int dtype, int64_t n, int64_t k) {
    (void)dtype, (void)n, (void)k;
#ifdef ENGINE_AVX512
#ifndef ENGINE_AVX512_BF16
    if (dtype == 1) return 0;
#endif
    if (dtype == 0 || k % 2 == 0) return (n + PANEL - 1) / PANEL * PANEL * k;
#endif
    return 0;
}

// weight [n, k], its rows `stride` elements apart.
extern "C" void pack_linear(int dtype, const void* weight, void* packed, int64_t n, int64_t k, int64_t stride,
                            int threads) {
    (void)dtype, (void)weight, (void)packed, (void)n, (void)k, (void)stride, (void)threads;
#ifdef ENGINE_AVX512
    if (dtype == 0) pack((const float*)weight, (float*)packed, n, k, stride, threads);
#ifdef ENGINE_AVX512_BF16
    if (dtype == 1) pack((const bf16*)weight, (bf16*)packed, n, k, stride, threads);
#endif
#endif
}

// x [rows, k], its rows `stride` elements apart, bias [n] or null -> out [rows, n], all of the weight's dtype.
extern "C" void linear(int dtype, const void* x, const void* packed, const void* bias, void* out, int64_t rows,
                       int64_t n, int64_t k, int64_t stride, int threads) {
    (void)dtype, (void)x, (void)packed, (void)bias, (void)out, (void)rows, (void)n, (void)k, (void)stride,
        (void)threads;
#ifdef ENGINE_AVX512
    if (dtype == 0)
        linear((const float*)x, (const float*)packed, (const float*)bias, (float*)out, rows, n, k, stride, threads);
#ifdef ENGINE_AVX512_BF16
    if (dtype == 1)
        linear((const bf16*)x, (const bf16*)packed, (const bf16*)bias, (bf16*)out, rows, n, k, stride, threads);
#endif
#endif
}

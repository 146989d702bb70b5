// The small operations between a decoder's linears, each one pass over its rows. Rows are independent of each other, and
// what a row gives does not depend on how many there are. All arithmetic is in float32; bfloat16 is rounded once, where a
// result is stored.
#include <omp.h>

#include <vector>

#include "simd.h"

namespace {

using namespace simd;

constexpr int64_t PARALLEL_WORK = 1 << 16;  // elements below which waking other threads costs more

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline void narrow(float& to, float x) { to = x; }
inline void narrow(bf16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 1 / rms of n floats. Sums run over 16 lanes whatever the CPU, so that their order is fixed.
inline float inverse_rms(const float* x, int64_t n, float eps) {
    float lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += x[i + j] * x[i + j];
    float total = 0;
    for (; i < n; i++) total += x[i] * x[i];
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lanes[j] += lanes[j + step];
    return 1.0f / std::sqrt((total + lanes[0]) / (float)n + eps);
}

template <class F>
void for_rows(int64_t rows, int64_t row_work, int threads, F f) {
    if (rows * row_work < PARALLEL_WORK || threads == 1) {
        for (int64_t row = 0; row < rows; row++) f(row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) f(row);
}

template <class T>
void add_rms_norm(const T* hidden, const T* delta, const float* weight, T* out, T* sum, int64_t rows, int64_t size,
                  float eps, int threads) {
    for_rows(rows, size, threads, [=](int64_t row) {
        thread_local std::vector<float> memory;
        memory.resize(size);
        float* x = memory.data();
        const int64_t at = row * size;
        for (int64_t i = 0; i < size; i++) x[i] = widen(hidden[at + i]);
        if (delta) {
            // The stream is kept in T: what is normed is what the next layer will add to.
            for (int64_t i = 0; i < size; i++) narrow(sum[at + i], x[i] + widen(delta[at + i]));
            for (int64_t i = 0; i < size; i++) x[i] = widen(sum[at + i]);
        }
        const float scale = inverse_rms(x, size, eps);
        for (int64_t i = 0; i < size; i++) narrow(out[at + i], x[i] * scale * weight[i]);
    });
}

struct Rotate {
    const void* qkv;
    void *q, *k_cache, *v_cache;
    const int64_t *positions, *slots;
    const float *cos, *sin;  // [P, dim / 2]; dim 0: no rotation
    const float* norm;       // [Hq + Hkv, D], or none
    int64_t tokens, heads, kv_heads, head_dim, dim, k_stride, v_stride;
    float eps;
};

template <class T>
void rotate_and_store(const Rotate& args, int threads) {
    const int64_t d = args.head_dim, half = args.dim / 2, row_size = (args.heads + 2 * args.kv_heads) * d;
    for_rows(args.tokens, row_size, threads, [=](int64_t token) {
        thread_local std::vector<float> memory;
        memory.resize(2 * d);
        float *x = memory.data(), *y = x + d;
        const T* from = (const T*)args.qkv + token * row_size;
        const float *cos = args.cos + args.positions[token] * half, *sin = args.sin + args.positions[token] * half;
        T* k = (T*)args.k_cache + args.slots[token] * args.k_stride;
        for (int64_t head = 0; head < args.heads + args.kv_heads; head++, from += d) {
            T* to = head < args.heads ? (T*)args.q + (token * args.heads + head) * d : k + (head - args.heads) * d;
            for (int64_t i = 0; i < d; i++) x[i] = widen(from[i]);
            if (args.norm) {
                const float scale = inverse_rms(x, d, args.eps);
                for (int64_t i = 0; i < d; i++) x[i] = x[i] * scale * args.norm[head * d + i];
            }
            for (int64_t i = 0; i < half; i++) {
                y[i] = x[i] * cos[i] - x[i + half] * sin[i];
                y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
            }
            for (int64_t i = args.dim; i < d; i++) y[i] = x[i];
            for (int64_t i = 0; i < d; i++) narrow(to[i], y[i]);
        }
        std::memcpy((T*)args.v_cache + args.slots[token] * args.v_stride, from, args.kv_heads * d * sizeof(T));
    });
}

inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

// x (1 + tanh y) / 2 = x / (1 + e^-2y), which keeps its digits where tanh y is close to -1.
inline vf gelu_tanh(vf x) {
    const vf y = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-2.0f * y));
}

template <class T, class F>
void gated(const T* gate_up, T* out, int64_t rows, int64_t size, int threads, F activation) {
    for_rows(rows, size, threads, [=](int64_t row) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        T* to = out + row * size;
        int64_t i = 0;
        for (; i + W <= size; i += W) store(to + i, activation(load(gate + i)) * load(up + i));
        if (i < size) {
            T tail[3][W] = {};
            std::memcpy(tail[0], gate + i, (size - i) * sizeof(T));
            std::memcpy(tail[1], up + i, (size - i) * sizeof(T));
            store(tail[2], activation(load(tail[0])) * load(tail[1]));
            std::memcpy(to + i, tail[2], (size - i) * sizeof(T));
        }
    });
}

}  // namespace

// In all of these dtype 0 is float32 and 1 bfloat16, and tensors are contiguous but where a stride says otherwise.

// hidden, delta [rows, size] -> sum = hidden + delta, out = rms_norm(sum) * weight. Without delta (null) sum is not
// written and hidden is normed.
extern "C" void add_rms_norm(int dtype, const void* hidden, const void* delta, const float* weight, void* out,
                             void* sum, int64_t rows, int64_t size, float eps, int threads) {
    if (dtype == 0)
        add_rms_norm((const float*)hidden, (const float*)delta, weight, (float*)out, (float*)sum, rows, size, eps,
                     threads);
    else
        add_rms_norm((const bf16*)hidden, (const bf16*)delta, weight, (bf16*)out, (bf16*)sum, rows, size, eps,
                     threads);
}

// qkv [tokens, (heads + 2 kv_heads) * head_dim] -> q [tokens, heads, head_dim]; keys and values go to their slots.
// Queries and keys are normed (where norm is given) and their first `dim` elements rotated, i with i + dim / 2.
extern "C" void rotate_and_store(int dtype, const void* qkv, void* q, void* k_cache, void* v_cache,
                                 const int64_t* positions, const int64_t* slots, const float* cos, const float* sin,
                                 const float* norm, int64_t tokens, int64_t heads, int64_t kv_heads,
                                 int64_t head_dim, int64_t dim, int64_t k_stride, int64_t v_stride, float eps,
                                 int threads) {
    const Rotate args{qkv,    q,     k_cache,  v_cache,  positions, slots,    cos,      sin, norm,
                      tokens, heads, kv_heads, head_dim, dim,       k_stride, v_stride, eps};
    if (dtype == 0)
        rotate_and_store<float>(args, threads);
    else
        rotate_and_store<bf16>(args, threads);
}

// gate_up [rows, 2 * size] -> out [rows, size] = activation(gate) * up; activation 0: silu, 1: gelu by tanh.
extern "C" void gated(int dtype, const void* gate_up, void* out, int64_t rows, int64_t size, int activation,
                      int threads) {
    auto run = [&](auto f) {
        if (dtype == 0)
            gated((const float*)gate_up, (float*)out, rows, size, threads, f);
        else
            gated((const bf16*)gate_up, (bf16*)out, rows, size, threads, f);
    };
    if (activation == 0)
        run([](vf x) { return silu(x); });
    else
        run([](vf x) { return gelu_tanh(x); });
}

// Causal attention of a ragged batch over a paged pool of keys and values: one pass with an online softmax.
//
// A task is one KV head of one row for a few of its queries (m = queries x heads of the group). Keys are visited in
// tiles of TILE, and every SEGMENT keys the softmax starts anew and is merged into the running result. Both lie at
// fixed positions of the row, so a query's result has the same bits whether it is computed alone or in a batch, as a
// decode or inside a chunk, by one thread or with the segments of a long row spread over all of them.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "attention_kernels.h"

namespace {

using namespace attention;

constexpr int SEGMENT = 512;
constexpr int64_t QUERY_ROWS = 64;          // queries x heads that share a tile of keys while it is in the cache
constexpr int64_t PARALLEL_WORK = 1 << 16;  // multiply-adds below which waking other threads costs more

struct Args {
    const void *q, *k, *v;
    void* out;
    const int32_t *query_starts, *kv_lens, *block_tables;
    int64_t rows, table_width, block_size, heads, kv_heads, head_dim;
    int64_t q_stride, k_stride, v_stride;  // elements from token to token, slot to slot
    int64_t window, max_queries;           // no window: 0; rows with more queries are left alone
    float scale, soft_cap;                 // no cap: 0

    int64_t group() const { return heads / kv_heads; }
    int64_t tile_queries() const { return std::max<int64_t>(QUERY_ROWS / group(), 1); }
};

struct Task {
    int64_t row, kv_head, query, queries;     // `query` and `queries` count within the row
    int64_t first_segment, segments, partial;  // partial: of the segment's result; -1: finish all segments
};

// The softmax so far of m query rows: maximum, sum of weights, weighted values.
struct State {
    std::vector<float> max, sum, acc;

    void clear(int64_t m, int64_t width) {
        max.assign(m, -INFINITY);
        sum.assign(m, 0.0f);
        acc.assign(m * width, 0.0f);
    }

    void merge(const State& other, int64_t m, int64_t width) {
        for (int64_t i = 0; i < m; i++) {
            const float top = std::max(max[i], other.max[i]);
            if (top == -INFINITY) continue;
            const float mine = exp(splat(max[i] - top))[0], theirs = exp(splat(other.max[i] - top))[0];
            float* to = acc.data() + i * width;
            const float* from = other.acc.data() + i * width;
            for (int64_t d = 0; d < width; d += W) store(to + d, load(to + d) * mine + load(from + d) * theirs);
            sum[i] = sum[i] * mine + other.sum[i] * theirs;
            max[i] = top;
        }
    }
};

// What a query may see: keys low .. high - 1 of its row.
struct Span {
    int32_t low, high;
};

template <class K>
struct Worker {
    typedef typename K::Value T;

    const Args& args;
    std::vector<typename K::Query> queries;
    std::vector<typename K::Weight> weights;
    std::vector<float> scores, rescale;
    std::vector<Span> spans;
    State segment, result;
    Tile<T> tiles[2];

    explicit Worker(const Args& args) : args(args) {}

    int64_t width() const { return K::padded(args.head_dim); }

    void load_queries(const Task& task) {
        const int64_t group = args.group(), m = task.queries * group, first = args.query_starts[task.row];
        const int64_t count = args.query_starts[task.row + 1] - first, before = args.kv_lens[task.row] - count;
        queries.resize(m * width());
        scores.resize(m * TILE);
        weights.resize(m * TILE);
        rescale.resize(m);
        spans.resize(m);
        for (int64_t i = 0; i < m; i++) {
            const int64_t query = task.query + i / group, head = task.kv_head * group + i % group;
            const T* from = (const T*)args.q + (first + query) * args.q_stride + head * args.head_dim;
            K::load_query(queries.data() + i * width(), from, args.head_dim);
            const int64_t high = before + query + 1;
            spans[i] = {(int32_t)(args.window ? std::max<int64_t>(high - args.window, 0) : 0), (int32_t)high};
        }
    }

    // Pointers to keys from .. from + TILE - 1, those outside [low, high) standing at its ends: what lies there is live.
    void point(Tile<T>& tile, const Task& task, int64_t from, int64_t low, int64_t high) {
        const int32_t* table = args.block_tables + task.row * args.table_width;
        const T* k = (const T*)args.k + task.kv_head * args.head_dim;
        const T* v = (const T*)args.v + task.kv_head * args.head_dim;
        const int64_t first = std::max(from, low), last = std::min(from + TILE, high) - 1;
        int64_t block = first / args.block_size, offset = first % args.block_size;
        int64_t slot = table[block] * args.block_size + offset;
        for (int64_t j = 0; j < TILE; j++) {
            tile.k[j] = k + slot * args.k_stride;
            tile.v[j] = v + slot * args.v_stride;
            if (from + j < first || from + j >= last) continue;
            slot++;
            if (++offset == args.block_size) {
                offset = 0;
                slot = table[++block] * args.block_size;
            }
        }
    }

    // Turns a row of raw scores into weights relative to the new maximum, and says by how much to rescale the old.
    void weigh(State& state, int64_t i, int64_t from, bool masked) {
        constexpr int N = TILE / W;
        float* s = scores.data() + i * TILE;
        vf x[N], top = splat(-INFINITY);
        for (int n = 0; n < N; n++) {
            x[n] = load(s + n * W) * args.scale;
            if (args.soft_cap > 0) x[n] = args.soft_cap * tanh(x[n] / args.soft_cap);
            if (masked) {
                const vi key = iota() + (int32_t)(from + n * W);
                x[n] = select((key >= spans[i].low) & (key < spans[i].high), x[n], splat(-INFINITY));
            }
            top = max(top, x[n]);
        }
        const float old = state.max[i], now = std::max(old, max(top));
        const float base = now == -INFINITY ? 0.0f : now;  // no key seen yet: all weights are e^-inf
        vf total = splat(0.0f);
        for (int n = 0; n < N; n++) {
            const vf p = exp(x[n] - base);
            K::load_weights(weights.data() + i * TILE, n * W, p);
            total += p;
        }
        rescale[i] = exp(splat(old - base))[0];
        state.sum[i] = state.sum[i] * rescale[i] + sum(total);
        state.max[i] = now;
    }

    template <int MT>
    void add_values(int64_t i, const Tile<T>& tile, int n, const Tile<T>* next, State& state) {
        const auto* p = weights.data() + i * TILE;
        float* acc = state.acc.data() + i * width();
        const int64_t step = K::CHUNK * K::CHUNKS;
        for (int64_t d = 0; d < width(); d += step) {
            const Tile<T>* fetch = d == 0 ? next : nullptr;
            switch (std::min<int64_t>((width() - d) / K::CHUNK, K::CHUNKS)) {
                case 1: K::template values<MT, 1>(p, tile, n, d, args.head_dim, &rescale[i], fetch, acc); break;
                case 2: K::template values<MT, 2>(p, tile, n, d, args.head_dim, &rescale[i], fetch, acc); break;
                default:
                    if constexpr (K::CHUNKS == 4) {
                        if ((width() - d) / K::CHUNK == 3)
                            K::template values<MT, 3>(p, tile, n, d, args.head_dim, &rescale[i], fetch, acc);
                        else
                            K::template values<MT, 4>(p, tile, n, d, args.head_dim, &rescale[i], fetch, acc);
                    }
            }
        }
    }

    // Calls f(i, integral MT) for groups of up to MAX_MT query rows.
    template <class F>
    static void in_groups(int64_t m, F f) {
        int64_t i = 0;
        if constexpr (MAX_MT == 4)
            for (; i + 4 <= m; i += 4) f(i, std::integral_constant<int, 4>());
        for (; i + 2 <= m; i += 2) f(i, std::integral_constant<int, 2>());
        for (; i < m; i++) f(i, std::integral_constant<int, 1>());
    }

    // The softmax of the task's queries over the keys of one segment, into `state`.
    void run_segment(const Task& task, int64_t index, State& state) {
        const int64_t m = task.queries * args.group();
        state.clear(m, width());
        const int64_t low = std::max<int64_t>(spans[0].low, index * SEGMENT);
        const int64_t high = std::min<int64_t>(spans[m - 1].high, (index + 1) * SEGMENT);
        int64_t from = low / TILE * TILE;
        point(tiles[0], task, from, low, high);
        for (int now = 0; from < high; from += TILE, now ^= 1) {
            const Tile<T>& tile = tiles[now];
            const int n = (int)std::min<int64_t>(high - from, TILE);
            const Tile<T>* next = nullptr;
            if (from + TILE < high) {
                point(tiles[now ^ 1], task, from + TILE, low, high);
                next = &tiles[now ^ 1];
            }
            in_groups(m, [&](int64_t i, auto mt) {
                K::template scores<mt.value>(queries.data() + i * width(), tile, n, args.head_dim,
                                             i == 0 ? next : nullptr, scores.data() + i * TILE);
            });
            for (int64_t i = 0; i < m; i++)
                weigh(state, i, from, from < spans[i].low || from + TILE > spans[i].high);
            in_groups(m, [&](int64_t i, auto mt) {
                add_values<mt.value>(i, tile, n, i == 0 ? next : nullptr, state);
            });
        }
    }

    void finish(const Task& task, const State& state) {
        const int64_t group = args.group(), first = args.query_starts[task.row] + task.query;
        for (int64_t i = 0; i < task.queries * group; i++) {
            const int64_t head = task.kv_head * group + i % group;
            T* out = (T*)args.out + ((first + i / group) * args.heads + head) * args.head_dim;
            K::finish(out, state.acc.data() + i * width(), state.sum[i], args.head_dim);
        }
    }

    void run(const Task& task, std::vector<State>& partials) {
        load_queries(task);
        if (task.partial >= 0) return run_segment(task, task.first_segment, partials[task.partial]);
        if (task.segments == 1) {
            run_segment(task, task.first_segment, result);
        } else {
            result.clear(task.queries * args.group(), width());
            for (int64_t s = 0; s < task.segments; s++) {
                run_segment(task, task.first_segment + s, segment);
                result.merge(segment, task.queries * args.group(), width());
            }
        }
        finish(task, result);
    }
};

// Longest tasks first: later queries of a row see more keys.
std::vector<Task> list_tasks(const Args& args, int64_t& work) {
    std::vector<Task> tasks;
    work = 0;
    for (int64_t row = 0; row < args.rows; row++) {
        const int64_t count = args.query_starts[row + 1] - args.query_starts[row];
        if (count == 0 || count > args.max_queries) continue;
        const int64_t step = args.tile_queries(), before = args.kv_lens[row] - count;
        for (int64_t query = (count - 1) / step * step; query >= 0; query -= step) {
            const int64_t queries = std::min(step, count - query), high = before + query + queries;
            const int64_t low = args.window ? std::max<int64_t>(before + query + 1 - args.window, 0) : 0;
            const int64_t first = low / SEGMENT, segments = (high - 1) / SEGMENT - first + 1;
            for (int64_t head = 0; head < args.kv_heads; head++)
                tasks.push_back({row, head, query, queries, first, segments, -1});
            work += queries * (high - low) * args.heads * args.head_dim;
        }
    }
    return tasks;
}

template <class K>
void run_all(const Args& args, int threads) {
    int64_t work;
    std::vector<Task> whole = list_tasks(args, work), split;
    if (work < PARALLEL_WORK) threads = 1;
    std::vector<std::pair<Task, int64_t>> merges;  // a task whose segments were spread, and its first partial
    int64_t partial_count = 0;
    const bool spread = threads > 1 && (int64_t)whole.size() < 4 * threads;
    if (spread) {
        for (const Task& task : whole) {
            if (task.segments == 1) {
                split.push_back(task);
                continue;
            }
            merges.emplace_back(task, partial_count);
            for (int64_t s = 0; s < task.segments; s++) {
                Task part = task;
                part.first_segment += s, part.segments = 1, part.partial = partial_count++;
                split.push_back(part);
            }
        }
    }
    const std::vector<Task>& tasks = spread ? split : whole;
    std::vector<State> partials(partial_count);
    threads = std::max(1, std::min<int>(threads, (int)tasks.size()));
#pragma omp parallel num_threads(threads)
    {
        Worker<K> worker(args);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) worker.run(tasks[i], partials);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < merges.size(); i++) {
            const Task& task = merges[i].first;
            const int64_t m = task.queries * args.group();
            worker.result.clear(m, worker.width());
            for (int64_t s = 0; s < task.segments; s++)
                worker.result.merge(partials[merges[i].second + s], m, worker.width());
            worker.finish(task, worker.result);
        }
    }
}

}  // namespace

// dtype 0: float32, 1: bfloat16. Heads of q, k, v and out lie side by side; out is contiguous.
extern "C" void paged_attention(int dtype, const void* q, const void* k, const void* v, void* out,
                                const int32_t* query_starts, const int32_t* kv_lens, const int32_t* block_tables,
                                int64_t rows, int64_t table_width, int64_t block_size, int64_t heads,
                                int64_t kv_heads, int64_t head_dim, int64_t q_stride, int64_t k_stride,
                                int64_t v_stride, int64_t window, int64_t max_queries, float scale, float soft_cap,
                                int threads) {
    const Args args{q,        k,        v,        out,      query_starts, kv_lens,     block_tables, rows,
                    table_width, block_size, heads, kv_heads, head_dim,    q_stride,    k_stride,     v_stride,
                    window,   max_queries, scale, soft_cap};
    if (dtype == 0)
        run_all<Floats<float>>(args, threads);
    else
        run_all<Bfloat16>(args, threads);
}

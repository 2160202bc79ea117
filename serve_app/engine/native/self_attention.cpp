// Self-attention of a decode step. Caches hold heads padded to 32, 64 or 128 values with zeros.

#include "vectors.h"

namespace t5 {

// Self-attention reads a hypothesis' keys wherever the beams it descends from wrote them.
struct SelfCache {
    void* keys;  // (lanes, heads, capacity, padded)
    void* values;
    const int32_t* ancestry;  // (lanes, ancestry_stride): whose key it is, by position
    int64_t ancestry_stride;
    int capacity, heads, width, padded;
    const float* bias;  // (heads, distances), farthest first
    int distances;
};

template <class T>
static void write_cache(const SelfCache& cache, const T* row, float scale, int lane, int position) {
    const int inner = cache.heads * cache.width;
    for (int head = 0; head < cache.heads; ++head) {
        const int64_t at =
            ((int64_t(lane) * cache.heads + head) * cache.capacity + position) * cache.padded;
        const T* from = row + inner + head * cache.width;
        convert(from, scale, cache.width, cache.padded, static_cast<T*>(cache.keys) + at);
        convert(from + inner, scale, cache.width, cache.padded,
                static_cast<T*>(cache.values) + at);
    }
}

// `kChunks` chunks make a head.
template <class T, int kChunks>
static void self_row(const SelfCache& cache, const T* row, float scale, int lane, int position,
                     int head, float* room, float* out) {
    constexpr int parts = Chunk<T>::kParts, span = Chunk<T>::kValues;
    float* scores = room + cache.padded;
    for (int i = 0; i < cache.padded; ++i)
        room[in_chunk<T>(i)] = i < cache.width ? widen(row[head * cache.width + i]) * scale : 0.0f;
    Floats query[kChunks * parts];
    for (int i = 0; i < kChunks * parts; ++i) query[i] = load(room + i * kVector);
    const int32_t* ancestry = cache.ancestry + lane * cache.ancestry_stride;
    const float* bias = cache.bias + int64_t(head) * cache.distances + cache.distances - 1 - position;
    const auto cell = [&](const void* base, int p) {
        const int64_t from = p == position ? lane : ancestry[p];
        const int64_t at = ((from * cache.heads + head) * cache.capacity + p) * cache.padded;
        return static_cast<const T*>(base) + at;
    };
    for (int p = 0; p <= position; ++p) {
        const T* key = cell(cache.keys, p);
        const T* value = cell(cache.values, p);
        for (int i = 0; i < cache.padded; i += 64 / int(sizeof(T))) __builtin_prefetch(value + i);
        Floats total{};
        for (int c = 0; c < kChunks; ++c) {
            const Chunk<T> chunk(key + c * span);
            for (int i = 0; i < parts; ++i) total += chunk.parts[i] * query[c * parts + i];
        }
        scores[p] = sum(total) + bias[p];
    }
    softmax(scores, position + 1);
    Floats total[kChunks * parts] = {};
    for (int p = 0; p <= position; ++p) {
        const T* value = cell(cache.values, p);
        for (int c = 0; c < kChunks; ++c) {
            const Chunk<T> chunk(value + c * span);
            for (int i = 0; i < parts; ++i) total[c * parts + i] += chunk.parts[i] * scores[p];
        }
    }
    for (int i = 0; i < kChunks * parts; ++i) store(room + i * kVector, total[i]);
    for (int i = 0; i < cache.width; ++i) out[i] = room[in_chunk<T>(i)];
}

template <class T>
static void self_rows(const SelfCache& cache, const T* joined, const float* scales, int rows,
                      const int32_t* lanes, const int32_t* positions, float* mixed,
                      const Output& output) {
    const int inner = cache.heads * cache.width;
#pragma omp parallel
    {
        static thread_local std::vector<float> keep;
        float* room = scratch(keep, cache.padded + cache.capacity + kVector);
#pragma omp for schedule(static)
        for (int row = 0; row < rows; ++row)
            write_cache(cache, joined + int64_t(row) * 3 * inner, scales ? scales[row] : 1.0f,
                        lanes[row], positions[row]);
#pragma omp for schedule(dynamic, 4)
        for (int item = 0; item < rows * cache.heads; ++item) {
            const int row = item / cache.heads, head = item % cache.heads;
            with_chunks<T>(cache.padded, [&](auto chunks) {
                self_row<T, decltype(chunks)::value>(
                    cache, joined + int64_t(row) * 3 * inner, scales ? scales[row] : 1.0f,
                    lanes[row], positions[row], head, room,
                    mixed + int64_t(row) * inner + head * cache.width);
            });
        }
#pragma omp for schedule(static)
        for (int row = 0; row < rows; ++row)
            put_row(mixed + int64_t(row) * inner, inner, output, row, false);
    }
}

}  // namespace t5

using namespace t5;

extern "C" {

// Self-attention of one layer for the rows of a step; writes the rows' keys and values first.
// joined: (rows, 3 * heads * width), queries, keys and values. mixed: room for (rows, heads * width).
void t5_self_attention(const SelfCache* cache, const void* joined, int format, const float* scales,
                       int rows, const int32_t* lanes, const int32_t* positions, float* mixed,
                       void* values, float* out_scales, int out_format) {
    const Output output{values, out_scales, out_format};
    if (format == kBfloat16)
        self_rows(*cache, static_cast<const bf16*>(joined), scales, rows, lanes, positions, mixed,
                  output);
    else
        self_rows(*cache, static_cast<const float*>(joined), scales, rows, lanes, positions, mixed,
                  output);
}

}  // extern "C"

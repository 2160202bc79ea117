// Attention over caches of the running batch, and within documents while they are encoded.
//
// Caches hold heads padded to `padded` values, a multiple of 32, of which the last are zero.

#include "vectors.h"

namespace t5 {

// A row's queries of one head as floats. Packed formats read even and odd values apart, so bfloat16
// queries are laid out that way: sixteen even ones, sixteen odd ones, and so on.
template <class T>
static void take_query(const T* from, float scale, int width, int padded, float* to) {
    constexpr int span = kVector * Packing<T>::kValues;
    for (int i = 0; i < padded; ++i) {
        const float value = i < width ? widen(from[i]) * scale : 0.0f;
        const int within = i % span;
        to[i - within + within % Packing<T>::kValues * kVector + within / Packing<T>::kValues] =
            value;
    }
}

static Floats dot_words(const float* key, const float* query, Floats total) {
    return total + load(key) * load(query);
}
static Floats dot_words(const bf16* key, const float* query, Floats total) {
    const Words pairs = words(key);
    total += even(pairs) * load(query);
    return total + odd(pairs) * load(query + kVector);
}

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
        T* key = static_cast<T*>(cache.keys) + at;
        T* value = static_cast<T*>(cache.values) + at;
        const T* from = row + inner + head * cache.width;
        for (int i = 0; i < cache.width; ++i) narrow(key + i, widen(from[i]) * scale);
        for (int i = 0; i < cache.width; ++i) narrow(value + i, widen(from[inner + i]) * scale);
        for (int i = cache.width; i < cache.padded; ++i) narrow(key + i, 0), narrow(value + i, 0);
    }
}

template <class T>
static void self_row(const SelfCache& cache, const T* row, float scale, int lane, int position,
                     int head, float* room, float* out) {
    constexpr int span = kVector * Packing<T>::kValues;
    float* query = room;
    float* scores = room + cache.padded;
    take_query(row + head * cache.width, scale, cache.width, cache.padded, query);
    const int32_t* ancestry = cache.ancestry + lane * cache.ancestry_stride;
    const float* bias = cache.bias + int64_t(head) * cache.distances + cache.distances - 1 - position;
    const auto cell = [&](const void* base, int p) {
        const int64_t from = p == position ? lane : ancestry[p];
        const int64_t at = ((from * cache.heads + head) * cache.capacity + p) * cache.padded;
        return static_cast<const T*>(base) + at;
    };
    for (int p = 0; p <= position; ++p) {
        const T* key = cell(cache.keys, p);
        Floats total{};
        for (int i = 0; i < cache.padded; i += span) total = dot_words(key + i, query + i, total);
        scores[p] = sum(total) + bias[p];
    }
    softmax(scores, position + 1);
    for (int start = 0; start < cache.padded; start += span) {
        Floats first{}, second{};
        for (int p = 0; p <= position; ++p) {
            const Words value = words(cell(cache.values, p) + start);
            if constexpr (Packing<T>::kValues == 2) {
                first += even(value) * scores[p];
                second += odd(value) * scores[p];
            } else {
                first += as<Floats>(value) * scores[p];
            }
        }
        for (int i = 0; i < span && start + i < cache.width; ++i)
            out[start + i] = i % Packing<T>::kValues ? second[i / 2] : first[i / Packing<T>::kValues];
    }
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
            self_row(cache, joined + int64_t(row) * 3 * inner, scales ? scales[row] : 1.0f,
                     lanes[row], positions[row], head, room,
                     mixed + int64_t(row) * inner + head * cache.width);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < rows; ++row)
            put_row(mixed + int64_t(row) * inner, inner, output, row, false);
    }
}

// Cross-attention keys lie in blocks of sixteen positions, (blocks, words of a head, 16): sixteen
// scores at a time, no sums across a register. Values lie by position, (positions, padded).
struct CrossCache {
    void* keys;  // (slots, heads, capacity, padded), capacity a multiple of 16
    void* values;
    int capacity, heads, width, padded;
};

template <class T, int kRows>
static void cross_head(const CrossCache& cache, const T* queries, const float* scales, int slot,
                       int source, int head, float* room, float* mixed) {
    constexpr int packed = Packing<T>::kValues, span = kVector * packed;
    const int inner = cache.heads * cache.width, blocks = (source + kVector - 1) / kVector;
    const int64_t base = (int64_t(slot) * cache.heads + head) * cache.capacity * cache.padded;
    float* query = room;  // (kRows, padded)
    float* scores = room + kRows * cache.padded;
    const int stride = blocks * kVector;
    for (int row = 0; row < kRows; ++row)
        for (int i = 0; i < cache.padded; ++i)
            query[row * cache.padded + i] =
                i < cache.width ? widen(queries[int64_t(row) * inner + head * cache.width + i]) *
                                      (scales ? scales[row] : 1.0f)
                                : 0.0f;
    const T* key = static_cast<const T*>(cache.keys) + base;
    for (int block = 0; block < blocks; ++block) {
        Floats total[kRows] = {};
        for (int i = 0; i < cache.padded; i += packed, key += span) {
            const Words pairs = words(key);
            for (int row = 0; row < kRows; ++row) {
                const float* q = query + row * cache.padded + i;
                if constexpr (packed == 2) {
                    total[row] += even(pairs) * q[0];
                    total[row] += odd(pairs) * q[1];
                } else {
                    total[row] += as<Floats>(pairs) * q[0];
                }
            }
        }
        for (int row = 0; row < kRows; ++row)
            store(scores + row * stride + block * kVector, total[row]);
    }
    for (int row = 0; row < kRows; ++row) softmax(scores + row * stride, source);
    const T* value = static_cast<const T*>(cache.values) + base;
    for (int start = 0; start < cache.padded; start += span) {
        Floats first[kRows] = {}, second[kRows] = {};
        for (int p = 0; p < source; ++p) {
            const Words pairs = words(value + int64_t(p) * cache.padded + start);
            for (int row = 0; row < kRows; ++row) {
                const float weight = scores[row * stride + p];
                if constexpr (packed == 2) {
                    first[row] += even(pairs) * weight;
                    second[row] += odd(pairs) * weight;
                } else {
                    first[row] += as<Floats>(pairs) * weight;
                }
            }
        }
        for (int row = 0; row < kRows; ++row) {
            float* out = mixed + int64_t(row) * inner + head * cache.width;
            for (int i = 0; i < span && start + i < cache.width; ++i)
                out[start + i] = i % packed ? second[row][i / 2] : first[row][i / packed];
        }
    }
}

template <class T>
static void cross_rows(const CrossCache& cache, const T* queries, const float* scales, int rows,
                       int documents, const int32_t* slots, const int32_t* sources,
                       const int32_t* firsts, float* mixed, const Output& output) {
    const int inner = cache.heads * cache.width;
#pragma omp parallel
    {
        static thread_local std::vector<float> keep;
        float* room = scratch(keep, 4 * (cache.padded + cache.capacity + kVector));
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < documents * cache.heads; ++item) {
            const int document = item / cache.heads, head = item % cache.heads;
            int row = firsts[document];
            const int end = document + 1 < documents ? firsts[document + 1] : rows;
            while (row < end) {  // the cache is read once for up to four rows of a document
                const auto run = [&](auto count) {
                    cross_head<T, decltype(count)::value>(
                        cache, queries + int64_t(row) * inner, scales ? scales + row : nullptr,
                        slots[document], sources[document], head, room,
                        mixed + int64_t(row) * inner);
                    row += decltype(count)::value;
                };
                if (end - row >= 4) run(std::integral_constant<int, 4>{});
                else if (end - row >= 2) run(std::integral_constant<int, 2>{});
                else run(std::integral_constant<int, 1>{});
            }
        }
#pragma omp for schedule(static)
        for (int row = 0; row < rows; ++row)
            put_row(mixed + int64_t(row) * inner, inner, output, row, false);
    }
}

// Write documents' keys and values, as projected from the encoder's output, into their slots.
template <class T>
static void store_cross(const CrossCache& cache, const T* projected, const float* scales,
                        int64_t stride, int documents, const int32_t* starts,
                        const int32_t* slots) {
    constexpr int packed = Packing<T>::kValues;
    const int inner = cache.heads * cache.width;
#pragma omp parallel for schedule(dynamic, 1)
    for (int item = 0; item < documents * cache.heads; ++item) {
        const int document = item / cache.heads, head = item % cache.heads;
        const int source = starts[document + 1] - starts[document];
        const int64_t base =
            (int64_t(slots[document]) * cache.heads + head) * cache.capacity * cache.padded;
        T* keys = static_cast<T*>(cache.keys) + base;
        T* values = static_cast<T*>(cache.values) + base;
        for (int p = 0; p < round_up(source, kVector); ++p) {
            const int64_t row = starts[document] + p;
            const bool real = p < source;
            const T* from = real ? projected + row * stride + head * cache.width : nullptr;
            const float scale = real && scales ? scales[row] : 1.0f;
            T* block = keys + int64_t(p / kVector) * kVector * cache.padded;
            for (int i = 0; i < cache.padded; ++i)
                narrow(block + (i / packed * kVector + p % kVector) * packed + i % packed,
                       real && i < cache.width ? widen(from[i]) * scale : 0.0f);
            for (int i = 0; i < cache.padded; ++i)
                narrow(values + int64_t(p) * cache.padded + i,
                       real && i < cache.width ? widen(from[inner + i]) * scale : 0.0f);
        }
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

// Cross-attention of one layer. Rows of a document follow each other from `firsts` on.
void t5_cross_attention(const CrossCache* cache, const void* queries, int format,
                        const float* scales, int rows, int documents, const int32_t* slots,
                        const int32_t* sources, const int32_t* firsts, float* mixed, void* values,
                        float* out_scales, int out_format) {
    const Output output{values, out_scales, out_format};
    if (format == kBfloat16)
        cross_rows(*cache, static_cast<const bf16*>(queries), scales, rows, documents, slots,
                   sources, firsts, mixed, output);
    else
        cross_rows(*cache, static_cast<const float*>(queries), scales, rows, documents, slots,
                   sources, firsts, mixed, output);
}

// projected: rows of `stride` values that begin with one layer's keys and values.
// starts: (documents + 1), the documents' first rows and the end.
void t5_store_cross(const CrossCache* cache, const void* projected, int format,
                    const float* scales, int64_t stride, int documents, const int32_t* starts,
                    const int32_t* slots) {
    if (format == kBfloat16)
        store_cross(*cache, static_cast<const bf16*>(projected), scales, stride, documents, starts,
                    slots);
    else
        store_cross(*cache, static_cast<const float*>(projected), scales, stride, documents,
                    starts, slots);
}

}  // extern "C"

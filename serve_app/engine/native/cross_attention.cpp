// Cross-attention of a decode step. A document's keys and values are read once for all its rows.

#include "products.h"

namespace t5 {

// Keys lie in blocks of sixteen positions, by value and then by position (a chunk holds sixteen
// positions): sixteen scores at a time, no sums across a register. Values lie by position.
//
// Held as bytes, keys lie in blocks of kByteBlock positions as `product` reads them, (words of a
// head, positions, 4), and values as (words of positions, values of a head, 4). Each position of a
// head has a scale, and each key an offset for queries that are counted from 128.
struct CrossCache {
    void* keys;  // (slots, heads, capacity, padded), capacity a multiple of kByteBlock
    void* values;
    float* key_scales;  // (slots, heads, capacity), or null
    float* key_offsets;
    float* value_scales;
    int capacity, heads, width, padded;
};

constexpr int kByteVectors = 2, kByteBlock = kByteVectors * kVector;

// Caches are larger than the processor's: ask for what is read next while this is worked on. The
// hardware's own prefetching ends with each page.
constexpr int kAhead = 6144;  // bytes

static void fetch(const void* from, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}
template <class Cell> static void fetch_ahead(const Cell* from, int count) {
    fetch(reinterpret_cast<const char*>(from) + kAhead, count * int(sizeof(Cell)));
}

// The first or second value of sixteen keys.
static Floats value_at(const float* key, int which) { return load(key + which * kVector); }
static Floats value_at(const bf16* key, int which) {
    return which ? odd(words(key)) : even(words(key));
}

template <class Cell, int kRows, int kChunks>
static void cross_head(const CrossCache& cache, const Cell* queries, const float* scales, int slot,
                       int source, int head, float* room, float* mixed) {
    constexpr int parts = Chunk<Cell>::kParts, span = Chunk<Cell>::kValues;
    const int inner = cache.heads * cache.width, stride = round_up(source, kVector);
    const int64_t first = (int64_t(slot) * cache.heads + head) * cache.capacity;
    float* query = room;  // (kRows, padded)
    float* scores = room + kRows * cache.padded;
    for (int row = 0; row < kRows; ++row)
        convert(queries + int64_t(row) * inner + head * cache.width, scales ? scales[row] : 1.0f,
                cache.width, cache.padded, query + row * cache.padded);
    const Cell* key = static_cast<const Cell*>(cache.keys) + first * cache.padded;
    const Cell* value = static_cast<const Cell*>(cache.values) + first * cache.padded;
    for (int start = 0; start < source; start += kVector) {
        fetch_ahead(key, kVector * cache.padded);
        Floats total[kRows] = {}, other[kRows] = {};  // two: one would wait for itself
        for (int i = 0; i < cache.padded; i += 2, key += 2 * kVector) {
            const Floats first_value = value_at(key, 0), second = value_at(key, 1);
            for (int row = 0; row < kRows; ++row) {
                const float* q = query + row * cache.padded + i;
                total[row] += first_value * q[0];
                other[row] += second * q[1];
            }
        }
        for (int row = 0; row < kRows; ++row)
            store(scores + row * stride + start, total[row] + other[row]);
    }
    for (int row = 0; row < kRows; ++row) softmax(scores + row * stride, source);
    Floats total[kRows][kChunks * parts] = {};
    for (int p = 0; p < source; ++p, value += cache.padded) {
        fetch_ahead(value, cache.padded);
        for (int c = 0; c < kChunks; ++c) {
            const Chunk<Cell> chunk(value + c * span);
            for (int row = 0; row < kRows; ++row)
                for (int i = 0; i < parts; ++i)
                    total[row][c * parts + i] += chunk.parts[i] * scores[row * stride + p];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kChunks * parts; ++i) store(query + i * kVector, total[row][i]);
        float* out = mixed + int64_t(row) * inner + head * cache.width;
        for (int i = 0; i < cache.width; ++i) out[i] = query[in_chunk<Cell>(i)];
    }
}

// The same with bytes: queries and shares are rounded to bytes too, each row by its greatest.
template <int kRows, int kChunks>
static void cross_head_of_bytes(const CrossCache& cache, const bf16* queries, const float* scales,
                                int slot, int source, int head, float* room, float* mixed) {
    constexpr int vectors = 2 * kChunks;  // a chunk is of bfloat16 elsewhere, 32 values
    const int inner = cache.heads * cache.width, padded = cache.padded;
    const int stride = round_up(source, kByteBlock), words_of_head = padded / 4;
    const int64_t first = (int64_t(slot) * cache.heads + head) * cache.capacity;
    float* query = room;
    float* scores = room + kRows * padded;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scores + kRows * stride);
    const auto word = [](const void* at) { return static_cast<const uint32_t*>(at); };
    float query_scales[kRows];
    for (int row = 0; row < kRows; ++row) {
        convert(queries + int64_t(row) * inner + head * cache.width, scales ? scales[row] : 1.0f,
                cache.width, padded, query);
        const Output output{bytes, query_scales, kBytes};
        put_row(query, padded, output, row, false);
    }
    const int8_t* key = static_cast<const int8_t*>(cache.keys) + first * padded;
    const int8_t* value = static_cast<const int8_t*>(cache.values) + first * padded;
    const int8_t* key_of_next = key + int64_t(cache.capacity) * padded;
    for (int start = 0; start < source; start += kByteBlock, key += kByteBlock * padded) {
        if (kRows > 2) fetch_ahead(key, kByteBlock * padded);  // or `product` does it
        if (start * padded < kAhead) fetch(value + start * padded, kByteBlock * padded);
        Ints total[kRows][kByteVectors];
        product<Int8, kRows, kByteVectors>(word(bytes), words_of_head, word(key), kByteBlock,
                                           words_of_head, total);
        for (int v = 0; v < kByteVectors; ++v) {
            const int64_t at = first + start + v * kVector;
            const Floats factor = load(cache.key_scales + at), offset = load(cache.key_offsets + at);
            for (int row = 0; row < kRows; ++row)
                store(scores + row * stride + start + v * kVector,
                      (__builtin_convertvector(total[row][v], Floats) * factor + offset) *
                          query_scales[row]);
        }
    }
    float share_scales[kRows];
    for (int row = 0; row < kRows; ++row) {
        float* line = scores + row * stride;
        softmax(line, source);
        for (int p = 0; p < source; p += kVector)
            store(line + p, load(line + p) * load(cache.value_scales + first + p));
        for (int p = source; p < stride; ++p) line[p] = 0;
        const Output output{bytes, share_scales, kBytes};
        put_row(line, stride, output, row, true);
    }
    fetch(key_of_next, kAhead);
    Ints total[kRows][vectors];
    product<Int8, kRows, vectors>(word(bytes), stride / 4, word(value), padded,
                                  round_up(source, 4) / 4, total);
    for (int row = 0; row < kRows; ++row) {
        float* out = mixed + int64_t(row) * inner + head * cache.width;
        for (int v = 0; v < vectors; ++v) {
            const Floats sums = __builtin_convertvector(total[row][v], Floats) * share_scales[row];
            const int i = v * kVector;
            if (i + kVector <= cache.width)
                store(out + i, sums);
            else
                for (int j = 0; i + j < cache.width; ++j) out[i + j] = sums[j];
        }
    }
}

template <class T, class Cell>
static void cross_rows(const CrossCache& cache, const T* queries, const float* scales, int rows,
                       int documents, const int32_t* slots, const int32_t* sources,
                       const int32_t* firsts, float* mixed, const Output& output) {
    const int inner = cache.heads * cache.width;
#pragma omp parallel
    {
        static thread_local std::vector<float> keep;
        float* room = scratch(keep, 8 * (cache.padded + cache.capacity));
        // A thread stays with a document: the next head's keys are where it looks ahead.
#pragma omp for schedule(dynamic, documents < 8 ? 1 : cache.heads)
        for (int item = 0; item < documents * cache.heads; ++item) {
            const int document = item / cache.heads, head = item % cache.heads;
            int row = firsts[document];
            const int end = document + 1 < documents ? firsts[document + 1] : rows;
            while (row < end) {  // the cache is read once for up to four rows of a document
                const auto run = [&](auto count) {
                    const auto call = [&](auto head_of) {
                        head_of(cache, queries + int64_t(row) * inner,
                                scales ? scales + row : nullptr, slots[document],
                                sources[document], head, room, mixed + int64_t(row) * inner);
                    };
                    with_chunks<T>(cache.padded, [&](auto chunks) {
                        constexpr int n = decltype(count)::value, wide = decltype(chunks)::value;
                        if constexpr (std::is_same_v<Cell, int8_t>)
                            call(cross_head_of_bytes<n, wide>);
                        else
                            call(cross_head<T, n, wide>);
                    });
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

// Write documents' keys and values, as projected from the encoder's output, into their slots. By
// blocks of positions, all heads of them: that is how the projected rows lie.
template <class T, class Block>
static void store_blocks(const CrossCache& cache, const T* projected, int64_t stride,
                         int documents, const int32_t* starts, const int32_t* slots,
                         const float* scales, Block store_block) {
    int longest = 0;
    for (int i = 0; i < documents; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
    const int blocks = (longest + kByteBlock - 1) / kByteBlock;
#pragma omp parallel
    {
        static thread_local std::vector<float> keep;
        float* room = scratch(keep, 2 * kByteBlock * cache.padded);
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < documents * blocks; ++item) {
            const int document = item / blocks, start = item % blocks * kByteBlock;
            const int64_t row = starts[document] + start;
            const int count = std::min(starts[document + 1] - int(row), kByteBlock);
            for (int head = 0; count > 0 && head < cache.heads; ++head)
                store_block(cache, projected + row * stride + head * cache.width, stride,
                            scales ? scales + row : nullptr, count,
                            (int64_t(slots[document]) * cache.heads + head) * cache.capacity + start,
                            room);
        }
    }
}

// rows: `source` keys of a head, with the values heads * width behind; `first`: where they go.
template <class T>
static void store_block(const CrossCache& cache, const T* rows, int64_t stride, const float* scales,
                       int source, int64_t first, float* room) {
    constexpr int parts = Chunk<T>::kParts;
    const int inner = cache.heads * cache.width, padded = cache.padded, width = padded / parts;
    T* block = reinterpret_cast<T*>(room);  // (16 positions, padded)
    uint32_t* keys = reinterpret_cast<uint32_t*>(static_cast<T*>(cache.keys) + first * padded);
    T* values = static_cast<T*>(cache.values) + first * padded;
    for (int start = 0; start < source; start += kVector, keys += kVector * width) {
        for (int i = 0; i < kVector; ++i) {
            const int p = start + i;
            const bool real = p < source;
            const T* row = rows + p * stride;
            const float scale = real && scales ? scales[p] : 1.0f;
            convert(row, scale, real ? cache.width : 0, padded, block + i * padded);
            if (real) convert(row + inner, scale, cache.width, padded, values + int64_t(p) * padded);
        }
        const uint32_t* words = reinterpret_cast<const uint32_t*>(block);
        for (int word = 0; word < width; ++word)
            for (int i = 0; i < kVector; ++i) keys[word * kVector + i] = words[i * width + word];
    }
}

static void store_block_of_bytes(const CrossCache& cache, const bf16* rows, int64_t stride,
                                const float* scales, int source, int64_t first, float* room) {
    const int inner = cache.heads * cache.width, padded = cache.padded, width = padded / 4;
    int8_t* block = reinterpret_cast<int8_t*>(room + padded);  // (kByteBlock positions, padded)
    uint32_t* keys = reinterpret_cast<uint32_t*>(static_cast<int8_t*>(cache.keys) + first * padded);
    int8_t* values = static_cast<int8_t*>(cache.values) + first * padded;
    const auto take = [&](int part, int p, int8_t* to) {
        const bool real = p < source;
        convert(rows + p * stride + part * inner, real && scales ? scales[p] : 1.0f,
                real ? cache.width : 0, padded, room);
        const float most = magnitude(room, padded);
        convert(room, most > 0 ? 127 / most : 0.0f, padded, padded, to);
        return most / 127;
    };
    for (int start = 0; start < source; start += kByteBlock, keys += kByteBlock * width) {
        for (int i = 0; i < kByteBlock; ++i) {
            const float scale = take(0, start + i, block + i * padded);
            int sum = 0;
            for (int j = 0; j < padded; ++j) sum += block[i * padded + j];
            cache.key_scales[first + start + i] = scale;
            cache.key_offsets[first + start + i] = -128.0f * float(sum) * scale;
        }
        const uint32_t* words = reinterpret_cast<const uint32_t*>(block);
        for (int word = 0; word < width; ++word)
            for (int i = 0; i < kByteBlock; ++i)
                keys[word * kByteBlock + i] = words[i * width + word];
        for (int i = 0; i < kByteBlock; ++i)
            cache.value_scales[first + start + i] = take(1, start + i, block + i * padded);
        for (int i = 0; i < kByteBlock; i += 4)  // words of four positions
            for (int n = 0; n < padded; ++n)
                for (int j = 0; j < 4; ++j)
                    values[int64_t(start + i) * padded + n * 4 + j] = block[(i + j) * padded + n];
    }
}

}  // namespace t5

using namespace t5;

extern "C" {

// Cross-attention of one layer. Rows of a document follow each other from `firsts` on.
void t5_cross_attention(const CrossCache* cache, const void* queries, int format,
                        const float* scales, int rows, int documents, const int32_t* slots,
                        const int32_t* sources, const int32_t* firsts, float* mixed, void* values,
                        float* out_scales, int out_format) {
    const Output output{values, out_scales, out_format};
    if (cache->key_scales)
        cross_rows<bf16, int8_t>(*cache, static_cast<const bf16*>(queries), scales, rows, documents,
                                 slots, sources, firsts, mixed, output);
    else if (format == kBfloat16)
        cross_rows<bf16, bf16>(*cache, static_cast<const bf16*>(queries), scales, rows, documents,
                               slots, sources, firsts, mixed, output);
    else
        cross_rows<float, float>(*cache, static_cast<const float*>(queries), scales, rows,
                                 documents, slots, sources, firsts, mixed, output);
}

// projected: rows of `stride` values that begin with one layer's keys and values.
// starts: (documents + 1), the documents' first rows and the end.
void t5_store_cross(const CrossCache* cache, const void* projected, int format,
                    const float* scales, int64_t stride, int documents, const int32_t* starts,
                    const int32_t* slots) {
    if (cache->key_scales)
        store_blocks(*cache, static_cast<const bf16*>(projected), stride, documents, starts, slots,
                    scales, store_block_of_bytes);
    else if (format == kBfloat16)
        store_blocks(*cache, static_cast<const bf16*>(projected), stride, documents, starts, slots,
                    scales, store_block<bf16>);
    else
        store_blocks(*cache, static_cast<const float*>(projected), stride, documents, starts, slots,
                    scales, store_block<float>);
}

}  // extern "C"

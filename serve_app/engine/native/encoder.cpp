// The encoder's self-attention, document by document: no padding is attended to or computed.

#include "products.h"

namespace t5 {

constexpr int kQueries = 8;  // rows of a product
constexpr int kWide = 3 * kVector;

struct Encoder {
    int heads, width, padded;
    const float* bias;  // (heads, 2 * reach - 1), by key's position less query's
    int reach;
};

template <class T, int kRows, int kVectors>
static void block_product(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride,
                          int depth, float* to, int to_stride) {
    Floats total[kRows][kVectors];
    product<typename KindOf<T>::Kind, kRows, kVectors>(a, a_stride, b, b_stride, depth, total);
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; ++v)
            store(to + int64_t(row) * to_stride + v * kVector, total[row][v]);
}

// Words of the values of two positions, or one position's values as they are.
static void interleave(const bf16* from, int stride, bf16* to) {
    Halves low, high;
    std::memcpy(&low, from, sizeof(low));
    std::memcpy(&high, from + stride, sizeof(high));
    const Words pairs =
        __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
    std::memcpy(to, &pairs, sizeof(pairs));
}
static void interleave(const float* from, int, float* to) { store(to, load(from)); }

// Softmax of scores + bias without its division, rounded to T; returns what to divide by.
template <class T>
static float share(float* scores, const float* bias, int source, int positions, T* shares) {
    const int whole = source / kVector * kVector;
    Floats top = broadcast(kNever);
    for (int p = 0; p < whole; p += kVector) {
        const Floats score = load(scores + p) + load(bias + p);
        store(scores + p, score);
        top = max(top, score);
    }
    for (int p = whole; p < round_up(source, kVector); ++p)
        scores[p] = p < source ? scores[p] + bias[p] : kNever;
    if (whole < source) top = max(top, load(scores + whole));
    const Floats most = broadcast(max(top));
    Floats total{};
    for (int p = 0; p < whole; p += kVector) {
        const Floats value = exponential(load(scores + p) - most);
        total += value;
        store(shares + p, value);
    }
    float sum_of = sum(total);
    if (whole < source) {
        float last[kVector];
        store(last, exponential(load(scores + whole) - most));
        for (int i = 0; i < kVector; ++i) sum_of += last[i] *= whole + i < source;
        store(shares + whole, load(last));
    }
    for (int p = round_up(source, kVector); p < positions; ++p) narrow(shares + p, 0);
    return sum_of;
}

// One head of one document. K is laid out (words of a head, positions), V (words of positions,
// head): either way a product reads whole registers.
template <class T>
static void attend(const Encoder& encoder, const T* joined, const float* scales, int source,
                   int head, std::vector<float>& keep, float* mixed) {
    constexpr int packed = Chunk<T>::kParts;  // values in a word
    const int inner = encoder.heads * encoder.width, width = encoder.width;
    const int padded = encoder.padded, depth = padded / packed;
    const int positions = round_up(source, kWide);
    const size_t key_size = size_t(depth) * positions;
    const size_t value_size = size_t(positions) / packed * padded;
    const size_t query_size = size_t(kQueries) * depth;
    float* room = scratch(keep, key_size + value_size + query_size + 2 * kQueries * positions +
                                    kQueries * padded + kVector * depth);
    uint32_t* keys = reinterpret_cast<uint32_t*>(room);
    T* values = reinterpret_cast<T*>(room + key_size);
    T* queries = reinterpret_cast<T*>(room + key_size + value_size);
    float* scores = room + key_size + value_size + query_size;
    T* shares = reinterpret_cast<T*>(scores + kQueries * positions);
    float* out = scores + 2 * kQueries * positions;
    T* block = reinterpret_cast<T*>(out + kQueries * padded);  // sixteen rows
    const auto word = [](const T* at) { return reinterpret_cast<const uint32_t*>(at); };
    const auto row_of = [&](int part, int p, T* to) {
        const T* from = joined + int64_t(p) * 3 * inner + part * inner + head * width;
        const bool real = p < source;
        convert(from, real && scales ? scales[p] : 1.0f, real ? width : 0, padded, to);
    };
    for (int start = 0; start < positions; start += kVector) {
        for (int i = 0; i < kVector; ++i) row_of(1, std::min(start + i, source), block + i * padded);
        for (int k = 0; k < depth; ++k)
            for (int i = 0; i < kVector; ++i)
                keys[int64_t(k) * positions + start + i] = word(block)[i * depth + k];
        for (int i = 0; i < kVector; ++i) row_of(2, std::min(start + i, source), block + i * padded);
        for (int i = 0; i < kVector; i += packed)
            for (int n = 0; n < padded; n += kVector)
                interleave(block + i * padded + n, padded,
                           values + int64_t(start + i) * padded + n * packed);
    }
    for (int start = 0; start < source; start += kQueries) {
        const int count = std::min(kQueries, source - start);
        float total[kQueries];
        for (int row = 0; row < kQueries; ++row)
            row_of(0, std::min(start + row, source), queries + row * padded);
        for (int p = 0; p < positions; p += kWide)
            block_product<T, kQueries, 3>(word(queries), depth, keys + p, positions, depth,
                                          scores + p, positions);
        for (int row = 0; row < count; ++row) {
            float* line = scores + row * positions;
            const float* bias = encoder.bias + int64_t(head) * (2 * encoder.reach - 1) +
                                encoder.reach - 1 - (start + row);
            total[row] = share(line, bias, source, positions, shares + row * positions);
        }
        for (int i = 0; i < padded; i += 2 * kVector)
            block_product<T, kQueries, 2>(word(shares), positions / packed,
                                          word(values + i * packed), padded,
                                          round_up(source, packed) / packed, out + i, padded);
        for (int row = 0; row < count; ++row)
            convert(out + row * padded, 1.0f / total[row], width, width,
                    mixed + int64_t(start + row) * inner + head * width);
    }
}

template <class T>
static void attend_all(const Encoder& encoder, const T* joined, const float* scales, int documents,
                       const int32_t* starts, float* mixed, const Output& output) {
    const int inner = encoder.heads * encoder.width;
#pragma omp parallel
    {
        static thread_local std::vector<float> keep;
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < documents * encoder.heads; ++item) {
            const int document = item / encoder.heads, head = item % encoder.heads;
            const int64_t start = starts[document];
            attend(encoder, joined + start * 3 * inner, scales ? scales + start : nullptr,
                   starts[document + 1] - starts[document], head, keep, mixed + start * inner);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < starts[documents]; ++row)
            put_row(mixed + int64_t(row) * inner, inner, output, row, false);
    }
}

}  // namespace t5

using namespace t5;

extern "C" {

// Encoder self-attention of one layer. joined: (tokens, 3 * heads * width), the documents' tokens
// one after the other, document i's from starts[i] to starts[i + 1].
void t5_encoder_attention(const Encoder* encoder, const void* joined, int format,
                          const float* scales, int documents, const int32_t* starts, float* mixed,
                          void* values, float* out_scales, int out_format) {
    const Output output{values, out_scales, out_format};
    if (format == kBfloat16)
        attend_all(*encoder, static_cast<const bf16*>(joined), scales, documents, starts, mixed,
                   output);
    else
        attend_all(*encoder, static_cast<const float*>(joined), scales, documents, starts, mixed,
                   output);
}

}  // extern "C"

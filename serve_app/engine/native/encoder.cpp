// The encoder's self-attention, document by document: no padding is attended to or computed; and
// the output head in bfloat16 with float32 logits, which oneDNN rounds to bfloat16.

#include "products.h"

namespace t5 {

constexpr int kQueries = 8;  // rows of a product
constexpr int kWide = 3 * kVector;

struct Encoder {
    int heads, width, padded;
    const float* bias;  // (heads, 2 * reach - 1), by key's position less query's
    int reach;
};

// One head of one document. K is laid out (words of a head, positions), V (words of positions,
// head): either way a product reads whole registers.
template <class T>
static void attend(const Encoder& encoder, const T* joined, const float* scales, int source,
                   int head, std::vector<float>& keep, float* mixed) {
    constexpr int packed = Packing<T>::kValues;
    const int inner = encoder.heads * encoder.width, padded = encoder.padded;
    const int positions = round_up(source, kWide), depth = padded / packed;
    const size_t key_size = size_t(depth) * positions;
    const size_t value_size = size_t(positions) / packed * padded;
    const size_t query_size = size_t(kQueries) * depth;
    float* room = scratch(keep, key_size + value_size + query_size + 2 * kQueries * positions +
                                    kQueries * padded);
    T* keys = reinterpret_cast<T*>(room);
    T* values = reinterpret_cast<T*>(room + key_size);
    T* queries = reinterpret_cast<T*>(room + key_size + value_size);
    float* scores = room + key_size + value_size + query_size;
    T* shares = reinterpret_cast<T*>(scores + kQueries * positions);
    float* out = scores + 2 * kQueries * positions;
    const auto take = [&](const T* from, int part, int p, int i) {
        const int64_t row = int64_t(p) * 3 * inner;
        return i < encoder.width ? widen(from[row + part * inner + head * encoder.width + i]) *
                                       (scales ? scales[p] : 1.0f)
                                 : 0.0f;
    };
    for (int p = 0; p < positions; ++p)
        for (int i = 0; i < padded; ++i) {
            const bool real = p < source;
            narrow(keys + (int64_t(i / packed) * positions + p) * packed + i % packed,
                   real ? take(joined, 1, p, i) : 0.0f);
            narrow(values + (int64_t(p / packed) * padded + i) * packed + p % packed,
                   real ? take(joined, 2, p, i) : 0.0f);
        }
    const auto word = [](const T* at) { return reinterpret_cast<const uint32_t*>(at); };
    for (int start = 0; start < source; start += kQueries) {
        const int count = std::min(kQueries, source - start);
        for (int row = 0; row < kQueries; ++row)
            for (int i = 0; i < padded; ++i)
                narrow(queries + row * padded + i,
                       row < count ? take(joined, 0, start + row, i) : 0.0f);
        for (int p = 0; p < positions; p += kWide)
            product<T, kQueries, 3>(word(queries), depth, word(keys + p * packed), positions, depth,
                                    scores + p, positions);
        for (int row = 0; row < count; ++row) {
            float* line = scores + row * positions;
            const float* bias = encoder.bias + int64_t(head) * (2 * encoder.reach - 1) +
                                encoder.reach - 1 - (start + row);
            for (int p = 0; p < source; ++p) line[p] += bias[p];
            softmax(line, source);
            for (int p = 0; p < positions; ++p)
                narrow(shares + row * positions + p, p < source ? line[p] : 0.0f);
        }
        for (int i = 0; i < padded; i += 2 * kVector)
            product<T, kQueries, 2>(word(shares), positions / packed, word(values + i * packed),
                                    padded, round_up(source, packed) / packed, out + i, padded);
        for (int row = 0; row < count; ++row)
            std::memcpy(mixed + int64_t(start + row) * inner + head * encoder.width,
                        out + row * padded, encoder.width * sizeof(float));
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

// The weight (out, in) as panels (out / 48, in / 2, 48) of bfloat16 pairs; in must be even.
void t5_pack_head(const void* weight, int out, int in, void* packed) {
    const bf16* from = static_cast<const bf16*>(weight);
    bf16* to = static_cast<bf16*>(packed);
#pragma omp parallel for schedule(static)
    for (int panel = 0; panel < (out + kWide - 1) / kWide; ++panel)
        for (int k = 0; k < in; ++k)
            for (int n = 0; n < kWide; ++n) {
                const int row = panel * kWide + n;
                to[((int64_t(panel) * (in / 2) + k / 2) * kWide + n) * 2 + k % 2] =
                    row < out ? from[int64_t(row) * in + k] : bf16{0};
            }
}

// logits (rows, stride) float32 = x (rows, in) bfloat16 times the packed weight.
void t5_head(const void* x, int rows, const void* packed, int out, int in, float* logits,
             int64_t stride) {
    const uint32_t* left = static_cast<const uint32_t*>(x);
    const uint32_t* panels = static_cast<const uint32_t*>(packed);
    const int depth = in / 2;
#pragma omp parallel for schedule(dynamic, 8)
    for (int panel = 0; panel < (out + kWide - 1) / kWide; ++panel) {
        const uint32_t* right = panels + int64_t(panel) * depth * kWide;
        float* to = logits + int64_t(panel) * kWide;
        int row = 0;
        const auto run = [&](auto count) {
            constexpr int n = decltype(count)::value;
            for (; row + n <= rows; row += n)
                product<bf16, n, 3>(left + int64_t(row) * depth, depth, right, kWide, depth,
                                    to + row * stride, stride);
        };
        run(std::integral_constant<int, 8>{});
        run(std::integral_constant<int, 4>{});
        run(std::integral_constant<int, 2>{});
        run(std::integral_constant<int, 1>{});
    }
}

}  // extern "C"

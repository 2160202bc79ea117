// What happens to the rows between two matrix products: norms, activations, quantization.

#include "vectors.h"

namespace t5 {

static void quantize(const float* row, int width, uint8_t* to, float* scale, bool positive) {
    const float most = magnitude(row, width);
    const float steps = positive ? 255.0f : 127.0f, zero = positive ? 0.0f : 128.0f;
    const float factor = most > 0 ? steps / most : 0.0f;
    *scale = most / steps;
    int i = 0;
    for (; i + kVector <= width; i += kVector) {
        const Floats value = load(row + i) * factor + (zero + 0.5f);
        const Ints whole = __builtin_convertvector(value, Ints);
        typedef uint8_t Unsigned __attribute__((vector_size(16)));
        const Unsigned bytes = __builtin_convertvector(whole, Unsigned);
        std::memcpy(to + i, &bytes, sizeof(bytes));
    }
    for (; i < width; ++i) to[i] = uint8_t(int32_t(row[i] * factor + (zero + 0.5f)));
}

void put_row(const float* row, int width, const Output& output, int64_t index, bool positive) {
    const int64_t at = index * width;
    switch (output.format) {
        case kFloat32:
            convert(row, 1, width, width, static_cast<float*>(output.values) + at);
            break;
        case kBfloat16:
            convert(row, 1, width, width, static_cast<bf16*>(output.values) + at);
            break;
        case kBytes:
            quantize(row, width, static_cast<uint8_t*>(output.values) + at, output.scales + index,
                     positive);
    }
}

template <class T>
static void add(float* hidden, const T* addend, float scale, int width) {
    int i = 0;
    for (; i + kVector <= width; i += kVector)
        store(hidden + i, load(hidden + i) + load(addend + i) * scale);
    for (; i < width; ++i) hidden[i] += widen(addend[i]) * scale;
}

static void norm(const float* hidden, const float* weight, int width, float epsilon, float* out) {
    Floats squares{};
    int i = 0;
    for (; i + kVector <= width; i += kVector) squares += load(hidden + i) * load(hidden + i);
    float total = sum(squares);
    for (; i < width; ++i) total += hidden[i] * hidden[i];
    const float factor = 1.0f / std::sqrt(total / width + epsilon);
    for (i = 0; i + kVector <= width; i += kVector)
        store(out + i, load(hidden + i) * factor * load(weight + i));
    for (; i < width; ++i) out[i] = hidden[i] * factor * weight[i];
}

enum Activation { kRelu = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

static float activated(float x, int kind) {
    switch (kind) {
        case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
        case kGeluTanh:
            return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        case kSilu: return x / (1.0f + std::exp(-x));
    }
    return x > 0 ? x : 0;
}

// tanh's exponential in vectors: the gated models spend a tenth of their time here otherwise.
static Floats gelu_tanh(Floats x) {
    const Floats inner = 1.59576912f * (x + 0.044715f * x * x * x);  // twice tanh's argument
    const Floats magnitude = max(inner, -inner);
    const Floats decay = exponential(-magnitude);
    const Floats tanh = (1.0f - decay) / (1.0f + decay);
    return 0.5f * x * (1.0f + (inner < 0.0f ? -tanh : tanh));
}

template <class T>
static void activate_row(const T* in, float scale, int width, int kind, bool gated, float* out) {
    int i = 0;
    if (kind == kRelu || kind == kGeluTanh)
        for (; i + kVector <= width; i += kVector) {
            const Floats x = load(in + i) * scale;
            Floats y = kind == kRelu ? max(x, Floats{}) : gelu_tanh(x);
            if (gated) y *= load(in + width + i) * scale;
            store(out + i, y);
        }
    for (; i < width; ++i) {
        out[i] = activated(widen(in[i]) * scale, kind);
        if (gated) out[i] *= widen(in[width + i]) * scale;
    }
}

template <class T>
static void embed_rows(const int32_t* ids, int rows, int width, const T* table, float* hidden) {
    for (int row = 0; row < rows; ++row) {
        const T* from = table + int64_t(ids[row]) * width;
        for (int i = 0; i < width; ++i) hidden[int64_t(row) * width + i] = widen(from[i]);
    }
}

}  // namespace t5

using namespace t5;

extern "C" {

// hidden (rows, width) float32: the embeddings of `ids`.
void t5_embed(const int32_t* ids, int rows, int width, const void* table, int format,
              float* hidden) {
    if (format == kBfloat16)
        embed_rows(ids, rows, width, static_cast<const bf16*>(table), hidden);
    else
        embed_rows(ids, rows, width, static_cast<const float*>(table), hidden);
}

// hidden += addend * scales (by row; null: 1), then out = RMS norm of hidden, times weight.
void t5_add_norm(float* hidden, const void* addend, int format, const float* scales, int rows,
                 int width, const float* weight, float epsilon, void* values, float* out_scales,
                 int out_format) {
    const Output output{values, out_scales, out_format};
#pragma omp parallel if (int64_t(rows) * width > 16384)
    {
        static thread_local std::vector<float> room;
        float* normed = scratch(room, width);
#pragma omp for schedule(static)
        for (int row = 0; row < rows; ++row) {
            const int64_t at = int64_t(row) * width;
            const float scale = scales ? scales[row] : 1.0f;
            if (addend && format == kBfloat16)
                add(hidden + at, static_cast<const bf16*>(addend) + at, scale, width);
            else if (addend)
                add(hidden + at, static_cast<const float*>(addend) + at, scale, width);
            norm(hidden + at, weight, width, epsilon, normed);
            put_row(normed, width, output, row, false);
        }
    }
}

// out (rows, width) = activation of inner (rows, width), or of its first half times its second.
void t5_activate(const void* inner, int format, const float* scales, int rows, int width, int kind,
                 int gated, void* values, float* out_scales, int out_format) {
    const Output output{values, out_scales, out_format};
    const int64_t stride = int64_t(width) * (gated ? 2 : 1);
#pragma omp parallel if (int64_t(rows) * width > 16384)
    {
        static thread_local std::vector<float> room;
        float* row_out = scratch(room, width);
#pragma omp for schedule(static)
        for (int row = 0; row < rows; ++row) {
            const float scale = scales ? scales[row] : 1.0f;
            if (format == kBfloat16)
                activate_row(static_cast<const bf16*>(inner) + row * stride, scale, width, kind,
                             gated, row_out);
            else
                activate_row(static_cast<const float*>(inner) + row * stride, scale, width, kind,
                             gated, row_out);
            put_row(row_out, width, output, row, kind == kRelu && !gated);
        }
    }
}

}  // extern "C"

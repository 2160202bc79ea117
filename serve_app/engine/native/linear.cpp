// Linear layers of a decode step. A step has few rows, so its price is reading the weights: they lie
// in panels, each read once, in order, by one thread, and used for all rows while it is in the
// cache. oneDNN's products, which the encoder uses, took half as long again here (measured:
// docs/performance.md).

#include "products.h"

namespace t5 {

// Weights of (out, in) as (panels, in / packed, kTile, packed). For bytes, sums over `in` and
// scales by output, so that sum((x - zero) w) = sum(x w) - zero * sum(w).
struct Linear {
    void* packed;
    int32_t* sums;
    const float* scales;
    int out, in, kind;  // kind is a Format
};

template <class Kind> static void pack(const Linear& linear, const typename Kind::Weight* weight) {
    constexpr int packed = Kind::kPacked;
    auto* to = static_cast<typename Kind::Weight*>(linear.packed);
#pragma omp parallel for schedule(static)
    for (int panel = 0; panel < (linear.out + kTile - 1) / kTile; ++panel)
        for (int n = 0; n < kTile; ++n) {
            const int out = panel * kTile + n;
            int32_t sum = 0;
            for (int k = 0; k < linear.in; ++k) {
                const int64_t at = int64_t(panel) * linear.in * kTile +
                                   int64_t(k / packed) * kTile * packed + n * packed + k % packed;
                to[at] = out < linear.out ? weight[int64_t(out) * linear.in + k]
                                          : typename Kind::Weight{};
                if constexpr (packed == 4) sum += to[at];
            }
            if (packed == 4) linear.sums[out] = sum;
        }
}

template <class Kind, class To, int kRows>
static void tile(const Linear& linear, int panel, const typename Kind::Value* x,
                 const float* x_scales, int zero, To* to, int64_t stride) {
    const int depth = linear.in / Kind::kPacked, column = panel * kTile;
    typename Kind::Sum total[kRows][kTileVectors];
    product<Kind, kRows, kTileVectors>(
        reinterpret_cast<const uint32_t*>(x), depth,
        static_cast<const uint32_t*>(linear.packed) + int64_t(panel) * depth * kTile, kTile, depth,
        total);
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kTileVectors; ++v) {
            const int n = column + v * kVector;
            if (n >= linear.out) break;
            Floats value;
            if constexpr (Kind::kPacked == 4) {
                Ints sums;
                std::memcpy(&sums, linear.sums + n, sizeof(sums));
                value = __builtin_convertvector(total[row][v] - sums * zero, Floats) *
                        load(linear.scales + n) * x_scales[row];
            } else {
                value = total[row][v];
            }
            To* at = to + row * stride + n;
            if (n + kVector <= linear.out)
                store(at, value);
            else
                for (int i = 0; n + i < linear.out; ++i) narrow(at + i, value[i]);
        }
}

template <class Kind, class To>
static void multiply(const Linear& linear, const typename Kind::Value* x, const float* x_scales,
                     int zero, int rows, To* to, int64_t stride) {
    const int panels = (linear.out + kTile - 1) / kTile;
#pragma omp parallel for schedule(static)
    for (int panel = 0; panel < panels; ++panel) {
        int row = 0;
        const auto run = [&](auto count) {
            constexpr int n = decltype(count)::value;
            for (; row + n <= rows; row += n)
                tile<Kind, To, n>(linear, panel, x + int64_t(row) * linear.in,
                                  x_scales ? x_scales + row : nullptr, zero, to + row * stride,
                                  stride);
        };
        run(std::integral_constant<int, kTileRows>{});
        if (kTileRows > 4) run(std::integral_constant<int, 4>{});
        if (kTileRows > 2) run(std::integral_constant<int, 2>{});
        run(std::integral_constant<int, 1>{});
    }
}

template <class To>
static void multiply_any(const Linear& linear, const void* x, const float* x_scales, int zero,
                         int rows, To* to, int64_t stride) {
    switch (linear.kind) {
        case kFloat32:
            return multiply<Float32>(linear, static_cast<const float*>(x), x_scales, zero, rows, to,
                                     stride);
        case kBfloat16:
            return multiply<Bfloat16>(linear, static_cast<const bf16*>(x), x_scales, zero, rows, to,
                                      stride);
        case kBytes:
            return multiply<Int8>(linear, static_cast<const uint8_t*>(x), x_scales, zero, rows, to,
                                  stride);
    }
}

}  // namespace t5

using namespace t5;

extern "C" {

// Outputs of a panel; `packed` needs room for whole panels.
int t5_tile() { return kTile; }

// weight: (out, in) of the linear's kind; in a multiple of what fits a word.
void t5_pack(const Linear* linear, const void* weight) {
    switch (linear->kind) {
        case kFloat32: return pack<Float32>(*linear, static_cast<const float*>(weight));
        case kBfloat16: return pack<Bfloat16>(*linear, static_cast<const bf16*>(weight));
        case kBytes: return pack<Int8>(*linear, static_cast<const int8_t*>(weight));
    }
}

// to (rows, stride) = x (rows, in) times the weight; bytes count from `zero` and by x_scales.
void t5_linear(const Linear* linear, const void* x, const float* x_scales, int zero, int rows,
               void* to, int format, int64_t stride) {
    if (format == kBfloat16)
        multiply_any(*linear, x, x_scales, zero, rows, static_cast<bf16*>(to), stride);
    else
        multiply_any(*linear, x, x_scales, zero, rows, static_cast<float*>(to), stride);
}

}  // extern "C"

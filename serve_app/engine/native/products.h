// Small matrix products: C = A B with rows of A broadcast word by word, B read whole registers at a
// time. A word is a float, two bfloat16 or four bytes of a row; accumulators are float32 or int32.
#pragma once

#include "vectors.h"

namespace t5 {

// Accumulators for rows times vectors should fill the registers, and no more.
#ifdef __AVX512F__
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 2, kTileVectors = 2;
#endif
constexpr int kTile = kTileVectors * kVector;

struct Float32 {
    typedef float Value;
    typedef float Weight;
    typedef Floats Sum;
    static constexpr int kPacked = 1;
    static Sum multiply(uint32_t word, Words values, Sum total) {
        return total + as<Floats>(values) * as<float>(word);
    }
};

struct Bfloat16 {
    typedef bf16 Value;
    typedef bf16 Weight;
    typedef Floats Sum;
    static constexpr int kPacked = 2;
    static Sum multiply(uint32_t pair, Words pairs, Sum total) {
#ifdef __AVX512BF16__
        return as<Floats>(_mm512_dpbf16_ps(as<__m512>(total), as<__m512bh>(Words{} + pair),
                                           as<__m512bh>(pairs)));
#else
        total += even(pairs) * as<float>(pair << 16);
        return total + odd(pairs) * as<float>(pair & 0xffff0000u);
#endif
    }
};

// Unsigned bytes times signed ones.
struct Int8 {
    typedef uint8_t Value;
    typedef int8_t Weight;
    typedef Ints Sum;
    static constexpr int kPacked = 4;
    static Sum multiply(uint32_t four, Words fours, Sum total) {
#ifdef __AVX512VNNI__
        return as<Ints>(_mm512_dpbusd_epi32(as<__m512i>(total), as<__m512i>(Words{} + four),
                                            as<__m512i>(fours)));
#else
        for (int i = 0; i < 4; ++i) {
            const Ints weights = as<Ints>(fours << (24 - 8 * i)) >> 24;
            total += weights * int32_t(four >> (8 * i) & 0xffu);
        }
        return total;
#endif
    }
};

template <class T> struct KindOf;
template <> struct KindOf<float> { typedef Float32 Kind; };
template <> struct KindOf<bf16> { typedef Bfloat16 Kind; };

// total (kRows, kVectors registers) = A (kRows, depth) B (depth, kVectors registers), in words.
template <class Kind, int kRows, int kVectors>
inline void product(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                    int depth, typename Kind::Sum (&total)[kRows][kVectors]) {
    for (auto& row : total)
        for (auto& sum : row) sum = typename Kind::Sum{};
    for (int k = 0; k < depth; ++k) {
        Words right[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            right[v] = words(b + k * b_stride + v * kVector);
            // With few rows it is all a matter of how fast B comes from memory.
            if (kRows <= 2) __builtin_prefetch(b + k * b_stride + v * kVector + 1536);
        }
        for (int row = 0; row < kRows; ++row) {
            const uint32_t left = a[row * a_stride + k];
            for (int v = 0; v < kVectors; ++v)
                total[row][v] = Kind::multiply(left, right[v], total[row][v]);
        }
    }
}

}  // namespace t5

// Small matrix products inside the kernels: C = A B with rows of A broadcast word by word.
#pragma once

#include "vectors.h"

namespace t5 {

#ifdef __AVX512BF16__
inline Floats multiply(bf16, uint32_t pair, Words pairs, Floats total) {
    return as<Floats>(_mm512_dpbf16_ps(as<__m512>(total), as<__m512bh>(Words{} + pair),
                                       as<__m512bh>(pairs)));
}
#else
inline Floats multiply(bf16, uint32_t pair, Words pairs, Floats total) {
    total += even(pairs) * as<float>(pair << 16);
    return total + odd(pairs) * as<float>(pair & 0xffff0000u);
}
#endif
inline Floats multiply(float, uint32_t word, Words values, Floats total) {
    return total + as<Floats>(values) * as<float>(word);
}

// total (kRows, 16 * kVectors) = A (kRows, depth) B (depth, 16 * kVectors), in words of T.
template <class T, int kRows, int kVectors>
inline void product(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                    float* to, int to_stride) {
    Floats total[kRows][kVectors] = {};
    for (int k = 0; k < depth; ++k) {
        Words right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = words(b + int64_t(k) * b_stride + v * kVector);
        for (int row = 0; row < kRows; ++row) {
            const uint32_t left = a[int64_t(row) * a_stride + k];
            for (int v = 0; v < kVectors; ++v)
                total[row][v] = multiply(T{}, left, right[v], total[row][v]);
        }
    }
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; ++v)
            store(to + int64_t(row) * to_stride + v * kVector, total[row][v]);
}

}  // namespace t5

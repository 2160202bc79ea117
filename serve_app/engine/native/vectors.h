// Sixteen floats at a time, in GCC's vector extension: one register with AVX-512, two with AVX2,
// four with SSE or NEON. Built once per instruction set (build.py), chosen when loaded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <algorithm>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace t5 {

constexpr int kVector = 16;
constexpr float kNever = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline Floats broadcast(float value) { return value - Floats{}; }

template <class To, class From> inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

inline Floats load(const bf16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return as<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline void store(int8_t* to, Floats value) {
#ifdef __AVX512F__
    const __m512i whole = _mm512_cvtps_epi32(as<__m512>(value));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(whole));
#else
    for (int i = 0; i < kVector; ++i) to[i] = int8_t(std::lrintf(value[i]));
#endif
}

inline Words words(const void* from) {
    Words value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

inline Floats even(Words pairs) { return as<Floats>(pairs << 16); }
inline Floats odd(Words pairs) { return as<Floats>(pairs & 0xffff0000u); }

// Caches are read a chunk at a time: sixteen floats, or sixteen words of two bfloat16 each,
// of which the even come apart from the odd: so widening costs one operation for sixteen values.
template <class T> struct Chunk {
    static constexpr int kParts = 1, kValues = kVector;
    Floats parts[1];
    explicit Chunk(const T* from) : parts{load(from)} {}
};
template <> struct Chunk<bf16> {
    static constexpr int kParts = 2, kValues = 2 * kVector;
    Floats parts[2];
    explicit Chunk(const bf16* from) : parts{even(words(from)), odd(words(from))} {}
};

// The order in which floats meet a chunk's values: even ones first, if they come apart.
template <class T> inline int in_chunk(int i) {
    constexpr int parts = Chunk<T>::kParts;
    const int within = i % Chunk<T>::kValues;
    return i - within + within % parts * kVector + within / parts;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(bf16* to, Floats value) {
    // Round to nearest, ties to even. Activations are finite: no care is taken of NaN.
    Words bits = as<Words>(value);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    const Halves halves = __builtin_convertvector(bits >> 16, Halves);
    std::memcpy(to, &halves, sizeof(halves));
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return as<float>(uint32_t(value.bits) << 16); }

inline void narrow(float* to, float value) { *to = value; }
inline void narrow(int8_t* to, float value) { *to = int8_t(std::lrintf(value)); }
inline void narrow(bf16* to, float value) {
    uint32_t bits = as<uint32_t>(value);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    to->bits = uint16_t(bits >> 16);
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(as<__m512>(value));
#else
    float parts[kVector], total = 0;
    store(parts, value);
    for (int width = kVector / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return total + parts[0];
#endif
}

inline float max(Floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(as<__m512>(value));
#else
    float parts[kVector];
    store(parts, value);
    float top = parts[0];
    for (int i = 1; i < kVector; ++i) top = parts[i] > top ? parts[i] : top;
    return top;
#endif
}

// e^x for x <= 0, to about one unit in the last place: Cephes' expf, without its branches.
inline Floats exponential(Floats x) {
    x = max(x, broadcast(-87.0f));
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats whole = (x * 1.44269504f + magic) - magic;
    x = x - whole * 0.693359375f;
    x = x + whole * 2.12194440e-4f;
    Floats y = broadcast(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * (x * x) + x + 1.0f;
    const Ints power = __builtin_convertvector(whole, Ints) << 23;
    return as<Floats>(as<Ints>(y) + power);
}

// Softmax of values[0..count), in place. Values up to the next whole vector are overwritten.
inline void softmax(float* values, int count) {
    const int padded = (count + kVector - 1) / kVector * kVector;
    for (int i = count; i < padded; ++i) values[i] = kNever;
    Floats top = broadcast(kNever);
    for (int i = 0; i < padded; i += kVector) top = max(top, load(values + i));
    const Floats most = broadcast(max(top));
    Floats total{};
    for (int i = 0; i < padded; i += kVector) {
        const Floats value = exponential(load(values + i) - most);
        total += value;
        store(values + i, value);
    }
    // e^-87 is not zero: take the padding's share out again.
    float whole = sum(total);
    for (int i = count; i < padded; ++i) {
        whole -= values[i];
        values[i] = 0;
    }
    const Floats share = broadcast(1.0f / whole);
    for (int i = 0; i < padded; i += kVector) store(values + i, load(values + i) * share);
}

// to[0..count) = from[0..count) * scale, then zeros up to `padded`.
template <class From, class To>
inline void convert(const From* from, float scale, int count, int padded, To* to) {
    int i = 0;
    for (; i + kVector <= count; i += kVector) store(to + i, load(from + i) * scale);
    for (; i < count; ++i) narrow(to + i, widen(from[i]) * scale);
    for (; i < padded; ++i) narrow(to + i, 0.0f);
}

// The greatest magnitude.
inline float magnitude(const float* values, int count) {
    Floats top{};
    int i = 0;
    for (; i + kVector <= count; i += kVector) {
        const Floats value = load(values + i);
        top = max(top, max(value, -value));
    }
    float most = max(top);
    for (; i < count; ++i) most = std::fmax(most, std::fabs(values[i]));
    return most;
}

// Heads are 32, 64 or 128 values wide in all T5s there are.
template <class T, class Run> inline void with_chunks(int padded, Run run) {
    constexpr int values = Chunk<T>::kValues;
    switch (padded) {
        case 32: return run(std::integral_constant<int, 32 / values>{});
        case 64: return run(std::integral_constant<int, 64 / values>{});
        case 128: return run(std::integral_constant<int, 128 / values>{});
    }
}

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Room that a thread keeps from call to call.
template <class T> inline T* scratch(std::vector<T>& room, size_t size) {
    if (room.size() < size) room.resize(size);
    return room.data();
}

// Where rows go that feed the next matrix product: as they are, or as unsigned bytes around 128 (or
// from 0, where none is negative), each row with a scale of its own.
enum Format { kFloat32 = 0, kBfloat16 = 1, kBytes = 2 };

struct Output {
    void* values;
    float* scales;  // of kBytes only
    int format;
};

void put_row(const float* row, int width, const Output& output, int64_t index, bool positive);

}  // namespace t5

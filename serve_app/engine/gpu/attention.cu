// Attention of a decode step: one query for each row and head, to as many keys as there are.
//
// A block is one head of one row. LANES threads hold one key together, 16 bytes each, so GROUPS keys
// are under way at once, of each thread UNROLL; softmax is online (Milakov and Gimelshein 2018).
//
// Compiled at run time for a HEAD_WIDTH, and for HALF (bfloat16) or float32 as `Number`. No headers:
// those of CUDA need not be there.

#define THREADS 128
#define UNROLL 4

#ifdef HALF
typedef unsigned short Number;
#define VECTOR 8
#else
typedef float Number;
#define VECTOR 4
#endif

#define LANES (HEAD_WIDTH / VECTOR)
#define GROUPS (THREADS / LANES)

static const float NEVER = -1e30f;  // not infinite: differences of such must be numbers

struct alignas(16) Vector { unsigned int parts[4]; };

__device__ inline void spread(const Vector& from, float* to) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#ifdef HALF
        to[2 * i] = __int_as_float((int)(from.parts[i] << 16));
        to[2 * i + 1] = __int_as_float((int)(from.parts[i] & 0xffff0000u));
#else
        to[i] = __int_as_float((int)from.parts[i]);
#endif
    }
}

__device__ inline float wide(Number x) {
#ifdef HALF
    return __int_as_float((int)x << 16);
#else
    return x;
#endif
}

__device__ inline Number narrow(float x) {
#ifdef HALF
    // To the nearest, of two the even one.
    unsigned int bits = (unsigned int)__float_as_int(x);
    return (Number)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#else
    return x;
#endif
}

// Keys that follow each other; no bias.
struct Source {
    __device__ long long row(int at) const { return at; }
    __device__ float bias(int at) const { return 0.0f; }
};

// Keys of a hypothesis: at each position that of the beam which it descends from.
struct Generated {
    const long long* ancestry;  // of this beam
    const Number* distances;    // bias by how far back a key lies, of this head
    int beams, beam, newest;

    __device__ long long row(int at) const {
        int from = beams == 1 || at == newest ? beam : (int)ancestry[at];
        return (long long)at * beams + from;
    }
    __device__ float bias(int at) const { return wide(distances[newest - at]); }
};

template <typename Keys>
__device__ inline void attend(
    const Number* query, const Number* keys, const Number* values, int count, const Keys& which,
    Number* mixed
) {
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    float asked[VECTOR], sum[VECTOR], most = NEVER, weight = 0.0f;
    spread(*(const Vector*)(query + lane * VECTOR), asked);
    for (int i = 0; i < VECTOR; i++) sum[i] = 0.0f;
    for (int first = 0; first < count; first += UNROLL * GROUPS) {
        Vector key[UNROLL], value[UNROLL];
        float score[UNROLL], now = most;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int at = first + u * GROUPS + group;
            long long from = which.row(at < count ? at : 0) * HEAD_WIDTH + lane * VECTOR;
            key[u] = *(const Vector*)(keys + from);
            value[u] = *(const Vector*)(values + from);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int at = first + u * GROUPS + group;
            float numbers[VECTOR], product = 0.0f;
            spread(key[u], numbers);
            for (int i = 0; i < VECTOR; i++) product += asked[i] * numbers[i];
            for (int step = 1; step < LANES; step *= 2) {
                product += __shfl_xor_sync(0xffffffffu, product, step);
            }
            score[u] = at < count ? product + which.bias(at) : NEVER;
            now = fmaxf(now, score[u]);
        }
        float scale = expf(most - now);
        weight *= scale;
        for (int i = 0; i < VECTOR; i++) sum[i] *= scale;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float numbers[VECTOR];
            float part = first + u * GROUPS + group < count ? expf(score[u] - now) : 0.0f;
            spread(value[u], numbers);
            weight += part;
            for (int i = 0; i < VECTOR; i++) sum[i] += part * numbers[i];
        }
        most = now;
    }
    __shared__ float mosts[GROUPS], weights[GROUPS], sums[GROUPS][HEAD_WIDTH];
    if (lane == 0) {
        mosts[group] = most;
        weights[group] = weight;
    }
    for (int i = 0; i < VECTOR; i++) sums[group][lane * VECTOR + i] = sum[i];
    __syncthreads();
    for (int column = threadIdx.x; column < HEAD_WIDTH; column += THREADS) {
        float top = NEVER, all = 0.0f, out = 0.0f;
        for (int g = 0; g < GROUPS; g++) top = fmaxf(top, mosts[g]);
        for (int g = 0; g < GROUPS; g++) {
            float scale = expf(mosts[g] - top);
            all += scale * weights[g];
            out += scale * sums[g][column];
        }
        mixed[column] = narrow(all > 0.0f ? out / all : 0.0f);
    }
}

// `query` and `mixed` (rows, heads, width); `keys` and `values` (slots, heads, room, width);
// `sources` counts a slot's keys, `stride` numbers apart.
extern "C" __global__ void cross(
    const Number* query, const Number* keys, const Number* values, const long long* sources,
    Number* mixed, int stride, int beams, int room
) {
    int head = blockIdx.x, heads = gridDim.x;
    long long row = blockIdx.y, slot = row / beams;
    long long lies = (row * heads + head) * HEAD_WIDTH;
    long long from = (slot * heads + head) * room * HEAD_WIDTH;
    int count = (int)sources[slot * stride];
    attend(query + lies, keys + from, values + from, count, Source(), mixed + lies);
}

// `joined` (rows, 3, heads, width), queries, keys and values of the newest token, of which the last
// two are stored at `steps` of the slot; `keys` and `values` (slots, heads, room, beams, width);
// `ancestry` (slots, beams, room); slots of it and of `steps` are `stride` numbers apart;
// `distances` (heads, `far`).
extern "C" __global__ void generated(
    const Number* joined, Number* keys, Number* values, const long long* steps,
    const long long* ancestry, const Number* distances, Number* mixed, int stride, int beams,
    int room, int far
) {
    int head = blockIdx.x, heads = gridDim.x;
    long long row = blockIdx.y, slot = row / beams;
    int beam = (int)(row % beams), newest = (int)steps[slot * stride];
    long long inner = (long long)heads * HEAD_WIDTH;
    const Number* query = joined + row * 3 * inner + head * HEAD_WIDTH;
    long long from = (slot * heads + head) * room * beams * HEAD_WIDTH;
    long long to = from + ((long long)newest * beams + beam) * HEAD_WIDTH;
    for (int column = threadIdx.x; column < HEAD_WIDTH; column += THREADS) {
        keys[to + column] = query[inner + column];
        values[to + column] = query[2 * inner + column];
    }
    __syncthreads();
    const long long* descent = ancestry + slot * stride + (long long)beam * room;
    Generated which = {descent, distances + (long long)head * far, beams, beam, newest};
    attend(query, keys + from, values + from, newest + 1, which, mixed + row * inner + head * HEAD_WIDTH);
}

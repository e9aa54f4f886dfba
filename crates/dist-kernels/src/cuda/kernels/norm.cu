// add_bias_norm: residual += delta + bias, then normed = norm(residual).
//
// Layout: residual, delta, normed [rows, d], bias and the norm's vectors [d]; 16-byte aligned if d is a multiple of 8.
// Bound by latency for few rows, by L2 and memory for many. The norm is taken of the sum before it is rounded.
//
// A block takes a row and keeps it in registers; the squares are taken about each warp's mean. The vectors do not depend
// on the kernel before and are asked for before the wait. Of many rows a block of `add_bias_norm` takes one after another:
// it keeps the vectors, which are as long as what it reads of a row, and asks for a row while it is at the one before.
//
// Launch: grid rows, or fewer for `add_bias_norm`; threads = align_up(div_ceil(d, V · N), 32); V · N elements are a thread's: 8 in
// `add_bias_norm` (d a multiple of 8, at most 8,192), 16 in `_long` (a multiple of 8, at most 12,288) and in `_odd` (any d
// up to 16,384).

struct NormArgs {
    u16* normed;
    u16* residual;        // read and written
    const u16* delta;     // [rows, d] or null
    const u16* bias;      // [d] or null
    const u16* weight;    // [d]; null: no norm
    const u16* norm_bias; // [d]; null: root mean square
    int d;
    int keep_normed;      // what residual holds afterwards: the sum, or the norm of it
    float eps;
    int rows;
};

// V elements side by side as they are stored.
template <int V>
struct Bits;
template <>
struct Bits<8> {
    uint4 v;
};
template <>
struct Bits<1> {
    u16 v;
};

// Zeros where there is nothing.
template <int V>
DEVICE Bits<V> load_bits(const u16* from, bool has) {
    Bits<V> bits = {};
    if constexpr (V == 8) {
        if (has) bits.v = *(const uint4*)from;
    } else {
        if (has) bits.v = *from;
    }
    return bits;
}

template <class T, int V>
DEVICE void widen_bits(float (&x)[V], const Bits<V>& bits) {
    if constexpr (V == 8) {
        u32 words[4] = {bits.v.x, bits.v.y, bits.v.z, bits.v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = widen2<T>(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    } else {
        x[0] = widen<T>(bits.v);
    }
}

template <class T, int V>
DEVICE void store_row(u16* to, const float (&x)[V]) {
    if constexpr (V == 8) {
        *(uint4*)to = make_uint4(narrow2<T>(x[0], x[1]), narrow2<T>(x[2], x[3]), narrow2<T>(x[4], x[5]),
                                 narrow2<T>(x[6], x[7]));
    } else {
        *to = narrow<T>(x[0]);
    }
}

// The sum over a warp.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// The scale and the mean of a row, from each warp's: its sum, its squares about its own mean, how many, that mean.
template <class T, int N>
DEVICE float2 moments_of(const NormArgs& args, const float4* warps) {
    float mean = 0.0f, square = 0.0f;
    int n_warps = blockDim.x / 32;
    if (args.norm_bias) {
#pragma unroll (N > 2 ? 1 : 2)
        for (int w = 0; w < n_warps; w++) mean += warps[w].x;
        mean /= args.d;
    }
#pragma unroll (N > 2 ? 1 : 2)
    for (int w = 0; w < n_warps; w++) {
        float4 of = warps[w];
        float apart = of.w - mean;
        square += fmaf(of.z * apart, apart, of.y);
    }
    return make_float2(1.0f / sqrtf(square / args.d + args.eps), mean);
}

template <class T, int V, int N>
DEVICE void add_bias_norm(const NormArgs& args) {
    __shared__ float4 warps[2][32];  // of this row and of the next one
    let_next_start();
    constexpr bool EARLY = V > 1, WALKS = EARLY && N == 1;  // else registers do not suffice
    Bits<V> bias[N], weight[N], norm_bias[N], residual[N], delta[N];
    auto at = [&](int n) { return (n * (int)blockDim.x + (int)threadIdx.x) * V; };
    auto inside = [&](int n) { return at(n) < args.d; };
    auto load_vectors = [&](int n) {
        weight[n] = load_bits<V>(args.weight + at(n), inside(n) && args.weight);
        norm_bias[n] = load_bits<V>(args.norm_bias + at(n), inside(n) && args.norm_bias);
    };
    auto load_row = [&](int row, int n) {
        i64 from = (i64)row * args.d + at(n);
        bool has = row < args.rows && inside(n);
        residual[n] = load_bits<V>(args.residual + from, has);
        delta[n] = load_bits<V>(args.delta + from, has && args.delta);
    };
#pragma unroll
    for (int n = 0; n < N; n++) {
        bias[n] = load_bits<V>(args.bias + at(n), inside(n) && args.bias);
        if (EARLY) load_vectors(n);
    }
    wait_for_previous();
    bool changed = (args.delta || args.bias) && !args.keep_normed;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (EARLY) load_row(blockIdx.x, n);
    }
#pragma unroll 1
    for (int row = blockIdx.x, turn = 0; row < args.rows; row += gridDim.x, turn ^= 1) {
        float x[N][V], sum = 0.0f;
        i64 first = (i64)row * args.d;
        auto store_sum = [&](int n) {
            if (inside(n) && changed) store_row<T, V>(args.residual + first + at(n), x[n]);
        };
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (!EARLY) load_row(row, n);
            float r[V], d[V], b[V];
            widen_bits<T>(r, residual[n]), widen_bits<T>(d, delta[n]), widen_bits<T>(b, bias[n]);
#pragma unroll
            for (int v = 0; v < V; v++) {
                x[n][v] = r[v] + (d[v] + b[v]);
                sum += x[n][v];
            }
            if (!EARLY) store_sum(n);
        }
        // Not above, where registers suffice: a load does not pass a store that it may depend on.
        if constexpr (EARLY) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                if (WALKS) load_row(row + gridDim.x, n);
            }
#pragma unroll
            for (int n = 0; n < N; n++) store_sum(n);
        }
        if (args.weight) {
            // A warp takes the squares about its own mean, and what the means differ is added after the only barrier.
            int warp = threadIdx.x / 32, count = 0;  // elements of this warp
#pragma unroll
            for (int n = 0; n < N; n++) {
                if constexpr (EARLY) {
                    count += max_of(0, min_of(32 * V, args.d - (n * (int)blockDim.x + warp * 32) * V));
                } else {
                    count += __popc(__ballot_sync(~0u, inside(n)));  // takes fewer registers
                }
            }
            sum = warp_sum(sum);
            float own = args.norm_bias && count > 0 ? sum / count : 0.0f, square = 0.0f;
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float centred = inside(n) ? x[n][v] - own : 0.0f;
                    square = fmaf(centred, centred, square);
                }
            }
            square = warp_sum(square);
            if (threadIdx.x % 32 == 0) warps[turn][warp] = make_float4(sum, square, count, own);
            __syncthreads();
            float2 scale_mean = moments_of<T, N>(args, warps[turn]);
#pragma unroll
            for (int n = 0; n < N; n++) {
                if (!EARLY) load_vectors(n);
                float w[V], b[V];
                widen_bits<T>(w, weight[n]), widen_bits<T>(b, norm_bias[n]);
#pragma unroll
                for (int v = 0; v < V; v++) x[n][v] = fmaf((x[n][v] - scale_mean.y) * scale_mean.x, w[v], b[v]);
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (!inside(n)) continue;
            store_row<T, V>(args.normed + first + at(n), x[n]);
            if (args.keep_normed) store_row<T, V>(args.residual + first + at(n), x[n]);
        }
        if (!WALKS) return;
    }
}

#define ADD_BIAS_NORM(name, T, V, N)                                                                    \
    KERNEL __launch_bounds__(V * N == 16 && V > 1 ? 768 : 1024) name(const __grid_constant__ NormArgs args) { \
        add_bias_norm<T, V, N>(args);                                                                   \
    }

ADD_BIAS_NORM(add_bias_norm_bf16, Bf16, 8, 1)
ADD_BIAS_NORM(add_bias_norm_f16, F16, 8, 1)
ADD_BIAS_NORM(add_bias_norm_long_bf16, Bf16, 8, 2)
ADD_BIAS_NORM(add_bias_norm_long_f16, F16, 8, 2)
ADD_BIAS_NORM(add_bias_norm_odd_bf16, Bf16, 1, 16)
ADD_BIAS_NORM(add_bias_norm_odd_f16, F16, 1, 16)

// add_bias_norm: residual += delta + bias, then normed = norm(residual).
//
// Layout: residual, delta, normed [rows, d], bias and the norm's vectors [d]; 16-byte aligned if d is a multiple of 8.
// Bound by latency for few rows, by memory for many. The norm is taken of the sum before it is rounded.
//
// A block takes a row and keeps it in registers; mean and variance take two passes over them. The vectors do not depend
// on the kernel before and are asked for before the wait.
//
// Launch: grid rows, threads = align_up(div_ceil(d, V · N), 32); V · N elements are a thread's: 8 in `add_bias_norm`
// (d a multiple of 8, at most 8,192), 16 in `_long` (a multiple of 8, at most 12,288) and in `_odd` (any d up to
// 16,384).

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
};

// V elements side by side as f32; zeros where there is no pointer.
template <class T, int V>
DEVICE void load_row(float (&x)[V], const u16* from, bool has) {
    if constexpr (V == 8) {
        uint4 bits = has ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
        u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = widen2<T>(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    } else {
        x[0] = has ? widen<T>(*from) : 0.0f;
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

// The sum over the block, in one fixed order; `slots` is not used again before a barrier.
DEVICE float block_sum(float x, float* slots) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    x = (threadIdx.x & 31) < warps ? slots[threadIdx.x & 31] : 0.0f;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

template <class T, int V, int N>
DEVICE void add_bias_norm(const NormArgs& args) {
    __shared__ float slots[2][32];
    let_next_start();
    i64 row = (i64)blockIdx.x * args.d;
    float x[N][V], weight[N][V], norm_bias[N][V];
    constexpr bool EARLY = V > 1;  // else registers do not suffice
    auto at = [&](int n) { return (n * (int)blockDim.x + (int)threadIdx.x) * V; };
    auto inside = [&](int n) { return at(n) < args.d; };
    auto load_vectors = [&](int n) {
        load_row<T, V>(weight[n], args.weight + at(n), inside(n) && args.weight);
        load_row<T, V>(norm_bias[n], args.norm_bias + at(n), inside(n) && args.norm_bias);
    };
#pragma unroll
    for (int n = 0; n < N; n++) {
        load_row<T, V>(x[n], args.bias + at(n), inside(n) && args.bias);
        if (EARLY) load_vectors(n);
    }
    wait_for_previous();
    bool changed = args.delta || args.bias;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float residual[V], delta[V];
        load_row<T, V>(residual, args.residual + row + at(n), inside(n));
        load_row<T, V>(delta, args.delta + row + at(n), inside(n) && args.delta);
#pragma unroll
        for (int v = 0; v < V; v++) {
            x[n][v] = residual[v] + (delta[v] + x[n][v]);
            sum += x[n][v];
        }
        if (inside(n) && changed && !args.keep_normed) store_row<T, V>(args.residual + row + at(n), x[n]);
    }
    if (args.weight) {
        float mean = args.norm_bias ? block_sum(sum, slots[0]) / args.d : 0.0f, square = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                float centred = inside(n) ? x[n][v] - mean : 0.0f;
                square = fmaf(centred, centred, square);
            }
        }
        float scale = 1.0f / sqrtf(block_sum(square, slots[1]) / args.d + args.eps);
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (!EARLY) load_vectors(n);
#pragma unroll
            for (int v = 0; v < V; v++) x[n][v] = fmaf((x[n][v] - mean) * scale, weight[n][v], norm_bias[n][v]);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!inside(n)) continue;
        store_row<T, V>(args.normed + row + at(n), x[n]);
        if (args.keep_normed) store_row<T, V>(args.residual + row + at(n), x[n]);
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

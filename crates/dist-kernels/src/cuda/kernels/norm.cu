// add_bias_norm: residual += delta + bias, then normed = norm(residual).
//
// Layout: residual, delta, normed [rows, d], bias and the norm's vectors [d]; 16-byte aligned if d is a multiple of 8.
// Bound by latency for few rows, by memory for many. The norm is taken of the sum before it is rounded.
//
// A block takes a row and keeps it in registers; the squares are taken about each warp's mean. The vectors do not depend
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

// The sum over a warp.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

template <class T, int V, int N>
DEVICE void add_bias_norm(const NormArgs& args) {
    __shared__ float4 warps[32];  // of each: its sum, its squares about its own mean, how many, that mean
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
    bool changed = (args.delta || args.bias) && !args.keep_normed;
    auto store_sum = [&](int n) {
        if (inside(n) && changed) store_row<T, V>(args.residual + row + at(n), x[n]);
    };
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
        if constexpr (!EARLY) store_sum(n);
    }
    // Not above, where registers suffice: a load does not pass a store that it may depend on.
    if constexpr (EARLY) {
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
        if (threadIdx.x % 32 == 0) warps[warp] = make_float4(sum, square, count, own);
        __syncthreads();
        float mean = 0.0f;
        int n_warps = blockDim.x / 32;
        if (args.norm_bias) {
#pragma unroll (N > 2 ? 1 : T::is_f16 ? 4 : 8)
            for (int w = 0; w < n_warps; w++) mean += warps[w].x;
            mean /= args.d;
        }
        square = 0.0f;
#pragma unroll (N > 2 ? 1 : T::is_f16 ? 4 : 8)
        for (int w = 0; w < n_warps; w++) {
            float4 of = warps[w];
            float apart = of.w - mean;
            square += fmaf(of.z * apart, apart, of.y);
        }
        float scale = 1.0f / sqrtf(square / args.d + args.eps);
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

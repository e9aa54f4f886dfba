// What the two kernels of `linear` share: arguments, the walk over the weight, and the end of a pass.
//
// Layout: weight [n, k] with inputs contiguous and `ld_weight` a multiple of 8, x [rows, k], out [rows, n]; 16-byte
// aligned; k a multiple of 8. Bound by reading the weight.
//
// A cluster of blocks owns `units` · 8 outputs and takes them in passes of up to TN; its blocks share k evenly. A block
// keeps a ring of stages in shared memory, filled by cp.async: TN pieces of weight rows and 8 · NT pieces of rows of x.
// Tensor cores multiply with the weight as the left operand, so a row of x is a column of the product and never meets
// another row: what a row gives does not depend on the other rows. The warps that share k are added in a fixed order,
// then the blocks of the cluster, over distributed shared memory.
//
// The weight's first stages are asked for before the wait for the kernel before, whose work they do not depend on.
// Blocks begin at different places of k, so that they do not all ask the same part of L2 for x.
//
// Launch: grid `clusters · cluster`, 256 threads, cluster (cluster, 1, 1), shared memory: the module's integer
// `<symbol>_shared`. units = div_ceil(div_ceil(n, 8), clusters), and then clusters = div_ceil(div_ceil(n, 8), units).

struct LinearArgs {
    void* out;             // [rows, n], 16 bits; f32 if out_f32
    const u16* x;          // [rows, k]
    const u16* weight;     // [n, k]
    const u16* bias;       // [n] or null
    const u16* residual;   // [rows, n] or null: added last
    u16* k_cache;          // [n_blocks, n_kv_heads, block_size, d_head] or null
    u16* v_cache;
    const int* slots;      // [rows]; negative: not stored
    int rows, n, k, ld_weight;
    int units;             // of 8 outputs, per cluster
    int activation;        // 0 none, 1 GELU with tanh, 2 GELU with erf, 3 ReLU
    int out_f32;
    int n_kv_heads, block_size, d_head;
};

DEVICE float activated(float x, int activation) {
    if (activation == 1) {
        float cubic = fmaf(x * x * 0.044715f, x, x);
        return x / (1.0f + __expf(cubic * -1.5957691f));
    }
    if (activation == 2) {
        return x * 0.5f * (1.0f + erff(x * 0.70710678f));
    }
    return activation == 3 ? fmaxf(x, 0.0f) : x;
}

// Where one key or value element of output `column` goes: null if it is a query or the row is not stored.
DEVICE u16* cache_place(const LinearArgs& args, int row, int column) {
    int d_kv = args.n_kv_heads * args.d_head;
    int at = column - (args.n - 2 * d_kv);
    if (at < 0) return nullptr;
    int slot = args.slots[row];
    if (slot < 0) return nullptr;
    u16* cache = at < d_kv ? args.k_cache : args.v_cache;
    at = at < d_kv ? at : at - d_kv;
    int head = at / args.d_head, dim = at % args.d_head;
    int block = slot / args.block_size, offset = slot % args.block_size;
    return cache + (((i64)block * args.n_kv_heads + head) * args.block_size + offset) * args.d_head + dim;
}

// Bias, activation, residual; then the stores of one output of one row.
template <class T>
DEVICE void finish(const LinearArgs& args, int row, int column, float sum) {
    if (args.bias) sum += widen<T>(args.bias[column]);
    sum = activated(sum, args.activation);
    i64 at = (i64)row * args.n + column;
    if (args.out_f32) {
        ((float*)args.out)[at] = sum;
        return;
    }
    if (args.residual) sum += widen<T>(args.residual[at]);
    u16 bits = narrow<T>(sum);
    ((u16*)args.out)[at] = bits;
    if (args.k_cache) {
        u16* place = cache_place(args, row, column);
        if (place) *place = bits;
    }
}

// Which rows and which part of k a block reads, in the order of its stages.
struct LinearWalk {
    int first;      // first output of the cluster
    int end;        // one after its last output
    int per_pass;   // outputs of a pass
    int k0;         // first input of this block
    int k1;         // one after its last
    int stages;     // of a pass
    int start;      // stage of k at which a pass begins: blocks start apart, so that they do not read the same x at once
};

// A place in a walk.
struct LinearPlace {
    int row0, stage;
};

template <class Sh>
DEVICE int input_of(const LinearWalk& walk, const LinearPlace& place) {
    int stage = place.stage + walk.start;
    return walk.k0 + (stage >= walk.stages ? stage - walk.stages : stage) * Sh::KC;
}

DEVICE void advance(const LinearWalk& walk, LinearPlace& place, int n) {
    place.stage += n;
    if (place.stage == walk.stages) {
        place.stage = 0;
        place.row0 += walk.per_pass;
    }
}

template <class T, class Sh>
DEVICE void load_weight(const LinearArgs& args, const LinearWalk& walk, const LinearPlace& place, u32 stage) {
    int k = input_of<Sh>(walk, place);
    constexpr int ROWS = 256 / Sh::CHUNKS;  // rows that all threads copy at once
    int r = threadIdx.x / Sh::CHUNKS, c = threadIdx.x % Sh::CHUNKS;
    const u16* from = args.weight + (i64)(place.row0 + r) * args.ld_weight + k + c * 8;
    i64 step = (i64)ROWS * args.ld_weight;
    int rows = min_of(walk.per_pass, walk.end - place.row0);
    bool inside = k + c * 8 < walk.k1;
#pragma unroll
    for (int i = 0; i < div_up(Sh::TN, ROWS); i++) {
        int row = r + i * ROWS;
        if (row < rows) {
            u32 to = stage + Sh::weight_at(row, c);
            copy16(to, inside ? from + i * step : args.weight, inside);
        }
    }
}

template <class T, class Sh>
DEVICE void load_x(const LinearArgs& args, const LinearWalk& walk, const LinearPlace& place, u32 stage) {
    int k = input_of<Sh>(walk, place);
    constexpr int ROWS = 256 / Sh::CHUNKS;
    int r = threadIdx.x / Sh::CHUNKS, c = threadIdx.x % Sh::CHUNKS;
    bool inside = k + c * 8 < walk.k1;
#pragma unroll
    for (int i = 0; i < div_up(Sh::NT * 8, ROWS); i++) {
        int row = r + i * ROWS;
        if (row < args.rows) {
            u32 to = stage + Sh::W_BYTES + Sh::x_at(row, c);
            copy16(to, inside ? args.x + (i64)row * args.k + k + c * 8 : args.x, inside);
        }
    }
}

// The walk of this block.
template <class Sh>
DEVICE LinearWalk walk_of(const LinearArgs& args, u32 rank, u32 size) {
    LinearWalk walk;
    walk.first = (blockIdx.x / size) * args.units * 8;
    walk.end = min_of(args.n, walk.first + args.units * 8);
    int passes = div_ceil(args.units * 8, Sh::TN);
    walk.per_pass = div_ceil(args.units, passes) * 8;
    int stages = div_ceil(args.k, Sh::KC);
    int s0 = stages * rank / size, s1 = stages * (rank + 1) / size;
    walk.k0 = s0 * Sh::KC;
    walk.k1 = min_of(args.k, s1 * Sh::KC);
    walk.stages = s1 - s0;
    walk.start = walk.stages ? (blockIdx.x * 5) % walk.stages : 0;
    return walk;
}

// Asks for the first stages: the weight before the wait for the kernel before, x after it.
template <class T, class Sh>
DEVICE LinearPlace fill_ring(const LinearArgs& args, const LinearWalk& walk, int total, u32 ring) {
    LinearPlace next = {walk.first, 0};
#pragma unroll 1
    for (int it = 0; it < Sh::S - 1; it++) {
        if (it < total) {
            load_weight<T, Sh>(args, walk, next, ring + it * Sh::STAGE);
            advance(walk, next, 1);
        }
        copies_commit();
    }
    wait_for_previous();
    next = {walk.first, 0};
#pragma unroll 1
    for (int it = 0; it < Sh::S - 1; it++) {
        if (it < total) {
            load_x<T, Sh>(args, walk, next, ring + it * Sh::STAGE);
            advance(walk, next, 1);
        }
        copies_commit();
    }
    return next;
}

// One warp's sums to or from a buffer [8 · NT rows of x][TN outputs].
template <class Sh, bool ADD>
DEVICE void exchange(float (&sums)[Sh::MW][Sh::NT][4], float* buffer, int wm) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int m = 0; m < Sh::MW; m++) {
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float* at = buffer + (j * 8 + t * 2 + (e & 1)) * Sh::LD + (wm * Sh::MW + m) * 16 + g + (e >> 1) * 8;
                if constexpr (ADD) sums[m][j][e] += *at; else *at = sums[m][j][e];
            }
        }
    }
}

// Adds the warps, then the blocks of the cluster, and stores this block's share of the pass's outputs.
template <class T, class Sh>
DEVICE void finish_pass(const LinearArgs& args, const LinearWalk& walk, int row0, float (&sums)[Sh::MW][Sh::NT][4],
                        float* buffers, int wm, int wk, u32 rank, u32 size) {
    if constexpr (Sh::ALL) {
        exchange<Sh, false>(sums, buffers + wk * Sh::SUM_FLOATS, wm);
    } else {
#pragma unroll
        for (int half = Sh::WK / 2; half > 0; half /= 2) {
            if (wk >= half && wk < 2 * half) exchange<Sh, false>(sums, buffers + (wk - half) * Sh::SUM_FLOATS, wm);
            __syncthreads();
            if (wk < half) exchange<Sh, true>(sums, buffers + wk * Sh::SUM_FLOATS, wm);
            __syncthreads();
        }
        if (wk == 0) exchange<Sh, false>(sums, buffers, wm);
    }
    if (size > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    int outputs = min_of(walk.per_pass, walk.end - row0);
    int from = outputs * rank / size, share = outputs * (rank + 1) / size - from;
    for (int i = threadIdx.x; i < share * args.rows; i += 256) {
        int row = i / share, j = from + i - row * share;
        float sum = 0.0f;
        if (size > 1) {
            u32 at = shared_address(buffers + row * Sh::LD + j);
            for (u32 other = 0; other < size; other++) {
#pragma unroll
                for (int b = 0; b < Sh::SUMS; b++) sum += load_cluster(at + b * Sh::SUM_FLOATS * 4, other);
            }
        } else {
#pragma unroll
            for (int b = 0; b < Sh::SUMS; b++) sum += buffers[b * Sh::SUM_FLOATS + row * Sh::LD + j];
        }
        finish<T>(args, row, row0 + j, sum);
    }
    if (size > 1) {
        cluster_arrive();
        cluster_wait();
    }
    // Without a cluster the barrier of the next stage keeps the buffers until all have read them.
}


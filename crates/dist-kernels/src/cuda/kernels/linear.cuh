// What the kernels of `linear` for few rows share: arguments, the walk over the weight, and the end of a pass.
//
// Layout: weight [n, k] with inputs contiguous and `ld_weight` a multiple of 8, x [rows, k], out [rows, n]; 16-byte
// aligned; k a multiple of 8. Bound by reading the weight.
//
// A cluster of blocks owns `units` · 8 outputs and takes them in passes of up to TN; its blocks share k evenly. A block
// keeps a ring of stages in shared memory: TN pieces of weight rows and 8 · NT pieces of rows of x, by cp.async, or by the
// copy engine (linear_ring.cu). Tensor cores multiply with the weight as the left operand, so a row of x is a column of the
// product and never meets another row: what a row gives does not depend on the other rows. Warps and blocks that share k
// are added in a fixed order.
//
// The weight's first stages are asked for before the wait for the kernel before, whose work they do not depend on.
// Blocks begin at different places of k, so that they do not all ask the same part of L2 for x.
//
// Launch: grid `clusters · parts`, 256 threads (more or fewer in linear_ring.cu), cluster (parts, 1, 1), shared memory: the module's
// integer `<symbol>_shared`. With as many columns as clusters of `parts` run at once (on 132 multiprocessors 132, 66 and 39
// for 1, 2 and 3), units = div_ceil(div_ceil(n, 8), columns), clusters = div_ceil(div_ceil(n, 8), units). Which variant a
// shape takes: choice/streaming.rs.

struct LinearArgs {
    void* out;             // [rows, n], 16 bits; f32 if out_f32
    const u16* x;          // [rows, k]
    const u16* weight;     // [n, k]
    const u16* bias;       // [n] or null
    u16* k_cache;          // [n_blocks, n_kv_heads, block_size, d_head] or null
    u16* v_cache;
    const int* slots;      // [rows]; negative: not stored
    int rows, n, k, ld_weight;
    int units;             // of 8 outputs, per cluster
    int activation;        // 0 none, 1 GELU with tanh, 2 GELU with erf, 3 ReLU
    int out_f32;
    int n_kv_heads, block_size, d_head;
};

DEVICE float gelu_tanh(float x) {
    float cubic = fmaf(x * x * 0.044715f, x, x);
    return __fdividef(x, 1.0f + __expf(cubic * -1.5957691f));
}
DEVICE float gelu_erf(float x) { return x * 0.5f * (1.0f + erff(x * 0.70710678f)); }

// What the stores of one thread need to know of its outputs, the same for all rows: asked for before the products.
struct LinearOutputs {
    static constexpr int N = 4;  // a thread's outputs of one row
    int column, stride;          // the first one, and from one to the next
    int n;                       // how many there are
    bool whole;                  // four side by side
    float bias[N];
    u16* cache;                  // of the key or value elements, or null
    int head, dim;
};

// `lane` of `lanes` threads takes four of the pass's outputs: side by side if rows are aligned, else far apart.
template <class T>
DEVICE LinearOutputs outputs_of(const LinearArgs& args, int row0, int end, int lane, int lanes) {
    LinearOutputs outputs;
    outputs.whole = args.n % 4 == 0;
    outputs.stride = outputs.whole ? 1 : lanes;
    outputs.column = row0 + (outputs.whole ? 4 * lane : lane);
    outputs.n = max_of(0, min_of(4, div_ceil(end - outputs.column, outputs.stride)));
#pragma unroll
    for (int v = 0; v < 4; v++) {
        bool has = args.bias && v < outputs.n;
        outputs.bias[v] = has ? widen<T>(args.bias[outputs.column + v * outputs.stride]) : 0.0f;
    }
    outputs.cache = nullptr;
    int d_kv = args.n_kv_heads * args.d_head, at = outputs.column - (args.n - 2 * d_kv);
    if (args.k_cache && at >= 0) {
        outputs.cache = at < d_kv ? args.k_cache : args.v_cache;
        at = at < d_kv ? at : at - d_kv;
        outputs.head = at / args.d_head;
        outputs.dim = at - outputs.head * args.d_head;
    }
    return outputs;
}

// Bias and activation; then the stores of a thread's outputs of rows `row`, `row + step` … below `end`. Rows are
// taken together so that their latencies overlap.
template <class T, int BATCH>
DEVICE void finish_rows(const LinearArgs& args, const LinearOutputs& outputs, int row, int step, int end,
                        float (&sums)[BATCH][4]) {
#pragma unroll
    for (int r = 0; r < BATCH; r++) {
#pragma unroll
        for (int v = 0; v < 4; v++) sums[r][v] += outputs.bias[v];
    }
    if (args.activation == 1) {
#pragma unroll
        for (int i = 0; i < BATCH * 4; i++) sums[i / 4][i % 4] = gelu_tanh(sums[i / 4][i % 4]);
    } else if (args.activation == 2) {
#pragma unroll
        for (int i = 0; i < BATCH * 4; i++) sums[i / 4][i % 4] = gelu_erf(sums[i / 4][i % 4]);
    } else if (args.activation == 3) {
#pragma unroll
        for (int i = 0; i < BATCH * 4; i++) sums[i / 4][i % 4] = fmaxf(sums[i / 4][i % 4], 0.0f);
    }
    i64 at = (i64)row * args.n + outputs.column, next = (i64)step * args.n;
    if (!outputs.whole) {
#pragma unroll
        for (int r = 0; r < BATCH; r++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                if (v >= outputs.n || row + r * step >= end) continue;
                i64 one = at + r * next + v * outputs.stride;
                if (args.out_f32) ((float*)args.out)[one] = sums[r][v]; else ((u16*)args.out)[one] = narrow<T>(sums[r][v]);
            }
        }
        return;
    }
    if (args.out_f32) {
#pragma unroll
        for (int r = 0; r < BATCH; r++) {
            if (row + r * step >= end) continue;
            *(float4*)((float*)args.out + at + r * next) = make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < BATCH; r++) {
        if (row + r * step >= end) continue;
        uint2 bits = make_uint2(narrow2<T>(sums[r][0], sums[r][1]), narrow2<T>(sums[r][2], sums[r][3]));
        *(uint2*)((u16*)args.out + at + r * next) = bits;
        if (!outputs.cache) continue;
        int slot = args.slots[row + r * step];
        if (slot < 0) continue;
        int block = slot / args.block_size, offset = slot - block * args.block_size;
        i64 place = (((i64)block * args.n_kv_heads + outputs.head) * args.block_size + offset) * args.d_head;
        *(uint2*)(outputs.cache + place + outputs.dim) = bits;
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

// Where block `block` begins: blocks of a launch start apart. Without a division.
DEVICE int start_of(int block, int stages) { return (int)__umulhi(block * 0x9E3779B9u, stages); }

// n / parts, for up to four parts: a division is slow, and this stands before a block's first load.
DEVICE int share_of(int n, int parts) {
    return parts == 1 ? n : (int)__umulhi(n, parts == 2 ? 0x80000000u : parts == 3 ? 0x55555556u : 0x40000000u);
}

// The walk of this block, which has part `part` of k if `parts` blocks share it. Divisions are slow and stand before the
// first load, so most launches make none.
template <class Sh>
DEVICE LinearWalk walk_of(const LinearArgs& args, int part, int parts) {
    LinearWalk walk;
    walk.first = share_of(blockIdx.x, parts) * args.units * 8;
    walk.end = min_of(args.n, walk.first + args.units * 8);
    int passes = div_up(args.units * 8, Sh::TN);
    walk.per_pass = (passes > 1 ? div_ceil(args.units, passes) : args.units) * 8;
    int stages = div_up(args.k, Sh::KC);
    int s0 = share_of(stages * part, parts), s1 = share_of(stages * (part + 1), parts);
    walk.k0 = s0 * Sh::KC;
    walk.k1 = min_of(args.k, s1 * Sh::KC);
    walk.stages = s1 - s0;
    walk.start = start_of(blockIdx.x, walk.stages);
    return walk;
}

// Stages of all passes.
DEVICE int stages_of(const LinearWalk& walk) {
    int n = walk.end - walk.first;
    return n <= walk.per_pass ? walk.stages : div_ceil(n, walk.per_pass) * walk.stages;
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

// The threads of a block at the end of a pass: LANES of them take a row, SWEEP rows at a time.
template <class Sh>
struct LinearFinish {
    static constexpr int LANES = Sh::TN <= 16 ? 4 : Sh::TN <= 32 ? 8 : Sh::TN <= 64 ? 16 : 32;
    static constexpr int SWEEP = 256 / LANES;
    static constexpr int SWEEPS = div_up(Sh::NT * 8, SWEEP);
    static constexpr int MOST = Sh::SUMS > 1 ? 2 : 4;  // rows at once, as registers allow
    static constexpr int BATCH = SWEEPS < MOST ? SWEEPS : MOST;
    static_assert(4 * LANES >= Sh::TN, "outputs of a pass");
};

// A thread's outputs of one row in a buffer.
DEVICE void load_outputs(float (&x)[4], const float* at, const LinearOutputs& outputs) {
    if (outputs.whole) {
        float4 v = *(const float4*)at;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        return;
    }
#pragma unroll
    for (int v = 0; v < 4; v++) x[v] = at[min_of(v, outputs.n - 1) * outputs.stride];
}

// Adds the warps and stores. The barrier of the next stage keeps the buffers until all have read them.
template <class T, class Sh>
DEVICE void finish_pass(const LinearArgs& args, const LinearOutputs& outputs, int row0,
                        float (&sums)[Sh::MW][Sh::NT][4], float* buffers, int wm, int wk) {
    if constexpr (Sh::ALL) {
        exchange<Sh, false>(sums, buffers + wk * Sh::SUM_FLOATS, wm);
    } else {
#pragma unroll
        for (int half = Sh::WK / 2; half > 0; half /= 2) {
            if (wk >= half && wk < 2 * half) exchange<Sh, false>(sums, buffers + (wk - half) * Sh::SUM_FLOATS, wm);
            sync_256();
            if (wk < half) exchange<Sh, true>(sums, buffers + wk * Sh::SUM_FLOATS, wm);
            sync_256();
        }
        if (wk == 0) exchange<Sh, false>(sums, buffers, wm);
    }
    sync_256();
    using Finish = LinearFinish<Sh>;
    constexpr int SWEEP = Finish::SWEEP, BATCH = Finish::BATCH;
    if (outputs.n == 0) return;
#pragma unroll 1
    for (int row = threadIdx.x / Finish::LANES; row < args.rows; row += SWEEP * BATCH) {
        float total[BATCH][4] = {}, part[BATCH][Sh::SUMS][4];
#pragma unroll
        for (int r = 0; r < BATCH; r++) {
#pragma unroll
            for (int b = 0; b < Sh::SUMS; b++) {
                // What is in rows from `args.rows` on is not used.
                int own = min_of(row + r * SWEEP, Sh::NT * 8 - 1);
                load_outputs(part[r][b], buffers + b * Sh::SUM_FLOATS + own * Sh::LD + (outputs.column - row0), outputs);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH * Sh::SUMS * 4; i++) {
            total[i / (Sh::SUMS * 4)][i % 4] += part[i / (Sh::SUMS * 4)][i / 4 % Sh::SUMS][i % 4];
        }
        finish_rows<T, BATCH>(args, outputs, row, SWEEP, args.rows, total);
    }
}

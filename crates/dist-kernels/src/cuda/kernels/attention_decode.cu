// attention for few rows a sequence (decode): split over the context, causal, paged.
//
// Layout: keys and values [n_blocks, n_kv_heads, block_size, D] with block_size a multiple of 16; q are the first
// columns of qkv [rows, ld_qkv]; out [rows, n_heads · D]; 16-byte aligned. Bound by reading keys and values.
//
// An entry is one (row, head) pair; up to E of them that share a KV head are one tile and read it once. A cluster
// of blocks shares the context of a tile, in parts that depend on the length and the size of the cluster alone. Every
// warp keeps its own ring of chunks of 16 positions, filled by bulk copies (cp.async before Hopper), so warps never wait
// for each other; tensor
// cores give the scores and the weighted values; the softmax is running. In the end the warps are combined in order,
// then the blocks, over distributed shared memory.
//
// Keys and values of earlier steps do not depend on the kernel before, so the rings are filled with them before the
// wait; lengths and block tables must not be written by the kernel before.
//
// Launch: grid (cluster, n_kv_heads · tiles, n_seqs), 128 threads, cluster (cluster, 1, 1) with at most 8 blocks,
// tiles = div_ceil(longest q · n_heads / n_kv_heads, E); shared memory: the module's integer `<symbol>_shared`.

struct AttentionArgs {
    u16* out;
    const u16* qkv;
    const u16* k;
    const u16* v;
    const u32* q_offsets;     // [n_seqs + 1]
    const u32* context_lens;  // [n_seqs]
    const u32* block_tables;  // [n_seqs, max_blocks]
    int max_blocks;
    int ld_qkv;
    int n_heads, n_kv_heads;
    int block_size;
    int window;               // positions that a row sees; INT_MAX: all before it
    float scale;
};

template <int D_, int E_, int W_, int S_>
struct DecodeShape {
    static constexpr int D = D_, E = E_, S = S_, WARPS = W_;
    static constexpr int ROW = D * 2 + 16;             // bytes, an odd number of 16: no bank conflicts in ldmatrix
    static constexpr int HALF = 16 * ROW, CHUNK = 2 * HALF;
    static constexpr int RING = S * CHUNK;             // of a warp; in the end its sums [E][D] lie there
    static constexpr int PIECES = D / 8;               // 16-byte pieces of a row
    static constexpr int STATE = WARPS * RING;         // offset of maxima and sums of the warps, then of the block
    static constexpr int BARRIERS = STATE + (WARPS + 1) * E * 8;
    static constexpr int SHARED = BARRIERS + WARPS * S * 8;
    static_assert(RING >= E * D * 4 && (E == 8 || E == 16), "a warp's sums fit its ring");
};

// Raises 2 to x; −∞ gives 0.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The factor of sums that were taken below maximum `old`, now below `now`.
DEVICE float rescale(float old, float now) { return old == now ? 1.0f : power_of_two(old - now); }

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// Asks for the chunk at `position` of one (block, head); from `context` on, where nothing was stored, there are zeros.
template <class Sh>
DEVICE void copy_chunk(const AttentionArgs& args, u32 block, int kv_head, int position, int context, u32 to,
                       u32 barrier, int lane) {
    int offset = position % args.block_size;
    i64 from = (((i64)block * args.n_kv_heads + kv_head) * args.block_size + offset) * Sh::D;
#if HOPPER
    // A lane copies a row: of the keys in the lower half of the warp, of the values in the upper one.
    int row = lane & 15, rows = min_of(16, context - position);
    to += (lane >> 4) * Sh::HALF + row * Sh::ROW;
    if (lane == 0) barrier_expect(barrier, rows * 4 * Sh::D);
    __syncwarp();
    if (row < rows) {
        copy_bulk(to, (lane < 16 ? args.k : args.v) + from + row * Sh::D, 2 * Sh::D, barrier);
    } else {
#pragma unroll
        for (int c = 0; c < Sh::PIECES; c++) store_shared16(to + c * 16, make_uint4(0, 0, 0, 0));
    }
#else
#pragma unroll
    for (int j = 0; j < Sh::D / 16; j++) {
        int i = j * 32 + lane, row = i / Sh::PIECES, c = i % Sh::PIECES;
        bool stored = position + row < context;
        copy16(to + row * Sh::ROW + c * 16, args.k + from + i * 8, stored);
        copy16(to + Sh::HALF + row * Sh::ROW + c * 16, args.v + from + i * 8, stored);
    }
#endif
}

template <class T, class Sh>
DEVICE void attention_decode(const AttentionArgs& args) {
    constexpr int D = Sh::D, E = Sh::E, S = Sh::S, WARPS = Sh::WARPS, PER = E / 8;  // entries of a thread
    extern __shared__ __align__(1024) u8 shared[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    u32 rank = cluster_rank(), size = cluster_size();
    let_next_start();

    int seq = blockIdx.z, kv_head = blockIdx.y % args.n_kv_heads, tile = blockIdx.y / args.n_kv_heads;
    int row0 = args.q_offsets[seq], n_rows = args.q_offsets[seq + 1] - row0;
    int context = args.context_lens[seq], first_position = context - n_rows;
    int group = args.n_heads / args.n_kv_heads;
    int n_entries = max_of(0, min_of(E, n_rows * group - tile * E));

    // The chunks that the tile sees, this block's part of them, and this warp's: every WARPS-th.
    int last_row = (tile * E + n_entries - 1) / group, first_row = tile * E / group;
    int see_from = max_of(0, first_position + first_row - args.window + 1);
    int low = see_from / 16, high = n_entries ? div_ceil(first_position + last_row + 1, 16) : low;
    int n_chunks = max_of(0, high - low);
    int begin = low + n_chunks * rank / size + warp, end = low + n_chunks * (rank + 1) / size;
    int mine = begin < end ? div_ceil(end - begin, WARPS) : 0;

    const u32* table = args.block_tables + (i64)seq * args.max_blocks;
    u32 ring = shared_address(shared) + warp * Sh::RING;
    u32 barriers = shared_address(shared + Sh::BARRIERS) + warp * S * 8;
    if (lane < S) barrier_init(barriers + lane * 8, 1);
    barriers_ready();
    __syncwarp();
    auto block_of = [&](int i) { return i < mine ? table[(begin + i * WARPS) * 16 / args.block_size] : 0; };
    u32 blocks = block_of(lane), next_blocks = block_of(32 + lane);
    auto load = [&](int i) {
        u32 block = __shfl_sync(~0u, blocks, i & 31);
        copy_chunk<Sh>(args, block, kv_head, (begin + i * WARPS) * 16, context, ring + i % S * Sh::CHUNK,
                       barriers + i % S * 8, lane);
    };
    int written = div_ceil(first_position + 1, 16) - 1;  // the first chunk that the kernel before may have written to
#pragma unroll
    for (int i = 0; i < S; i++) {
        if (i < mine && begin + i * WARPS < written) load(i);
        copies_commit();
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < S; i++) {
        if (i < mine && begin + i * WARPS >= written) load(i);
        copies_commit();
    }

    // A thread has entry g, and g + 8 if E is 16.
    u32 q[D / 16][4];
    int position[PER];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int entry = g + e * 8, at = tile * E + entry, row = at / group, head = kv_head * group + at - row * group;
        bool has = entry < n_entries;
        if (e < PER) position[e] = has ? first_position + row : -1;
        const u16* from = args.qkv + (i64)(row0 + row) * args.ld_qkv + head * D + t * 2;
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            q[d][e] = has ? *(const u32*)(from + d * 16) : 0;
            q[d][2 + e] = has ? *(const u32*)(from + d * 16 + 8) : 0;
        }
    }

    float out[D / 8][4] = {};
    float maximum[PER], sum[PER];
#pragma unroll
    for (int e = 0; e < PER; e++) maximum[e] = NEGATIVE_INFINITY, sum[e] = 0.0f;
    float scale = args.scale * 1.44269504f;
    // Rows of the matrices that this lane addresses: keys by position, values transposed.
    u32 k_at = ((lane >> 4) * 8 + (lane & 7)) * Sh::ROW + (lane >> 3 & 1) * 16;
    u32 v_at = Sh::HALF + ((lane >> 3 & 1) * 8 + (lane & 7)) * Sh::ROW + (lane >> 4) * 16;
    int whole_from = first_position + last_row - args.window + 1, whole_to = first_position + first_row;

    int slot = 0, phase = 0;
    for (int i = 0; i < mine; i++) {
#if HOPPER
        barrier_wait(barriers + slot * 8, phase);
#else
        copies_wait<S - 1>();
#endif
        __syncwarp();
        u32 chunk = ring + slot * Sh::CHUNK;
        float scores[2][4] = {}, more[2][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint4 k = load_matrices(chunk + k_at + d * 32);
            multiply_add<T>(d & 1 ? more[0] : scores[0], q[d][0], q[d][1], q[d][2], q[d][3], k.x, k.y);
            multiply_add<T>(d & 1 ? more[1] : scores[1], q[d][0], q[d][1], q[d][2], q[d][3], k.z, k.w);
        }
        int p0 = (begin + i * WARPS) * 16;
        bool edge = p0 < whole_from || p0 + 15 > whole_to;  // not all positions are seen by all entries
        float now[PER];
#pragma unroll
        for (int e = 0; e < PER; e++) {
            now[e] = maximum[e];
#pragma unroll
            for (int x = 0; x < 4; x++) {
                float& score = scores[x >> 1][2 * e + (x & 1)];
                score = (score + more[x >> 1][2 * e + (x & 1)]) * scale;
                int p = p0 + (x >> 1) * 8 + t * 2 + (x & 1);
                if (edge && (p > position[e] || p <= position[e] - args.window)) score = NEGATIVE_INFINITY;
                now[e] = fmaxf(now[e], score);
            }
            now[e] = fmaxf(now[e], __shfl_xor_sync(~0u, now[e], 1));
            now[e] = fmaxf(now[e], __shfl_xor_sync(~0u, now[e], 2));
        }
        if (__any_sync(~0u, now[0] != maximum[0] || now[PER - 1] != maximum[PER - 1])) {
#pragma unroll
            for (int e = 0; e < PER; e++) {
                float factor = rescale(maximum[e], now[e]);
#pragma unroll
                for (int n = 0; n < D / 8; n++) out[n][2 * e] *= factor, out[n][2 * e + 1] *= factor;
                sum[e] *= factor;
                maximum[e] = now[e];
            }
        }
        u32 p[4] = {};
#pragma unroll
        for (int e = 0; e < PER; e++) {
            float top = maximum[e] == NEGATIVE_INFINITY ? 0.0f : maximum[e];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float low = power_of_two(scores[n][2 * e] - top), high = power_of_two(scores[n][2 * e + 1] - top);
                sum[e] += low + high;
                p[n * 2 + e] = narrow2<T>(low, high);
            }
        }
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint4 v = load_matrices_transposed(chunk + v_at + d * 32);
            multiply_add<T>(out[2 * d], p[0], p[1], p[2], p[3], v.x, v.y);
            multiply_add<T>(out[2 * d + 1], p[0], p[1], p[2], p[3], v.z, v.w);
        }
        __syncwarp();
        if ((i + S & 31) == 0) {
            blocks = next_blocks;
            next_blocks = block_of(i + S + 32 + lane);
        }
        if (i + S < mine) load(i + S);
        copies_commit();
        slot = slot == S - 1 ? 0 : slot + 1;
        phase ^= slot == 0;
    }

    // Each warp leaves its sums in its ring, which holds nothing any more.
    float* own = (float*)(shared + warp * Sh::RING);
    float2* states = (float2*)(shared + Sh::STATE);
    copies_wait<0>();
    __syncwarp();
#pragma unroll
    for (int e = 0; e < PER; e++) {
        sum[e] += __shfl_xor_sync(~0u, sum[e], 1);
        sum[e] += __shfl_xor_sync(~0u, sum[e], 2);
        if (g + e * 8 >= n_entries) continue;
        if (t == 0) states[warp * E + g + e * 8] = make_float2(maximum[e], sum[e]);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(float2*)(own + (g + e * 8) * D + n * 8 + t * 2) = make_float2(out[n][e * 2], out[n][e * 2 + 1]);
        }
    }
    __syncthreads();
    // The block's sums replace those of warp 0: an element is read and written by the same thread.
    for (int i = threadIdx.x; i < n_entries * D; i += 32 * WARPS) {
        int entry = i / D;
        float top = NEGATIVE_INFINITY, total = 0.0f, weight = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, states[w * E + entry].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 state = states[w * E + entry];
            float factor = rescale(state.x, top);
            total += ((float*)(shared + w * Sh::RING))[i] * factor;
            weight += state.y * factor;
        }
        ((float*)shared)[i] = total;
        if (i % D == 0) states[WARPS * E + entry] = make_float2(top, weight);
    }
    if (size > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    int share = n_entries * D / 2;  // pairs of elements
    for (int i = share * rank / size + threadIdx.x; i < share * (rank + 1) / size; i += 32 * WARPS) {
        int entry = 2 * i / D;
        u32 state = shared_address(states + WARPS * E + entry), from = shared_address((float*)shared + 2 * i);
        float top = NEGATIVE_INFINITY, weight = 0.0f, low_sum = 0.0f, high_sum = 0.0f;
        for (u32 other = 0; other < size; other++) top = fmaxf(top, load_cluster(state, other));
        for (u32 other = 0; other < size; other++) {
            float factor = rescale(load_cluster(state, other), top);
            weight += load_cluster(state + 4, other) * factor;
            low_sum += load_cluster(from, other) * factor;
            high_sum += load_cluster(from + 4, other) * factor;
        }
        float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
        int at = tile * E + entry, row = at / group, head = kv_head * group + at - row * group;
        u16* to = args.out + ((i64)(row0 + row) * args.n_heads + head) * D + 2 * i - entry * D;
        *(u32*)to = narrow2<T>(low_sum * inverse, high_sum * inverse);
    }
    if (size > 1) {
        cluster_arrive();
        cluster_wait();
    }
}

#define ATTENTION_DECODE(name, T, ...)                                                                  \
    KERNEL __launch_bounds__(DecodeShape<__VA_ARGS__>::WARPS * 32) name(const __grid_constant__ AttentionArgs args) {                  \
        attention_decode<T, DecodeShape<__VA_ARGS__>>(args);                                            \
    }                                                                                                   \
    extern "C" __device__ const int name##_shared = DecodeShape<__VA_ARGS__>::SHARED;

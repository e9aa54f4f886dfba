// attention for few rows a sequence (decode): split over the context, causal, paged.
//
// Layout: keys and values [n_blocks, n_kv_heads, block_size, D] with block_size a multiple of 16; q are the first
// columns of qkv [rows, ld_qkv]; out [rows, n_heads · D]; 16-byte aligned. Bound by reading keys and values.
//
// An entry is one (row, head) pair; up to E of them that share a KV head are one tile and read it once. The blocks of a
// tile share its context, in parts that depend on its length and on the number of blocks alone. Every warp keeps its own
// ring of chunks of 16 positions, filled by cp.async, so warps never wait for each other; tensor cores give the scores
// and the weighted values; the softmax is running. In the end the warps are combined in order, then, by the block that is
// done last, the blocks, also in order.
//
// Keys and values of earlier steps do not depend on the kernel before, so the rings are filled with them before the
// wait; lengths and block tables must not be written by the kernel before.
//
// Launch: grid (splits, n_kv_heads · tiles, n_seqs), `<symbol>_threads` threads, tiles = div_ceil(longest q · n_heads /
// n_kv_heads, 8); shared memory: the module's integer `<symbol>_shared`. With splits > 1: `counters`, one a (tile,
// sequence), zero before and after; `partials`, floats [n_seqs, n_kv_heads · tiles, splits, 8 · (D + 2)].
//
// Which variant (measured on an H100), with blocks = n_seqs, rounded up to a power of two, · n_kv_heads · tiles and `sms`
// multiprocessors: splits = max(1, sms / blocks); blocks ≤ sms: d64w12, d80, d96, d128w8, whose warps have a chunk or two
// each where contexts are short; ≤ 2 · sms: d64s2, d80, d96, d128; more: d64s2, d80s2, d96, d128s2, whose short rings let
// more blocks be on a multiprocessor, so that one's beginning and end hide behind the others.

struct AttentionArgs {
    u16* out;
    const u16* qkv;
    const u16* k;
    const u16* v;
    const u32* q_offsets;     // [n_seqs + 1]
    const u32* context_lens;  // [n_seqs]
    const u32* block_tables;  // [n_seqs, max_blocks], max_blocks at least 1; any number where no block is
    int max_blocks;
    int ld_qkv;
    int n_heads, n_kv_heads;
    int block_size;
    int window;               // positions that a row sees; INT_MAX: all before it
    float scale;
    float* partials;
    u32* counters;
};

template <int D_, int E_, int W_, int S_, int B_>
struct DecodeShape {
    static constexpr int D = D_, E = E_, WARPS = W_;
    static constexpr int BLOCKS = B_;                  // of a multiprocessor at least, as registers go
    static constexpr int ROW = D * 2 + 16;             // bytes, an odd number of 16: no bank conflicts in ldmatrix
    static constexpr int HALF = 16 * ROW, CHUNK = 2 * HALF;
    static constexpr int FIT = (SHARED_MOST - WARPS * E * 8) / (WARPS * CHUNK), S = FIT < S_ ? FIT : S_;
    static constexpr int RING = S * CHUNK;             // of a warp; in the end its sums [E][D] lie there
    static constexpr int PIECES = D / 8;               // 16-byte pieces of a row
    static constexpr int STATE = WARPS * RING;         // offset of maxima and sums of the warps
    static constexpr int SHARED = STATE + WARPS * E * 8;
    static_assert(S >= 1 && SHARED <= SHARED_MOST, "rings");
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

constexpr int MIN_CHUNKS = 16;

// Asks for the chunk at `position` of one (block, head); from `context` on, where nothing was stored, there are zeros.
template <class Sh>
DEVICE void copy_chunk(const AttentionArgs& args, u32 block, int kv_head, int position, int context, u32 to, int lane) {
    int offset = position - quotient(position, args.block_size) * args.block_size;
    i64 from = (((i64)block * args.n_kv_heads + kv_head) * args.block_size + offset) * Sh::D + lane * 8;
    const u16 *k = args.k + from, *v = args.v + from;
    bool whole = position + 16 <= context;
#pragma unroll
    for (int j = 0; j < Sh::D / 16; j++) {
        int i = j * 32 + lane, row = i / Sh::PIECES, c = i % Sh::PIECES;
        bool stored = whole || position + row < context;
        copy16(to + row * Sh::ROW + c * 16, k + j * 256, stored);
        copy16(to + Sh::HALF + row * Sh::ROW + c * 16, v + j * 256, stored);
    }
}

// Stores the weighted mean of pair `i` of the tile's entries.
template <class T, int D, int E>
DEVICE void store_pair(const AttentionArgs& args, float2 total, float weight, int i, int row0, int tile, int kv_head,
                       int group) {
    int entry = 2 * i / D, at = tile * E + entry, row = quotient(at, group), head = kv_head * group + at - row * group;
    float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
    u16* to = args.out + ((i64)(row0 + row) * args.n_heads + head) * D + 2 * i - entry * D;
    *(u32*)to = narrow2<T>(total.x * inverse, total.y * inverse);
}

template <class T, class Sh>
DEVICE void attention_decode(const AttentionArgs& args) {
    constexpr int D = Sh::D, E = Sh::E, S = Sh::S, WARPS = Sh::WARPS, PER = E / 8;  // entries of a thread
    extern __shared__ __align__(1024) u8 shared[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    let_next_start();

    int seq = blockIdx.z, tile = quotient(blockIdx.y, args.n_kv_heads), kv_head = blockIdx.y - tile * args.n_kv_heads;
    // Most parts begin with the first chunk: their blocks are asked for before it is known which chunks are seen.
    const u32* table = args.block_tables + (i64)seq * args.max_blocks;
    u32 guess = table[min_of(quotient((warp + lane * WARPS) * 16, args.block_size), args.max_blocks - 1)];
    int row0 = args.q_offsets[seq], n_rows = args.q_offsets[seq + 1] - row0;
    int context = args.context_lens[seq], first_position = context - n_rows;
    int group = quotient(args.n_heads, args.n_kv_heads);
    int n_entries = max_of(0, min_of(E, n_rows * group - tile * E));

    // The chunks that the tile sees, this block's part of them, and this warp's: every WARPS-th.
    int last_row = quotient(tile * E + n_entries - 1, group), first_row = quotient(tile * E, group);
    int see_from = max_of(0, first_position + first_row - args.window + 1);
    int low = see_from / 16, high = n_entries ? div_ceil(first_position + last_row + 1, 16) : low;
    int n_chunks = max_of(0, high - low);
    // A part is at least MIN_CHUNKS chunks, because adding parts has its price.
    int size = max_of(1, min_of(gridDim.x, div_up(n_chunks, MIN_CHUNKS))), rank = blockIdx.x;
    if (rank >= size) return;
    int begin = (size == 1 ? low : low + n_chunks * rank / size) + warp;
    int end = size == 1 ? high : low + n_chunks * (rank + 1) / size;
    int mine = begin < end ? div_ceil(end - begin, WARPS) : 0;

    u32 ring = shared_address(shared) + warp * Sh::RING;
    auto block_of = [&](int i) { return i < mine ? table[quotient((begin + i * WARPS) * 16, args.block_size)] : 0; };
    u32 blocks = begin == warp ? guess : block_of(lane), next_blocks = block_of(32 + lane);
    auto load = [&](int i) {
        u32 block = __shfl_sync(~0u, blocks, i & 31);
        copy_chunk<Sh>(args, block, kv_head, (begin + i * WARPS) * 16, context, ring + i % S * Sh::CHUNK, lane);
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
        int entry = g + e * 8, at = tile * E + entry, row = quotient(at, group), head = kv_head * group + at - row * group;
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

    int slot = 0;
    for (int i = 0; i < mine; i++) {
        copies_wait<S - 1>();
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
    int tile_idx = seq * gridDim.y + blockIdx.y;
    float* partial = args.partials + ((i64)tile_idx * gridDim.x + rank) * (E * (D + 2));
    for (int i = threadIdx.x; i < n_entries * D / 2; i += 32 * WARPS) {
        int entry = 2 * i / D;
        float top = NEGATIVE_INFINITY, weight = 0.0f;
        float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, states[w * E + entry].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 state = states[w * E + entry], sums = ((float2*)(shared + w * Sh::RING))[i];
            float factor = rescale(state.x, top);
            total.x += sums.x * factor, total.y += sums.y * factor;
            weight += state.y * factor;
        }
        if (size == 1) {
            store_pair<T, D, E>(args, total, weight, i, row0, tile, kv_head, group);
        } else {
            ((float2*)partial)[i] = total;
            if (i % (D / 2) == 0) ((float2*)(partial + E * D))[entry] = make_float2(top, weight);
        }
    }
    if (size == 1) return;

    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(args.counters + tile_idx, 1) == size - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) args.counters[tile_idx] = 0;
    const float* parts = args.partials + (i64)tile_idx * gridDim.x * (E * (D + 2));
    for (int i = threadIdx.x; i < n_entries * D / 2; i += 32 * WARPS) {
        int entry = 2 * i / D;
        float top = NEGATIVE_INFINITY, weight = 0.0f;
        float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 4
        for (int r = 0; r < size; r++) top = fmaxf(top, load_l2(parts + r * (E * (D + 2)) + E * D + 2 * entry));
#pragma unroll 4
        for (int r = 0; r < size; r++) {
            const float2* part = (const float2*)(parts + r * (E * (D + 2)));
            float2 state = load_l2(part + E * D / 2 + entry), sums = load_l2(part + i);
            float factor = rescale(state.x, top);
            total.x += sums.x * factor, total.y += sums.y * factor;
            weight += state.y * factor;
        }
        store_pair<T, D, E>(args, total, weight, i, row0, tile, kv_head, group);
    }
}

#define ATTENTION_DECODE(name, T, ...)                                                                      \
    KERNEL __launch_bounds__(DecodeShape<__VA_ARGS__>::WARPS * 32, DecodeShape<__VA_ARGS__>::BLOCKS)         \
    name(const __grid_constant__ AttentionArgs args) {                                                      \
        attention_decode<T, DecodeShape<__VA_ARGS__>>(args);                                                \
    }                                                                                                       \
    extern "C" __device__ const int name##_shared = DecodeShape<__VA_ARGS__>::SHARED;                       \
    extern "C" __device__ const int name##_threads = DecodeShape<__VA_ARGS__>::WARPS * 32;

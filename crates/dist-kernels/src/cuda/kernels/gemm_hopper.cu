// linear for many rows on Hopper: tiles of the output, each multiplied by `wgmma` from a ring that the copy engine fills.
// See linear.cuh for the arguments and for what happens to a row's sums before they are stored.
//
// Layout: weight [n, k] and x [rows, k], both 16-byte aligned with strides that are multiples of 16 bytes; out [rows, n].
// Any rows, n; k a multiple of 8. Bound by the tensor cores from about 300 rows on, below by reading the weight.
//
// A block owns tiles of BM rows × BN outputs. Two threads ask for stages of 64 inputs, one for the weight and one for x;
// two groups of four warps multiply, each with half of the tile's rows, and keep the sums in registers. Where out allows
// it (16 bits, n a multiple of 8) all of a warp's sums are finished and rounded into shared memory in
// straight-line code and the copy engine stores them, so that the tensor cores wait for little; else they go through shared
// memory in f32, so that stores are as wide as n allows.
//
// A cluster is rows_of_cluster × columns_of_cluster tiles, times `splits` parts of k. Blocks beside each other share the
// rows of x, blocks below each other the rows of the weight: each asks for its slice and the copy engine gives it to all.
// Blocks that share a tile's k finish the rows of some warps each: the others send it their sums of those (`st.async`), to
// slots of its ring that it is done with, and it adds them in the order of k. Which parts k has, and where a tile begins in
// its part, depends on k, `splits`, `spread` and the cluster's column alone, and rows never meet: what a row gives does not
// depend on the others.
//
// Tiles are taken in groups of `group` clusters of rows, rows first, so that what runs at once shares what L2 holds. With
// `spread` tiles begin at different places of k, which is better where a cluster shares x; where none does, L2 reads once
// what neighbours ask for at the same time.
//
// Launch: grid a multiple of the cluster's size, at most what fits at once (exactly all tiles where splits > 1);
// 384 threads; cluster (rows_of_cluster · columns_of_cluster · splits, 1, 1), at most 8 blocks; splits at most 4 and at
// most div_ceil(k, 64), and 1 for tiles of more than 160 outputs; shared memory: the module's integer `<symbol>_shared`.
// Parameters: GemmArgs, then three tensor maps of 16-bit elements: x [rows, k] with boxes of 64 × BM / columns_of_cluster
// and the weight [n, k] with boxes of 64 × BN / rows_of_cluster, both 128-byte swizzled, heights multiples of 8; out
// [rows, n] with boxes of P × 16, P being the module's integer `<symbol>_part`, with a swizzle of 2 · P bytes (not read
// where the copy engine does not store).

// Where the sum of (row, column) of a unit lies: columns are swapped in eights, against bank conflicts.
DEVICE int sum_at(int row, int column) { return row * 32 + (column ^ ((row & 3) << 3)); }

// Unit `unit` of a warp's sums, for a loop that is not unrolled: sums stay in registers.
template <int N>
DEVICE void take_unit(float (&v)[16], const float (&c)[N], int unit) {
#pragma unroll
    for (int u = 0; u < N / 16; u++) {
        if (unit == u) {
#pragma unroll
            for (int i = 0; i < 16; i++) v[i] = c[u * 16 + i];
        }
    }
}

// Stores one unit of a warp's sums through shared memory in f32: 16 rows from `row0` on, 32 outputs from `column` on.
template <class T, class Sh>
DEVICE void store_unit(const LinearArgs& args, const float (&v)[16], float* staging, int row0, int column) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        *(float2*)(staging + sum_at(g, j * 8 + t * 2)) = make_float2(v[j * 4], v[j * 4 + 1]);
        *(float2*)(staging + sum_at(g + 8, j * 8 + t * 2)) = make_float2(v[j * 4 + 2], v[j * 4 + 3]);
    }
    __syncwarp();
    LinearOutputs outputs = outputs_of<T>(args, column, min_of(args.n, column + Sh::UNIT), lane % 8, 8);
    int at = outputs.column - column, row = lane / 8;
    if (outputs.n > 0) {
        float total[4][4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if (outputs.whole) {
                float4 x = *(const float4*)(staging + sum_at(row + r * 4, at));
                total[r][0] = x.x, total[r][1] = x.y, total[r][2] = x.z, total[r][3] = x.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) total[r][i] = staging[sum_at(row + r * 4, at + i * 8)];
            }
        }
        finish_rows<T, 4>(args, outputs, row0 + row, 4, args.rows, total);
    }
    __syncwarp();
}

// Stores a warp's sums where the copy engine cannot: from row `row0` and output `column0` on.
template <class T, class Sh>
DEVICE void store_rows(const LinearArgs& args, const float (&c)[Sh::BN / 2], float* staging, int row0, int column0) {
    if (row0 >= args.rows) return;
#pragma unroll 1
    for (int unit = 0; unit < Sh::UNITS; unit++) {
        int column = column0 + unit * Sh::UNIT;
        if (column >= args.n) return;
        float v[16];
        take_unit(v, c, unit);
        store_unit<T, Sh>(args, v, staging, row0, column);
    }
}

// What a warp asks for while a tile's last products are under way: two outputs' bias in every 64 from a lane, and where its
// row's keys and values go.
template <class Sh>
struct TileWants {
    u32 bias[div_up(Sh::BN, 64)];
    int slot;
};

template <class Sh>
DEVICE void ask_for(TileWants<Sh>& wants, const LinearArgs& args, int row0, int column0) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < div_up(Sh::BN, 64); i++) {
        int column = column0 + i * 64 + lane * 2;
        bool has_two = args.bias && column + 1 < args.n, has_one = args.bias && column + 1 == args.n;
        wants.bias[i] = has_two ? *(const u32*)(args.bias + column) : has_one ? args.bias[column] : 0;
    }
    int row = row0 + (lane & 15);
    wants.slot = args.k_cache && row < args.rows ? args.slots[row] : -1;
}

template <class T, class Sh>
DEVICE void add_bias(float (&c)[Sh::BN / 2], const TileWants<Sh>& wants) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < Sh::BN / 8; j++) {
        float2 b = widen2<T>(__shfl_sync(~0u, wants.bias[j / 8], j % 8 * 4 + t));
        c[j * 4] += b.x, c[j * 4 + 1] += b.y, c[j * 4 + 2] += b.x, c[j * 4 + 3] += b.y;
    }
}

// Copies what a box has of keys and values from shared memory to the cache, 16 bytes a thread; `slot` is that of a lane's row.
template <class Sh>
DEVICE void append_box(const LinearArgs& args, int slot, u32 box, int column0) {
    constexpr int PIECES = Sh::PART / 8, ROWS = 32 / PIECES;
    int lane = threadIdx.x & 31, piece = lane % PIECES;
    int d_kv = args.n_kv_heads * args.d_head, first = args.n - 2 * d_kv, at = column0 + piece * 8 - first;
    if (column0 + Sh::PART <= first) return;
    int block = slot / args.block_size, offset = slot - block * args.block_size;
    u16* cache = at < d_kv ? args.k_cache : args.v_cache;
    at = at < d_kv ? at : at - d_kv;
    int head = at / args.d_head, dim = at - head * args.d_head;
#pragma unroll 1
    for (int r = lane / PIECES; r < 16; r += ROWS) {
        int its_slot = __shfl_sync(~0u, slot, r), its_block = __shfl_sync(~0u, block, r);
        int its_offset = __shfl_sync(~0u, offset, r);
        if (its_slot < 0 || at < 0 || at >= d_kv) continue;
        i64 place = (((i64)its_block * args.n_kv_heads + head) * args.block_size + its_offset) * args.d_head;
        *(uint4*)(cache + place + dim) = load_shared16(box + piece_of<Sh>(r, piece));
    }
}

// Rounds a box of a warp's sums into shared memory, and has the copy engine store it. Every box is a group of stores of its
// own, empty where it is outside, so that which box has been read is known by counting.
template <class T, class Sh>
DEVICE void send_box(const LinearArgs& args, const TensorMap* out_map, const float* c, int slot, u32 box, int row,
                     int column) {
    int lane = threadIdx.x & 31;
    u32 at = piece_of<Sh>(lane & 15, lane >> 4);  // where this thread's address of four 8 × 8 matrices is
    if (elected()) stores_read<Sh::BOXES - 1>();
    __syncwarp();
    if (row < args.rows && column < args.n) {
#pragma unroll
        for (int q = 0; q < Sh::PART / 16; q++) {
            const float* x = c + q * 8;
            store_matrices(box + (at ^ q << 5), narrow2<T>(x[0], x[1]), narrow2<T>(x[2], x[3]), narrow2<T>(x[4], x[5]),
                           narrow2<T>(x[6], x[7]));
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (elected()) {
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(out_map),
                         "r"(column), "r"(row), "r"(box)
                         : "memory");
        }
        if (args.k_cache) append_box<Sh>(args, slot, box, column);
    }
    if (elected()) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Stores a warp's sums by the copy engine: from row `row0` and output `column0` on. What takes many instructions, GELU, is
// in a loop that is not unrolled; the sums move down in it.
template <class T, class Sh>
DEVICE void send_tile(const LinearArgs& args, const TensorMap* out_map, float (&c)[Sh::BN / 2], const TileWants<Sh>& wants,
                      u32 staging, int row0, int column0) {
    constexpr int N = Sh::BN / 2, OF_BOX = Sh::PART / 2;
    if (args.bias) add_bias<T, Sh>(c, wants);
    if (args.activation == 0 || args.activation == 3) {
        if (args.activation == 3) {
#pragma unroll
            for (int i = 0; i < N; i++) c[i] = fmaxf(c[i], 0.0f);
        }
#pragma unroll
        for (int i = 0; i < Sh::ALL_BOXES; i++) {
            send_box<T, Sh>(args, out_map, c + i * OF_BOX, wants.slot, staging + i % Sh::BOXES * Sh::BOX, row0,
                            column0 + i * Sh::PART);
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < Sh::ALL_BOXES; i++) {
        if (args.activation == 1) {
#pragma unroll
            for (int j = 0; j < OF_BOX; j++) c[j] = gelu_tanh(c[j]);
        } else {
#pragma unroll
            for (int j = 0; j < OF_BOX; j++) c[j] = gelu_erf(c[j]);
        }
        send_box<T, Sh>(args, out_map, c, wants.slot, staging + i % Sh::BOXES * Sh::BOX, row0, column0 + i * Sh::PART);
#pragma unroll
        for (int j = 0; j < N - OF_BOX; j++) c[j] = c[j + OF_BOX];
    }
}

// The two groups of warps that multiply.
template <class T, class Sh>
DEVICE void gemm_multiply(const GemmArgs& args, const GemmPlace& place, const TensorMap* out_map, u8* shared, u32 full,
                          u32 empty) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    const LinearArgs& linear = args.linear;
    bool sends = linear.n % 8 == 0 && !linear.out_f32 && (!linear.k_cache || linear.d_head % 8 == 0);
    // The blocks that this one takes slices from hear when a slot is free: its row of the cluster and its column.
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster;
    bool tells = lane < cm + cn - 1;
    int peer = lane < cm ? place.n * cm + lane : (lane - cm + (lane - cm >= place.n)) * cm + place.m;
    u32 peer_empty = in_cluster(empty, tells ? place.split * cm * cn + peer : 0);
    u32 x0 = tile_descriptor(shared_address(shared) + group * 8192);
    u32 weight0 = tile_descriptor(shared_address(shared) + Sh::A_BYTES);
    u8* staging = shared + Sh::STAGING_AT + warp * Sh::STAGING;
    float sums[Sh::BN / 2];
    int slot = 0, parity = 0;
#pragma unroll 1
    for (int tile = place.cluster; tile < place.tiles; tile += place.step) {
        int last = 0;
        hold(sums);
#pragma unroll 1
        for (int stage = 0; stage < place.stages; stage++) {
            slot_wait(full + slot * 8, parity);
            u32 x = x0 + slot * (Sh::STAGE / 16), weight = weight0 + slot * (Sh::STAGE / 16);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int step = 0; step < 4; step++) {
                wgmma<T, Sh::BN>(sums, descriptor(x + step * 2), descriptor(weight + step * 2), step > 0 || stage > 0);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (stage > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (tells) slot_release(peer_empty + last * 8);
            }
            last = slot;
            if (++slot == Sh::S) slot = 0, parity ^= 1;
        }
        GemmCorner corner = corner_of<Sh>(args, place, tile);
        int row0 = corner.row + warp * 16;
        TileWants<Sh> wants;
        ask_for<Sh>(wants, linear, row0, corner.column);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(sums);
        if (tells) slot_release(peer_empty + last * 8);
        if constexpr (Sh::SHARES_K) {
            // Where it is shared this is the block's only tile.
            if (args.splits > 1 && !GemmMail<Sh>(args, place, shared_address(shared)).exchange(sums, warp)) break;
        }
        if (sends) send_tile<T, Sh>(linear, out_map, sums, wants, shared_address(staging), row0, corner.column);
        else store_rows<T, Sh>(linear, sums, (float*)staging, row0, corner.column);
    }
    // Shared memory must last until the copy engine has read it.
    if (elected()) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <class T, class Sh>
DEVICE void gemm(const GemmArgs& args, const TensorMap* x_map, const TensorMap* weight_map, const TensorMap* out_map) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 full = shared_address(shared + Sh::BARRIERS), empty = full + Sh::S * 8;
    int size = args.rows_of_cluster * args.columns_of_cluster * args.splits;
    if (!Sh::SHARES_K && args.splits > 1) __trap();
    let_next_start();
    if (threadIdx.x == 256) prefetch_map(weight_map);
    if (threadIdx.x == 288) prefetch_map(x_map);
    // By one thread: lanes would take turns, a dozen instructions each.
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < Sh::S; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, 8 * (args.rows_of_cluster + args.columns_of_cluster - 1));
        }
        if (Sh::SHARES_K && args.splits > 1) {
            barrier_init(empty + Sh::S * 8, args.splits - 1);
#pragma unroll
            for (int i = 1; i < 9; i++) barrier_init(empty + (Sh::S + i) * 8, 1);
        }
        barriers_ready();
    }
    GemmPlace place = gemm_place<Sh>(args);
    __syncthreads();
    if (Sh::SHARES_K && args.splits > 1 && threadIdx.x < 8) GemmMail<Sh>(args, place, shared_address(shared)).expect(threadIdx.x);
    __syncwarp();
    if (size > 1) cluster_arrive(), cluster_wait();
    if (threadIdx.x >= 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
        if (warp == 8) {
            if (elected()) gemm_fill<Sh, true>(args, place, weight_map, shared_address(shared), full, empty);
        } else if (warp == 9) {
            if (elected()) gemm_fill<Sh, false>(args, place, x_map, shared_address(shared), full, empty);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous();
        gemm_multiply<T, Sh>(args, place, out_map, shared, full, empty);
    }
}

#define GEMM(name, T, ...)                                                                                      \
    KERNEL __launch_bounds__(384, 1)                                                                             \
        name(const __grid_constant__ GemmArgs args, const __grid_constant__ TensorMap x_map,                    \
             const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap out_map) {         \
        gemm<T, GemmShape<__VA_ARGS__>>(args, &x_map, &weight_map, &out_map);                                   \
    }                                                                                                           \
    extern "C" __device__ const int name##_shared = GemmShape<__VA_ARGS__>::SHARED;                             \
    extern "C" __device__ const int name##_part = GemmShape<__VA_ARGS__>::PART;

// linear for many rows on Hopper: tiles of the output, each multiplied by `wgmma` from a ring that the copy engine fills.
// See linear.cuh for the arguments and for what happens to a row's sums before they are stored.
//
// Layout: weight [n, k] and x [rows, k], both 16-byte aligned with strides that are multiples of 16 bytes; out [rows, n].
// Any rows, n; k a multiple of 8. Bound by the tensor cores from about 300 rows on, below by reading the weight.
//
// A block owns tiles of BM rows × BN outputs. One thread asks for stages of 64 inputs; two groups of four warps multiply,
// each with half of the tile's rows, and keep the sums in registers. While they store a tile, the thread is asking for
// the next one. Sums go through shared memory, a warp's own 16 rows at a time, so that stores are whole lines and the
// residual is read in whole lines.
//
// A cluster is rows_of_cluster × columns_of_cluster tiles, times `splits` parts of k. Blocks beside each other share the
// rows of x, blocks below each other the rows of the weight: each asks for its slice and the copy engine gives it to all.
// Blocks that share a tile's k add their sums over distributed shared memory in the order of k. Which parts k has depends
// on k and `splits` alone, and rows never meet: what a row gives does not depend on the other rows.
//
// Tiles are taken in groups of `group` clusters of rows, rows first, so that what runs at once shares what L2 holds.
//
// Launch: grid a multiple of the cluster's size, at most what fits at once (all tiles where splits > 1); 384 threads;
// cluster (rows_of_cluster · columns_of_cluster · splits, 1, 1); shared memory: the module's integer `<symbol>_shared`.
// Parameters: GemmArgs, then two tensor maps of 16-bit elements with 128-byte swizzle: x [rows, k] with boxes of 64 ×
// BM / columns_of_cluster, the weight [n, k] with boxes of 64 × BN / rows_of_cluster; both heights multiples of 8.

struct GemmArgs {
    LinearArgs linear;  // `units` and `slots_of_ring` are not used
    int rows_of_cluster, columns_of_cluster, splits;
    int group;
};

template <int BM_, int BN_>
struct GemmShape {
    static constexpr int BM = BM_, BN = BN_, MI = BM / 128;  // products of 64 rows of a group of warps
    static constexpr int STAGE = (BM + BN) * 128, A_BYTES = BM * 128;
    static constexpr int STAGING = 8 * 16 * 64 * 4;  // a warp's 16 rows × 64 outputs
    static constexpr int FIT = (232448 - STAGING - 256) / STAGE, S = FIT < 8 ? FIT : 8;
    static constexpr int STAGING_AT = S * STAGE, BARRIERS = STAGING_AT + STAGING, SHARED = BARRIERS + 2 * S * 8;
    static constexpr bool SPLITS = BM * BN * 4 <= S * STAGE;  // whether the sums fit in the ring
    static_assert(BM % 128 == 0 && BN % 32 == 0 && S >= 3, "shape");
};

// A tile of 128-byte rows in the 128-byte swizzle, eight rows to 1,024 bytes.
DEVICE u64 tile_descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// The box of `map` at (x, y) to the same place in the shared memory of every block of `mask`.
DEVICE void copy_box_to(u32 to, const TensorMap* map, int x, int y, u32 barrier, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(mask)
        : "memory");
}

// Barriers of the ring. What they order is the copy engine's and the tensor cores' work, so nothing is flushed for a
// cluster's sake: at cluster scope each would cost a fence of all memory or the first cache.
DEVICE void slot_wait(u32 barrier, int parity) {
    asm volatile(
        "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra AGAIN; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
DEVICE void slot_release_at(u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
        " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
// A barrier of the cluster that makes no writes visible.
DEVICE void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

#define WGMMA(n, type, regs, a, b, p, ...)                                                                     \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %" p ", 0;"                                               \
                 " wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" regs "}, %" a ", %" b    \
                 ", add, 1, 1, 0, 0; }"                                                                        \
                 : __VA_ARGS__                                                                                 \
                 : "l"(left), "l"(right), "r"(add))
#define WGMMA_OF(n, regs, a, b, p, ...)                                \
    if constexpr (T::is_f16) {                                         \
        WGMMA(n, "f16", regs, a, b, p, __VA_ARGS__);                   \
    } else {                                                           \
        WGMMA(n, "bf16", regs, a, b, p, __VA_ARGS__);                  \
    }
#define SUMS4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES48 NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES64 NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES80 NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES96 NAMES80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES128                                                                                    \
    NAMES96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113" \
            ",%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// c (64 × BN) = a (64 × 16) · b (16 × BN), both from shared memory; plus c if `add`.
template <class T, int BN>
DEVICE void wgmma(float (&c)[BN / 2], u64 left, u64 right, int add) {
    if constexpr (BN == 64) {
        WGMMA_OF(64, NAMES32, "32", "33", "34", SUMS32(0));
    } else if constexpr (BN == 96) {
        WGMMA_OF(96, NAMES48, "48", "49", "50", SUMS32(0), SUMS16(32));
    } else if constexpr (BN == 128) {
        WGMMA_OF(128, NAMES64, "64", "65", "66", SUMS32(0), SUMS32(32));
    } else if constexpr (BN == 160) {
        WGMMA_OF(160, NAMES80, "80", "81", "82", SUMS32(0), SUMS32(32), SUMS16(64));
    } else if constexpr (BN == 192) {
        WGMMA_OF(192, NAMES96, "96", "97", "98", SUMS32(0), SUMS32(32), SUMS32(64));
    } else {
        static_assert(BN == 256, "outputs of a tile");
        WGMMA_OF(256, NAMES128, "128", "129", "130", SUMS32(0), SUMS32(32), SUMS32(64), SUMS32(96));
    }
}

// Keeps the compiler from moving the sums about while products are under way.
template <int N>
DEVICE void hold(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) asm volatile("" : SUMS4(i)::"memory");
}

// What a block knows of its place.
struct GemmPlace {
    int m, n, split;    // tile inside the cluster, and which part of k
    int cluster, step;  // first tile of tiles, and from one to the next
    int groups_of_rows, tiles;
    int first, stages;  // of k
    u16 x_mask, weight_mask;
};

template <class Sh>
DEVICE GemmPlace gemm_place(const GemmArgs& args) {
    GemmPlace place;
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster, size = cm * cn * args.splits;
    int rank = size > 1 ? cluster_rank() : 0, tile = rank % (cm * cn);
    place.split = rank / (cm * cn);
    place.m = tile % cm, place.n = tile / cm;
    place.cluster = blockIdx.x / size, place.step = gridDim.x / size;
    place.groups_of_rows = div_ceil(args.linear.rows, Sh::BM * cm);
    place.tiles = place.groups_of_rows * div_ceil(args.linear.n, Sh::BN * cn);
    int stages = div_ceil(args.linear.k, 64);
    place.first = stages * place.split / args.splits;
    place.stages = stages * (place.split + 1) / args.splits - place.first;
    u32 x_mask = 0;
    for (int i = 0; i < cn; i++) x_mask |= 1u << (i * cm);
    place.x_mask = (u16)(x_mask << (rank - tile + place.m));
    place.weight_mask = (u16)(((1u << cm) - 1) << (rank - tile + place.n * cm));
    return place;
}

// The first row and the first output of this block's tile of tiles `tile`.
template <class Sh>
DEVICE int2 corner_of(const GemmArgs& args, const GemmPlace& place, int tile) {
    int columns = place.tiles / place.groups_of_rows, per_group = args.group * columns;
    int group = tile / per_group, first = group * args.group;
    int rows = min_of(args.group, place.groups_of_rows - first), at = tile - group * per_group;
    int m = (first + at % rows) * args.rows_of_cluster + place.m, n = at / rows * args.columns_of_cluster + place.n;
    return make_int2(m * Sh::BM, n * Sh::BN);
}

// The thread that asks.
template <class Sh>
DEVICE void gemm_fill(const GemmArgs& args, const GemmPlace& place, const TensorMap* x_map, const TensorMap* weight_map,
                      u32 ring, u32 full, u32 empty) {
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster;
    int x_rows = Sh::BM / cn * place.n, weight_rows = Sh::BN / cm * place.m;
    u32 x_at = ring + x_rows * 128, weight_at = ring + Sh::A_BYTES + weight_rows * 128;
    auto ask_x = [&](int2 corner, int stage, int slot) {
        int k = (place.first + stage) * 64, row = corner.x + x_rows;
        if (cn > 1) copy_box_to(x_at + slot * Sh::STAGE, x_map, k, row, full + slot * 8, place.x_mask);
        else copy_box(x_at + slot * Sh::STAGE, x_map, k, row, full + slot * 8);
    };
    auto ask_weight = [&](int2 corner, int stage, int slot) {
        int k = (place.first + stage) * 64, row = corner.y + weight_rows;
        barrier_expect(full + slot * 8, Sh::STAGE);
        if (cm > 1) copy_box_to(weight_at + slot * Sh::STAGE, weight_map, k, row, full + slot * 8, place.weight_mask);
        else copy_box(weight_at + slot * Sh::STAGE, weight_map, k, row, full + slot * 8);
    };
    // The weight of the first stages before the wait for the kernel before, whose work it does not depend on.
    int2 corner = corner_of<Sh>(args, place, place.cluster);
    int ahead = min_of(Sh::S, place.stages);
#pragma unroll 1
    for (int stage = 0; stage < ahead; stage++) ask_weight(corner, stage, stage);
    wait_for_previous();
#pragma unroll 1
    for (int stage = 0; stage < ahead; stage++) ask_x(corner, stage, stage);
    int slot = ahead == Sh::S ? 0 : ahead, parity = ahead == Sh::S ? 0 : 1;
    for (int tile = place.cluster, stage = ahead;;) {
#pragma unroll 1
        for (; stage < place.stages; stage++) {
            slot_wait(empty + slot * 8, parity);
            ask_weight(corner, stage, slot);
            ask_x(corner, stage, slot);
            if (++slot == Sh::S) slot = 0, parity ^= 1;
        }
        tile += place.step;
        if (tile >= place.tiles) return;
        corner = corner_of<Sh>(args, place, tile);
        stage = 0;
    }
}

// Where the sum of (row, column) lies: columns are swapped in eights, against bank conflicts.
template <int LD>
DEVICE int sum_at(int row, int column) { return row * LD + (column ^ ((row & 3) << 3)); }

// A thread's four outputs of a row.
template <int LD>
DEVICE float4 sums_of(const float* from, int row, int column, const LinearOutputs& outputs, bool clustered, u32 rank) {
    if (outputs.whole) {
        const float* at = from + sum_at<LD>(row, column);
        return clustered ? load_cluster4(shared_address(at), rank) : *(const float4*)at;
    }
    float x[4];
#pragma unroll
    for (int v = 0; v < 4; v++) {
        const float* at = from + sum_at<LD>(row, column + v * 16);
        x[v] = clustered ? load_cluster(shared_address(at), rank) : *at;
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

// One part of 64 outputs of a warp's sums of 16 rows to shared memory.
template <int N, int PART, int LD>
DEVICE void put_sums(const float (&c)[N], float* to) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if (PART * 32 + j * 4 >= N) break;
        const float* v = c + PART * 32 + j * 4;
        *(float2*)(to + sum_at<LD>(g, j * 8 + t * 2)) = make_float2(v[0], v[1]);
        *(float2*)(to + sum_at<LD>(g + 8, j * 8 + t * 2)) = make_float2(v[2], v[3]);
    }
}

template <int N, int LD>
DEVICE void put_part(const float (&c)[N], float* to, int part) {
    if (part == 0) put_sums<N, 0, LD>(c, to);
    if constexpr (N > 32) if (part == 1) put_sums<N, 1, LD>(c, to);
    if constexpr (N > 64) if (part == 2) put_sums<N, 2, LD>(c, to);
    if constexpr (N > 96) if (part == 3) put_sums<N, 3, LD>(c, to);
}

// Stores a warp's sums: 16 rows from `row0` on, BN outputs from `column0` on.
template <class T, int BN>
DEVICE void store_rows(const LinearArgs& args, const float (&c)[BN / 2], float* staging, int row0, int column0) {
    int lane = threadIdx.x & 31, l = lane & 15;
#pragma unroll 1
    for (int part = 0; part < div_up(BN, 64); part++) {
        put_part<BN / 2, 64>(c, staging, part);
        __syncwarp();
        int column = column0 + part * 64;
        LinearOutputs outputs = outputs_of<T>(args, column, min_of(args.n, min_of(column + 64, column0 + BN)), l, 16);
        int at = outputs.column - column;
        if (outputs.n > 0) {
#pragma unroll 1
            for (int row = lane >> 4; row < 16; row += 8) {
                float total[4][4];
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    float4 v = sums_of<64>(staging, row + r * 2, at, outputs, false, 0);
                    total[r][0] = v.x, total[r][1] = v.y, total[r][2] = v.z, total[r][3] = v.w;
                }
                finish_rows<T, 4>(args, outputs, row0 + row, 2, args.rows, total);
            }
        }
        __syncwarp();
    }
}

// Adds what the blocks that share k have in `from`, and stores this block's share of the rows.
template <class T, class Sh>
DEVICE void store_shared_tile(const GemmArgs& args, const GemmPlace& place, const float* from, int2 corner) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, l = lane & 15;
    int own = place.n * args.rows_of_cluster + place.m, step = args.rows_of_cluster * args.columns_of_cluster;
    int end = Sh::BM * (place.split + 1) / args.splits;
#pragma unroll 1
    for (int part = 0; part < div_up(Sh::BN, 64); part++) {
        int column = corner.y + part * 64;
        LinearOutputs outputs =
            outputs_of<T>(args.linear, column, min_of(args.linear.n, min_of(column + 64, corner.y + Sh::BN)), l, 16);
        int at = outputs.column - corner.y;
        if (outputs.n <= 0) continue;
#pragma unroll 1
        for (int row = Sh::BM * place.split / args.splits + warp * 2 + (lane >> 4); row < end; row += 64) {
            if (corner.x + row >= args.linear.rows) break;
            float total[4][4] = {};
#pragma unroll 1
            for (int split = 0; split < args.splits; split++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    // What is in rows from `end` on is not used.
                    int one = min_of(row + r * 16, Sh::BM - 1);
                    float4 v = sums_of<Sh::BN>(from, one, at, outputs, true, own + split * step);
                    total[r][0] += v.x, total[r][1] += v.y, total[r][2] += v.z, total[r][3] += v.w;
                }
            }
            finish_rows<T, 4>(args.linear, outputs, corner.x + row, 16, min_of(args.linear.rows, corner.x + end), total);
        }
    }
}

// The two groups of warps that multiply.
template <class T, class Sh>
DEVICE void gemm_multiply(const GemmArgs& args, const GemmPlace& place, u8* shared, u32 full, u32 empty) {
    u32 ring = shared_address(shared);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    float* staging = (float*)(shared + Sh::STAGING_AT) + warp * 1024;
    // The blocks that this one takes slices from hear when a slot is free: its row of the cluster and its column.
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster, hears = cm + cn - 1;
    int own = place.split * cm * cn, peer = own + (lane < cm ? place.n * cm + lane : 0);
    if (lane >= cm) {
        int n = lane - cm;
        peer = own + (n >= place.n ? n + 1 : n) * cm + place.m;
    }
    auto release = [&](int slot) {
        if (hears == 1) {
            if (lane == 0) barrier_arrive(empty + slot * 8);
        } else if (lane < hears) {
            slot_release_at(empty + slot * 8, peer);
        }
    };
    float sums[Sh::MI][Sh::BN / 2];
    int slot = 0, parity = 0;
    for (int tile = place.cluster; tile < place.tiles; tile += place.step) {
        int last = 0;
#pragma unroll
        for (int m = 0; m < Sh::MI; m++) hold(sums[m]);
#pragma unroll 1
        for (int stage = 0; stage < place.stages; stage++) {
            slot_wait(full + slot * 8, parity);
            u32 x = ring + slot * Sh::STAGE + group * (Sh::MI * 8192), weight = ring + slot * Sh::STAGE + Sh::A_BYTES;
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int step = 0; step < 4; step++) {
#pragma unroll
                for (int m = 0; m < Sh::MI; m++) {
                    wgmma<T, Sh::BN>(sums[m], tile_descriptor(x + m * 8192 + step * 32),
                                     tile_descriptor(weight + step * 32), step > 0 || stage > 0);
                }
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (stage > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                release(last);
            }
            last = slot;
            if (++slot == Sh::S) slot = 0, parity ^= 1;
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int m = 0; m < Sh::MI; m++) hold(sums[m]);
        release(last);
        int2 corner = corner_of<Sh>(args, place, tile);
        if (Sh::SPLITS && args.splits > 1) {
            // Both groups are done with the ring, and nothing more comes into it.
            sync_256();
#pragma unroll
            for (int m = 0; m < Sh::MI; m++) {
                float* rows = (float*)shared + (group * (Sh::MI * 64) + m * 64 + (warp & 3) * 16) * Sh::BN;
#pragma unroll
                for (int part = 0; part < div_up(Sh::BN, 64); part++) {
                    put_part<Sh::BN / 2, Sh::BN>(sums[m], rows + part * 64, part);
                }
            }
            cluster_arrive();
            cluster_wait();
            store_shared_tile<T, Sh>(args, place, (const float*)shared, corner);
        } else {
#pragma unroll
            for (int m = 0; m < Sh::MI; m++) {
                int row = corner.x + group * (Sh::MI * 64) + m * 64 + (warp & 3) * 16;
                if (row < args.linear.rows) store_rows<T, Sh::BN>(args.linear, sums[m], staging, row, corner.y);
            }
        }
    }
}

template <class T, class Sh>
DEVICE void gemm(const GemmArgs& args, const TensorMap* x_map, const TensorMap* weight_map) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 full = shared_address(shared + Sh::BARRIERS), empty = full + Sh::S * 8;
    int size = args.rows_of_cluster * args.columns_of_cluster * args.splits;
    let_next_start();
    if (threadIdx.x == 256) {
        prefetch_map(x_map);
        prefetch_map(weight_map);
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < Sh::S; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, 8 * (args.rows_of_cluster + args.columns_of_cluster - 1));
        }
        barriers_ready();
    }
    GemmPlace place = gemm_place<Sh>(args);
    __syncthreads();
    if (size > 1) cluster_meet();
    if (threadIdx.x >= 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 256) gemm_fill<Sh>(args, place, x_map, weight_map, shared_address(shared), full, empty);
        __syncwarp();
        if (args.splits > 1) {
            cluster_arrive();
            cluster_wait();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous();
        gemm_multiply<T, Sh>(args, place, shared, full, empty);
        __syncwarp();
    }
    // Others may still write to this block's barriers or read its sums.
    if (size > 1) cluster_meet();
}

#define GEMM(name, T, ...)                                                                             \
    KERNEL __launch_bounds__(384, 1) name(const __grid_constant__ GemmArgs args,                        \
                                          const __grid_constant__ TensorMap x_map,                     \
                                          const __grid_constant__ TensorMap weight_map) {              \
        gemm<T, GemmShape<__VA_ARGS__>>(args, &x_map, &weight_map);                                    \
    }                                                                                                  \
    extern "C" __device__ const int name##_shared = GemmShape<__VA_ARGS__>::SHARED;

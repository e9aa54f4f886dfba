// linear for many rows on Hopper: tiles of the output, each multiplied by `wgmma` from a ring that the copy engine fills.
// See linear.cuh for the arguments and for what happens to a row's sums before they are stored.
//
// Layout: weight [n, k] and x [rows, k], both 16-byte aligned with strides that are multiples of 16 bytes; out [rows, n].
// Any rows, n; k a multiple of 8. Bound by the tensor cores from about 300 rows on, below by reading the weight.
//
// A block owns tiles of BM rows × BN outputs. Two threads ask for stages of 64 inputs, one for the weight and one for x;
// two groups of four warps multiply, each with half of the tile's rows, and keep the sums in registers. Where out allows
// it (16 bits, n a multiple of 8) a warp rounds its sums into shared memory and the copy engine stores them while the
// next tile is multiplied; else they go through shared memory in f32, so that stores are as wide as n allows.
//
// A cluster is rows_of_cluster × columns_of_cluster tiles, times `splits` parts of k. Blocks beside each other share the
// rows of x, blocks below each other the rows of the weight: each asks for its slice and the copy engine gives it to all.
// Blocks that share a tile's k exchange their sums over distributed shared memory; they are added in the order of k. Which parts k has, and
// where a tile begins in its part, depends on k, `splits` and the column alone, and rows never meet: what a row gives
// does not depend on the other rows.
//
// Tiles are taken in groups of `group` clusters of rows, rows first, so that what runs at once shares what L2 holds. With
// `spread` tiles begin at different places of k, so that few rows of x are not all asked of the same part of L2 at once.
//
// Launch: grid a multiple of the cluster's size, at most what fits at once (exactly all tiles where splits > 1);
// 384 threads; cluster (rows_of_cluster · columns_of_cluster · splits, 1, 1), at most 8 blocks; splits at most 4
// and at most div_ceil(k, 64), 1 for the largest tiles, 128 × 256 and 256 × N; shared memory: the module's integer `<symbol>_shared`. Parameters: GemmArgs, then three tensor maps of
// 16-bit elements: x [rows, k] with boxes of 64 × BM / columns_of_cluster and the weight [n, k] with boxes of
// 64 × BN / rows_of_cluster, both 128-byte swizzled, heights multiples of 8; out [rows, n] with boxes of P × 16, P being
// the module's integer `<symbol>_part`, with a swizzle of 2 · P bytes (not read where the copy engine does not store).

struct GemmArgs {
    LinearArgs linear;  // `units` and `slots_of_ring` are not used
    int rows_of_cluster, columns_of_cluster, splits;
    int group, spread;
};

// The copy engine stores PART outputs of a warp's 16 rows at once; a warp finishes UNIT outputs at a time, so that those
// and all sums fit in the registers.
template <int BM_, int BN_>
struct GemmShape {
    static constexpr int BM = BM_, BN = BN_, MI = BM / 128;  // products of 64 rows of a group of warps
    static constexpr int PART = BN % 64 == 0 ? 64 : 32;
    static constexpr int UNIT = 32, UNITS = BN / UNIT, UNITS_OF_PART = PART / UNIT;
    static constexpr int STAGE = (BM + BN) * 128, A_BYTES = BM * 128;
    static constexpr int STAGING = 64 * PART;  // of a warp: two parts in 16 bits, or a unit in f32
    static constexpr int FIT = (232448 - 8 * STAGING - 256) / STAGE;
    static constexpr int S = FIT < 8 ? FIT : 8;
    static constexpr int STAGING_AT = S * STAGE, BARRIERS = STAGING_AT + 8 * STAGING, SHARED = BARRIERS + (2 * S + 1) * 8;
    static constexpr bool SPLITS = MI == 1 && BN < 256;  // whether blocks may share a tile's k
    static_assert(BM % 128 == 0 && BN % 32 == 0 && S >= 3, "shape");
    static_assert(!SPLITS || BM * (BN + 3 * UNIT) * 4 <= S * STAGE, "sums of up to four parts of k");
};

// A tile of 128-byte rows in the 128-byte swizzle, eight rows to 1,024 bytes. The lower half can be moved: by 16 · n bytes
// if n is added to it.
DEVICE u32 tile_descriptor(u32 address) { return ((address & 0x3ffff) >> 4) | 1 << 16; }
DEVICE u64 descriptor(u32 low) { return (u64)(64 | 1 << 30) << 32 | low; }

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
// `barrier` is an address of the cluster.
DEVICE void slot_release(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE u32 cluster_address(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
// One thread of a warp, always the same.
DEVICE bool elected() {
    u32 is;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is));
    return is != 0;
}
// What this thread gave the copy engine to store: all but the last N have been read from shared memory.
template <int N>
DEVICE void stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
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

// Four 8 × 8 matrices of 16 bits to shared memory: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

// Where 8 outputs of a row lie in a box of PART × 16 that the copy engine stores.
template <class Sh>
DEVICE u32 piece_of(int row, int piece) {
    if constexpr (Sh::PART == 64) return row * 128 + ((piece ^ (row & 7)) << 4);
    return row * 64 + ((piece ^ (row >> 1 & 3)) << 4);
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

// The first row and the first output of this block's tile, and the stage of k at which it begins.
struct GemmCorner {
    int row, column, start;
};

template <class Sh>
DEVICE GemmCorner corner_of(const GemmArgs& args, const GemmPlace& place, int tile) {
    int columns = place.tiles / place.groups_of_rows, per_group = args.group * columns;
    int group = tile / per_group, first = group * args.group;
    int rows = min_of(args.group, place.groups_of_rows - first), at = tile - group * per_group;
    int column = at / rows, m = (first + at - column * rows) * args.rows_of_cluster + place.m;
    int start = args.spread ? (int)__umulhi(column * 0x9E3779B9u, place.stages) : 0;
    return {m * Sh::BM, (column * args.columns_of_cluster + place.n) * Sh::BN, start};
}

// The two warps that ask: WEIGHT for the weight, which is asked for before the wait for the kernel before, on whose work
// it does not depend; the other for x.
template <class Sh, bool WEIGHT>
DEVICE void gemm_fill(const GemmArgs& args, const GemmPlace& place, const TensorMap* map, u32 ring, u32 full, u32 empty) {
    int shared_by = WEIGHT ? args.rows_of_cluster : args.columns_of_cluster;
    int slice = (WEIGHT ? Sh::BN : Sh::BM) / shared_by * (WEIGHT ? place.m : place.n);
    u16 mask = WEIGHT ? place.weight_mask : place.x_mask;
    u32 to = ring + (WEIGHT ? Sh::A_BYTES : 0) + slice * 128;
    if constexpr (!WEIGHT) wait_for_previous();
    int slot = 0, parity = 1;
#pragma unroll 1
    for (int tile = place.cluster; tile < place.tiles; tile += place.step) {
        GemmCorner corner = corner_of<Sh>(args, place, tile);
        int row = (WEIGHT ? corner.column : corner.row) + slice;
        int k = (place.first + corner.start) * 64, k_end = (place.first + place.stages) * 64;
#pragma unroll 1
        for (int stage = 0; stage < place.stages; stage++) {
            slot_wait(empty + slot * 8, parity);
            if constexpr (WEIGHT) barrier_expect(full + slot * 8, Sh::STAGE);
            if (shared_by > 1) copy_box_to(to + slot * Sh::STAGE, map, k, row, full + slot * 8, mask);
            else copy_box(to + slot * Sh::STAGE, map, k, row, full + slot * 8);
            k += 64;
            if (k == k_end) k = place.first * 64;
            if (++slot == Sh::S) slot = 0, parity ^= 1;
        }
    }
}

// Where the sum of (row, column) of a unit lies: columns are swapped in eights, against bank conflicts.
DEVICE int sum_at(int row, int column) { return row * 32 + (column ^ ((row & 3) << 3)); }

// Unit `unit` of a warp's sums, for a loop that is not unrolled: sums stay in registers.
template <int MI, int N>
DEVICE void take_unit(float (&v)[16], const float (&c)[MI][N], int unit) {
#pragma unroll
    for (int u = 0; u < MI * N / 16; u++) {
        if (unit == u) {
#pragma unroll
            for (int i = 0; i < 16; i++) v[i] = c[u / (N / 16)][u % (N / 16) * 16 + i];
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
DEVICE void store_rows(const LinearArgs& args, const float (&c)[Sh::MI][Sh::BN / 2], float* staging, int row0,
                       int column0) {
#pragma unroll 1
    for (int unit = 0; unit < Sh::MI * Sh::UNITS; unit++) {
        int row = row0 + unit / Sh::UNITS * 64, column = column0 + unit % Sh::UNITS * Sh::UNIT;
        if (row >= args.rows || column >= args.n) continue;
        float v[16];
        take_unit(v, c, unit);
        store_unit<T, Sh>(args, v, staging, row, column);
    }
}

// Bias, activation, residual of one unit of a warp's sums, where they are: rows `row` and `row + 8`, two outputs from
// `column` on in every eight.
template <class T>
DEVICE void finish_unit(const LinearArgs& args, float (&v)[16], int row, int column) {
    constexpr int N = 16, J = N / 4;
    u32 bias[J];
    u32 residual[2 * J];
    if (args.bias) {
#pragma unroll
        for (int j = 0; j < J; j++) bias[j] = *(const u32*)(args.bias + min_of(column + j * 8, args.n - 2));
    }
    if (args.residual) {
        const u16* low = args.residual + (i64)min_of(row, args.rows - 1) * args.n;
        const u16* high = args.residual + (i64)min_of(row + 8, args.rows - 1) * args.n;
#pragma unroll
        for (int j = 0; j < J; j++) {
            int at = min_of(column + j * 8, args.n - 2);
            residual[2 * j] = *(const u32*)(low + at);
            residual[2 * j + 1] = *(const u32*)(high + at);
        }
    }
    if (args.bias) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            float2 b = widen2<T>(bias[j]);
            v[j * 4] += b.x, v[j * 4 + 1] += b.y, v[j * 4 + 2] += b.x, v[j * 4 + 3] += b.y;
        }
    }
    if (args.activation == 1) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = gelu_tanh(v[i]);
    } else if (args.activation == 2) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = gelu_erf(v[i]);
    } else if (args.activation == 3) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = fmaxf(v[i], 0.0f);
    }
    if (args.residual) {
#pragma unroll
        for (int i = 0; i < 2 * J; i++) {
            float2 r = widen2<T>(residual[i]);
            v[i * 2] += r.x, v[i * 2 + 1] += r.y;
        }
    }
}

// Copies what a part has of keys and values from shared memory to the cache, 16 bytes a thread.
template <class Sh>
DEVICE void append_part(const LinearArgs& args, u32 box, int row0, int column0) {
    constexpr int PIECES = Sh::PART / 8, ROWS = 32 / PIECES;
    int lane = threadIdx.x & 31, piece = lane % PIECES;
    int d_kv = args.n_kv_heads * args.d_head, at = column0 + piece * 8 - (args.n - 2 * d_kv);
    if (at < 0 || at >= 2 * d_kv) return;
    u16* cache = at < d_kv ? args.k_cache : args.v_cache;
    at = at < d_kv ? at : at - d_kv;
    int head = at / args.d_head, dim = at - head * args.d_head;
#pragma unroll
    for (int i = 0; i < 16 / ROWS; i++) {
        int r = i * ROWS + lane / PIECES;
        int slot = row0 + r < args.rows ? args.slots[row0 + r] : -1;
        if (slot < 0) continue;
        int block = slot / args.block_size, offset = slot - block * args.block_size;
        i64 place = (((i64)block * args.n_kv_heads + head) * args.block_size + offset) * args.d_head;
        *(uint4*)(cache + place + dim) = load_shared16(box + piece_of<Sh>(r, piece));
    }
}

// Rounds a warp's sums into shared memory and has the copy engine store them: from row `row0` and output `column0` on.
template <class T, class Sh>
DEVICE void send_rows(const LinearArgs& args, const TensorMap* out_map, const float (&c)[Sh::MI][Sh::BN / 2],
                      u32 staging, int& turn, int row0, int column0) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int row = (lane & 7) + (lane & 8), piece = lane >> 4;  // where this thread's address of four 8 × 8 matrices is
#pragma unroll 1
    for (int unit = 0; unit < Sh::MI * Sh::UNITS; unit++) {
        int inside = unit % Sh::UNITS_OF_PART, first_row = row0 + unit / Sh::UNITS * 64;
        int column = column0 + unit % Sh::UNITS * Sh::UNIT, first = column - inside * Sh::UNIT;
        if (first_row >= args.rows || first >= args.n) continue;
        float v[16];
        take_unit(v, c, unit);
        finish_unit<T>(args, v, first_row + g, column + t * 2);
        u32 box = staging + turn * (Sh::PART * 32);
        if (inside == 0) {
            if (elected()) stores_read<1>();
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const float* x = v + j * 4;
            store_matrices(box + piece_of<Sh>(row, inside * 4 + j + piece), narrow2<T>(x[0], x[1]),
                           narrow2<T>(x[2], x[3]), narrow2<T>(x[4], x[5]), narrow2<T>(x[6], x[7]));
        }
        if (inside != Sh::UNITS_OF_PART - 1) continue;
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (elected()) {
            asm volatile(
                "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                " cp.async.bulk.commit_group;" ::"l"(out_map),
                "r"(first), "r"(first_row), "r"(box)
                : "memory");
        }
        if (args.k_cache) append_part<Sh>(args, box, first_row, first);
        turn ^= 1;
    }
}

// The units of a tile that the block with part `split` of k stores, and the most that one stores.
template <class Sh>
DEVICE int first_unit(int split, int splits) { return Sh::UNITS * split / splits; }

// Blocks that share a tile's k: each gives every unit of its sums to the block that stores it, as they lie in registers
// (an asynchronous store counts on the barrier `summed` of the block that gets it), adds what it got, and stores it.
template <class T, class Sh>
DEVICE void share_sums(const GemmArgs& args, const GemmPlace& place, const float (&c)[Sh::MI][Sh::BN / 2], u8* shared,
                       float* staging, u32 summed, int row0, const GemmCorner& corner) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, splits = args.splits, most = div_ceil(Sh::UNITS, splits);
    int step = args.rows_of_cluster * args.columns_of_cluster, rank = place.n * args.rows_of_cluster + place.m;
    int first = first_unit<Sh>(place.split, splits), end = first_unit<Sh>(place.split + 1, splits);
    int blocks = div_ceil(max_of(0, min_of(Sh::BM, args.linear.rows - corner.row)), 16);  // of 16 rows
    int bytes = blocks * (end - first) * splits * 2048;
    if (threadIdx.x == 0 && bytes > 0) barrier_expect(summed, bytes);
    // All are done with their rings, where the sums go.
    cluster_meet();
    u32 mine = ((place.split * Sh::MI * 8 + warp) * most) * 2048 + lane * 16, ring = shared_address(shared);
#pragma unroll
    for (int m = 0; m < Sh::MI; m++) {
        if (row0 + m * 64 >= args.linear.rows) continue;
#pragma unroll
        for (int unit = 0; unit < Sh::UNITS; unit++) {
            int owner = ((unit + 1) * splits - 1) / Sh::UNITS;
            u32 to = ring + mine + (m * 8 * most + unit - first_unit<Sh>(owner, splits)) * 2048;
            u32 remote = cluster_address(to, rank + owner * step), barrier = cluster_address(summed, rank + owner * step);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* v = c[m] + unit * 16 + j * 4;
                asm volatile(
                    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                        remote + j * 512),
                    "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                    : "memory");
            }
        }
    }
    if (bytes == 0) return;
    barrier_wait(summed, 0);
#pragma unroll 1
    for (int at = 0; at < Sh::MI * (end - first); at++) {
        int m = at / (end - first), unit = first + at - m * (end - first);
        int row = row0 + m * 64, column = corner.column + unit * Sh::UNIT;
        if (row >= args.linear.rows || column >= args.linear.n) continue;
        float v[16] = {};
#pragma unroll 1
        for (int split = 0; split < splits; split++) {
            const u8* from = shared + ((((split * Sh::MI + m) * 8 + warp) * most + unit - first) * 2048 + lane * 16);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float4 x = *(const float4*)(from + j * 512);
                v[j * 4] += x.x, v[j * 4 + 1] += x.y, v[j * 4 + 2] += x.z, v[j * 4 + 3] += x.w;
            }
        }
        store_unit<T, Sh>(args.linear, v, staging, row, column);
    }
}

// The two groups of warps that multiply.
template <class T, class Sh>
DEVICE void gemm_multiply(const GemmArgs& args, const GemmPlace& place, const TensorMap* out_map, u8* shared, u32 full,
                          u32 empty, u32 summed) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    u8* staging = shared + Sh::STAGING_AT + warp * Sh::STAGING;
    const LinearArgs& linear = args.linear;
    bool sends = linear.n % 8 == 0 && !linear.out_f32 && (!linear.k_cache || linear.d_head % 8 == 0);
    // The blocks that this one takes slices from hear when a slot is free: its row of the cluster and its column.
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster;
    bool tells = lane < cm + cn - 1;
    int peer = lane < cm ? place.n * cm + lane : (lane - cm + (lane - cm >= place.n)) * cm + place.m;
    u32 peer_empty = cluster_address(empty, tells ? place.split * cm * cn + peer : 0);
    u32 x0 = tile_descriptor(shared_address(shared) + group * (Sh::MI * 8192));
    u32 weight0 = tile_descriptor(shared_address(shared) + Sh::A_BYTES);
    float sums[Sh::MI][Sh::BN / 2];
    int slot = 0, parity = 0, turn = 0;
#pragma unroll 1
    for (int tile = place.cluster; tile < place.tiles; tile += place.step) {
        int last = 0;
#pragma unroll
        for (int m = 0; m < Sh::MI; m++) hold(sums[m]);
#pragma unroll 1
        for (int stage = 0; stage < place.stages; stage++) {
            slot_wait(full + slot * 8, parity);
            u32 x = x0 + slot * (Sh::STAGE / 16), weight = weight0 + slot * (Sh::STAGE / 16);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int step = 0; step < 4; step++) {
#pragma unroll
                for (int m = 0; m < Sh::MI; m++) {
                    wgmma<T, Sh::BN>(sums[m], descriptor(x + m * 512 + step * 2), descriptor(weight + step * 2),
                                     step > 0 || stage > 0);
                }
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (stage > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (tells) slot_release(peer_empty + last * 8);
            }
            last = slot;
            if (++slot == Sh::S) slot = 0, parity ^= 1;
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int m = 0; m < Sh::MI; m++) hold(sums[m]);
        if (tells) slot_release(peer_empty + last * 8);
        GemmCorner corner = corner_of<Sh>(args, place, tile);
        int row0 = corner.row + group * (Sh::MI * 64) + (warp & 3) * 16;
        if (Sh::SPLITS && args.splits > 1) {
            share_sums<T, Sh>(args, place, sums, shared, (float*)staging, summed, row0, corner);
        } else if (sends) {
            send_rows<T, Sh>(linear, out_map, sums, shared_address(staging), turn, row0, corner.column);
        } else {
            store_rows<T, Sh>(linear, sums, (float*)staging, row0, corner.column);
        }
    }
    // Shared memory must last until the copy engine has read it.
    if (elected()) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <class T, class Sh>
DEVICE void gemm(const GemmArgs& args, const TensorMap* x_map, const TensorMap* weight_map, const TensorMap* out_map) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 full = shared_address(shared + Sh::BARRIERS), empty = full + Sh::S * 8, summed = empty + Sh::S * 8;
    int size = args.rows_of_cluster * args.columns_of_cluster * args.splits;
    let_next_start();
    if (threadIdx.x == 256) prefetch_map(weight_map);
    if (threadIdx.x == 288) prefetch_map(x_map);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Sh::S; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, 8 * (args.rows_of_cluster + args.columns_of_cluster - 1));
        }
        barrier_init(summed, 1);
        barriers_ready();
    }
    GemmPlace place = gemm_place<Sh>(args);
    __syncthreads();
    if (size > 1) cluster_meet();
    if (threadIdx.x >= 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
        if (warp == 8) {
            if (elected()) gemm_fill<Sh, true>(args, place, weight_map, shared_address(shared), full, empty);
        } else if (warp == 9) {
            if (elected()) gemm_fill<Sh, false>(args, place, x_map, shared_address(shared), full, empty);
        }
        __syncwarp();
        if (args.splits > 1) cluster_meet();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous();
        gemm_multiply<T, Sh>(args, place, out_map, shared, full, empty, summed);
        __syncwarp();
    }
    // Others may still write to this block's barriers.
    if (size > 1) cluster_meet();
}

#define GEMM(name, T, ...)                                                                                      \
    KERNEL __launch_bounds__(384, 1)                                                                             \
        name(const __grid_constant__ GemmArgs args, const __grid_constant__ TensorMap x_map,                    \
             const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap out_map) {         \
        gemm<T, GemmShape<__VA_ARGS__>>(args, &x_map, &weight_map, &out_map);                                   \
    }                                                                                                           \
    extern "C" __device__ const int name##_shared = GemmShape<__VA_ARGS__>::SHARED;                             \
    extern "C" __device__ const int name##_part = GemmShape<__VA_ARGS__>::PART;

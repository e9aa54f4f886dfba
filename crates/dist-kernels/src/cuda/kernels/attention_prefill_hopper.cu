// attention for many rows a sequence on Hopper (`wgmma`, copy engine), see attention_prefill.cuh.
//
// One warp asks for the copies and fetches the next piece of work; G groups of four warps compute 64 rows each. Queries have
// two slots, keys and values a ring of S tiles of 128 positions each: blocks of the cache are gathered by one box a block
// (and half of a wide head), 128 bytes a row in the 128-byte swizzle. While a group's tensor cores multiply the next scores
// and the last weighted values, another group takes its exponentials: named barriers pass the turn around. Bound by the
// tensor cores and, at head size 64, as much by the exponentials.
//
// Launch: grid of at most as many blocks as there are multiprocessors, 128 · (G + 1) threads. Parameters: PrefillArgs, then
// three tensor maps, all of 16-bit elements, 128-byte swizzle, zeros outside, boxes 64 wide: qkv [rows, ld_qkv] with boxes
// of 64 · G rows; keys and values, each [n_blocks · n_kv_heads · block_size, D] with boxes of `box_rows` rows.
// Shared memory: the module's integer `<symbol>_shared`, rows of a tile `<symbol>_rows`.

template <int D_, int G_, int S_>
struct HopperShape {
    static constexpr int D = D_, G = G_, S = S_, N = 128;
    static constexpr int M = 64 * G, HALVES = (D + 63) / 64;   // of 64 elements, the last one filled up with zeros
    static constexpr int Q_BYTES = HALVES * M * 128, TILE = HALVES * N * 128;
    static constexpr int QUERIES = 0, KEYS = 2 * Q_BYTES, VALUES = KEYS + S * TILE, BARRIERS = VALUES + S * TILE;
    static constexpr int WORK = BARRIERS + (4 + 4 * S) * 8;
    static constexpr int SHARED = WORK + 2 * 32 + 1024;         // the tiles begin at a multiple of 1,024
    static constexpr int CONSUMER_REGISTERS = G == 2 ? 232 : 160, PRODUCER_REGISTERS = G == 2 ? 40 : 32;
};

// Where the rings and their barriers are.
template <class Sh>
struct PrefillRings {
    u32 base;
    DEVICE_MEMBER u32 queries(int slot) const { return base + Sh::QUERIES + slot * Sh::Q_BYTES; }
    DEVICE_MEMBER u32 keys(int slot) const { return base + Sh::KEYS + slot * Sh::TILE; }
    DEVICE_MEMBER u32 values(int slot) const { return base + Sh::VALUES + slot * Sh::TILE; }
    DEVICE_MEMBER u32 q_full(int slot) const { return base + Sh::BARRIERS + slot * 8; }
    DEVICE_MEMBER u32 q_empty(int slot) const { return q_full(2 + slot); }
    DEVICE_MEMBER u32 k_full(int slot) const { return q_full(4 + slot); }
    DEVICE_MEMBER u32 k_empty(int slot) const { return q_full(4 + Sh::S + slot); }
    DEVICE_MEMBER u32 v_full(int slot) const { return q_full(4 + 2 * Sh::S + slot); }
    DEVICE_MEMBER u32 v_empty(int slot) const { return q_full(4 + 3 * Sh::S + slot); }
    DEVICE_MEMBER u32 work(int slot) const { return base + Sh::WORK + slot * 32; }
};

// A place in a ring, and how often it was passed.
template <int S>
struct RingPlace {
    int slot = 0, parity = 0;
    DEVICE_MEMBER void advance() {
        if (++slot == S) slot = 0, parity ^= 1;
    }
};

#define REGS32                                                                                                \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"  \
    "%28,%29,%30,%31"
#define REGS40 REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REGS48 REGS40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS64 REGS48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SUMS4(how, c, j) how(c[j][0]), how(c[j][1]), how(c[j][2]), how(c[j][3])
#define SUMS16(how, c, j) SUMS4(how, c, j), SUMS4(how, c, j + 1), SUMS4(how, c, j + 2), SUMS4(how, c, j + 3)
#define SUMS32(how, c, j) SUMS16(how, c, j), SUMS16(how, c, j + 4)

// scores (64 × 128) = or += queries (64 × 16) · keys (128 × 16)ᵀ.
#define WGMMA_SCORES(type, how, add)                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" REGS64                     \
                 "}, %64, %65, " add ", 1, 1, 0, 0;"                                                          \
                 : SUMS32(how, c, 0), SUMS32(how, c, 8)                                                       \
                 : "l"(queries), "l"(keys))
template <class T, bool ADD>
DEVICE void wgmma_scores(float (&c)[16][4], u64 queries, u64 keys) {
    if constexpr (ADD && T::is_f16) WGMMA_SCORES("f16", "+f", "1");
    else if constexpr (ADD) WGMMA_SCORES("bf16", "+f", "1");
    else if constexpr (T::is_f16) WGMMA_SCORES("f16", "=f", "0");
    else WGMMA_SCORES("bf16", "=f", "0");
}

// sums (64 × D) += weights (64 × 16, in registers) · values (16 × D).
#define WGMMA_VALUES(n, type, regs, a, b, ...)                                                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" regs "}, {" a "}, %" b   \
                 ", 1, 1, 1, 1;"                                                                              \
                 : __VA_ARGS__                                                                                \
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(values))
#define WGMMA_VALUES_OF(n, regs, a, b, ...)                                                                   \
    if constexpr (T::is_f16) WGMMA_VALUES(n, "f16", regs, a, b, __VA_ARGS__);                                 \
    else WGMMA_VALUES(n, "bf16", regs, a, b, __VA_ARGS__)
template <class T, int BLOCKS>
DEVICE void wgmma_values(float (&c)[BLOCKS][4], const u32 (&p)[4], u64 values) {
    if constexpr (BLOCKS == 8) {
        WGMMA_VALUES_OF(64, REGS32, "%32,%33,%34,%35", "36", SUMS32("+f", c, 0));
    } else if constexpr (BLOCKS == 10) {
        WGMMA_VALUES_OF(80, REGS40, "%40,%41,%42,%43", "44", SUMS32("+f", c, 0), SUMS4("+f", c, 8), SUMS4("+f", c, 9));
    } else if constexpr (BLOCKS == 12) {
        WGMMA_VALUES_OF(96, REGS48, "%48,%49,%50,%51", "52", SUMS32("+f", c, 0), SUMS16("+f", c, 8));
    } else {
        static_assert(BLOCKS == 16, "head size");
        WGMMA_VALUES_OF(128, REGS64, "%64,%65,%66,%67", "68", SUMS32("+f", c, 0), SUMS32("+f", c, 8));
    }
}

// Keeps the compiler from moving what reads or writes these registers across.
template <int BLOCKS>
DEVICE void pin(float (&c)[BLOCKS][4]) {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) asm volatile("" : SUMS4("+f", c, j)::"memory");
}
DEVICE void pin(u32 (&p)[8][4]) {
#pragma unroll
    for (int j = 0; j < 8; j++) asm volatile("" : "+r"(p[j][0]), "+r"(p[j][1]), "+r"(p[j][2]), "+r"(p[j][3])::"memory");
}
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Rows of 128 bytes in the 128-byte swizzle, eight rows to 1,024 bytes. Where the rows are k (values), `halves` is the
// distance from 64 columns to the next 64.
DEVICE u64 rows_descriptor(u32 address, int halves) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(halves >> 4) << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// A group's turn at the tensor cores.
template <int G>
struct Turn {
    int own, next;
    DEVICE_MEMBER explicit Turn(int group) : own(1 + group), next(1 + (group + 1) % G) {
        if (group == G - 1) pass();
    }
    DEVICE_MEMBER void await() const { asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory"); }
    DEVICE_MEMBER void pass() const { asm volatile("bar.arrive %0, 256;" ::"r"(next) : "memory"); }
};

// The warp that asks.
template <class Sh>
struct Producer {
    static constexpr int N = Sh::N, HALVES = Sh::HALVES, D = Sh::D;
    const PrefillArgs& args;
    const TensorMap *q_map, *k_map, *v_map;
    PrefillRings<Sh> rings;
    int lane, boxes;  // boxes of a tile and half

    DEVICE_MEMBER void copy_half_tiles(u32 to, const TensorMap* map, int row, u32 barrier, int without) const {
        for (int i = 0; i < boxes; i++) {
            int y = __shfl_sync(~0u, row, i);
            if (lane == 0 && i != without) {
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    copy_box(to + h * (N * 128) + i * args.box_rows * 128, map, h * 64, y, barrier);
                }
            }
        }
    }

    // Every lane has the row of one box in the cache.
    DEVICE_MEMBER void ask_keys(RingPlace<Sh::S> at, int row) const {
        barrier_wait(rings.k_empty(at.slot), at.parity ^ 1);
        if (lane == 0) barrier_expect(rings.k_full(at.slot), Sh::TILE);
        __syncwarp();
        copy_half_tiles(rings.keys(at.slot), k_map, row, rings.k_full(at.slot), -1);
    }

    // Values weigh zero where they are not seen, but what was never stored may not be a number: the box with the end of
    // the context is written by hand, zeros behind the end.
    DEVICE_MEMBER void ask_values(RingPlace<Sh::S> at, int row, int position, int context) const {
        barrier_wait(rings.v_empty(at.slot), at.parity ^ 1);
        int left = context - position, by_hand = left < N && left % args.box_rows ? left / args.box_rows : -1;
        int row_by_hand = __shfl_sync(~0u, row, max_of(0, by_hand));
        if (row_by_hand < 0) by_hand = -1;
        if (by_hand >= 0) {
            int first = by_hand * args.box_rows;
            i64 from = (i64)row_by_hand * D;
            for (int i = lane; i < args.box_rows * HALVES * 8; i += 32) {
                int slot = i / (HALVES * 8), c = i % (HALVES * 8), to = first + slot;
                uint4 piece = make_uint4(0, 0, 0, 0);
                if (to < left && c < D / 8) piece = *(const uint4*)(args.v + from + (i64)slot * D + c * 8);
                u32 address = rings.values(at.slot) + (c >> 3) * (N * 128) + to * 128 + (((c & 7) ^ (to & 7)) << 4);
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(piece.x), "r"(piece.y),
                             "r"(piece.z), "r"(piece.w)
                             : "memory");
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        __syncwarp();
        int bytes = Sh::TILE - (by_hand >= 0 ? HALVES * args.box_rows * 128 : 0);
        if (lane == 0) barrier_expect(rings.v_full(at.slot), bytes);
        __syncwarp();
        copy_half_tiles(rings.values(at.slot), v_map, row, rings.v_full(at.slot), by_hand);
    }

    // Tells the groups what comes next, and asks for its queries.
    DEVICE_MEMBER void ask_queries(RingPlace<2> at, const RowTile& tile, bool has) const {
        barrier_wait(rings.q_empty(at.slot), at.parity ^ 1);
        if (lane == 0) {
            u32 work = rings.work(at.slot);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(work), "r"(tile.row),
                         "r"(has ? tile.n_rows : 0), "r"(tile.position), "r"(tile.head)
                         : "memory");
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(work + 16), "r"(tile.low), "r"(tile.high) : "memory");
            if (has) {
                barrier_expect(rings.q_full(at.slot), Sh::Q_BYTES);
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    copy_box(rings.queries(at.slot) + h * (Sh::M * 128), q_map, tile.head * D + h * 64, tile.row,
                             rings.q_full(at.slot));
                }
            } else {
                barrier_arrive(rings.q_full(at.slot));
            }
        }
        __syncwarp();
    }

    DEVICE_MEMBER void run() {
        WorkOrder<D, Sh::M, N> order;
        RowTile tile = {};
        RingPlace<2> q;
        RingPlace<Sh::S> k, v;
        u32 last = count_tiles<Sh::M>(args, lane) + gridDim.x - 1;  // numbers that the blocks fetch together, less one
        boxes = N / args.box_rows;
        auto fetch = [&] {
            u32 work = 0;
            if (lane == 0) {
                asm volatile("atom.global.inc.u32 %0, [%1], %2;" : "=r"(work) : "l"(args.next), "r"(last) : "memory");
            }
            return work;
        };
        u32 work = fetch();
        while (true) {
            bool has = order.find(args, __shfl_sync(~0u, work, 0), lane, tile);
            ask_queries(q, tile, has);
            q.advance();
            if (!has) return;
            Pages pages(args, tile);
            int context = args.context_lens[tile.seq];
            auto row_of = [&](int j) -> int {
                if (lane >= boxes || j >= tile.high) return Pages::OUTSIDE;
                return pages.row_of(j * N + lane * args.box_rows, args.box_rows);
            };
            int before = 0, row = row_of(tile.low);
            for (int j = tile.low; j <= tile.high; j++) {
                int next_row = row_of(j + 1);
                if (j == max_of(tile.low, tile.high - 2)) work = fetch();
                if (j < tile.high) ask_keys(k, row), k.advance();
                if (j > tile.low) ask_values(v, before, (j - 1) * N, context), v.advance();
                before = row, row = next_row;
            }
        }
    }
};

// One of the groups that compute.
template <class T, class Sh>
struct Consumer {
    static constexpr int N = Sh::N, D = Sh::D;
    const PrefillArgs& args;
    PrefillRings<Sh> rings;
    int group;
    RingPlace<Sh::S> k, v;
    u32 p[8][4];
    float sums[D / 8][4];

    DEVICE_MEMBER void start_scores(float (&scores)[16][4], int q_slot) {
        u64 queries = rows_descriptor(rings.queries(q_slot) + group * (64 * 128), 16);
        u64 keys = rows_descriptor(rings.keys(k.slot), 16);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            u64 q_at = queries + ((d >> 2) * (Sh::M * 128) + (d & 3) * 32 >> 4);
            u64 k_at = keys + ((d >> 2) * (N * 128) + (d & 3) * 32 >> 4);
            if (d == 0) wgmma_scores<T, false>(scores, q_at, k_at);
            else wgmma_scores<T, true>(scores, q_at, k_at);
        }
        products_commit();
    }
    DEVICE_MEMBER void start_values() {
        u64 values = rows_descriptor(rings.values(v.slot), N * 128);
#pragma unroll
        for (int n = 0; n < N / 16; n++) wgmma_values<T>(sums, p[n], values + (n * 2048 >> 4));
        products_commit();
    }
    DEVICE_MEMBER void weigh(const float (&scores)[16][4]) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const float(&w)[4] = scores[2 * n + (x >> 1)];
                p[n][x] = narrow2<T>(w[(x & 1) * 2], w[(x & 1) * 2 + 1]);
            }
        }
    }
    DEVICE_MEMBER void let_go(u32 barrier) const {
        if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
    }

    DEVICE_MEMBER void run() {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, t = lane & 3, own = group * 64 + warp * 16 + (lane >> 2);
        float scale = args.scale * 1.44269504f;
        Turn<Sh::G> turn(group);
        for (RingPlace<2> q;; q.advance()) {
            barrier_wait(rings.q_full(q.slot), q.parity);
            uint4 work = load_shared16(rings.work(q.slot)), tiles = load_shared16(rings.work(q.slot) + 16);
            int row0 = work.x, n_rows = work.y, position = work.z, head = work.w, low = tiles.x, high = tiles.y;
            if (n_rows == 0) return;

            Softmax softmax;
            float scores[16][4], factor[2];
            auto mask = [&](int j) {
                int first = position + group * 64;
                if ((j + 1) * N <= first + 1 && j * N > first + 63 - args.window) return;
                int at = j * N + t * 2, see[2], from[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    see[e] = position + own + e * 8 - at;
                    from[e] = max_of(0, position + own + e * 8 - args.window + 1) - at;
                }
                mask_scores(scores, see, from);
            };
#pragma unroll
            for (int d = 0; d < D / 8; d++) sums[d][0] = sums[d][1] = sums[d][2] = sums[d][3] = 0.0f;

            barrier_wait(rings.k_full(k.slot), k.parity);
            products_begin();
            start_scores(scores, q.slot);
            products_wait<0>();
            pin(scores);
            let_go(rings.k_empty(k.slot));
            k.advance();
            mask(low);
            softmax.step(scores, scale, factor);
            weigh(scores);

            for (int j = low + 1; j < high; j++) {
                barrier_wait(rings.k_full(k.slot), k.parity);
                turn.await();
                pin(sums);
                pin(p);
                products_begin();
                start_scores(scores, q.slot);
                barrier_wait(rings.v_full(v.slot), v.parity);
                start_values();
                turn.pass();
                products_wait<1>();
                pin(scores);
                let_go(rings.k_empty(k.slot));
                k.advance();
                mask(j);
                softmax.step(scores, scale, factor);
                products_wait<0>();
                pin(sums);
                pin(p);
                let_go(rings.v_empty(v.slot));
                v.advance();
                weigh(scores);
#pragma unroll
                for (int d = 0; d < D / 8; d++) {
#pragma unroll
                    for (int x = 0; x < 4; x++) sums[d][x] *= factor[x >> 1];
                }
            }
            let_go(rings.q_empty(q.slot));

            barrier_wait(rings.v_full(v.slot), v.parity);
            pin(sums);
            pin(p);
            products_begin();
            start_values();
            float inverse[2];
            softmax.finish(inverse);
            products_wait<0>();
            pin(sums);
            let_go(rings.v_empty(v.slot));
            v.advance();
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int row = own + e * 8;
                u16* to = args.out + ((i64)(row0 + row) * args.n_heads + head) * D;
                store_row<T, D>(to, sums, e, inverse[e], row < n_rows, t);
            }
        }
    }
};

template <class T, class Sh>
DEVICE void attention_prefill_hopper(const PrefillArgs& args, const TensorMap* q_map, const TensorMap* k_map,
                                     const TensorMap* v_map) {
    extern __shared__ __align__(1024) u8 shared[];
    PrefillRings<Sh> rings = {(shared_address(shared) + 1023) & ~1023u};
    int group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(rings.q_full(i), 1);
            barrier_init(rings.q_empty(i), 4 * Sh::G);
        }
        for (int i = 0; i < Sh::S; i++) {
            barrier_init(rings.k_full(i), 1);
            barrier_init(rings.v_full(i), 1);
            barrier_init(rings.k_empty(i), 4 * Sh::G);
            barrier_init(rings.v_empty(i), 4 * Sh::G);
        }
        barriers_ready();
    }
    __syncthreads();
    wait_for_previous();
    if (group == Sh::G) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Sh::PRODUCER_REGISTERS));
        if (threadIdx.x < (Sh::G * 4 + 1) * 32) {
            Producer<Sh>{args, q_map, k_map, v_map, rings, (int)threadIdx.x & 31, 0}.run();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Sh::CONSUMER_REGISTERS));
        Consumer<T, Sh> consumer{args, rings, group};
        consumer.run();
    }
}

#define ATTENTION_PREFILL_HOPPER(name, T, ...)                                                          \
    KERNEL __launch_bounds__(128 * (HopperShape<__VA_ARGS__>::G + 1), 1)                                 \
        name(const __grid_constant__ PrefillArgs args, const __grid_constant__ TensorMap q_map,         \
             const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {        \
        attention_prefill_hopper<T, HopperShape<__VA_ARGS__>>(args, &q_map, &k_map, &v_map);            \
    }                                                                                                   \
    extern "C" __device__ const int name##_shared = HopperShape<__VA_ARGS__>::SHARED;                   \
    extern "C" __device__ const int name##_rows = HopperShape<__VA_ARGS__>::M;

// attention for many rows a sequence on Hopper (`wgmma`, copy engine), see attention_prefill.cuh
// and attention_prefill_wgmma.cuh.
//
// One warp fetches work and asks for queries and keys, one for values, and G groups of four warps compute 64 rows each.
// Queries have one or two slots, keys and values a ring of S tiles of 128 positions each. While a group's tensor cores
// multiply the next scores and the last weighted values, another group takes its exponentials: named barriers pass the
// turn around. Bound by the tensor cores and, at head size 64, as much by the exponentials.
//
// Keys and values are gathered from the cache's blocks, one box a block: eight rows after eight rows, each eight cut
// into atoms of the widest swizzle that divides the head (64, 32 or 16 elements).
//
// Launch: grid of at most as many blocks as there are multiprocessors or pieces of work, 128 · (G + 1) threads.
// Parameters: PrefillArgs, then three tensor maps, all of 16-bit elements, zeros outside:
//   qkv [rows, ld_qkv], boxes of 64 · G rows and 64 columns, 128-byte swizzle;
//   keys, then values: each as [rows / 8][D / atom][8][atom], strides 16 · D, 2 · atom and 2 · D bytes, boxes
//   [box_rows / 8][D / atom][8][atom], swizzle of 2 · atom bytes, where rows = n_blocks · n_kv_heads · block_size.
// The module's integers: `<symbol>_shared` bytes of shared memory, `<symbol>_rows` rows of a tile, `<symbol>_atom`.
// Shapes (D, G, Q_SLOTS, S): 64, 3, 2, 4; 80, 2, 2, 3; 96, 2, 2, 3; 128, 2, 2, 2.

template <int D_, int G_, int Q_SLOTS_, int S_>
struct HopperShape {
    static constexpr int D = D_, G = G_, Q_SLOTS = Q_SLOTS_, S = S_, N = 128;
    static constexpr int M = 64 * G, HALVES = (D + 63) / 64;               // of the queries
    static constexpr int ATOM = D % 64 == 0 ? 64 : D % 32 == 0 ? 32 : 16;  // of keys and values
    static constexpr int EIGHT = 16 * D, ATOM_BYTES = 16 * ATOM;           // bytes of eight rows, of an atom of them
    static constexpr int Q_BYTES = HALVES * M * 128, TILE = N * D * 2;
    static constexpr int QUERIES = 0, KEYS = Q_SLOTS * Q_BYTES, VALUES = KEYS + S * TILE, BARRIERS = VALUES + S * TILE;
    static constexpr int WORK = BARRIERS + (4 + 4 * S) * 8;
    static constexpr int SHARED = WORK + 2 * 32 + 1024;                     // the tiles begin at a multiple of 1,024
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

// The box of `map` at row `row` (a multiple of 8) to shared memory.
DEVICE void copy_rows(u32 to, const TensorMap* map, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(0), "r"(row >> 3), "r"(barrier)
        : "memory");
}
// True in one thread of a whole warp, which the compiler knows to be one.
DEVICE bool elected() {
    u32 is;
    asm volatile("{ .reg .pred is; elect.sync _|is, 0xffffffff; selp.u32 %0, 1, 0, is; }" : "=r"(is));
    return is;
}

// What the two warps that ask have in common.
template <class Sh>
struct Asking {
    const PrefillArgs& args;
    PrefillRings<Sh> rings;
    int lane, boxes;  // of a tile

    // The row of each lane's box of tile j.
    DEVICE_MEMBER int row_of(const Pages& pages, const RowTile& tile, int j) const {
        if (lane >= boxes || j >= tile.high) return Pages::OUTSIDE;
        return pages.row_of(j * Sh::N + lane * args.box_rows, args.box_rows);
    }
    DEVICE_MEMBER void copy_tile(u32 to, const TensorMap* map, int row, u32 barrier, int without) const {
        int bytes = args.box_rows * Sh::D * 2;
        if (elected()) barrier_expect(barrier, Sh::TILE - (without >= 0 ? bytes : 0));
        __syncwarp();
        for (int i = 0; i < boxes; i++) {
            int y = __shfl_sync(~0u, row, i);
            if (i != without && elected()) copy_rows(to + i * bytes, map, y, barrier);
        }
    }
};

// The warp that fetches work and asks for queries and keys.
template <class Sh>
struct KeyProducer : Asking<Sh> {
    using Asking<Sh>::args, Asking<Sh>::rings, Asking<Sh>::lane;

    // Tells the others what comes next, and asks for its queries.
    DEVICE_MEMBER void ask_queries(RingPlace<Sh::Q_SLOTS> at, const TensorMap* map, const RowTile& tile,
                                   int context) const {
        barrier_wait(rings.q_empty(at.slot), at.parity ^ 1);
        if (lane == 0) {
            u32 work = rings.work(at.slot);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(work), "r"(tile.row), "r"(tile.n_rows),
                         "r"(tile.position), "r"(tile.head)
                         : "memory");
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(work + 16), "r"(tile.low), "r"(tile.high),
                         "r"(tile.seq), "r"(context)
                         : "memory");
            if (tile.n_rows) barrier_expect(rings.q_full(at.slot), Sh::Q_BYTES);
            else barrier_arrive(rings.q_full(at.slot));
        }
        __syncwarp();
        if (tile.n_rows && elected()) {
#pragma unroll
            for (int h = 0; h < Sh::HALVES; h++) {
                copy_box(rings.queries(at.slot) + h * (Sh::M * 128), map, tile.head * Sh::D + h * 64, tile.row,
                         rings.q_full(at.slot));
            }
        }
    }

    DEVICE_MEMBER void run(const TensorMap* q_map, const TensorMap* k_map) {
        WorkOrder<Sh::D, Sh::M, Sh::N> order;
        RowTile tile = {};
        RingPlace<Sh::Q_SLOTS> q;
        RingPlace<Sh::S> k;
        u32 last = count_tiles<Sh::M>(args, lane) + gridDim.x - 1;  // numbers that the blocks fetch together, less one
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
            if (!has) tile.n_rows = 0;
            ask_queries(q, q_map, tile, has ? args.context_lens[tile.seq] : 0);
            q.advance();
            if (!has) return;
            Pages pages(args, tile);
            int row = this->row_of(pages, tile, tile.low);
            for (int j = tile.low; j < tile.high; j++, k.advance()) {
                if (j == max_of(tile.low, tile.high - 2)) work = fetch();
                barrier_wait(rings.k_empty(k.slot), k.parity ^ 1);
                this->copy_tile(rings.keys(k.slot), k_map, row, rings.k_full(k.slot), -1);
                row = this->row_of(pages, tile, j + 1);
            }
        }
    }
};

// The warp that asks for values.
template <class Sh>
struct ValueProducer : Asking<Sh> {
    using Asking<Sh>::args, Asking<Sh>::rings, Asking<Sh>::lane;

    // Values weigh zero where they are not seen, but what was never stored may not be a number: the box with the end of
    // the context is written by hand, zeros behind the end. `left` rows of the tile are stored.
    DEVICE_MEMBER void copy_end(u32 tile, int row, int first, int left) const {
        constexpr int D = Sh::D, ATOM = Sh::ATOM;
        for (int i = lane; i < args.box_rows * (D / 8); i += 32) {
            int slot = i / (D / 8), c = i % (D / 8), to = first + slot;
            uint4 piece = make_uint4(0, 0, 0, 0);
            if (to < left) piece = *(const uint4*)(args.v + (i64)(row + slot) * D + c * 8);
            u32 address = tile + (to >> 3) * Sh::EIGHT + c / (ATOM / 8) * Sh::ATOM_BYTES + (to & 7) * (ATOM * 2) +
                          ((c % (ATOM / 8) ^ (to & 7) / (64 / ATOM)) << 4);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(piece.x), "r"(piece.y),
                         "r"(piece.z), "r"(piece.w)
                         : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    DEVICE_MEMBER void run(const TensorMap* map) {
        RingPlace<Sh::S> v;
        for (RingPlace<Sh::Q_SLOTS> q;; q.advance()) {
            barrier_wait(rings.q_full(q.slot), q.parity);
            uint4 work = load_work(rings.work(q.slot)), more = load_work(rings.work(q.slot) + 16);
            if (lane == 0) barrier_arrive(rings.q_empty(q.slot));
            int seq = more.z, head = work.w, row0 = work.x, n_rows = work.y, position = work.z, low = more.x, high = more.y;
            RowTile tile = {seq, head, row0, n_rows, position, low, high};
            int context = more.w;
            if (tile.n_rows == 0) return;
            Pages pages(args, tile);
            int row = this->row_of(pages, tile, tile.low);
            for (int j = tile.low; j < tile.high; j++, v.advance()) {
                barrier_wait(rings.v_empty(v.slot), v.parity ^ 1);
                int left = context - j * Sh::N;
                int end = left < Sh::N && left % args.box_rows ? left / args.box_rows : -1;  // the box with the end
                if (end >= 0) {
                    int end_row = __shfl_sync(~0u, row, end);
                    if (end_row < 0) end = -1;
                    else copy_end(rings.values(v.slot), end_row, end * args.box_rows, left);
                    __syncwarp();
                }
                this->copy_tile(rings.values(v.slot), map, row, rings.v_full(v.slot), end);
                row = this->row_of(pages, tile, j + 1);
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
        u64 queries = rows_descriptor(rings.queries(q_slot) + group * (64 * 128), 64, 1024);
        u64 keys = rows_descriptor(rings.keys(k.slot), Sh::ATOM, Sh::EIGHT);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            u64 q_at = queries + ((d >> 2) * (Sh::M * 128) + (d & 3) * 32 >> 4);
            u64 k_at = keys + (d * 16 / Sh::ATOM * Sh::ATOM_BYTES + d * 16 % Sh::ATOM * 2 >> 4);
            if (d == 0) wgmma_scores<T, false>(scores, q_at, k_at);
            else wgmma_scores<T, true>(scores, q_at, k_at);
        }
        products_commit();
    }
    DEVICE_MEMBER void start_values() {
        u64 values = rows_descriptor(rings.values(v.slot), Sh::ATOM, Sh::EIGHT, Sh::ATOM_BYTES);
#pragma unroll
        for (int n = 0; n < N / 16; n++) wgmma_values<T>(sums, p[n], values + (n * 2 * Sh::EIGHT >> 4));
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
        int lane = threadIdx.x & 31, t = lane & 3, own = group * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
        float scale = args.scale * 1.44269504f;
        Turn<Sh::G> turn(group);
        for (RingPlace<Sh::Q_SLOTS> q;; q.advance()) {
            barrier_wait(rings.q_full(q.slot), q.parity);
            uint4 work = load_work(rings.work(q.slot)), tiles = load_work(rings.work(q.slot) + 16);
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
            barrier_init(rings.q_empty(i), 4 * Sh::G + 1);
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
        Asking<Sh> asking = {args, rings, (int)threadIdx.x & 31, Sh::N / args.box_rows};
        int warp = __shfl_sync(~0u, threadIdx.x >> 5 & 3, 0);
        if (warp == 0) {
            KeyProducer<Sh>{asking}.run(q_map, k_map);
        } else if (warp == 1) {
            ValueProducer<Sh>{asking}.run(v_map);
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
    extern "C" __device__ const int name##_rows = HopperShape<__VA_ARGS__>::M;                           \
    extern "C" __device__ const int name##_atom = HopperShape<__VA_ARGS__>::ATOM;

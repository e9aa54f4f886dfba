// What the GEMM of Hopper (gemm_hopper.cu) is made of: arguments, shape of a tile, barriers, products, place of a block.

struct GemmArgs {
    LinearArgs linear;  // `units` is not used
    int rows_of_cluster, columns_of_cluster, splits;
    int group, spread;
};

// The copy engine stores PART outputs of a warp's 16 rows at once, from one of a warp's BOXES. Where it cannot store, a warp
// stores UNIT outputs at a time.
template <int BN_>
struct GemmShape {
    static constexpr int BM = 128, BN = BN_;  // each of two groups of warps multiplies half of the rows
    static constexpr int PART = BN % 64 == 0 ? 64 : 32, BOX = PART * 32;
    static constexpr int UNIT = 32, UNITS = BN / UNIT;
    static constexpr int STAGE = (BM + BN) * 128, A_BYTES = BM * 128;
    static constexpr int FIT = (SHARED_MOST - 16 * BOX - 256) / STAGE;
    static constexpr int S = FIT < 8 ? FIT : 8;
    static constexpr int ALL_BOXES = BN / PART, ROOM = (SHARED_MOST - 256 - S * STAGE) / (8 * BOX);
    static constexpr int BOXES = ROOM >= ALL_BOXES ? ALL_BOXES : 2;
    static constexpr int STAGING = BOXES * BOX;  // of a warp, or a unit in f32
    // Two barriers a stage; one of the mail and one for each warp's.
    static constexpr int STAGING_AT = S * STAGE, BARRIERS = STAGING_AT + 8 * STAGING, SHARED = BARRIERS + (2 * S + 9) * 8;
    // Sheets of mail, a warp's sums, in a stage's slot; and slots for the six that a block gets at most.
    static constexpr int SHEET = 64 * BN, SHEETS = STAGE / SHEET, MAIL_SLOTS = div_up(6, SHEETS);
    static constexpr bool SHARES_K = BN <= 160;  // more sums than there are registers for, else
    static_assert(BN % 32 == 0 && S >= 3 && S > MAIL_SLOTS && SHARED <= SHARED_MOST, "shape");
    static_assert(STAGING >= 2048 && STAGING % 1024 == 0 && ALL_BOXES % BOXES == 0, "boxes");
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

// As for `slot_wait`, nothing is flushed. `barrier` is an address of the cluster.
DEVICE void slot_release(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
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
#define NAMES32                                                                          \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22" \
    ",%23,%24,%25,%26,%27,%28,%29,%30,%31"
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
    int groups_of_rows, columns, tiles;
    int first, stages;  // of k
    u16 x_mask, weight_mask;
};

template <class Sh>
DEVICE GemmPlace gemm_place(const GemmArgs& args) {
    GemmPlace place;
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster, size = cm * cn * args.splits;
    int rank = size > 1 ? cluster_rank() : 0;
    place.split = quotient(rank, cm * cn);
    int tile = rank - place.split * cm * cn;
    place.n = quotient(tile, cm), place.m = tile - place.n * cm;
    place.cluster = quotient(blockIdx.x, size), place.step = quotient(gridDim.x, size);
    place.groups_of_rows = quotient(args.linear.rows + Sh::BM * cm - 1, Sh::BM * cm);
    place.columns = quotient(args.linear.n + Sh::BN * cn - 1, Sh::BN * cn);
    place.tiles = place.groups_of_rows * place.columns;
    int stages = div_ceil(args.linear.k, 64);
    place.first = quotient(stages * place.split, args.splits);
    place.stages = quotient(stages * (place.split + 1), args.splits) - place.first;
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
    int per_group = args.group * place.columns, group = quotient(tile, per_group), first = group * args.group;
    int rows = min_of(args.group, place.groups_of_rows - first), at = tile - group * per_group;
    int column = quotient(at, rows), m = (first + at - column * rows) * args.rows_of_cluster + place.m;
    int start = args.spread ? (int)__umulhi(column * 0x9E3779B9u, place.stages) : 0;
    return {m * Sh::BM, (column * args.columns_of_cluster + place.n) * Sh::BN, start};
}

// Blocks that share a tile's k: each finishes the rows of some of the eight warps, to which the others send their sums. Mail
// comes to the slots that the ring is done with first, when all blocks of the tile have said so: stages before the end.
template <class Sh>
struct GemmMail {
    int split, splits;      // which part of k, of how many
    int rank, step;         // of the block with the first part, and to that with the next one
    int all_stages;         // of k
    u32 shared, barriers;   // the ring; what says that others take mail, and what says to a warp that all of its is there

    DEVICE_MEMBER GemmMail(const GemmArgs& args, const GemmPlace& place, u32 ring)
        : split(place.split), splits(args.splits), rank(place.n * args.rows_of_cluster + place.m),
          step(args.rows_of_cluster * args.columns_of_cluster), all_stages(div_ceil(args.linear.k, 64)), shared(ring),
          barriers(ring + Sh::BARRIERS + 2 * Sh::S * 8) {}
    DEVICE_MEMBER u32 letters(int warp) const { return barriers + 8 + warp * 8; }
    // The warps of the block with part `p` begin here, and end where those of the next one begin.
    DEVICE_MEMBER int first_of(int p) const { return share_of(8 * p, splits); }
    DEVICE_MEMBER int owner_of(int warp) const {
        int owner = 0;
        for (int p = 1; p < splits; p++) owner += warp >= first_of(p);
        return owner;
    }
    DEVICE_MEMBER int stages_of(int p) const {
        return share_of(all_stages * (p + 1), splits) - share_of(all_stages * p, splits);
    }
    // Where the block with part `to` gets the sums of its warp `warp` from that with part `from`.
    DEVICE_MEMBER u32 sheet(int to, int warp, int from) const {
        int at = (warp - first_of(to)) * (splits - 1) + from - (from > to);
        int slot = (stages_of(to) + at / Sh::SHEETS) % Sh::S;
        return shared + slot * Sh::STAGE + at % Sh::SHEETS * Sh::SHEET + (threadIdx.x & 31) * 16;
    }
    DEVICE_MEMBER void expect(int warp) const {
        if (owner_of(warp) == split) barrier_expect(letters(warp), (splits - 1) * Sh::SHEET);
    }
    // Says to the others that the slots of the mail are free: nothing here reads them any more.
    DEVICE_MEMBER void open() const {
        for (int to = 0; to < splits; to++) {
            if (to == split) continue;
            asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                             in_cluster(barriers, rank + to * step))
                         : "memory");
        }
    }
    // Gives a warp's sums away, or adds to them what the others sent, in the order of k; whether they are this block's to
    // store.
    DEVICE_MEMBER bool exchange(float (&c)[Sh::BN / 2], int warp) const {
        constexpr int N = Sh::BN / 2, PART = N > 64 ? N / 2 : N;  // as registers allow
        int owner = owner_of(warp);
        if (owner != split) {
            int to = rank + owner * step;
            u32 there = in_cluster(sheet(owner, warp, split), to), arrival = in_cluster(letters(warp), to);
            slot_wait(barriers, 0);
#pragma unroll
            for (int j = 0; j < N / 4; j++) send_cluster4(there + j * 512, c + j * 4, arrival);
            return false;
        }
        barrier_wait(letters(warp), 0);
#pragma unroll
        for (int part = 0; part < N; part += PART) {
            float total[PART] = {};
#pragma unroll 1
            for (int from = 0; from < splits; from++) {
                u32 here = sheet(split, warp, from) + part * 128;
#pragma unroll
                for (int j = 0; j < PART; j += 4) {
                    uint4 sent = make_uint4(0, 0, 0, 0);
                    if (from != split) sent = load_shared16(here + j * 128);
                    float v[4] = {__uint_as_float(sent.x), __uint_as_float(sent.y), __uint_as_float(sent.z),
                                  __uint_as_float(sent.w)};
#pragma unroll
                    for (int e = 0; e < 4; e++) total[j + e] += from == split ? c[part + j + e] : v[e];
                }
            }
#pragma unroll
            for (int i = 0; i < PART; i++) c[part + i] = total[i];
        }
        return true;
    }
};

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
    // A block may end only when no other tells it of a slot any more; those that come free first are the mail's.
    if constexpr (WEIGHT) {
#pragma unroll 1
        for (int i = 0; i < Sh::S; i++) {
            slot_wait(empty + slot * 8, parity);
            if (++slot == Sh::S) slot = 0, parity ^= 1;
            if constexpr (Sh::SHARES_K) {
                if (args.splits > 1 && i == Sh::MAIL_SLOTS - 1) GemmMail<Sh>(args, place, ring).open();
            }
        }
    }
}

// linear for up to 64 rows on Hopper's tensor cores (`wgmma`), fed by the copy engine, see linear.cuh.
//
// A stage is U blocks of 64 inputs; a block is a tile of the pass's weight rows and one of 8 · NT rows of x, 128 bytes a row,
// swizzled as the 128-byte mode of `wgmma` wants it. One warp has the copy engine keep a ring of stages full; WG groups of
// four warps multiply, 64 outputs each. What the copy engine writes the tensor cores may read without a fence.
//
// A pass ends in registers: warps exchange nothing in shared memory. Its end runs once or a few times in a launch, so its
// instructions are not in the cache: it is short, and is run through once, storing nothing, while the first stage is on its
// way.
//
// The blocks of a cluster have the same outputs and share k. Each finishes an even share of the rows: the others send it
// their sums of those (`st.async`), and it adds them in the order of the blocks, so that bits do not depend on who did.
//
// Launch: `<symbol>_threads` threads; shared memory up to `<symbol>_shared`: what stages, `behind`, `Mail` and `ENDS` take,
// as far as there are stages. Parameters are LinearArgs and the maps of x and the weight: 16-bit [rows, k] and [n, k], box
// 64 × 8 · NT and 64 × the outputs of a pass, swizzle 128 B, zeros outside. Clusters have up to four blocks, and one pass.

template <int WG_, int NT_, int U_>
struct RingShape {
    static constexpr int WG = WG_, NT = NT_, U = U_, MOST = 16;
    static constexpr int TN = 64 * WG, KC = 64 * U, MULTIPLY = 128 * WG, THREADS = MULTIPLY + 32;
    static constexpr int X_BYTES = NT * 8 * KC * 2;
    static constexpr int SHARED = SHARED_MOST - 1024;
    // Behind the ring: two barriers a stage, that of the mail, and an entry of the caches a row.
    static constexpr int MAIL_AT = 2 * MOST * 8, ENTRIES_AT = MAIL_AT + 16, ENDS = ENTRIES_AT + NT * 8 * 8;
    // Four k-steps a block are long enough that a slot is better given back at once than when the next stage has begun.
    static constexpr bool AT_ONCE = U >= 4;
};

DEVICE int shared_size() {
    int bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}
// bytes / stage, which are multiples of 16 and of 1,024, without the long way of a division.
DEVICE int stages_in(int bytes, int stage) { return (int)(__fdividef((float)bytes, (float)stage) + 1e-4f); }

// The ring: where its stages and their barriers are.
template <class Sh>
struct Ring {
    u32 at, full, empty;
    int tile, stage, stages;  // bytes of a tile of the weight, bytes of a stage, number of stages
    int slot, round;          // of the stage that is next here

    // Tiles have as many rows as a pass has outputs. What `wgmma` reads behind the last is not used, but must be there:
    // so much behind the last stage.
    DEVICE_MEMBER int behind() const { return max_of(0, Sh::TN * 128 - tile - Sh::X_BYTES); }
    DEVICE_MEMBER Ring(u32 shared, u32 ends, int per_pass, int bytes)
        : at(shared), full(ends), empty(full + Sh::MOST * 8), tile(per_pass * 128), stage(tile * Sh::U + Sh::X_BYTES),
          stages(min_of(stages_in(bytes - behind(), stage), Sh::MOST)), slot(0), round(0) {}
    DEVICE_MEMBER u32 here() const { return at + slot * stage; }
    DEVICE_MEMBER void next() {
        if (++slot == stages) slot = 0, round++;
    }
};

// What the blocks of a cluster send each other: for each of the others a place for the sums of this block's eights of rows,
// four floats a thread.
template <class Sh>
struct Mail {
    static constexpr int SHEET = Sh::MULTIPLY * 16;  // bytes of eight rows
    int part, parts;
    int most;         // eights of rows that a block has at most
    int bytes;        // of all places
    u32 at, barrier;  // where they are, and what says that all is there

    DEVICE_MEMBER explicit Mail(u32 ends)
        : part(cluster_rank()), parts(cluster_size()), most(share_of(Sh::NT + parts - 1, parts)),
          bytes((parts - 1) * most * SHEET), at(ends - bytes), barrier(ends + Sh::MAIL_AT) {}
    // The eights of rows of block `p` begin here, and end where those of the next one begin.
    DEVICE_MEMBER int first_of(int p) const { return share_of(Sh::NT * p, parts); }
    // Where block `from` puts its sums for block `to`.
    DEVICE_MEMBER u32 place(int from, int to) const {
        return at + (from - (from > to)) * most * SHEET + threadIdx.x * 16;
    }
    DEVICE_MEMBER void open() const {
        barrier_init(barrier, 1);
        barrier_expect(barrier, (parts - 1) * (first_of(part + 1) - first_of(part)) * SHEET);
    }
    // Sends what others finish, and adds what they sent to what this block does.
    DEVICE_MEMBER void exchange(float (&sums)[Sh::NT][4]) const {
#pragma unroll 1
        for (int to = 0; to < parts; to++) {
            if (to == part) continue;
            int first = first_of(to), end = first_of(to + 1);
            u32 there = in_cluster(place(part, to) - first * SHEET, to), arrival = in_cluster(barrier, to);
#pragma unroll
            for (int j = 0; j < Sh::NT; j++) {
                if (j >= first && j < end) send_cluster4(there + j * SHEET, sums[j], arrival);
            }
        }
        int first = first_of(part), end = first_of(part + 1);
        if (first == end) return;
        barrier_wait(barrier, 0);
        float total[Sh::NT][4] = {};
#pragma unroll 1
        for (int from = 0; from < parts; from++) {
            u32 here = place(from, part) - first * SHEET;
#pragma unroll
            for (int j = 0; j < Sh::NT; j++) {
                if (j < first || j >= end) continue;
                if (from == part) {
#pragma unroll
                    for (int e = 0; e < 4; e++) total[j][e] += sums[j][e];
                } else {
                    uint4 sent = load_shared16(here + j * SHEET);
                    total[j][0] += __uint_as_float(sent.x), total[j][1] += __uint_as_float(sent.y);
                    total[j][2] += __uint_as_float(sent.z), total[j][3] += __uint_as_float(sent.w);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < Sh::NT * 4; i++) sums[i / 4][i % 4] = total[i / 4][i % 4];
    }
};

// Starts the products of one stage for this group of warps.
template <class T, class Sh>
DEVICE void start_stage(float (&sums)[Sh::NT][4], const Ring<Sh>& ring, int group) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    u32 stage = ring.here(), inputs = stage + ring.tile * Sh::U;
#pragma unroll
    for (int step = 0; step < Sh::U * 4; step++) {  // of 16 inputs
        u32 weight = stage + (step >> 2) * ring.tile + group * (64 * 128) + (step & 3) * 32;
        u32 x = inputs + (step >> 2) * (Sh::NT * 8 * 128) + (step & 3) * 32;
        wgmma<T>(sums, tile_descriptor(weight), tile_descriptor(x));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The thread that keeps the ring full, in two parts: the weight as far as there is room, which nothing need be waited for,
// and the rest after the wait for the kernel before.
template <class Sh>
struct Filler {
    const TensorMap *x, *weight;
    const LinearWalk& walk;
    int total, early;

    DEVICE_MEMBER void ask_weight(const LinearPlace& place, const Ring<Sh>& to) const {
        int k = input_of<Sh>(walk, place);
        barrier_expect(to.full + to.slot * 8, to.stage);
#pragma unroll
        for (int u = 0; u < Sh::U; u++) {
            copy_box(to.here() + u * to.tile, weight, k + u * 64, place.row0, to.full + to.slot * 8);
        }
    }
    DEVICE_MEMBER void begin(Ring<Sh> ring) const {
        LinearPlace place = {walk.first, 0};
#pragma unroll 1
        for (int it = 0; it < early; it++, ring.next(), advance(walk, place, 1)) ask_weight(place, ring);
    }
    DEVICE_MEMBER void go_on(Ring<Sh> ring) const {
        LinearPlace place = {walk.first, 0};
#pragma unroll 1
        for (int it = 0; it < total; it++, ring.next(), advance(walk, place, 1)) {
            if (it >= early) {
                slot_wait(ring.empty + ring.slot * 8, ring.round + 1 & 1);
                ask_weight(place, ring);
            }
            int k = input_of<Sh>(walk, place);
            u32 at = ring.here() + ring.tile * Sh::U;
#pragma unroll
            for (int u = 0; u < Sh::U; u++) {
                copy_box(at + u * (Sh::NT * 8 * 128), x, k + u * 64, 0, ring.full + ring.slot * 8);
            }
        }
    }
};

// What the stores of one thread need to know of its outputs, the same for all rows: asked for before the products. While it
// holds sums these are `column` and the one eight further; when it stores 16 bits, four from `four` on.
struct RingOutputs {
    int column, four, end;
    float bias[2];
    u16* cache;  // where the head of the four has its entry of the first slot, or null
};

template <class T>
DEVICE RingOutputs ring_outputs(const LinearArgs& args, int warp_row0, int end) {
    RingOutputs outputs;
    int lane = threadIdx.x & 31, d_kv = args.n_kv_heads * args.d_head;
    outputs.column = warp_row0 + (lane >> 2);
    outputs.four = warp_row0 + (lane & 1) * 8 + (lane & 2) * 2;
    outputs.end = end;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int column = outputs.column + half * 8;
        outputs.bias[half] = args.bias && column < end ? widen<T>(args.bias[column]) : 0.0f;
    }
    outputs.cache = nullptr;
    int at = outputs.four - (args.n - 2 * d_kv);
    if (args.k_cache && at >= 0 && outputs.four < end) {
        u16* cache = at < d_kv ? args.k_cache : args.v_cache;
        at = at < d_kv ? at : at - d_kv;
        int head = at / args.d_head;
        outputs.cache = cache + head * args.block_size * args.d_head + at - head * args.d_head;
    }
    return outputs;
}

// Bias and activation. What is not unrolled is not fetched, which counts in a kernel that comes here once; registers cannot
// be indexed, so the sums walk by.
template <int NT>
DEVICE void activate(const LinearArgs& args, const RingOutputs& outputs, float (&sums)[NT][4]) {
#pragma unroll
    for (int i = 0; i < NT * 4; i++) sums[i / 4][i % 4] += outputs.bias[i / 2 % 2];
    if (args.activation == 0) return;
    constexpr int N = NT < 2 ? 4 : 8;
#pragma unroll 1
    for (int done = 0; done < NT * 4; done += N) {
        float now[N];
#pragma unroll
        for (int i = 0; i < N; i++) now[i] = sums[i / 4][i % 4];
#pragma unroll
        for (int i = 0; i < NT * 4 - N; i++) sums[i / 4][i % 4] = sums[(i + N) / 4][i % 4];
        if (args.activation == 1) {
#pragma unroll
            for (int i = 0; i < N; i++) now[i] = gelu_tanh(now[i]);
        } else if (args.activation == 2) {
#pragma unroll
            for (int i = 0; i < N; i++) now[i] = gelu_erf(now[i]);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) now[i] = fmaxf(now[i], 0.0f);
        }
#pragma unroll
        for (int i = 0; i < N; i++) sums[NT - N / 4 + i / 4][i % 4] = now[i];
    }
}

// Stores sums as they are, for f32 and for rows that fours are not aligned in: of rows from `row0` to `end`.
template <class T, class Out, int NT>
DEVICE void store_sums(const LinearArgs& args, const RingOutputs& outputs, int row0, int end, const float (&sums)[NT][4]) {
    int first = (threadIdx.x & 3) * 2;
    Out* to = (Out*)args.out + (i64)first * args.n + outputs.column;
#pragma unroll
    for (int i = 0; i < NT * 4; i++) {
        int row = i / 4 * 8 + i % 2, right = i / 2 % 2 * 8;
        if (first + row < row0 || first + row >= end || outputs.column + right >= outputs.end) continue;
        Out* at = to + (i64)row * args.n + right;
        if constexpr (sizeof(Out) == 4) *at = sums[i / 4][i % 4]; else *at = narrow<T>(sums[i / 4][i % 4]);
    }
}

// Stores 16 bits: 8 × 8 sums at a time are turned, and neighbours trade halves, so that a thread has four outputs side by
// side. `entries` says where a row's key and value are kept, if they are.
template <class T, bool APPENDS, int NT>
DEVICE void store_fours(const LinearArgs& args, const RingOutputs& outputs, int row0, int end, const i64* entries,
                        const float (&sums)[NT][4]) {
    int first = (threadIdx.x & 31) >> 2;
    bool odd = threadIdx.x & 1, inside = outputs.four < outputs.end;
    u16* to = (u16*)args.out + (i64)first * args.n + outputs.four;
#pragma unroll
    for (int j = 0; j < NT; j++, to += 8 * args.n) {
        u32 low = turned(narrow2<T>(sums[j][0], sums[j][1])), high = turned(narrow2<T>(sums[j][2], sums[j][3]));
        u32 other = __shfl_xor_sync(~0u, odd ? low : high, 1);
        uint2 bits = odd ? make_uint2(other, high) : make_uint2(low, other);
        int row = first + j * 8;
        bool stores = inside && row >= row0 && row < end;
        if (stores) *(uint2*)to = bits;
        if constexpr (APPENDS) {
            i64 entry = stores && outputs.cache ? entries[row] : -1;
            if (entry >= 0) *(uint2*)(outputs.cache + entry) = bits;
        }
    }
}

// Where the caches keep a row, from a head's first element on; -1 if they do not.
DEVICE i64 entry_of(const LinearArgs& args, int row) {
    int slot = row < args.rows ? args.slots[row] : -1;
    if (slot < 0) return -1;
    int block = slot / args.block_size, offset = slot - block * args.block_size;
    return ((i64)block * args.n_kv_heads * args.block_size + offset) * args.d_head;
}

template <class T, class Sh>
DEVICE void linear_ring(const LinearArgs& args, const TensorMap* x, const TensorMap* weight) {
    extern __shared__ __align__(1024) u8 shared[];
    let_next_start();
    int ends = shared_size() - Sh::ENDS;
    Mail<Sh> mail(shared_address(shared) + ends);
    LinearWalk walk = walk_of<Sh>(args, mail.part, mail.parts);
    int total = stages_of(walk);
    Ring<Sh> ring(shared_address(shared), shared_address(shared) + ends, walk.per_pass, ends - mail.bytes);
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
    if (warp == Sh::WG * 4) {
        // By one lane: all of them would take turns, a dozen instructions each.
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < Sh::MOST; i++) {
                barrier_init(ring.full + i * 8, 1);
                barrier_init(ring.empty + i * 8, Sh::WG * 4);
            }
            if (mail.parts > 1) mail.open();
            barriers_ready();
        }
        Filler<Sh> filler = {x, weight, walk, total, min_of(total, ring.stages)};
        if (lane == 0) filler.begin(ring);
        __syncthreads();
        if (mail.parts > 1) cluster_arrive();
        wait_for_previous();
        if (lane == 0) filler.go_on(ring);
        __syncwarp();
        if (mail.parts > 1) cluster_wait();
        return;
    }
    __syncthreads();
    if (mail.parts > 1) cluster_arrive();
    i64* entries = (i64*)(shared + ends + Sh::ENTRIES_AT);
    auto release = [&](int slot) {
        if (lane == 0) barrier_arrive(ring.empty + slot * 8);
    };
    bool rehearses = true;
    for (int row0 = walk.first; row0 < walk.end; row0 += rehearses ? 0 : walk.per_pass, rehearses = false) {
        float sums[Sh::NT][4] = {};
        RingOutputs outputs = ring_outputs<T>(args, row0 + warp * 16, min_of(walk.end, row0 + walk.per_pass));
        int before = 0;
        for (int s = 0; s < (rehearses ? 0 : walk.stages); s++, ring.next()) {
            slot_wait(ring.full + ring.slot * 8, ring.round & 1);
            start_stage<T, Sh>(sums, ring, warp >> 2);
            if constexpr (Sh::AT_ONCE) {
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                release(ring.slot);
            } else {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (s > 0) release(before);
                before = ring.slot;
            }
        }
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" : REGS4_OF(sums[j])::"memory");
        }
        int first = 0, last = 0;
        if (!rehearses) {
            if constexpr (!Sh::AT_ONCE) release(before);
            if (mail.parts > 1) {
                cluster_wait();  // the others are there
                mail.exchange(sums);
            }
            first = mail.first_of(mail.part) * 8;
            last = min_of(args.rows, mail.first_of(mail.part + 1) * 8);
        }
        activate(args, outputs, sums);
        if (args.out_f32) store_sums<T, float>(args, outputs, first, last, sums);
        else if (args.n % 4 != 0) store_sums<T, u16>(args, outputs, first, last, sums);
        else if (args.k_cache) store_fours<T, true>(args, outputs, first, last, entries, sums);
        else store_fours<T, false>(args, outputs, first, last, entries, sums);
        if (rehearses) {
            wait_for_previous();
            if (args.k_cache) {
                if (threadIdx.x < Sh::NT * 8) entries[threadIdx.x] = entry_of(args, threadIdx.x);
                asm volatile("bar.sync 1, %0;" ::"n"(Sh::MULTIPLY) : "memory");
            }
        }
    }
}

#define LINEAR_RING(name, T, ...)                                                                           \
    KERNEL __launch_bounds__(RingShape<__VA_ARGS__>::THREADS, 1)                                              \
        name(const __grid_constant__ LinearArgs args, const __grid_constant__ TensorMap x,                     \
             const __grid_constant__ TensorMap weight) {                                                       \
        linear_ring<T, RingShape<__VA_ARGS__>>(args, &x, &weight);                                          \
    }                                                                                                         \
    extern "C" __device__ const int name##_shared = RingShape<__VA_ARGS__>::SHARED;                           \
    extern "C" __device__ const int name##_threads = RingShape<__VA_ARGS__>::THREADS;

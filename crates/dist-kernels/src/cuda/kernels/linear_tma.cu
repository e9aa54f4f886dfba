// linear for up to 64 rows on Hopper: the copy engine fills the ring (tensor maps, mbarriers), `wgmma` multiplies; see
// linear.cuh for what the kernels of `linear` share.
//
// One warp asks, two groups of four warps multiply; the groups share the outputs (WG = 2) or k (WG = 1). A stage is U
// blocks of 64 inputs; a block is a tile of the pass's weight rows and one of 8 · NT rows of x, 128 bytes a row, in the
// 128-byte swizzle.
//
// Launch: grid `clusters · cluster`, 288 threads, cluster (cluster, 1, 1). Parameters: LinearArgs, then two tensor maps,
// both of 16-bit elements, 128-byte swizzle and boxes 64 wide: the weight [n, k] with boxes of `per_pass` rows, x
// [rows, k] with boxes of 8 · NT rows. per_pass = 8 · div_ceil(units, div_ceil(8 · units, TN)).
// slots = what fits: shared = fixed + slots · U · 128 · (per_pass + 8 · NT) + (TN − per_pass) · 128, slots at most 16.

template <int WG_, int NT_, int U_>
struct TmaShape {
    static constexpr int WG = WG_, NT = NT_, U = U_;
    static constexpr int WK = 2 / WG, MW = 1;
    static constexpr int TN = 64 * WG, KC = 64 * U;
    static constexpr int LD = TN + 4;
    static constexpr bool ALL = true;
    static constexpr int SUMS = WK, SUM_FLOATS = NT * 8 * LD;
    static constexpr int BARRIERS = SUMS * SUM_FLOATS * 4;                   // full [16], empty [16], summed, free
    static constexpr int FIXED = (BARRIERS + 34 * 8 + 1023) / 1024 * 1024;  // the ring comes next
};

// A tile of 128-byte rows in the 128-byte swizzle, eight rows to 1,024 bytes.
DEVICE u64 tile_descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

#define WGMMA(n, type, regs, a, b, ...)                                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" regs "}, %" a ", %" b    \
                 ", 1, 1, 1, 0, 0;"                                                                           \
                 : __VA_ARGS__                                                                                \
                 : "l"(left), "l"(right))
#define REGS4_OF(v) "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
#define REGS4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])

// c (64 × 8 · NT) += a (64 × 16) · b (16 × 8 · NT), both from shared memory.
template <class T, int NT>
DEVICE void wgmma(float (&c)[NT][4], u64 left, u64 right) {
    if constexpr (NT == 1) {
        if constexpr (T::is_f16) WGMMA(8, "f16", "%0,%1,%2,%3", "4", "5", REGS4(0));
        else WGMMA(8, "bf16", "%0,%1,%2,%3", "4", "5", REGS4(0));
    } else if constexpr (NT == 2) {
        if constexpr (T::is_f16) WGMMA(16, "f16", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", REGS4(0), REGS4(1));
        else WGMMA(16, "bf16", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", REGS4(0), REGS4(1));
    } else if constexpr (NT == 4) {
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
        if constexpr (T::is_f16) WGMMA(32, "f16", R16, "16", "17", REGS4(0), REGS4(1), REGS4(2), REGS4(3));
        else WGMMA(32, "bf16", R16, "16", "17", REGS4(0), REGS4(1), REGS4(2), REGS4(3));
    } else {
        static_assert(NT == 8, "rows");
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        if constexpr (T::is_f16)
            WGMMA(64, "f16", R32, "32", "33", REGS4(0), REGS4(1), REGS4(2), REGS4(3), REGS4(4), REGS4(5), REGS4(6),
                  REGS4(7));
        else
            WGMMA(64, "bf16", R32, "32", "33", REGS4(0), REGS4(1), REGS4(2), REGS4(3), REGS4(4), REGS4(5), REGS4(6),
                  REGS4(7));
    }
}

// Starts the products of one stage for this group of warps.
template <class T, class Sh>
DEVICE void start_stage(float (&sums)[Sh::NT][4], u32 stage, int per_pass, int wm, int wk) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    constexpr int STEPS = Sh::U * 4 / Sh::WK;  // of 16 inputs
    u32 weights = stage + Sh::U * Sh::NT * 1024 + wm * 8192;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int step = wk * STEPS + s;
        u32 weight = weights + (step >> 2) * (per_pass * 128) + (step & 3) * 32;
        u32 x = stage + (step >> 2) * (Sh::NT * 1024) + (step & 3) * 32;
        wgmma<T>(sums, tile_descriptor(weight), tile_descriptor(x));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// How the blocks of a cluster wait for each other's sums, where the warp that asks goes on meanwhile.
struct BarrierMeeting {
    u32 summed_barrier, free_barrier, size;
    int parity;
    DEVICE_MEMBER void meet(u32 barrier) const {
        sync_256();
        if (size == 1) return;
        if (threadIdx.x < size) barrier_arrive_at(barrier, threadIdx.x);
        barrier_wait(barrier, parity);
    }
    DEVICE_MEMBER void summed() const { meet(summed_barrier); }
    DEVICE_MEMBER void read() const { meet(free_barrier); }
};

// The warp that asks: one thread of it.
template <class Sh>
DEVICE void fill(const LinearArgs& args, const LinearWalk& walk, const TensorMap* weight_map, const TensorMap* x_map,
                 u32 ring, u32 full, u32 empty, int total) {
    int stage_bytes = Sh::U * 128 * (walk.per_pass + Sh::NT * 8), slots = args.slots_of_ring;
    int x_bytes = Sh::U * Sh::NT * 1024;
    auto ask_weight = [&](const LinearPlace& place, int slot) {
        int k = input_of<Sh>(walk, place);
        barrier_expect(full + slot * 8, stage_bytes);
#pragma unroll
        for (int u = 0; u < Sh::U; u++) {
            copy_box(ring + slot * stage_bytes + x_bytes + u * walk.per_pass * 128, weight_map, k + u * 64, place.row0,
                     full + slot * 8);
        }
    };
    auto ask_x = [&](const LinearPlace& place, int slot) {
        int k = input_of<Sh>(walk, place);
#pragma unroll
        for (int u = 0; u < Sh::U; u++) {
            copy_box(ring + slot * stage_bytes + u * Sh::NT * 1024, x_map, k + u * 64, 0, full + slot * 8);
        }
    };
    LinearPlace place = {walk.first, 0}, first = place;
    int ahead = min_of(slots, total);
    for (int it = 0; it < ahead; it++, advance(walk, place, 1)) ask_weight(place, it);
    wait_for_previous();
    for (int it = 0; it < ahead; it++, advance(walk, first, 1)) ask_x(first, it);
    int slot = 0, parity = 0;
    for (int it = ahead; it < total; it++, advance(walk, place, 1)) {
        barrier_wait(empty + slot * 8, parity);
        ask_weight(place, slot);
        ask_x(place, slot);
        if (++slot == slots) slot = 0, parity ^= 1;
    }
}

template <class T, class Sh>
DEVICE void linear_tma(const LinearArgs& args, const TensorMap* weight_map, const TensorMap* x_map) {
    extern __shared__ __align__(1024) u8 shared[];
    float* buffers = (float*)shared;
    u32 full = shared_address(shared + Sh::BARRIERS), empty = full + 128, summed = full + 256, free = full + 264;
    u32 ring = shared_address(shared + Sh::FIXED);
    u32 rank = cluster_rank(), size = cluster_size();

    let_next_start();
    LinearWalk walk = walk_of<Sh>(args, rank, size);
    int total = stages_of(walk), slots = args.slots_of_ring;
    if (threadIdx.x == 256) {
        for (int i = 0; i < slots; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, 8);
        }
        barrier_init(summed, size);
        barrier_init(free, size);
        barriers_ready();
    }
    __syncthreads();
    if (size > 1) cluster_arrive();
    if (threadIdx.x >= 256) {
        if (threadIdx.x == 256) fill<Sh>(args, walk, weight_map, x_map, ring, full, empty, total);
        __syncwarp();
        if (size > 1) cluster_wait();
        return;
    }
    if (size > 1) cluster_wait();
    wait_for_previous();
    int warp = threadIdx.x >> 5, group = __shfl_sync(~0u, threadIdx.x >> 7, 0), wm = group % Sh::WG, wk = group / Sh::WG;
    int stage_bytes = Sh::U * 128 * (walk.per_pass + Sh::NT * 8), slot = 0, parity = 0, pass = 0;
    for (int row0 = walk.first; row0 < walk.end; row0 += walk.per_pass, pass++) {
        float sums[1][Sh::NT][4] = {};
        LinearOutputs outputs = outputs_of<T>(args, row0, min_of(walk.end, row0 + walk.per_pass),
                                              threadIdx.x % LinearFinish<Sh>::LANES, LinearFinish<Sh>::LANES);
        for (int s = 0, last = 0; s < walk.stages; s++) {
            barrier_wait(full + slot * 8, parity);
            start_stage<T, Sh>(sums[0], ring + slot * stage_bytes, walk.per_pass, wm, wk);
            if (s > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if ((threadIdx.x & 31) == 0) barrier_arrive(empty + last * 8);
            }
            last = slot;
            if (++slot == slots) slot = 0, parity ^= 1;
        }
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" : REGS4_OF(sums[0][j])::"memory");
        }
        if (walk.stages > 0 && (threadIdx.x & 31) == 0) barrier_arrive(empty + (slot == 0 ? slots - 1 : slot - 1) * 8);
        finish_pass<T, Sh>(args, outputs, row0, sums, buffers, wm * 4 + (warp & 3), wk, rank, size,
                           BarrierMeeting{summed, free, size, pass & 1});
    }
}

#define LINEAR_TMA(name, T, ...)                                                                        \
    KERNEL __launch_bounds__(288, 1) name(const __grid_constant__ LinearArgs args,                       \
                                          const __grid_constant__ TensorMap weight_map,                 \
                                          const __grid_constant__ TensorMap x_map) {                    \
        linear_tma<T, TmaShape<__VA_ARGS__>>(args, &weight_map, &x_map);                                \
    }                                                                                                   \
    extern "C" __device__ const int name##_fixed = TmaShape<__VA_ARGS__>::FIXED;

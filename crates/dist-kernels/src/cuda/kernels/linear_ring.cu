// linear for 9 to 64 rows on Hopper's tensor cores, fed by the copy engine, see linear.cuh.
//
// A stage is U blocks of 64 inputs; a block is a tile of the pass's weight rows and one of 8 · NT rows of x, 128 bytes a row,
// swizzled as the 128-byte mode of `wgmma` wants it. One warp has the copy engine keep a ring of stages full; two groups of
// four warps multiply and share the outputs (WG = 2) or k (WG = 1). What the copy engine writes the tensor cores may read
// without a fence (see linear_hopper.cu).
//
// Launch: 288 threads; parameters are LinearArgs and the maps of x and the weight: 16-bit [rows, k] and [n, k], box 64 × 8 · NT
// and 64 × the outputs of a pass, swizzle 128 B, zeros outside. The ring has as many stages as fit, up to MOST; a block of one
// pass leaves its sums where the ring was, others keep both.

template <int WG_, int NT_, int U_>
struct RingShape {
    static constexpr int WG = WG_, NT = NT_, U = U_, MOST = 16;
    static constexpr int WK = 2 / WG, MW = 1;
    static constexpr int TN = 64 * WG, KC = 64 * U;
    static constexpr int X_BYTES = NT * 8 * KC * 2;
    static constexpr int LD = TN + 4;
    static constexpr bool ALL = true;
    static constexpr int SUMS = WK, SUM_FLOATS = NT * 8 * LD;
    static constexpr int SHARED = SHARED_MOST - 1024;
    static constexpr int BARRIERS_AT = SHARED - 2 * MOST * 8, SUMS_AT = BARRIERS_AT - SUMS * SUM_FLOATS * 4;
    static constexpr int RING_ALONE = BARRIERS_AT, RING = SUMS_AT;
};

// The ring: where its stages and their barriers are.
template <class Sh>
struct Ring {
    u32 at, full, empty;
    int tile, stage, stages;  // bytes of a tile of the weight, bytes of a stage, number of stages
    int slot, round;          // of the stage that is next here

    // Tiles have as many rows as a pass has outputs; what `wgmma` reads behind the last is not used.
    DEVICE_MEMBER Ring(u32 shared, int per_pass, int bytes)
        : at(shared), full(shared + Sh::BARRIERS_AT), empty(full + Sh::MOST * 8), tile(per_pass * 128),
          stage(tile * Sh::U + Sh::X_BYTES), stages(min_of(bytes / stage, Sh::MOST)), slot(0), round(0) {}
    DEVICE_MEMBER u32 here() const { return at + slot * stage; }
    DEVICE_MEMBER void next() {
        if (++slot == stages) slot = 0, round++;
    }
};

// Starts the products of one stage for this group of warps.
template <class T, class Sh>
DEVICE void start_stage(float (&sums)[Sh::NT][4], const Ring<Sh>& ring, int wm, int wk) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    constexpr int STEPS = Sh::U * 4 / Sh::WK;  // of 16 inputs
    u32 stage = ring.here(), inputs = stage + ring.tile * Sh::U;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int step = wk * STEPS + s;
        u32 weight = stage + (step >> 2) * ring.tile + wm * (64 * 128) + (step & 3) * 32;
        u32 x = inputs + (step >> 2) * (Sh::NT * 8 * 128) + (step & 3) * 32;
        wgmma<T>(sums, tile_descriptor(weight), tile_descriptor(x));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// How the blocks of a cluster, which have the same outputs and share k, wait for each other's sums.
struct ClusterMeeting {
    int part, parts;
    DEVICE_MEMBER bool is_shared() const { return parts > 1; }
    DEVICE_MEMBER void meet() const {
        cluster_arrive();
        cluster_wait();
    }
    DEVICE_MEMBER void summed() const {
        if (parts > 1) meet(); else sync_256();
    }
    DEVICE_MEMBER void read() const { summed(); }
};

// The warp that keeps the ring full. The weight is asked for as far as there is room before the wait for the kernel before.
template <class Sh>
DEVICE void fill(const TensorMap* x, const TensorMap* weight, const LinearWalk& walk, int total, Ring<Sh> ring,
                 const ClusterMeeting& meeting) {
    bool asks = (threadIdx.x & 31) == 0;
    int early = min_of(total, ring.stages);
    auto ask_weight = [&](const LinearPlace& place, const Ring<Sh>& to) {
        int k = input_of<Sh>(walk, place);
        barrier_expect(to.full + to.slot * 8, to.stage);
#pragma unroll
        for (int u = 0; u < Sh::U; u++) {
            copy_box(to.here() + u * to.tile, weight, k + u * 64, place.row0, to.full + to.slot * 8);
        }
    };
    auto ask_x = [&](const LinearPlace& place, const Ring<Sh>& to) {
        int k = input_of<Sh>(walk, place);
        u32 at = to.here() + to.tile * Sh::U;
#pragma unroll
        for (int u = 0; u < Sh::U; u++) {
            copy_box(at + u * (Sh::NT * 8 * 128), x, k + u * 64, 0, to.full + to.slot * 8);
        }
    };
    LinearPlace place = {walk.first, 0};
    Ring<Sh> first = ring;
    if (asks) {
#pragma unroll 1
        for (int it = 0; it < early; it++, first.next(), advance(walk, place, 1)) ask_weight(place, first);
    }
    wait_for_previous();
    place = {walk.first, 0};
#pragma unroll 1
    for (int it = 0; it < total; it++, ring.next()) {
        if (asks) {
            if (it >= early) {
                slot_wait(ring.empty + ring.slot * 8, ring.round + 1 & 1);
                ask_weight(place, ring);
            }
            ask_x(place, ring);
        }
        advance(walk, place, 1);
        // A cluster's barriers are for all of its threads.
        if (place.stage == 0 && meeting.is_shared()) {
            __syncwarp();
            meeting.summed();
            meeting.read();
        }
    }
}

template <class T, class Sh>
DEVICE void linear_ring(const LinearArgs& args, const TensorMap* x, const TensorMap* weight) {
    extern __shared__ __align__(1024) u8 shared[];
    ClusterMeeting meeting = {(int)cluster_rank(), (int)cluster_size()};

    let_next_start();
    LinearWalk walk = walk_of<Sh>(args, meeting.part, meeting.parts);
    int total = stages_of(walk);
    bool is_one_pass = total == walk.stages;
    Ring<Sh> ring(shared_address(shared), walk.per_pass, is_one_pass ? Sh::RING_ALONE : Sh::RING);
    float* buffers = (float*)(shared + (is_one_pass ? 0 : Sh::SUMS_AT));
    if (threadIdx.x == 0) {
        for (int s = 0; s < ring.stages; s++) {
            barrier_init(ring.full + s * 8, 1);
            barrier_init(ring.empty + s * 8, 8);
        }
        barriers_ready();
    }
    __syncthreads();
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    if (warp >= 8) {
        fill<Sh>(x, weight, walk, total, ring, meeting);
        return;
    }
    int wm = (warp >> 2) % Sh::WG, wk = (warp >> 2) / Sh::WG;
    auto release = [&](int slot) {
        if ((threadIdx.x & 31) == 0) barrier_arrive(ring.empty + slot * 8);
    };
    wait_for_previous();
    for (int row0 = walk.first; row0 < walk.end; row0 += walk.per_pass) {
        float sums[1][Sh::NT][4] = {};
        LinearOutputs outputs = outputs_of<T>(args, row0, min_of(walk.end, row0 + walk.per_pass),
                                              threadIdx.x % LinearFinish<Sh>::LANES, LinearFinish<Sh>::LANES);
        int before = 0;
        for (int s = 0; s < walk.stages; s++, ring.next()) {
            slot_wait(ring.full + ring.slot * 8, ring.round & 1);
            start_stage<T, Sh>(sums[0], ring, wm, wk);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (s > 0) release(before);
            before = ring.slot;
        }
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" : REGS4_OF(sums[0][j])::"memory");
        }
        release(before);
        if (is_one_pass) sync_256();  // all products are done
        finish_pass<T, Sh>(args, outputs, row0, sums, buffers, wm * 4 + (warp & 3), wk, meeting);
    }
}

#define LINEAR_RING(name, T, ...)                                                                           \
    KERNEL __launch_bounds__(288, 1)                                                                           \
        name(const __grid_constant__ LinearArgs args, const __grid_constant__ TensorMap x,                     \
             const __grid_constant__ TensorMap weight) {                                                       \
        linear_ring<T, RingShape<__VA_ARGS__>>(args, &x, &weight);                                          \
    }                                                                                                         \
    extern "C" __device__ const int name##_shared = RingShape<__VA_ARGS__>::SHARED;

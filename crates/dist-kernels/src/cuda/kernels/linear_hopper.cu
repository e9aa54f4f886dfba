// linear for 9 to 64 rows on Hopper's tensor cores where a stage takes memory longer than a fence does, see linear.cuh.
//
// A stage is U blocks of 64 inputs; a block is a tile of TN weight rows and one of 8 · NT rows of x, 128 bytes a row,
// swizzled as the 128-byte mode of `wgmma` wants it. Two groups of four warps share the outputs (WG = 2) or k (WG = 1).
//
// What cp.async has written must be fenced before the tensor cores read it, and the fence waits for all copies of its thread:
// a stage takes about a microsecond, however little there is to read. Where memory takes longer this is as fast as reading,
// for cp.async asks for longer pieces of a row than the copy engine does; elsewhere linear_ring.cu is faster.

template <int WG_, int NT_, int U_, int S_>
struct WgmmaShape {
    static constexpr int WG = WG_, NT = NT_, U = U_, S = S_;
    static constexpr int WK = 2 / WG, MW = 1;
    static constexpr int TN = 64 * WG, KC = 64 * U, CHUNKS = KC / 8;
    static constexpr int W_BYTES = TN * KC * 2, X_BYTES = NT * 8 * KC * 2;
    static constexpr int STAGE = W_BYTES + X_BYTES;
    static constexpr int LD = TN + 4;
    static constexpr bool ALL = true;
    static constexpr int SUMS = WK, SUM_FLOATS = NT * 8 * LD;
    static constexpr int SHARED = S * STAGE + SUMS * SUM_FLOATS * 4;
    static DEVICE_MEMBER u32 tile_at(int row, int c, int rows) {
        return (c >> 3) * (rows * 128) + row * 128 + (((c & 7) ^ (row & 7)) << 4);
    }
    static DEVICE_MEMBER u32 weight_at(int row, int c) { return tile_at(row, c, TN); }
    static DEVICE_MEMBER u32 x_at(int row, int c) { return tile_at(row, c, NT * 8); }
};

// Starts the products of one stage for this group of warps.
template <class T, class Sh>
DEVICE void start_stage(float (&sums)[Sh::NT][4], u32 stage, int wm, int wk) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    constexpr int STEPS = Sh::U * 4 / Sh::WK;  // of 16 inputs
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int step = wk * STEPS + s;
        u32 weight = stage + (step >> 2) * (Sh::TN * 128) + wm * (64 * 128) + (step & 3) * 32;
        u32 x = stage + Sh::W_BYTES + (step >> 2) * (Sh::NT * 8 * 128) + (step & 3) * 32;
        wgmma<T>(sums, tile_descriptor(weight), tile_descriptor(x));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <class T, class Sh>
DEVICE void linear_hopper(const LinearArgs& args) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 ring = shared_address(shared);
    float* buffers = (float*)(shared + Sh::S * Sh::STAGE);
    int group = __shfl_sync(~0u, threadIdx.x >> 7, 0), wm = group % Sh::WG, wk = group / Sh::WG;
    constexpr int AHEAD = Sh::S - 1;

    let_next_start();
    LinearWalk walk = walk_of<Sh>(args, 0, 1);
    int total = stages_of(walk);
    LinearPlace next = fill_ring<T, Sh>(args, walk, total, ring);

    int slot = 0, it = 0;
    for (int row0 = walk.first; row0 < walk.end; row0 += walk.per_pass) {
        float sums[1][Sh::NT][4] = {};
        LinearOutputs outputs = outputs_of<T>(args, row0, min_of(walk.end, row0 + walk.per_pass),
                                              threadIdx.x % LinearFinish<Sh>::LANES, LinearFinish<Sh>::LANES);
        for (int s = 0; s < walk.stages; s++, it++) {
            copies_wait<AHEAD - 1>();
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            __syncthreads();
            start_stage<T, Sh>(sums[0], ring + slot * Sh::STAGE, wm, wk);
            if (it + AHEAD < total) {
                u32 stage = ring + (slot == 0 ? AHEAD : slot - 1) * Sh::STAGE;
                load_weight<T, Sh>(args, walk, next, stage);
                load_x<T, Sh>(args, walk, next, stage);
                advance(walk, next, 1);
            }
            copies_commit();
            slot = slot == AHEAD ? 0 : slot + 1;
        }
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" : REGS4_OF(sums[0][j])::"memory");
        }
        finish_pass<T, Sh>(args, outputs, row0, sums, buffers, wm * 4 + (threadIdx.x >> 5 & 3), wk, Alone{});
    }
}

#define LINEAR_HOPPER(name, T, ...)                                                                     \
    KERNEL __launch_bounds__(256, 1) name(const __grid_constant__ LinearArgs args) {                     \
        linear_hopper<T, WgmmaShape<__VA_ARGS__>>(args);                                                \
    }                                                                                                   \
    extern "C" __device__ const int name##_shared = WgmmaShape<__VA_ARGS__>::SHARED;

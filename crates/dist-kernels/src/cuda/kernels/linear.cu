// linear for up to 16 rows on tensor cores of Ampere and later (`mma`), see linear.cuh.
//
// k is permuted inside a step of 32, the same way on both sides, so that one 16-byte load from shared memory feeds two
// products. The warps share a stage along k (WK) and along the outputs (WM).
//
// Where blocks have less shared memory than Hopper's, stages are half as long, and as many as fit.

template <int MT_, int NT_, int WM_, int U_, int S_>
struct LinearShape {
    static constexpr bool IS_SMALL = SHARED_MOST < 232448;
    static constexpr int MT = MT_, NT = NT_, WM = WM_, U = IS_SMALL ? 1 : U_;
    static constexpr int WARPS = 8, WK = WARPS / WM, MW = MT / WM;
    static constexpr int KC = 32 * WK * U;        // inputs of a stage
    static constexpr int TN = 16 * MT;            // outputs of a pass
    static constexpr int CHUNKS = KC / 8;         // 16-byte pieces of a row in a stage
    static constexpr int W_BYTES = TN * KC * 2, X_BYTES = NT * 8 * KC * 2;
    static constexpr int STAGE = W_BYTES + X_BYTES;
    static constexpr int LD = TN + 4;             // of the sums, against bank conflicts
    // All warps that share k leave their sums side by side where that is small; else they are added pairwise first.
    static constexpr bool ALL = WK * NT <= 16 && WK * NT * MT <= 32;
    static constexpr int SUMS = ALL ? WK : 1;
    static constexpr int SUM_BUFFERS = ALL ? WK : (WK > 1 ? WK / 2 : 1);
    static constexpr int SUM_FLOATS = NT * 8 * LD;
    static constexpr int FIT = (SHARED_MOST - SUM_BUFFERS * SUM_FLOATS * 4) / STAGE, S = FIT < S_ ? FIT : S_;
    static constexpr int SHARED = S * STAGE + SUM_BUFFERS * SUM_FLOATS * 4;
    static_assert(S >= 2 && SHARED <= SHARED_MOST, "a ring");
    // Rows lie as they are, with every other one's halves of 128 bytes swapped, against bank conflicts.
    static DEVICE_MEMBER u32 weight_at(int row, int c) { return row * (KC * 2) + ((c ^ ((row & 1) << 2)) << 4); }
    static DEVICE_MEMBER u32 x_at(int row, int c) { return weight_at(row, c); }
    static_assert(MT % WM == 0 && CHUNKS >= 8, "shape");
};

// The products of one stage for this warp's outputs and its part of k.
template <class T, class Sh>
DEVICE void multiply_stage(float (&sums)[Sh::MW][Sh::NT][4], u32 stage, int wm, int wk) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int u = 0; u < Sh::U; u++) {
        u32 at = ((((wk * Sh::U + u) * 4 + t) ^ ((g & 1) << 2)) << 4) + g * (Sh::KC * 2);
        uint4 low[Sh::MW], high[Sh::MW];
#pragma unroll
        for (int m = 0; m < Sh::MW; m++) {
            u32 row = stage + (wm * Sh::MW + m) * 16 * (Sh::KC * 2) + at;
            low[m] = load_shared16(row);
            high[m] = load_shared16(row + 8 * (Sh::KC * 2));
        }
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
            uint4 x = load_shared16(stage + Sh::W_BYTES + j * 8 * (Sh::KC * 2) + at);
#pragma unroll
            for (int m = 0; m < Sh::MW; m++) {
                multiply_add<T>(sums[m][j], low[m].x, high[m].x, low[m].y, high[m].y, x.x, x.y);
                multiply_add<T>(sums[m][j], low[m].z, high[m].z, low[m].w, high[m].w, x.z, x.w);
            }
        }
    }
}

template <class T, class Sh>
DEVICE void linear(const LinearArgs& args) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 ring = shared_address(shared);
    float* buffers = (float*)(shared + Sh::S * Sh::STAGE);
    int warp = threadIdx.x >> 5, wm = warp % Sh::WM, wk = warp / Sh::WM;
    constexpr int AHEAD = Sh::S - 1;

    let_next_start();
    LinearWalk walk = walk_of<Sh>(args, 0, 1);
    int total = stages_of(walk);
    LinearPlace next = fill_ring<T, Sh>(args, walk, total, ring);

    int slot = 0, it = 0;
    for (int row0 = walk.first; row0 < walk.end; row0 += walk.per_pass) {
        float sums[Sh::MW][Sh::NT][4] = {};
        LinearOutputs outputs = outputs_of<T>(args, row0, min_of(walk.end, row0 + walk.per_pass),
                                              threadIdx.x % LinearFinish<Sh>::LANES, LinearFinish<Sh>::LANES);
        for (int s = 0; s < walk.stages; s++, it++) {
            copies_wait<AHEAD - 1>();
            __syncthreads();
            if (it + AHEAD < total) {
                u32 stage = ring + (slot == 0 ? AHEAD : slot - 1) * Sh::STAGE;
                load_weight<T, Sh>(args, walk, next, stage);
                load_x<T, Sh>(args, walk, next, stage);
                advance(walk, next, 1);
            }
            copies_commit();
            multiply_stage<T, Sh>(sums, ring + slot * Sh::STAGE, wm, wk);
            slot = slot == AHEAD ? 0 : slot + 1;
        }
        finish_pass<T, Sh>(args, outputs, row0, sums, buffers, wm, wk);
    }
}

#define LINEAR(name, T, ...)                                                                            \
    KERNEL __launch_bounds__(256, 1) name(const __grid_constant__ LinearArgs args) {                     \
        linear<T, LinearShape<__VA_ARGS__>>(args);                                                      \
    }                                                                                                   \
    extern "C" __device__ const int name##_shared = LinearShape<__VA_ARGS__>::SHARED;

// linear for many rows on tensor cores of Ampere and later (`mma`): a block multiplies one tile of the output from a ring
// filled by cp.async. See linear.cuh for the arguments and for what happens to a row's sums before they are stored.
//
// Layout: weight [n, k] with `ld_weight` from row to row, x [rows, k], out [rows, n]. The `_any` kernels take any k,
// `ld_weight` and alignment to 2 bytes; the others want x and weight 16-byte aligned, k and `ld_weight` multiples of 8.
// Where n is a multiple of 4, out must be aligned to four elements. Bound by the tensor cores, and by
// reading the weight where rows are few.
//
// Rows never meet, and all of k is added by one warp in order: what a row gives does not depend on the other rows.
//
// Launch: grid div_ceil(rows, BM) · div_ceil(n, BN), blocks of 32 · WM · WN threads, shared memory: the module's integer
// `<symbol>_shared`. Tiles are taken in groups of 16 tiles of rows, rows first.

template <bool ANY_, int BM_, int BN_, int WM_, int WN_, int S_>
struct TileShape {
    static constexpr bool ANY = ANY_;
    static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, S = S_, THREADS = 32 * WM * WN;
    static constexpr int MT = BM / WM / 16, NT = BN / WN / 8;  // products of a warp
    static constexpr int KC = 32, A_BYTES = BM * KC * 2, STAGE = (BM + BN) * KC * 2, GROUP = 16;
    static constexpr int LD = BN / WN, STAGING = 16 * LD * 4;  // a warp's sums of 16 rows
    static constexpr int SHARED = S * STAGE;
    static constexpr int LANES = LD / 4, SWEEP = 32 / LANES, BATCH = 16 / SWEEP;
    static_assert(NT % 2 == 0 && STAGING * WM * WN <= SHARED && LD == 32, "shape");
};

// Where 8 inputs of a row lie in a stage: against bank conflicts of eight rows.
DEVICE u32 piece_at(int row, int piece) { return row * 64 + ((piece ^ ((row >> 1) & 3)) << 4); }

// 8 elements from `from` on, of which `n` exist.
DEVICE uint4 load_any(const u16* from, int n) {
    u32 words[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < n) words[i / 2] |= (u32)from[i] << (i % 2 * 16);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// One stage of ROWS rows from `from` on, of which `rows` exist; inputs k … of `k_end`.
template <class Sh, int ROWS>
DEVICE void load_rows(u32 to, const u16* from, i64 ld, int rows, int k, int k_end) {
    static_assert(ROWS * 4 % Sh::THREADS == 0, "threads");
#pragma unroll
    for (int i = 0; i < ROWS * 4 / Sh::THREADS; i++) {
        int at = i * Sh::THREADS + threadIdx.x, row = at >> 2, piece = at & 3, k0 = k + piece * 8;
        bool inside = row < rows && k0 < k_end;
        const u16* source = inside ? from + row * ld + k0 : from;
        if constexpr (Sh::ANY) {
            uint4 v = load_any(source, inside ? min_of(8, k_end - k0) : 0);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + piece_at(row, piece)), "r"(v.x), "r"(v.y),
                         "r"(v.z), "r"(v.w)
                         : "memory");
        } else {
            copy16(to + piece_at(row, piece), source, inside);
        }
    }
}

template <class T, class Sh>
DEVICE void multiply_tile(float (&sums)[Sh::MT][Sh::NT][4], u32 stage, int wm, int wn) {
    int lane = threadIdx.x & 31;
    u32 x = stage, weight = stage + Sh::A_BYTES;
#pragma unroll
    for (int step = 0; step < 2; step++) {
        uint4 a[Sh::MT];
#pragma unroll
        for (int m = 0; m < Sh::MT; m++) {
            a[m] = load_matrices(x + piece_at((wm * Sh::MT + m) * 16 + (lane & 15), step * 2 + (lane >> 4)));
        }
#pragma unroll
        for (int j = 0; j < Sh::NT; j += 2) {
            int row = (wn * Sh::NT + j) * 8 + (lane & 7) + (lane >> 4) * 8;
            uint4 b = load_matrices(weight + piece_at(row, step * 2 + (lane >> 3 & 1)));
#pragma unroll
            for (int m = 0; m < Sh::MT; m++) {
                multiply_add<T>(sums[m][j], a[m].x, a[m].y, a[m].z, a[m].w, b.x, b.y);
                multiply_add<T>(sums[m][j + 1], a[m].x, a[m].y, a[m].z, a[m].w, b.z, b.w);
            }
        }
    }
}

template <class T, class Sh>
DEVICE void store_tile(const LinearArgs& args, const float (&sums)[Sh::MT][Sh::NT][4], float* staging, int row0,
                       int column0) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, l = lane % Sh::LANES;
    LinearOutputs outputs = outputs_of<T>(args, column0, min_of(args.n, column0 + Sh::LD), l, Sh::LANES);
    int column = outputs.column - column0;
    auto at = [](int row, int column) { return row * Sh::LD + (column ^ ((row & 3) << 3)); };
#pragma unroll
    for (int m = 0; m < Sh::MT; m++) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < Sh::NT; j++) {
            *(float2*)(staging + at(g, j * 8 + t * 2)) = make_float2(sums[m][j][0], sums[m][j][1]);
            *(float2*)(staging + at(g + 8, j * 8 + t * 2)) = make_float2(sums[m][j][2], sums[m][j][3]);
        }
        __syncwarp();
        float total[Sh::BATCH][4];
        int row = lane / Sh::LANES;
#pragma unroll
        for (int r = 0; r < Sh::BATCH; r++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                int one = min_of(column + v * outputs.stride, Sh::LD - 1);
                total[r][v] = staging[at(row + r * Sh::SWEEP, one)];
            }
        }
        if (outputs.n > 0) {
            finish_rows<T, Sh::BATCH>(args, outputs, row0 + m * 16 + row, Sh::SWEEP, args.rows, total);
        }
    }
}

template <class T, class Sh>
DEVICE void gemm(const LinearArgs& args) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 ring = shared_address(shared);
    int warp = threadIdx.x >> 5, wm = warp % Sh::WM, wn = warp / Sh::WM;
    let_next_start();
    int tiles_m = div_ceil(args.rows, Sh::BM), tiles_n = div_ceil(args.n, Sh::BN);
    int group = blockIdx.x / (Sh::GROUP * tiles_n), at = blockIdx.x - group * Sh::GROUP * tiles_n;
    int high = min_of(Sh::GROUP, tiles_m - group * Sh::GROUP);
    int row0 = (group * Sh::GROUP + at % high) * Sh::BM, column0 = at / high * Sh::BN;
    int stages = div_ceil(args.k, Sh::KC);
    const u16* x = args.x + (i64)row0 * args.k;
    const u16* weight = args.weight + (i64)column0 * args.ld_weight;
    auto load_x = [&](int stage, int slot) {
        load_rows<Sh, Sh::BM>(ring + slot * Sh::STAGE, x, args.k, args.rows - row0, stage * Sh::KC, args.k);
    };
    auto load_weight = [&](int stage, int slot) {
        load_rows<Sh, Sh::BN>(ring + slot * Sh::STAGE + Sh::A_BYTES, weight, args.ld_weight, args.n - column0,
                              stage * Sh::KC, args.k);
    };
    // The weight before the wait for the kernel before, whose work it does not depend on.
    for (int stage = 0; stage < Sh::S - 1; stage++) {
        if (stage < stages) load_weight(stage, stage);
    }
    wait_for_previous();
    for (int stage = 0; stage < Sh::S - 1; stage++) {
        if (stage < stages) load_x(stage, stage);
        copies_commit();
    }
    float sums[Sh::MT][Sh::NT][4] = {};
    for (int stage = 0, slot = 0; stage < stages; stage++) {
        copies_wait<Sh::S - 2>();
        __syncthreads();
        int next = stage + Sh::S - 1, free = slot == 0 ? Sh::S - 1 : slot - 1;
        if (next < stages) {
            load_x(next, free);
            load_weight(next, free);
        }
        copies_commit();
        multiply_tile<T, Sh>(sums, ring + slot * Sh::STAGE, wm, wn);
        slot = slot == Sh::S - 1 ? 0 : slot + 1;
    }
    copies_wait<0>();
    __syncthreads();
    store_tile<T, Sh>(args, sums, (float*)shared + warp * (16 * Sh::LD), row0 + wm * (Sh::MT * 16), column0 + wn * Sh::LD);
}

#define GEMM(name, T, MIN_BLOCKS, ...)                                                                      \
    KERNEL __launch_bounds__(TileShape<__VA_ARGS__>::THREADS, MIN_BLOCKS)                                    \
        name(const __grid_constant__ LinearArgs args) {                                                     \
        gemm<T, TileShape<__VA_ARGS__>>(args);                                                              \
    }                                                                                                       \
    extern "C" __device__ const int name##_shared = TileShape<__VA_ARGS__>::SHARED;
#define GEMMS(dtype, T)                                                        \
    GEMM(gemm_t128x128_##dtype, T, 2, false, 128, 128, 2, 4, 4)                 \
    GEMM(gemm_t64x64_##dtype, T, 4, false, 64, 64, 2, 2, 4)                     \
    GEMM(gemm_any_##dtype, T, 2, true, 128, 128, 2, 4, 3)

GEMMS(bf16, Bf16)
GEMMS(f16, F16)

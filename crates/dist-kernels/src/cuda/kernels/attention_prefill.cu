// attention for many rows a sequence on any tensor core from Ampere on (`mma`), see attention_prefill.cuh.
//
// Four warps share a tile of 64 · R rows; each holds R strips of 16 rows, their queries in shared memory, their sums in
// registers. Tiles of N keys and values come by cp.async, one ahead of the one that is worked on. A load by ldmatrix feeds
// R pairs of products. Bound by the tensor cores and, nearly as much, by what else a warp does beside them.
//
// Launch: grid (rows / (64 · R) + n_seqs) · n_heads (blocks without work end), 128 threads; shared memory: the module's
// integer `<symbol>_shared`, rows of a tile `<symbol>_rows`.
// Shapes (D, R, N): 64, 2, 64; 80, 2, 64; 96, 2, 64; 128, 2, 32.

template <int D_, int R_, int N_>
struct PrefillShape {
    static constexpr int D = D_, R = R_, N = N_;
    static constexpr int M = 64 * R, THREADS = 128;
    static constexpr int ROW = D * 2 + 16;        // bytes, an odd number of 16: no bank conflicts in ldmatrix
    static constexpr int PIECES = D / 8;          // 16-byte pieces of a row
    static constexpr int PAGES = N / 16;
    static constexpr int MATRIX = N * ROW, STAGE = 2 * MATRIX;
    static constexpr int RING = M * ROW, ROWS = RING + 2 * STAGE, SHARED = ROWS + 2 * PAGES * 4;
    static_assert(N * PIECES % THREADS == 0, "threads share a tile evenly");
};

// Copies one tile of keys and values, zeros where nothing is read.
template <class Sh>
DEVICE void copy_tile(const PrefillArgs& args, const int* rows, int position, int to_position, u32 to) {
#pragma unroll 1
    for (int j = 0; j < Sh::N * Sh::PIECES / Sh::THREADS; j++) {
        int i = j * Sh::THREADS + threadIdx.x, slot = i / Sh::PIECES, c = i % Sh::PIECES;
        int row = rows[slot / 16];
        bool take = row >= 0 && position + slot < to_position;
        i64 from = take ? (i64)(row + slot % 16) * Sh::D + c * 8 : 0;
        copy16(to + slot * Sh::ROW + c * 16, args.k + from, take);
        copy16(to + Sh::MATRIX + slot * Sh::ROW + c * 16, args.v + from, take);
    }
}

// Adds a strip's queries times the keys of a tile.
template <class T, class Sh>
DEVICE void score_tile(float (&scores)[Sh::R][Sh::N / 8][4], u32 queries, u32 keys) {
#pragma unroll
    for (int d = 0; d < Sh::D / 16; d++) {
        uint4 q[Sh::R];
#pragma unroll
        for (int r = 0; r < Sh::R; r++) q[r] = load_matrices(queries + r * (16 * Sh::ROW) + d * 32);
#pragma unroll
        for (int n = 0; n < Sh::N / 16; n++) {
            uint4 k = load_matrices(keys + n * (16 * Sh::ROW) + d * 32);
#pragma unroll
            for (int r = 0; r < Sh::R; r++) {
                multiply_add<T>(scores[r][2 * n], q[r].x, q[r].y, q[r].z, q[r].w, k.x, k.y);
                multiply_add<T>(scores[r][2 * n + 1], q[r].x, q[r].y, q[r].z, q[r].w, k.z, k.w);
            }
        }
    }
}

// Adds the values of a tile, weighted.
template <class T, class Sh>
DEVICE void add_values(float (&sums)[Sh::R][Sh::D / 8][4], const float (&weights)[Sh::R][Sh::N / 8][4], u32 values) {
#pragma unroll
    for (int n = 0; n < Sh::N / 16; n++) {
        u32 p[Sh::R][4];
#pragma unroll
        for (int r = 0; r < Sh::R; r++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const float(&w)[4] = weights[r][2 * n + (x >> 1)];
                p[r][x] = narrow2<T>(w[(x & 1) * 2], w[(x & 1) * 2 + 1]);
            }
        }
#pragma unroll
        for (int d = 0; d < Sh::D / 16; d++) {
            uint4 v = load_matrices_transposed(values + n * (16 * Sh::ROW) + d * 32);
#pragma unroll
            for (int r = 0; r < Sh::R; r++) {
                multiply_add<T>(sums[r][2 * d], p[r][0], p[r][1], p[r][2], p[r][3], v.x, v.y);
                multiply_add<T>(sums[r][2 * d + 1], p[r][0], p[r][1], p[r][2], p[r][3], v.z, v.w);
            }
        }
    }
}

template <class T, class Sh>
DEVICE void attention_prefill(const PrefillArgs& args) {
    constexpr int D = Sh::D, R = Sh::R, N = Sh::N, M = Sh::M;
    extern __shared__ __align__(1024) u8 shared[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    u32 base = shared_address(shared);
    int* rows = (int*)(shared + Sh::ROWS);
    let_next_start();
    wait_for_previous();

    RowTile tile;
    WorkOrder<D, M, N> order;
    if (!order.find(args, blockIdx.x, lane, tile)) return;
    Pages pages(args, tile);
    auto row_of = [&](int key_tile) -> int {
        return key_tile < tile.high ? pages.row_of(key_tile * N + (int)threadIdx.x * 16, 16) : Pages::OUTSIDE;
    };
    if (threadIdx.x < Sh::PAGES) {
        rows[threadIdx.x] = row_of(tile.low);
        rows[Sh::PAGES + threadIdx.x] = row_of(tile.low + 1);
    }
    for (int i = threadIdx.x; i < M * Sh::PIECES; i += Sh::THREADS) {
        int row = i / Sh::PIECES, c = i % Sh::PIECES;
        bool has = row < tile.n_rows;
        const u16* from = args.qkv + (i64)(tile.row + (has ? row : 0)) * args.ld_qkv + tile.head * D + c * 8;
        copy16(base + row * Sh::ROW + c * 16, from, has);
    }
    __syncthreads();
    copy_tile<Sh>(args, rows, tile.low * N, pages.to, base + Sh::RING);
    copies_commit();

    float sums[R][D / 8][4] = {};
    Softmax softmax[R];
    float scale = args.scale * 1.44269504f;
    int strip = warp * (16 * R), first = tile.position + strip + g;
    u32 queries = base + (strip + (lane & 15)) * Sh::ROW + (lane >> 4) * 16;
    u32 k_at = ((lane >> 4) * 8 + (lane & 7)) * Sh::ROW + (lane >> 3 & 1) * 16;
    u32 v_at = Sh::MATRIX + (lane & 15) * Sh::ROW + (lane >> 4) * 16;

    for (int j = tile.low, slot = 0; j < tile.high; j++, slot ^= 1) {
        copies_wait<0>();
        __syncthreads();
        if (j + 1 < tile.high) {
            int other = slot ^ 1;
            copy_tile<Sh>(args, rows + other * Sh::PAGES, (j + 1) * N, pages.to, base + Sh::RING + other * Sh::STAGE);
        }
        copies_commit();
        int next_row = threadIdx.x < Sh::PAGES ? row_of(j + 2) : 0;

        u32 stage = base + Sh::RING + slot * Sh::STAGE;
        float scores[R][N / 8][4] = {};
        score_tile<T, Sh>(scores, queries, stage + k_at);
        int top = tile.position + strip;
        bool mask = (j + 1) * N > top + 1 || j * N <= top + 16 * R - 1 - args.window;
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (mask) {
                int at = j * N + t * 2, see[2], from[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int position = first + r * 16 + e * 8;
                    see[e] = position - at;
                    from[e] = max_of(0, position - args.window + 1) - at;
                }
                mask_scores(scores[r], see, from);
            }
            float factor[2];
            softmax[r].step(scores[r], scale, factor);
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
#pragma unroll
                for (int x = 0; x < 4; x++) sums[r][d][x] *= factor[x >> 1];
            }
        }
        add_values<T, Sh>(sums, scores, stage + v_at);
        if (threadIdx.x < Sh::PAGES) rows[slot * Sh::PAGES + threadIdx.x] = next_row;
    }

#pragma unroll
    for (int r = 0; r < R; r++) {
        float inverse[2];
        softmax[r].finish(inverse);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int row = strip + r * 16 + e * 8 + g;
            u16* to = args.out + ((i64)(tile.row + row) * args.n_heads + tile.head) * D;
            store_row<T, D>(to, sums[r], e, inverse[e], row < tile.n_rows, t);
        }
    }
}

#define ATTENTION_PREFILL(name, T, ...)                                                                 \
    KERNEL __launch_bounds__(128) name(const __grid_constant__ PrefillArgs args) {                       \
        attention_prefill<T, PrefillShape<__VA_ARGS__>>(args);                                          \
    }                                                                                                   \
    extern "C" __device__ const int name##_shared = PrefillShape<__VA_ARGS__>::SHARED;                   \
    extern "C" __device__ const int name##_rows = PrefillShape<__VA_ARGS__>::M;

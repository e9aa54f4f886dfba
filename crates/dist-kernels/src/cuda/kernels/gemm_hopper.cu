// linear for many rows on Hopper: tiles of the output, each multiplied by `wgmma` from a ring that the copy engine fills.
// See linear.cuh for the arguments and for what happens to a row's sums before they are stored.
//
// Layout: weight [n, k] and x [rows, k], both 16-byte aligned with strides that are multiples of 16 bytes; out [rows, n].
// Any rows, n; k a multiple of 8. Bound by the tensor cores from about 300 rows on, below by reading the weight.
//
// A block owns tiles of BM rows × BN outputs. Two threads ask for stages of 64 inputs, one for the weight and one for x;
// two groups of four warps multiply, each with half of the tile's rows, and keep the sums in registers. Where out allows
// it (16 bits, n a multiple of 8) a warp rounds its sums into shared memory and the copy engine stores them while the
// next tile is multiplied; else they go through shared memory in f32, so that stores are as wide as n allows.
//
// A cluster is rows_of_cluster × columns_of_cluster tiles, times `splits` parts of k. Blocks beside each other share the
// rows of x, blocks below each other the rows of the weight: each asks for its slice and the copy engine gives it to all.
// Blocks that share a tile's k exchange their sums over distributed shared memory; they are added in the order of k. Which parts k has, and
// where a tile begins in its part, depends on k, `splits` and the column alone, and rows never meet: what a row gives
// does not depend on the other rows.
//
// Tiles are taken in groups of `group` clusters of rows, rows first, so that what runs at once shares what L2 holds. With
// `spread` tiles begin at different places of k, so that few rows of x are not all asked of the same part of L2 at once.
//
// Launch: grid a multiple of the cluster's size, at most what fits at once (exactly all tiles where splits > 1);
// 384 threads; cluster (rows_of_cluster · columns_of_cluster · splits, 1, 1), at most 8 blocks; splits at most 4
// and at most div_ceil(k, 64), 1 for the largest tiles, 128 × 256 and 256 × N; shared memory: the module's integer `<symbol>_shared`. Parameters: GemmArgs, then three tensor maps of
// 16-bit elements: x [rows, k] with boxes of 64 × BM / columns_of_cluster and the weight [n, k] with boxes of
// 64 × BN / rows_of_cluster, both 128-byte swizzled, heights multiples of 8; out [rows, n] with boxes of P × 16, P being
// the module's integer `<symbol>_part`, with a swizzle of 2 · P bytes (not read where the copy engine does not store).

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
}

// Where the sum of (row, column) of a unit lies: columns are swapped in eights, against bank conflicts.
DEVICE int sum_at(int row, int column) { return row * 32 + (column ^ ((row & 3) << 3)); }

// Unit `unit` of a warp's sums, for a loop that is not unrolled: sums stay in registers.
template <int MI, int N>
DEVICE void take_unit(float (&v)[16], const float (&c)[MI][N], int unit) {
#pragma unroll
    for (int u = 0; u < MI * N / 16; u++) {
        if (unit == u) {
#pragma unroll
            for (int i = 0; i < 16; i++) v[i] = c[u / (N / 16)][u % (N / 16) * 16 + i];
        }
    }
}

// Stores one unit of a warp's sums through shared memory in f32: 16 rows from `row0` on, 32 outputs from `column` on.
template <class T, class Sh>
DEVICE void store_unit(const LinearArgs& args, const float (&v)[16], float* staging, int row0, int column) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        *(float2*)(staging + sum_at(g, j * 8 + t * 2)) = make_float2(v[j * 4], v[j * 4 + 1]);
        *(float2*)(staging + sum_at(g + 8, j * 8 + t * 2)) = make_float2(v[j * 4 + 2], v[j * 4 + 3]);
    }
    __syncwarp();
    LinearOutputs outputs = outputs_of<T>(args, column, min_of(args.n, column + Sh::UNIT), lane % 8, 8);
    int at = outputs.column - column, row = lane / 8;
    if (outputs.n > 0) {
        float total[4][4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if (outputs.whole) {
                float4 x = *(const float4*)(staging + sum_at(row + r * 4, at));
                total[r][0] = x.x, total[r][1] = x.y, total[r][2] = x.z, total[r][3] = x.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) total[r][i] = staging[sum_at(row + r * 4, at + i * 8)];
            }
        }
        finish_rows<T, 4>(args, outputs, row0 + row, 4, args.rows, total);
    }
    __syncwarp();
}

// Stores a warp's sums where the copy engine cannot: from row `row0` and output `column0` on.
template <class T, class Sh>
DEVICE void store_rows(const LinearArgs& args, const float (&c)[Sh::MI][Sh::BN / 2], float* staging, int row0,
                       int column0) {
#pragma unroll 1
    for (int unit = 0; unit < Sh::MI * Sh::UNITS; unit++) {
        int row = row0 + unit / Sh::UNITS * 64, column = column0 + unit % Sh::UNITS * Sh::UNIT;
        if (row >= args.rows || column >= args.n) continue;
        float v[16];
        take_unit(v, c, unit);
        store_unit<T, Sh>(args, v, staging, row, column);
    }
}

// Bias, activation, residual of one unit of a warp's sums, where they are: rows `row` and `row + 8`, two outputs from
// `column` on in every eight.
template <class T>
DEVICE void finish_unit(const LinearArgs& args, float (&v)[16], int row, int column) {
    constexpr int N = 16, J = N / 4;
    u32 bias[J];
    u32 residual[2 * J];
    if (args.bias) {
#pragma unroll
        for (int j = 0; j < J; j++) bias[j] = *(const u32*)(args.bias + min_of(column + j * 8, args.n - 2));
    }
    if (args.residual) {
        const u16* low = args.residual + (i64)min_of(row, args.rows - 1) * args.n;
        const u16* high = args.residual + (i64)min_of(row + 8, args.rows - 1) * args.n;
#pragma unroll
        for (int j = 0; j < J; j++) {
            int at = min_of(column + j * 8, args.n - 2);
            residual[2 * j] = *(const u32*)(low + at);
            residual[2 * j + 1] = *(const u32*)(high + at);
        }
    }
    if (args.bias) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            float2 b = widen2<T>(bias[j]);
            v[j * 4] += b.x, v[j * 4 + 1] += b.y, v[j * 4 + 2] += b.x, v[j * 4 + 3] += b.y;
        }
    }
    if (args.activation == 1) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = gelu_tanh(v[i]);
    } else if (args.activation == 2) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = gelu_erf(v[i]);
    } else if (args.activation == 3) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = fmaxf(v[i], 0.0f);
    }
    if (args.residual) {
#pragma unroll
        for (int i = 0; i < 2 * J; i++) {
            float2 r = widen2<T>(residual[i]);
            v[i * 2] += r.x, v[i * 2 + 1] += r.y;
        }
    }
}

// Copies what a part has of keys and values from shared memory to the cache, 16 bytes a thread.
template <class Sh>
DEVICE void append_part(const LinearArgs& args, u32 box, int row0, int column0) {
    constexpr int PIECES = Sh::PART / 8, ROWS = 32 / PIECES;
    int lane = threadIdx.x & 31, piece = lane % PIECES;
    int d_kv = args.n_kv_heads * args.d_head, at = column0 + piece * 8 - (args.n - 2 * d_kv);
    if (at < 0 || at >= 2 * d_kv) return;
    u16* cache = at < d_kv ? args.k_cache : args.v_cache;
    at = at < d_kv ? at : at - d_kv;
    int head = at / args.d_head, dim = at - head * args.d_head;
#pragma unroll
    for (int i = 0; i < 16 / ROWS; i++) {
        int r = i * ROWS + lane / PIECES;
        int slot = row0 + r < args.rows ? args.slots[row0 + r] : -1;
        if (slot < 0) continue;
        int block = slot / args.block_size, offset = slot - block * args.block_size;
        i64 place = (((i64)block * args.n_kv_heads + head) * args.block_size + offset) * args.d_head;
        *(uint4*)(cache + place + dim) = load_shared16(box + piece_of<Sh>(r, piece));
    }
}

// Rounds a warp's sums into shared memory and has the copy engine store them: from row `row0` and output `column0` on.
template <class T, class Sh>
DEVICE void send_rows(const LinearArgs& args, const TensorMap* out_map, const float (&c)[Sh::MI][Sh::BN / 2],
                      u32 staging, int& turn, int row0, int column0) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int row = (lane & 7) + (lane & 8), piece = lane >> 4;  // where this thread's address of four 8 × 8 matrices is
#pragma unroll 1
    for (int unit = 0; unit < Sh::MI * Sh::UNITS; unit++) {
        int inside = unit % Sh::UNITS_OF_PART, first_row = row0 + unit / Sh::UNITS * 64;
        int column = column0 + unit % Sh::UNITS * Sh::UNIT, first = column - inside * Sh::UNIT;
        if (first_row >= args.rows || first >= args.n) continue;
        float v[16];
        take_unit(v, c, unit);
        finish_unit<T>(args, v, first_row + g, column + t * 2);
        u32 box = staging + turn * (Sh::PART * 32);
        if (inside == 0) {
            if (elected()) stores_read<1>();
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const float* x = v + j * 4;
            store_matrices(box + piece_of<Sh>(row, inside * 4 + j + piece), narrow2<T>(x[0], x[1]),
                           narrow2<T>(x[2], x[3]), narrow2<T>(x[4], x[5]), narrow2<T>(x[6], x[7]));
        }
        if (inside != Sh::UNITS_OF_PART - 1) continue;
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (elected()) {
            asm volatile(
                "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                " cp.async.bulk.commit_group;" ::"l"(out_map),
                "r"(first), "r"(first_row), "r"(box)
                : "memory");
        }
        if (args.k_cache) append_part<Sh>(args, box, first_row, first);
        turn ^= 1;
    }
}

// The units of a tile that the block with part `split` of k stores, and the most that one stores.
template <class Sh>
DEVICE int first_unit(int split, int splits) { return Sh::UNITS * split / splits; }

// Blocks that share a tile's k: each gives every unit of its sums to the block that stores it, as they lie in registers
// (an asynchronous store counts on the barrier `summed` of the block that gets it), adds what it got, and stores it.
template <class T, class Sh>
DEVICE void share_sums(const GemmArgs& args, const GemmPlace& place, const float (&c)[Sh::MI][Sh::BN / 2], u8* shared,
                       float* staging, u32 summed, int row0, const GemmCorner& corner) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, splits = args.splits, most = div_ceil(Sh::UNITS, splits);
    int step = args.rows_of_cluster * args.columns_of_cluster, rank = place.n * args.rows_of_cluster + place.m;
    int first = first_unit<Sh>(place.split, splits), end = first_unit<Sh>(place.split + 1, splits);
    int blocks = div_ceil(max_of(0, min_of(Sh::BM, args.linear.rows - corner.row)), 16);  // of 16 rows
    int bytes = blocks * (end - first) * splits * 2048;
    if (threadIdx.x == 0 && bytes > 0) barrier_expect(summed, bytes);
    // All are done with their rings, where the sums go.
    cluster_meet();
    u32 mine = ((place.split * Sh::MI * 8 + warp) * most) * 2048 + lane * 16, ring = shared_address(shared);
#pragma unroll
    for (int m = 0; m < Sh::MI; m++) {
        if (row0 + m * 64 >= args.linear.rows) continue;
#pragma unroll
        for (int unit = 0; unit < Sh::UNITS; unit++) {
            int owner = ((unit + 1) * splits - 1) / Sh::UNITS;
            u32 to = ring + mine + (m * 8 * most + unit - first_unit<Sh>(owner, splits)) * 2048;
            u32 remote = cluster_address(to, rank + owner * step), barrier = cluster_address(summed, rank + owner * step);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* v = c[m] + unit * 16 + j * 4;
                asm volatile(
                    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                        remote + j * 512),
                    "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                    : "memory");
            }
        }
    }
    if (bytes == 0) return;
    barrier_wait(summed, 0);
#pragma unroll 1
    for (int at = 0; at < Sh::MI * (end - first); at++) {
        int m = at / (end - first), unit = first + at - m * (end - first);
        int row = row0 + m * 64, column = corner.column + unit * Sh::UNIT;
        if (row >= args.linear.rows || column >= args.linear.n) continue;
        float v[16] = {};
#pragma unroll 1
        for (int split = 0; split < splits; split++) {
            const u8* from = shared + ((((split * Sh::MI + m) * 8 + warp) * most + unit - first) * 2048 + lane * 16);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float4 x = *(const float4*)(from + j * 512);
                v[j * 4] += x.x, v[j * 4 + 1] += x.y, v[j * 4 + 2] += x.z, v[j * 4 + 3] += x.w;
            }
        }
        store_unit<T, Sh>(args.linear, v, staging, row, column);
    }
}

// The two groups of warps that multiply.
template <class T, class Sh>
DEVICE void gemm_multiply(const GemmArgs& args, const GemmPlace& place, const TensorMap* out_map, u8* shared, u32 full,
                          u32 empty, u32 summed) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    u8* staging = shared + Sh::STAGING_AT + warp * Sh::STAGING;
    const LinearArgs& linear = args.linear;
    bool sends = linear.n % 8 == 0 && !linear.out_f32 && (!linear.k_cache || linear.d_head % 8 == 0);
    // The blocks that this one takes slices from hear when a slot is free: its row of the cluster and its column.
    int cm = args.rows_of_cluster, cn = args.columns_of_cluster;
    bool tells = lane < cm + cn - 1;
    int peer = lane < cm ? place.n * cm + lane : (lane - cm + (lane - cm >= place.n)) * cm + place.m;
    u32 peer_empty = cluster_address(empty, tells ? place.split * cm * cn + peer : 0);
    u32 x0 = tile_descriptor(shared_address(shared) + group * (Sh::MI * 8192));
    u32 weight0 = tile_descriptor(shared_address(shared) + Sh::A_BYTES);
    float sums[Sh::MI][Sh::BN / 2];
    int slot = 0, parity = 0, turn = 0;
#pragma unroll 1
    for (int tile = place.cluster; tile < place.tiles; tile += place.step) {
        int last = 0;
#pragma unroll
        for (int m = 0; m < Sh::MI; m++) hold(sums[m]);
#pragma unroll 1
        for (int stage = 0; stage < place.stages; stage++) {
            slot_wait(full + slot * 8, parity);
            u32 x = x0 + slot * (Sh::STAGE / 16), weight = weight0 + slot * (Sh::STAGE / 16);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int step = 0; step < 4; step++) {
#pragma unroll
                for (int m = 0; m < Sh::MI; m++) {
                    wgmma<T, Sh::BN>(sums[m], descriptor(x + m * 512 + step * 2), descriptor(weight + step * 2),
                                     step > 0 || stage > 0);
                }
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (stage > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (tells) slot_release(peer_empty + last * 8);
            }
            last = slot;
            if (++slot == Sh::S) slot = 0, parity ^= 1;
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int m = 0; m < Sh::MI; m++) hold(sums[m]);
        if (tells) slot_release(peer_empty + last * 8);
        GemmCorner corner = corner_of<Sh>(args, place, tile);
        int row0 = corner.row + group * (Sh::MI * 64) + (warp & 3) * 16;
        if (Sh::SPLITS && args.splits > 1) {
            share_sums<T, Sh>(args, place, sums, shared, (float*)staging, summed, row0, corner);
        } else if (sends) {
            send_rows<T, Sh>(linear, out_map, sums, shared_address(staging), turn, row0, corner.column);
        } else {
            store_rows<T, Sh>(linear, sums, (float*)staging, row0, corner.column);
        }
    }
    // Shared memory must last until the copy engine has read it.
    if (elected()) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <class T, class Sh>
DEVICE void gemm(const GemmArgs& args, const TensorMap* x_map, const TensorMap* weight_map, const TensorMap* out_map) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 full = shared_address(shared + Sh::BARRIERS), empty = full + Sh::S * 8, summed = empty + Sh::S * 8;
    int size = args.rows_of_cluster * args.columns_of_cluster * args.splits;
    let_next_start();
    if (threadIdx.x == 256) prefetch_map(weight_map);
    if (threadIdx.x == 288) prefetch_map(x_map);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Sh::S; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, 8 * (args.rows_of_cluster + args.columns_of_cluster - 1));
        }
        barrier_init(summed, 1);
        barriers_ready();
    }
    GemmPlace place = gemm_place<Sh>(args);
    __syncthreads();
    if (size > 1) cluster_meet();
    if (threadIdx.x >= 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
        if (warp == 8) {
            if (elected()) gemm_fill<Sh, true>(args, place, weight_map, shared_address(shared), full, empty);
        } else if (warp == 9) {
            if (elected()) gemm_fill<Sh, false>(args, place, x_map, shared_address(shared), full, empty);
        }
        __syncwarp();
        if (args.splits > 1) cluster_meet();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous();
        gemm_multiply<T, Sh>(args, place, out_map, shared, full, empty, summed);
        __syncwarp();
    }
    // Others may still write to this block's barriers.
    if (size > 1) cluster_meet();
}

#define GEMM(name, T, ...)                                                                                      \
    KERNEL __launch_bounds__(384, 1)                                                                             \
        name(const __grid_constant__ GemmArgs args, const __grid_constant__ TensorMap x_map,                    \
             const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap out_map) {         \
        gemm<T, GemmShape<__VA_ARGS__>>(args, &x_map, &weight_map, &out_map);                                   \
    }                                                                                                           \
    extern "C" __device__ const int name##_shared = GemmShape<__VA_ARGS__>::SHARED;                             \
    extern "C" __device__ const int name##_part = GemmShape<__VA_ARGS__>::PART;

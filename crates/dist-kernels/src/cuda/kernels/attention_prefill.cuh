// What the kernels of attention for many rows a sequence (prefill) share: arguments, the order of the work, the mask.
//
// Layout: keys and values [n_blocks, n_kv_heads, block_size, D] with block_size a multiple of 16; q are the first
// columns of qkv [rows, ld_qkv]; out [rows, n_heads · D]; 16-byte aligned; ld_qkv a multiple of 8. Row r of a sequence
// with q rows and context c stands at position c − q + r and sees `window` positions up to its own.
//
// A piece of work is a tile: up to M consecutive rows of one sequence under one head. It walks the keys in tiles that
// begin at multiples of N of the absolute position, and every tile rescales the running sums. Tiles that a row does not
// see leave its sums as they are, so its bits do not depend on the rows beside it.
//
// Blocks wholly outside of what a tile of rows sees are not read, nor what lies behind the context in the last one.

struct PrefillArgs {
    u16* out;
    const u16* qkv;
    const u16* k;
    const u16* v;
    const u32* q_offsets;     // [n_seqs + 1]
    const u32* context_lens;  // [n_seqs]
    const u32* block_tables;  // [n_seqs, max_blocks]
    int max_blocks;
    int ld_qkv;
    int n_heads, n_kv_heads;
    int block_size;
    int window;               // positions that a row sees; INT_MAX: all before it
    float scale;              // above zero
    int n_seqs;
    u32* next;                // a zero, left as a zero: the next piece of work (Hopper)
    int box_rows;             // rows that one copy takes from a block: divides block_size and 128 (Hopper)
};

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// Raises 2 to x; −∞ gives 0.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A tile of rows under one head.
struct RowTile {
    int seq, head;
    int row, n_rows;  // in the step
    int position;     // of the first row
    int low, high;    // tiles of keys that its rows see
};

// Pieces of work of all sequences; for a whole warp.
template <int M>
DEVICE int count_tiles(const PrefillArgs& args, int lane) {
    int tiles = 0;
    for (int seq = lane; seq < args.n_seqs; seq += 32) {
        tiles += div_ceil(args.q_offsets[seq + 1] - args.q_offsets[seq], M);
    }
    return __reduce_add_sync(~0u, tiles) * args.n_heads;
}

// Finds the pieces of work in their order, for a whole warp: by sequence, then by as many heads as have their keys and
// values in the L2 cache together, then the rows that see most first, so that the short ones fill the gaps at the end.
template <int D, int M, int N>
struct WorkOrder {
    static constexpr int L2_BYTES = 24 << 20;
    int first_seq = 0, first_work = 0;  // of the 32 sequences that the warp looks at

    // False: there is no such piece. `work` does not go down from call to call.
    DEVICE_MEMBER bool find(const PrefillArgs& args, int work, int lane, RowTile& tile) {
        for (; first_seq < args.n_seqs; first_seq += 32) {
            int seq = first_seq + lane;
            int rows = seq < args.n_seqs ? args.q_offsets[seq + 1] - args.q_offsets[seq] : 0;
            int mine = div_ceil(rows, M) * args.n_heads, end = first_work + mine;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                int before = __shfl_up_sync(~0u, end - first_work, step);
                if (lane >= step) end += before;
            }
            u32 beyond = __ballot_sync(~0u, work < end);
            if (beyond) {
                int owner = __ffs(beyond) - 1;
                tile.seq = first_seq + owner;
                place(args, work - __shfl_sync(~0u, end - mine, owner), tile);
                return true;
            }
            first_work = __shfl_sync(~0u, end, 31);
        }
        return false;
    }

    // The piece `work` of the sequence.
    DEVICE_MEMBER void place(const PrefillArgs& args, int work, RowTile& tile) {
        int start = args.q_offsets[tile.seq], rows = args.q_offsets[tile.seq + 1] - start;
        int context = args.context_lens[tile.seq], n_tiles = div_ceil(rows, M), group = args.n_heads / args.n_kv_heads;
        int together = min_of(max_of(1, L2_BYTES / (D * 4) / context), args.n_kv_heads) * group;
        int section = work / (n_tiles * together), heads = min_of(together, args.n_heads - section * together);
        work -= section * n_tiles * together;
        int down = work / heads, at = (n_tiles - 1 - down) * M;
        tile.head = section * together + work - down * heads;
        tile.row = start + at;
        tile.n_rows = min_of(M, rows - at);
        tile.position = context - rows + at;
        tile.low = max_of(0, tile.position - args.window + 1) / N;
        tile.high = div_ceil(tile.position + tile.n_rows, N);
    }
};

// Where keys and values of the sequence lie, in a cache seen as rows of D.
struct Pages {
    static constexpr int OUTSIDE = -1024;  // a whole box before the first row: the copy engine brings zeros
    const u32* table;
    int block_size, n_kv_heads, kv_head;
    int from, to;  // positions that are read

    DEVICE_MEMBER Pages(const PrefillArgs& args, const RowTile& tile)
        : table(args.block_tables + (i64)tile.seq * args.max_blocks), block_size(args.block_size),
          n_kv_heads(args.n_kv_heads), kv_head(tile.head / (args.n_heads / args.n_kv_heads)),
          from(max_of(0, tile.position - args.window + 1)), to(tile.position + tile.n_rows) {}

    // The row of the first of `length` positions that lie in one block; OUTSIDE if none of them is read.
    DEVICE_MEMBER int row_of(int position, int length) const {
        if (position >= to || position + length <= from) return OUTSIDE;
        int block = position / block_size;
        return (table[block] * n_kv_heads + kv_head) * block_size + position - block * block_size;
    }
};

// Hides what the rows of a thread do not see. `see` is the thread's row less the first column of the tile that it holds,
// `from` the first column that the row sees, likewise.
template <int BLOCKS>
DEVICE void mask_scores(float (&scores)[BLOCKS][4], const int (&see)[2], const int (&from)[2]) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
            int column = n * 8 + (x & 1);
            if (column > see[x >> 1] || column < from[x >> 1]) scores[n][x] = NEGATIVE_INFINITY;
        }
    }
}

// The running softmax of the two rows of a thread (lanes of four share a row).
struct Softmax {
    float maximum[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f};

    // Turns scores into weights; gives the factors of the sums so far. `scale` includes log2(e).
    template <int BLOCKS>
    DEVICE_MEMBER void step(float (&scores)[BLOCKS][4], float scale, float (&factor)[2]) {
        float now[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) now[x >> 1] = fmaxf(now[x >> 1], scores[n][x]);
        }
        float shift[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            now[e] = fmaxf(now[e], __shfl_xor_sync(~0u, now[e], 1));
            now[e] = fmaxf(now[e], __shfl_xor_sync(~0u, now[e], 2));
            float top = now[e] == NEGATIVE_INFINITY ? 0.0f : now[e];  // nothing seen yet
            shift[e] = -top * scale;
            factor[e] = power_of_two((maximum[e] - top) * scale);  // exactly 1 where the maximum stays
            maximum[e] = now[e];
        }
        float part[2][2] = {};
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                scores[n][x] = power_of_two(scores[n][x] * scale + shift[x >> 1]);
                part[x >> 1][x & 1] += scores[n][x];
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) sum[e] = sum[e] * factor[e] + (part[e][0] + part[e][1]);
    }

    // One over the sums of the whole rows.
    DEVICE_MEMBER void finish(float (&inverse)[2]) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            sum[e] += __shfl_xor_sync(~0u, sum[e], 1);
            sum[e] += __shfl_xor_sync(~0u, sum[e], 2);
            inverse[e] = 1.0f / sum[e];
        }
    }
};

// Stores one row's sums: the four lanes that share it exchange words, so that each stores 16 bytes.
template <class T, int D>
DEVICE void store_row(u16* to, const float (&sums)[D / 8][4], int e, float inverse, bool has, int t) {
    auto word = [&](int n) { return narrow2<T>(sums[n][e * 2] * inverse, sums[n][e * 2 + 1] * inverse); };
#pragma unroll
    for (int n = 0; n + 4 <= D / 8; n += 4) {
        u32 w[4] = {word(n), word(n + 1), word(n + 2), word(n + 3)};
        u32 a = __shfl_xor_sync(~0u, t & 1 ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, t & 1 ? w[2] : w[3], 1);
        if (t & 1) w[0] = a, w[2] = b;
        else w[1] = a, w[3] = b;
        a = __shfl_xor_sync(~0u, t & 2 ? w[0] : w[2], 2), b = __shfl_xor_sync(~0u, t & 2 ? w[1] : w[3], 2);
        uint4 all = t & 2 ? make_uint4(a, b, w[2], w[3]) : make_uint4(w[0], w[1], a, b);
        if (has) *(uint4*)(to + (n + t) * 8) = all;
    }
#pragma unroll
    for (int n = D / 32 * 4; n < D / 8; n++) {
        if (has) *(u32*)(to + n * 8 + t * 2) = word(n);
    }
}

// embed, gather_rows, add_bias, copy_pieces: one pass over rows. Bound by latency for few rows, by memory for many.
//
// Layout: tables [n, d] with rows `ld` apart, rows [rows, d] contiguous; accesses of V elements, V = 8 if d and ld are
// multiples of 8 and all is 16-byte aligned, else V = 1 (`_odd`).
//
// Launch: grid (div_ceil(d, 256 · V), rows), 256 threads.

struct EmbedTable {
    const u32* ids;     // [rows] or null: no table
    const u16* table;
    u32 offset;         // added to every id
    u32 first;          // the id of the table's first row
    u32 n;              // its rows; an id outside them contributes zero
    int ld;
};

struct EmbedArgs {
    u16* out;           // [rows, d]
    EmbedTable tokens;  // without ids: out is added to
    EmbedTable positions;
    const u32* drawn;   // what a token id with the top bit set, less it, is a place in
    int d;
};

template <class T, int V>
DEVICE void add_table(float (&x)[V], const EmbedTable& table, const u32* drawn, int row, int at) {
    if (!table.ids) return;
    u32 told = table.ids[row];
    if (drawn && told >> 31) told = drawn[told & 0x7fffffffu];
    u64 id = (u64)told + table.offset - table.first;
    if (id >= table.n) return;
    const u16* from = table.table + (i64)id * table.ld + at;
#pragma unroll
    for (int v = 0; v < V; v += 2) {
        if constexpr (V == 1) {
            x[0] += widen<T>(*from);
        } else {
            float2 pair = widen2<T>(*(const u32*)(from + v));
            x[v] += pair.x, x[v + 1] += pair.y;
        }
    }
}

template <class T, int V>
DEVICE void store(u16* to, const float (&x)[V]) {
    if constexpr (V == 1) {
        *to = narrow<T>(x[0]);
    } else {
        *(uint4*)to = make_uint4(narrow2<T>(x[0], x[1]), narrow2<T>(x[2], x[3]), narrow2<T>(x[4], x[5]),
                                 narrow2<T>(x[6], x[7]));
    }
}

template <class T, int V>
DEVICE void embed(const EmbedArgs& args) {
    let_next_start();
    wait_for_previous();
    int at = (blockIdx.x * 256 + threadIdx.x) * V, row = blockIdx.y;
    if (at >= args.d) return;
    u16* out = args.out + (i64)row * args.d + at;
    float x[V] = {};
    if (!args.tokens.ids) {
#pragma unroll
        for (int v = 0; v < V; v++) x[v] = widen<T>(out[v]);
    }
    add_table<T, V>(x, args.tokens, args.drawn, row, at);
    add_table<T, V>(x, args.positions, nullptr, row, at);
    store<T, V>(out, x);
}

struct GatherArgs {
    u16* out;            // [grid rows, d]
    const u16* x;        // [rows, d]
    const u32* indices;
    int d;
};

template <int V>
DEVICE void gather_rows(const GatherArgs& args) {
    let_next_start();
    wait_for_previous();
    int at = (blockIdx.x * 256 + threadIdx.x) * V;
    if (at >= args.d) return;
    const u16* from = args.x + (i64)args.indices[blockIdx.y] * args.d + at;
    u16* to = args.out + (i64)blockIdx.y * args.d + at;
    if constexpr (V == 1) *to = *from; else *(uint4*)to = *(const uint4*)from;
}

struct AddBiasArgs {
    u16* x;              // [rows, n], read and written
    const u16* bias;     // [n]
    int n;
};

template <class T, int V>
DEVICE void add_bias(const AddBiasArgs& args) {
    let_next_start();
    wait_for_previous();
    int at = (blockIdx.x * 256 + threadIdx.x) * V;
    if (at >= args.n) return;
    u16* x = args.x + (i64)blockIdx.y * args.n + at;
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = widen<T>(x[v]) + widen<T>(args.bias[at + v]);
    store<T, V>(x, sum);
}

struct CopyPiece {
    const u32* from;
    u32* to;
    i64 n;
};
struct CopyArgs {
    CopyPiece pieces[16];
};

// Words between the GPU's memory and the host's, which it reads and writes by itself: a step's small arrays cost one launch.
// Launch: grid (blocks, pieces), 256 threads; nothing may start before it is done.
KERNEL copy_pieces(const __grid_constant__ CopyArgs args) {
    CopyPiece piece = args.pieces[blockIdx.y];
    i64 step = (i64)gridDim.x * 256;
    for (i64 i = blockIdx.x * 256 + threadIdx.x; i < piece.n; i += step) piece.to[i] = piece.from[i];
}

KERNEL embed_bf16(const __grid_constant__ EmbedArgs args) { embed<Bf16, 8>(args); }
KERNEL embed_f16(const __grid_constant__ EmbedArgs args) { embed<F16, 8>(args); }
KERNEL embed_odd_bf16(const __grid_constant__ EmbedArgs args) { embed<Bf16, 1>(args); }
KERNEL embed_odd_f16(const __grid_constant__ EmbedArgs args) { embed<F16, 1>(args); }
KERNEL gather_rows_16(const __grid_constant__ GatherArgs args) { gather_rows<8>(args); }
KERNEL gather_rows_odd_16(const __grid_constant__ GatherArgs args) { gather_rows<1>(args); }
KERNEL add_bias_bf16(const __grid_constant__ AddBiasArgs args) { add_bias<Bf16, 8>(args); }
KERNEL add_bias_f16(const __grid_constant__ AddBiasArgs args) { add_bias<F16, 8>(args); }
KERNEL add_bias_odd_bf16(const __grid_constant__ AddBiasArgs args) { add_bias<Bf16, 1>(args); }
KERNEL add_bias_odd_f16(const __grid_constant__ AddBiasArgs args) { add_bias<F16, 1>(args); }

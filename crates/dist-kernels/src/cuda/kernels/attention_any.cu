// attention for head sizes that the other kernels do not take: any up to 256; causal, paged. Simple, not fast.
//
// Layout: as in attention_decode.cu, with any block size and no alignment.
//
// Launch: grid (rows, div_ceil(n_heads, 4)), 128 threads. A warp takes one head of one row; a lane keeps every 32nd
// element of it. The softmax is running, in the order of the positions.

struct AttentionAnyArgs {
    u16* out;                 // [rows, n_heads · d_head]
    const u16* qkv;           // [rows, ld_qkv]
    const u16* k;
    const u16* v;
    const u32* q_offsets;     // [n_seqs + 1]
    const u32* context_lens;  // [n_seqs]
    const u32* block_tables;  // [n_seqs, max_blocks]
    int n_seqs, max_blocks;
    int ld_qkv;
    int n_heads, n_kv_heads, d_head;
    int block_size;
    int window;
    float scale;
};

constexpr int PER_LANE = 8;

template <class T>
DEVICE void attention_any(const AttentionAnyArgs& args) {
    let_next_start();
    wait_for_previous();
    int lane = threadIdx.x % 32, row = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32;
    if (head >= args.n_heads) return;
    // The sequence that owns the row.
    int seq = 0, end = args.n_seqs;
    while (end - seq > 1) {
        int middle = (seq + end) / 2;
        if (args.q_offsets[middle] <= row) seq = middle; else end = middle;
    }
    int n_rows = args.q_offsets[seq + 1] - args.q_offsets[seq];
    int position = (int)args.context_lens[seq] - n_rows + row - (int)args.q_offsets[seq];
    int kv_head = head / (args.n_heads / args.n_kv_heads);
    float q[PER_LANE], sums[PER_LANE] = {}, maximum = __int_as_float(0xff800000), weight = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + 32 * i;
        q[i] = d < args.d_head ? widen<T>(args.qkv[(i64)row * args.ld_qkv + head * args.d_head + d]) : 0.0f;
    }
    for (int p = max_of(0, position - args.window + 1); p <= position; p++) {
        u32 block = args.block_tables[(i64)seq * args.max_blocks + p / args.block_size];
        i64 at = (((i64)block * args.n_kv_heads + kv_head) * args.block_size + p % args.block_size) * args.d_head;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + 32 * i;
            if (d < args.d_head) score = fmaf(q[i], widen<T>(args.k[at + d]), score);
        }
#pragma unroll
        for (int step = 16; step; step >>= 1) score += __shfl_xor_sync(~0u, score, step);
        score *= args.scale;
        float now = fmaxf(maximum, score), factor = __expf(maximum - now), share = __expf(score - now);
        weight = weight * factor + share;
        maximum = now;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + 32 * i;
            if (d < args.d_head) sums[i] = fmaf(share, widen<T>(args.v[at + d]), sums[i] * factor);
        }
    }
    float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + 32 * i;
        if (d < args.d_head) args.out[((i64)row * args.n_heads + head) * args.d_head + d] = narrow<T>(sums[i] * inverse);
    }
}

KERNEL attention_any_bf16(const __grid_constant__ AttentionAnyArgs args) { attention_any<Bf16>(args); }
KERNEL attention_any_f16(const __grid_constant__ AttentionAnyArgs args) { attention_any<F16>(args); }

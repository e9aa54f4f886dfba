// read_all: reads memory and does nothing with it. Bound by memory: what every kernel that reads is held against.
//
// Layout: `n` pieces of 16 bytes, aligned; n a multiple of 4,096.
//
// Launch: any grid, 512 threads; a block takes 64 KiB at a time, so that all blocks together read one long run.

struct ReadArgs {
    const uint4* from;
    u64 n;
    u32* found;  // written if all that a thread reads cancels out to `never`, so that reading cannot be left out
    u32 never;
};

KERNEL __launch_bounds__(512) read_all(const __grid_constant__ ReadArgs args) {
    constexpr int AT_ONCE = 8;
    let_next_start();
    wait_for_previous();
    u64 step = (u64)gridDim.x * 512 * AT_ONCE;
    u32 bits = 0;
    for (u64 at = (u64)blockIdx.x * 512 * AT_ONCE + threadIdx.x; at < args.n; at += step) {
        uint4 part[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) part[i] = __ldcs(args.from + at + i * 512);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) bits ^= part[i].x ^ part[i].y ^ part[i].z ^ part[i].w;
    }
    if (bits == args.never) *args.found = bits;
}

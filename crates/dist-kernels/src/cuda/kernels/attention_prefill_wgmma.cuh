// The products of attention for prefill on Hopper: `wgmma` by 64 rows, and how their operands lie in shared memory.

#define REGS32                                                                                                \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"  \
    "%28,%29,%30,%31"
#define REGS40 REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REGS48 REGS40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS64 REGS48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SUMS4(how, c, j) how(c[j][0]), how(c[j][1]), how(c[j][2]), how(c[j][3])
#define SUMS16(how, c, j) SUMS4(how, c, j), SUMS4(how, c, j + 1), SUMS4(how, c, j + 2), SUMS4(how, c, j + 3)
#define SUMS32(how, c, j) SUMS16(how, c, j), SUMS16(how, c, j + 4)

// scores (64 × 128) = or += queries (64 × 16) · keys (128 × 16)ᵀ.
#define WGMMA_SCORES(type, how, add)                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" REGS64                     \
                 "}, %64, %65, " add ", 1, 1, 0, 0;"                                                          \
                 : SUMS32(how, c, 0), SUMS32(how, c, 8)                                                       \
                 : "l"(queries), "l"(keys))
template <class T, bool ADD>
DEVICE void wgmma_scores(float (&c)[16][4], u64 queries, u64 keys) {
    if constexpr (ADD && T::is_f16) WGMMA_SCORES("f16", "+f", "1");
    else if constexpr (ADD) WGMMA_SCORES("bf16", "+f", "1");
    else if constexpr (T::is_f16) WGMMA_SCORES("f16", "=f", "0");
    else WGMMA_SCORES("bf16", "=f", "0");
}

// sums (64 × D) += weights (64 × 16, in registers) · values (16 × D).
#define WGMMA_VALUES(n, type, regs, a, b, ...)                                                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" regs "}, {" a "}, %" b   \
                 ", 1, 1, 1, 1;"                                                                              \
                 : __VA_ARGS__                                                                                \
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(values))
#define WGMMA_VALUES_OF(n, regs, a, b, ...)                                                                   \
    if constexpr (T::is_f16) WGMMA_VALUES(n, "f16", regs, a, b, __VA_ARGS__);                                 \
    else WGMMA_VALUES(n, "bf16", regs, a, b, __VA_ARGS__)
template <class T, int BLOCKS>
DEVICE void wgmma_values(float (&c)[BLOCKS][4], const u32 (&p)[4], u64 values) {
    if constexpr (BLOCKS == 8) {
        WGMMA_VALUES_OF(64, REGS32, "%32,%33,%34,%35", "36", SUMS32("+f", c, 0));
    } else if constexpr (BLOCKS == 10) {
        WGMMA_VALUES_OF(80, REGS40, "%40,%41,%42,%43", "44", SUMS32("+f", c, 0), SUMS4("+f", c, 8), SUMS4("+f", c, 9));
    } else if constexpr (BLOCKS == 12) {
        WGMMA_VALUES_OF(96, REGS48, "%48,%49,%50,%51", "52", SUMS32("+f", c, 0), SUMS16("+f", c, 8));
    } else {
        static_assert(BLOCKS == 16, "head size");
        WGMMA_VALUES_OF(128, REGS64, "%64,%65,%66,%67", "68", SUMS32("+f", c, 0), SUMS32("+f", c, 8));
    }
}

// Keeps the compiler from moving what reads or writes these registers across.
template <int BLOCKS>
DEVICE void pin(float (&c)[BLOCKS][4]) {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) asm volatile("" : SUMS4("+f", c, j)::"memory");
}
DEVICE void pin(u32 (&p)[8][4]) {
#pragma unroll
    for (int j = 0; j < 8; j++) asm volatile("" : "+r"(p[j][0]), "+r"(p[j][1]), "+r"(p[j][2]), "+r"(p[j][3])::"memory");
}
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Rows of `atom` elements in the swizzle of that width; `eight` is the distance to the next eight rows and, where the rows
// are summed over (values), `next` the one to the next atom of columns.
DEVICE u64 rows_descriptor(u32 address, int atom, int eight, int next = 16) {
    u64 swizzle = atom == 64 ? 1 : atom == 32 ? 2 : 3;
    return (u64)((address & 0x3ffff) >> 4) | (u64)(next >> 4) << 16 | (u64)(eight >> 4) << 32 | swizzle << 62;
}

// 16 bytes of what the work is, for all lanes of a warp; read by the lane that later gives the place back.
DEVICE uint4 load_work(u32 address) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if ((threadIdx.x & 31) == 0) v = load_shared16(address);
    return make_uint4(__shfl_sync(~0u, v.x, 0), __shfl_sync(~0u, v.y, 0), __shfl_sync(~0u, v.z, 0), __shfl_sync(~0u, v.w, 0));
}

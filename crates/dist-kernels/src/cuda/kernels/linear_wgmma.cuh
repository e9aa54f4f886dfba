// Products of 64 weight rows and up to 64 rows of x on Hopper's tensor cores (`wgmma`), for linear_ring.cu.

// A tile of 128-byte rows in the 128-byte swizzle, eight rows to 1,024 bytes.
DEVICE u64 tile_descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

#define WGMMA(n, type, regs, a, b, ...)                                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" regs "}, %" a ", %" b    \
                 ", 1, 1, 1, 0, 0;"                                                                           \
                 : __VA_ARGS__                                                                                \
                 : "l"(left), "l"(right))
#define REGS4_OF(v) "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
#define REGS4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])

// c (64 × 8 · NT) += a (64 × 16) · b (16 × 8 · NT), both from shared memory.
template <class T, int NT>
DEVICE void wgmma(float (&c)[NT][4], u64 left, u64 right) {
    if constexpr (NT == 1) {
        if constexpr (T::is_f16) WGMMA(8, "f16", "%0,%1,%2,%3", "4", "5", REGS4(0));
        else WGMMA(8, "bf16", "%0,%1,%2,%3", "4", "5", REGS4(0));
    } else if constexpr (NT == 2) {
        if constexpr (T::is_f16) WGMMA(16, "f16", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", REGS4(0), REGS4(1));
        else WGMMA(16, "bf16", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", REGS4(0), REGS4(1));
    } else if constexpr (NT == 4) {
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
        if constexpr (T::is_f16) WGMMA(32, "f16", R16, "16", "17", REGS4(0), REGS4(1), REGS4(2), REGS4(3));
        else WGMMA(32, "bf16", R16, "16", "17", REGS4(0), REGS4(1), REGS4(2), REGS4(3));
    } else {
        static_assert(NT == 8, "rows");
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        if constexpr (T::is_f16)
            WGMMA(64, "f16", R32, "32", "33", REGS4(0), REGS4(1), REGS4(2), REGS4(3), REGS4(4), REGS4(5), REGS4(6),
                  REGS4(7));
        else
            WGMMA(64, "bf16", R32, "32", "33", REGS4(0), REGS4(1), REGS4(2), REGS4(3), REGS4(4), REGS4(5), REGS4(6),
                  REGS4(7));
    }
}

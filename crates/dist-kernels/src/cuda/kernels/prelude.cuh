// What every kernel file begins with: types, conversions, 16-byte accesses, asynchronous copies, tensor-core products.
// Free of NVIDIA's headers, so that NVRTC needs no include path. The host joins this file and a kernel file.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HOPPER 1
#else
#define HOPPER 0
#endif

// Shared memory that a block may have: on whatever runs what is compiled here. What is for sm_80 runs on all of 8.x.
#if HOPPER && __CUDA_ARCH__ < 1200
constexpr int SHARED_MOST = 232448;
#else
constexpr int SHARED_MOST = 101376;
#endif

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL extern "C" __global__ void

// Storage types: bits, and how they widen and round.
struct Bf16 {
    static constexpr bool is_f16 = false;
};
struct F16 {
    static constexpr bool is_f16 = true;
};

template <class T>
DEVICE float widen(u16 bits) {
    float x;
    if constexpr (T::is_f16) {
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    } else {
        x = __uint_as_float((u32)bits << 16);
    }
    return x;
}

// The lower and the upper half of a word.
template <class T>
DEVICE float2 widen2(u32 bits) {
    if constexpr (T::is_f16) {
        return make_float2(widen<T>((u16)bits), widen<T>((u16)(bits >> 16)));
    } else {
        return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    }
}

// Rounds two numbers to the nearest, the first into the lower half.
template <class T>
DEVICE u32 narrow2(float low, float high) {
    u32 bits;
    if constexpr (T::is_f16) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
    return bits;
}

template <class T>
DEVICE u16 narrow(float x) {
    return (u16)narrow2<T>(x, 0.0f);
}

template <class T>
DEVICE float rounded(float x) {
    return widen<T>(narrow<T>(x));
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE uint4 load_shared16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// 16 bytes from global to shared memory, past L1; zeros if `take` is false.
DEVICE void copy16(u32 to, const void* from, bool take = true) {
    int bytes = take ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#if HOPPER
// Barriers of asynchronous copies: a phase ends when all have arrived and all bytes are there.
DEVICE void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, int parity) {
    asm volatile(
        "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;"
        " @!done bra AGAIN; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// The same for a ring that the copy engine and the tensor cores share: nothing is flushed for a cluster's sake, which would
// cost a fence of all memory or the first cache each time.
DEVICE void slot_wait(u32 barrier, int parity) {
    asm volatile(
        "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra AGAIN; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A map of a matrix for the copy engine, made by the host.
struct alignas(64) TensorMap {
    u64 words[16];
};
// The box of `map` at (x, y) to shared memory.
DEVICE void copy_box(u32 to, const TensorMap* map, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
#endif

#if HOPPER
// Where our own shared address `address` is in block `rank` of the cluster.
DEVICE u32 in_cluster(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
// Four floats to another block; its barrier counts their bytes.
DEVICE void send_cluster4(u32 to, const float* v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                 : "memory");
}
#endif

// An 8 × 8 matrix of 16 bits turned: lane l has two of row l / 4 before and after.
DEVICE u32 turned(u32 bits) {
    u32 v;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(bits));
    return v;
}

// Four 8 × 8 matrices: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE uint4 load_matrices(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
// The same, transposed on the way.
DEVICE uint4 load_matrices_transposed(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// c (16 × 8) += a (16 × 16) · b (16 × 8), in f32.
template <class T>
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (T::is_f16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// Programmatic dependent launch: the next kernel may start; what kernels before this one wrote may be read.
DEVICE void let_next_start() {
#if HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier of the first 256 threads.
DEVICE void sync_256() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Blocks of a cluster; one block where there are none.
DEVICE u32 cluster_rank() {
    u32 rank = 0;
#if HOPPER
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
DEVICE u32 cluster_size() {
    u32 size = 1;
#if HOPPER
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}
// Makes no writes visible: for barriers, which have a fence of their own.
DEVICE void cluster_arrive() {
#if HOPPER
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if HOPPER
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
constexpr __host__ __device__ int div_up(int a, int b) { return (a + b - 1) / b; }
DEVICE int div_ceil(int a, int b) { return (a + b - 1) / b; }
// a / b for a below 2^21, without the long way of a division: many of these stand before a block's first load.
DEVICE int quotient(int a, int b) { return (int)__fdividef((float)a + 0.5f, (float)b); }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }

// A load that passes L1 by, for what other blocks of the same launch wrote.
template <class V>
DEVICE V load_l2(const V* from) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a float or two");
    V v;
    if constexpr (sizeof(V) == 4) {
        asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(*(float*)&v) : "l"(from) : "memory");
    } else {
        asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                     : "=f"(((float*)&v)[0]), "=f"(((float*)&v)[1])
                     : "l"(from)
                     : "memory");
    }
    return v;
}

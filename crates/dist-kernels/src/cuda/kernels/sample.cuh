// What `sample` is made of: arguments, the order of tokens, weights, sums over a block, and selection of the likeliest.

constexpr int THREADS = 1024, WARPS = THREADS / 32, CHUNK = 8192, MAX_CHUNKS = 64;
constexpr int BINS = 2048, MEMBERS = 1024, STRIDES = 1024;
constexpr float LARGEST = 3.402823466e38f;
constexpr u32 NO_TOKEN = 0xffffffffu;

// One change of a logit; those of a row are sorted by token, those of a token stand in the order of their effect.
struct SampleChange {
    u32 id;
    u32 op;  // 0: repetition penalty, 1: subtract, 2: add, 3: ban
    float value;
    float before;  // written here: the logit before the token's first change
};

struct SampleRow {
    u32 target;        // scored instead of drawing; NO_TOKEN: draw
    u32 fallback;      // where no logit is finite, if there is such a token
    SampleChange* changes;
    u32 n_changes;
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
    u32 seed_low, seed_high;
    u32 sample_idx;
    u32 position;
};

struct SamplePartial {
    u64 best;    // greatest key of the chunk
    double sum;  // of exp(logit - the chunk's greatest)
};

struct SampleArgs {
    float* logits;
    i64 ld;
    const SampleRow* rows;
    SamplePartial* partials;
    u32* tickets;
    u32* ids;            // [rows]
    float* logprobs;     // [rows]
    u32* top_ids;        // [rows, n_top]
    float* top_logprobs;
    int n_vocab;
    int n_top;           // at most MEMBERS
};

struct SampleShared {
    union {
        struct {
            u32 counts[BINS];
            u32 low[BINS], high[BINS];
        };
        struct {
            u64 keys[MEMBERS];
            u64 measures[MEMBERS];
        };
        double masses[STRIDES];
    };
    u64 warps[WARPS];
    double sums[WARPS];
    u64 key, base;
    double log_sum;
    int found, n_members;
    bool last;
};

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// NaN counts as -infinity, +infinity as the greatest finite number.
DEVICE float cleaned(float x) { return x > minus_infinity() ? fminf(x, LARGEST) : minus_infinity(); }

// Place of a token in the order: greater is likelier, and among equal logits the lower id is greater.
DEVICE u64 key_of(float logit, u32 id) {
    u32 bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (u32)~id;
}
DEVICE float logit_of(u64 key) {
    u32 ordered = (u32)(key >> 32);
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
DEVICE u32 id_of(u64 key) { return ~(u32)key; }

DEVICE float power_of_two(int n) { return __uint_as_float((u32)(n + 127) << 23); }

// The exponential of src/cpu/math.rs, operation by operation.
DEVICE float exponential(float x) {
    x = fminf(fmaxf(x, -104.0f), 89.0f);
    float n = rintf(__fmul_rn(x, 1.44269504f));
    float r = __fmaf_rn(n, -0.6933594f, x);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float p = 1.9875692e-4f;
    p = __fmaf_rn(p, r, 1.3982e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    int whole = (int)n, half = whole >> 1;
    return __fmul_rn(__fmul_rn(p, power_of_two(half)), power_of_two(whole - half));
}

// Unnormalised probability, one for the likeliest.
DEVICE float weight_of(float logit, float max, float temperature) {
    return exponential(__fdiv_rn(__fsub_rn(logit, max), temperature));
}

template <class V, class F>
DEVICE V warp_reduce(V v, F combine) {
#pragma unroll
    for (int step = 16; step; step >>= 1) v = combine(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}

// Combines all threads' values; every thread gets the result. `room` has a place a warp.
template <class V, class F>
DEVICE V block_reduce(V v, V* room, F combine) {
    v = warp_reduce(v, combine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_reduce(room[threadIdx.x % 32], combine);
}

// Sum of the values of the threads before this one; `total` gets that of all.
template <class V>
DEVICE V sum_before(V v, V* room, V& total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    V sum = v;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        V other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) room[warp] = sum;
    __syncthreads();
    V warps = room[lane], own = warps;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        V other = __shfl_up_sync(0xffffffffu, warps, step);
        if (lane >= step) warps += other;
    }
    total = __shfl_sync(0xffffffffu, warps, 31);
    V exclusive = __shfl_up_sync(0xffffffffu, sum, 1);
    return __shfl_sync(0xffffffffu, warps - own, warp) + (lane ? exclusive : V(0));
}

DEVICE u64 greater(u64 a, u64 b) { return a > b ? a : b; }

// Four logits from `at` on; beyond the vocabulary -infinity.
DEVICE float4 load4(const float* logits, int at, int n, bool aligned) {
    float none = minus_infinity();
    if (aligned && at + 4 <= n) {
        float4 v = *(const float4*)(logits + at);
        return make_float4(cleaned(v.x), cleaned(v.y), cleaned(v.z), cleaned(v.w));
    }
    return make_float4(at < n ? cleaned(logits[at]) : none, at + 1 < n ? cleaned(logits[at + 1]) : none,
                       at + 2 < n ? cleaned(logits[at + 2]) : none, at + 3 < n ? cleaned(logits[at + 3]) : none);
}

// A row as the whole block reads it.
struct Logits {
    const float* at;
    int n;
    bool aligned;

    // Calls f(logit, id) for every token.
    template <class F>
    DEVICE_MEMBER void each(F f) const {
        for (int from = 4 * threadIdx.x; from < n; from += 8 * THREADS) {
            int second = from + 4 * THREADS;
            float4 v = load4(at, from, n, aligned), w = load4(at, second, n, aligned);
            f(v.x, from);
            if (from + 1 < n) f(v.y, from + 1);
            if (from + 2 < n) f(v.z, from + 2);
            if (from + 3 < n) f(v.w, from + 3);
            if (second < n) f(w.x, second);
            if (second + 1 < n) f(w.y, second + 1);
            if (second + 2 < n) f(w.z, second + 2);
            if (second + 3 < n) f(w.w, second + 3);
        }
    }
};

// How the tokens of a row are measured: each counts one, or by its weight in 2^-44.
template <bool BY_WEIGHT>
struct Measure {
    float max, temperature;
    DEVICE_MEMBER u64 operator()(float logit) const {
        if constexpr (!BY_WEIGHT) return 1;
        return __float2ull_rn(__fmul_rn(weight_of(logit, max, temperature), 17592186044416.0f));
    }
};

// The first key, going down, at which the measure of the keys so far reaches `wanted`, a share of the measure of all
// if BY_WEIGHT, among the keys from `from` on.
//
// Level 0 sorts the tokens into bins of 1/64 below the greatest logit, the last bin holding the rest. If the bin
// wanted has few members they are compared one by one; else their keys' bits are sorted into bins, level by level.
template <bool BY_WEIGHT>
DEVICE u64 select(SampleShared& s, const Logits& row, Measure<BY_WEIGHT> measure, u64 from, double wanted) {
    const int t = threadIdx.x;
    const auto coarse = [&](float logit) {
        return BINS - 1 - (int)fminf((measure.max - logit) * 64.0f, (float)(BINS - 1));
    };
    int bin0 = -1, above = 64, n_members = 0;
    u64 base = 0, prefix = 0;
    const auto takes_part = [&](float logit, u64 key) {
        if (key < from) return false;
        if (bin0 < 0) return true;
        return coarse(logit) == bin0 && (above == 64 || key >> above == prefix);
    };
    for (int level = 0; level < 6; level++) {
        // Ids have 20 bits at most, so that twelve bits of every key are ones.
        const int shift = level == 1 ? 53 : level == 2 ? 42 : level == 3 ? 32 : level == 4 ? 10 : 0;
        const int mask = level < 3 ? 2047 : 1023;
        __syncthreads();
        for (int bin = t; bin < BINS; bin += THREADS) {
            s.counts[bin] = 0;
            if constexpr (BY_WEIGHT) s.low[bin] = 0, s.high[bin] = 0;
        }
        if (t == 0) s.found = -1;
        __syncthreads();
        const auto add = [&](int bin, u32 n, u64 amount) {
            atomicAdd(&s.counts[bin], n);
            if constexpr (BY_WEIGHT) {
                u32 low = (u32)amount, high = (u32)(amount >> 32);
                if (low) high += atomicAdd(&s.low[bin], low) + low < low;
                if (high) atomicAdd(&s.high[bin], high);
            }
        };
        u32 n_rest = 0;
        u64 rest = 0;
        row.each([&](float logit, u32 id) {
            u64 key = key_of(logit, id);
            if (!takes_part(logit, key)) return;
            int bin = level == 0 ? coarse(logit) : (int)(key >> shift) & mask;
            if (level == 0 && bin == 0) {
                n_rest++, rest += measure(logit);
            } else {
                add(bin, 1, measure(logit));
            }
        });
        if (n_rest) add(0, n_rest, rest);
        __syncthreads();
        // Two bins a thread, greatest first.
        int bin = BINS - 1 - 2 * t;
        const auto amount_of = [&](int bin) {
            return BY_WEIGHT ? (u64)s.high[bin] << 32 | s.low[bin] : (u64)s.counts[bin];
        };
        u64 first = amount_of(bin), second = amount_of(bin - 1), total;
        u64 before = base + sum_before(first + second, s.warps, total);
        if (BY_WEIGHT && level == 0) wanted *= (double)total;
        bool takes_first = s.counts[bin] && (double)(before + first) >= wanted;
        bool takes_second = s.counts[bin - 1] && (double)(before + first + second) >= wanted;
        if (takes_first || takes_second) atomicMax(&s.found, takes_first ? bin : bin - 1);
        __syncthreads();
        int found = s.found;
        if (found < 0) return from;
        if (found == bin || found == bin - 1) {
            s.base = found == bin ? before : before + first;
            s.n_members = s.counts[found];
        }
        __syncthreads();
        base = s.base, n_members = s.n_members;
        if (level == 0) {
            bin0 = found;
        } else {
            prefix = level == 4 ? prefix << 22 | 0x3ffc00u | found : prefix << (above - shift) | found;
            above = shift;
        }
        if (n_members <= MEMBERS) break;
    }
    // One key a thread: what stands before it is the sum over all that are greater.
    __syncthreads();
    if (t == 0) s.n_members = 0;
    __syncthreads();
    row.each([&](float logit, u32 id) {
        u64 key = key_of(logit, id);
        if (!takes_part(logit, key)) return;
        int at = atomicAdd(&s.n_members, 1);
        s.keys[at] = key;
        if constexpr (BY_WEIGHT) s.measures[at] = measure(logit);
    });
    __syncthreads();
    if (t < n_members) {
        u64 key = s.keys[t], before = base;
        bool first = true;
        for (int other = 0; other < n_members; other++) {
            if (s.keys[other] > key) before += BY_WEIGHT ? s.measures[other] : 1, first = false;
        }
        u64 through = before + (BY_WEIGHT ? s.measures[t] : 1);
        if ((double)through >= wanted && (first || (double)before < wanted)) s.key = key;
    }
    __syncthreads();
    return s.key;
}

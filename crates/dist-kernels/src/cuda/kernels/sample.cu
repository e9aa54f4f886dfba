// sample: one token a row, a function of the row's logits, its parameters and nothing else. Bound by reading the
// logits once; a row that filters reads them again from L2, two times a filter and once for the draw.
//
// Layout: logits f32 [rows, ld], the first n_vocab columns count. Scratch: partials [rows, div_ceil(n_vocab, 1024)].
//
// Launch: grid (blocks of a row, rows), 1,024 threads, cluster (blocks of a row, 1, 1): one or, on Hopper, up to eight.
// n_vocab is at most 524,288.
//
// The blocks of a row share its tokens; what depends on all of them each block finds out by itself, from the same
// numbers, so that all take the same way. Sums do not depend on the number of blocks: a warp sums up 1,024 tokens for
// the normaliser, or a stride of them for the draw, in double precision, and those sums are added in one order; the
// choice of the nucleus adds whole numbers of 2^-44. The weights of a draw are the CPU's bit for bit (the same
// exponential, the same order of operations). Tokens, and with them all keys, are never equal.

constexpr int THREADS = 1024, WARPS = THREADS / 32, CHUNK = 1024, MAX_CHUNKS = 512;
constexpr int BINS = 2048, MEMBERS = 1024, STRIDES = 1024;
constexpr float LARGEST = 3.402823466e38f;
constexpr u32 NO_TOKEN = 0xffffffffu;

struct SampleRow {
    u32 target;        // scored instead of drawing; NO_TOKEN: draw
    u32 fallback;      // where no logit is finite
    u32 first_change;  // its changes in SampleArgs::changes
    u32 n_changes;
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
    u32 seed_low, seed_high;
    u32 sample_idx;
    u32 position;
};

// One change of a logit; those of a row are sorted by token, those of a token stand in the order of their effect.
struct SampleChange {
    u32 id;
    u32 op;  // 0: repetition penalty, 1: subtract, 2: add, 3: ban
    float value;
    float before;  // written here: the logit before the token's first change
};

struct SamplePartial {
    u64 best;    // greatest key of the chunk
    double sum;  // of exp(logit - the chunk's greatest)
};

struct SampleArgs {
    float* logits;
    i64 ld;
    const SampleRow* rows;
    SampleChange* changes;
    SamplePartial* partials;
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
            u32 counts[BINS], low[BINS], high[BINS];
        };
        struct {
            u64 keys[MEMBERS], measures[MEMBERS];  // of this block
        };
        double masses[STRIDES];
    };
    u64 all_keys[MEMBERS], all_measures[MEMBERS];  // of the row
    u64 warps[WARPS];
    double sums[WARPS];
    u64 key, base;
    double left;
    int found, n_members, n_own;
};

// The blocks of a row.
struct Blocks {
    u32 rank, size;
    // A barrier of all their threads; what was written before it may be read after it.
    DEVICE_MEMBER void meet() const {
        if (size > 1) {
            __syncwarp();
            cluster_arrive();
            cluster_wait();
        } else {
            __syncthreads();
        }
    }
};

// The same place in the shared memory of block `rank`.
template <class V>
DEVICE V load_of(const Blocks& blocks, const V* at, u32 rank) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 4, "a word or two");
#if HOPPER
    if (blocks.size > 1) {
        u32 remote;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(at)), "r"(rank));
        if constexpr (sizeof(V) == 8) {
            u64 bits;
            asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(remote) : "memory");
            return *(V*)&bits;
        } else {
            u32 bits;
            asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(remote) : "memory");
            return *(V*)&bits;
        }
    }
#endif
    return *at;
}

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

// A row as all of its blocks read it.
struct Logits {
    const float* at;
    int n;
    bool aligned;
    Blocks blocks;

    // Calls f(logit, id) for this thread's tokens.
    template <class F>
    DEVICE_MEMBER void each(F f) const {
        int step = 4 * THREADS * blocks.size;
#pragma unroll 1
        for (int from = 4 * (blocks.rank * THREADS + threadIdx.x); from < n; from += step) {
            float4 v = load4(at, from, n, aligned);
            f(v.x, from);
            if (from + 1 < n) f(v.y, from + 1);
            if (from + 2 < n) f(v.z, from + 2);
            if (from + 3 < n) f(v.w, from + 3);
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

// Brings the keys and measures of the tokens that `takes_part` picks, at most MEMBERS, to every block of the row, in any
// order.
template <class P, class M>
DEVICE void gather(SampleShared& s, const Logits& row, P takes_part, M measure) {
    const int t = threadIdx.x;
    row.blocks.meet();
    if (t == 0) s.n_own = 0;
    __syncthreads();
    row.each([&](float logit, u32 id) {
        u64 key = key_of(logit, id);
        if (!takes_part(logit, key)) return;
        int at = atomicAdd(&s.n_own, 1);
        s.keys[at] = key;
        s.measures[at] = measure(logit);
    });
    row.blocks.meet();
    int first = 0;
#pragma unroll 1
    for (u32 rank = 0; rank < row.blocks.size; rank++) {
        int n = load_of(row.blocks, &s.n_own, rank);
        if (t >= first && t < first + n) {
            s.all_keys[t] = load_of(row.blocks, &s.keys[t - first], rank);
            s.all_measures[t] = load_of(row.blocks, &s.measures[t - first], rank);
        }
        first += n;
    }
    __syncthreads();
}

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
        row.blocks.meet();
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
        row.blocks.meet();
        // Two bins a thread, greatest first, each of all blocks.
        int bin = BINS - 1 - 2 * t;
        u32 n_first = 0, n_second = 0;
        u64 first = 0, second = 0, total;
#pragma unroll 1
        for (u32 rank = 0; rank < row.blocks.size; rank++) {
            u64 n = load_of(row.blocks, (const u64*)&s.counts[bin - 1], rank);
            n_first += (u32)(n >> 32), n_second += (u32)n;
            if constexpr (BY_WEIGHT) {
                u64 low = load_of(row.blocks, (const u64*)&s.low[bin - 1], rank);
                u64 high = load_of(row.blocks, (const u64*)&s.high[bin - 1], rank);
                first += (high & 0xffffffff00000000u) + (low >> 32);
                second += (high << 32) + (u32)low;
            }
        }
        if constexpr (!BY_WEIGHT) first = n_first, second = n_second;
        u64 before = base + sum_before(first + second, s.warps, total);
        if (BY_WEIGHT && level == 0) wanted *= (double)total;
        bool takes_first = n_first && (double)(before + first) >= wanted;
        bool takes_second = n_second && (double)(before + first + second) >= wanted;
        if (takes_first || takes_second) atomicMax(&s.found, takes_first ? bin : bin - 1);
        __syncthreads();
        int found = s.found;
        if (found < 0) return from;
        if (found == bin || found == bin - 1) {
            s.base = found == bin ? before : before + first;
            s.n_members = found == bin ? n_first : n_second;
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
    gather(s, row, takes_part, measure);
    // One key a thread: what stands before it is the sum over all that are greater.
    if (t < n_members) {
        u64 key = s.all_keys[t], before = base;
        bool first = true;
        for (int other = 0; other < n_members; other++) {
            if (s.all_keys[other] > key) before += BY_WEIGHT ? s.all_measures[other] : 1, first = false;
        }
        u64 through = before + (BY_WEIGHT ? s.all_measures[t] : 1);
        if ((double)through >= wanted && (first || (double)before < wanted)) s.key = key;
    }
    __syncthreads();
    return s.key;
}

struct Softmax {
    double max, log_sum;
    // The model's log-probability.
    DEVICE_MEMBER float at(float logit) const {
        return logit == minus_infinity() ? logit : (float)((double)logit - max - log_sum);
    }
};

// The likeliest tokens, best first.
DEVICE void report_top(SampleShared& s, const SampleArgs& args, const Logits& row, const Softmax& softmax) {
    const int t = threadIdx.x, n = args.n_top;
    u64 worst = select<false>(s, row, Measure<false>{(float)softmax.max, 1.0f}, 0, n);
    gather(s, row, [&](float, u64 key) { return key >= worst; }, [](float) { return 0ull; });
    if (t < n && row.blocks.rank == 0) {
        u64 key = s.all_keys[t];
        int rank = 0;
        for (int other = 0; other < n; other++) rank += s.all_keys[other] > key;
        i64 to = (i64)blockIdx.y * n + rank;
        args.top_ids[to] = id_of(key);
        args.top_logprobs[to] = softmax.at(logit_of(key));
    }
}

// Applies penalties, biases and bans in place: a thread a token.
DEVICE void adjust(const SampleRow& how, SampleChange* changes, float* logits, int n_vocab) {
    for (int i = threadIdx.x; i < (int)how.n_changes; i += THREADS) {
        u32 id = changes[i].id;
        if (id >= n_vocab || (i && changes[i - 1].id == id)) continue;
        float logit = cleaned(logits[id]);
        changes[i].before = logit;
        for (int j = i; j < (int)how.n_changes && changes[j].id == id; j++) {
            float value = changes[j].value;
            u32 op = changes[j].op;
            if (op == 0) logit = logit > 0.0f ? __fdiv_rn(logit, value) : __fmul_rn(logit, value);
            if (op == 1) logit = __fsub_rn(logit, value);
            if (op == 2) logit = __fadd_rn(logit, value);
            if (op == 3) logit = minus_infinity();
            logit = cleaned(logit);
        }
        logits[id] = logit;
    }
}

// The logit that a token had before `adjust`.
DEVICE float logit_before(SampleShared& s, const SampleRow& how, const SampleChange* changes, const float* logits,
                          u32 id) {
    __syncthreads();
    if (threadIdx.x == 0) s.key = key_of(cleaned(logits[id]), 0);
    __syncthreads();
    for (int i = threadIdx.x; i < (int)how.n_changes; i += THREADS) {
        if (changes[i].id == id && (i == 0 || changes[i - 1].id != id)) s.key = key_of(changes[i].before, 0);
    }
    __syncthreads();
    return logit_of(s.key);
}

// A number in [0, 1): ten rounds of Philox4x32 over position and sample, under the request's seed.
DEVICE double uniform(const SampleRow& how) {
    u32 c0 = how.position, c1 = how.sample_idx, c2 = 0, c3 = 0, k0 = how.seed_low, k1 = how.seed_high;
    for (int round = 0; round < 10; round++) {
        u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    u64 bits = (u64)c0 << 32 | c1;
    return (double)(bits >> 11) * (1.0 / 9007199254740992.0);
}

// Inverse of the distribution function: the first token, by id, at which the running sum exceeds the share `u`. The
// first block of the row gets it.
template <class W>
DEVICE u32 draw(SampleShared& s, const Logits& row, W kept_weight, double u) {
    const int t = threadIdx.x, lane = t % 32, per_lane = 8 * div_ceil(row.n, 256 * STRIDES), stride = 32 * per_lane;
    const auto sum_lane = [&](int from) {
        double sum = 0.0;
        for (int at = from; at < from + per_lane; at += 4) {
            float4 v = load4(row.at, at, row.n, row.aligned);
            sum += (double)kept_weight(v.x, at) + (double)kept_weight(v.y, at + 1);
            sum += (double)kept_weight(v.z, at + 2) + (double)kept_weight(v.w, at + 3);
        }
        return sum;
    };
    const Blocks& blocks = row.blocks;
    blocks.meet();
    for (int at = blocks.rank * WARPS + t / 32; at < STRIDES; at += WARPS * blocks.size) {
        double sum = at * stride < row.n ? sum_lane(at * stride + lane * per_lane) : 0.0;
        sum = warp_reduce(sum, [](double a, double b) { return a + b; });
        if (lane == 0) s.masses[at] = sum;
    }
    if (t == 0) s.found = STRIDES, s.n_members = 0;
    blocks.meet();
    if (blocks.rank > 0) return 0;
    double mass = load_of(blocks, &s.masses[t], t / WARPS % blocks.size), total, before = sum_before(mass, s.sums, total), left = u * total;
    if (mass > 0.0 && left < before + mass) atomicMin(&s.found, t);
    // Should rounding carry the walk past the end, the last possible token is the one.
    if (mass > 0.0) atomicMax(&s.n_members, t);
    __syncthreads();
    int found = s.found < STRIDES ? s.found : s.n_members;
    if (t == found) s.left = left - before;
    __syncthreads();
    if (t < 32) {
        left = s.left;
        int from = found * stride + lane * per_lane;
        double running = sum_lane(from), own = running;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            double other = __shfl_up_sync(0xffffffffu, running, step);
            if (lane >= step) running += other;
        }
        running -= own;
        int hit = 0x7fffffff, last = 0;
        for (int at = from; at < from + per_lane && at < row.n; at++) {
            float weight = kept_weight(cleaned(row.at[at]), at);
            if (weight > 0.0f) {
                running += (double)weight;
                last = at;
                if (left < running) hit = min_of(hit, at);
            }
        }
        hit = warp_reduce(hit, [](int a, int b) { return min_of(a, b); });
        last = warp_reduce(last, [](int a, int b) { return max_of(a, b); });
        if (lane == 0) s.found = hit < 0x7fffffff ? hit : last;
    }
    __syncthreads();
    return s.found;
}

// Draws a token of the adjusted logits, of which `best` is the likeliest; the first block of the row gets it.
DEVICE u32 choose(SampleShared& s, const SampleRow& how, const Logits& row, u64 best) {
    float max = logit_of(best);
    if (max == minus_infinity()) return how.fallback;
    if (!(how.temperature > 0.0f)) return id_of(best);
    float temperature = fminf(how.temperature, LARGEST);
    u64 worst = 0;
    if (how.top_k > 0 && how.top_k < row.n) {
        worst = select<false>(s, row, Measure<false>{max, temperature}, 0, how.top_k);
    }
    if (how.top_p < 1.0f) {
        worst = select<true>(s, row, Measure<true>{max, temperature}, worst, how.top_p);
    }
    // The likeliest token stays whatever was asked for.
    float least = how.min_p > 0.0f ? fminf(how.min_p, 1.0f) : 0.0f;
    const auto kept_weight = [&](float logit, u32 id) {
        if (id >= row.n || key_of(logit, id) < worst) return 0.0f;
        float weight = weight_of(logit, max, temperature);
        return weight >= least ? weight : 0.0f;
    };
    return draw(s, row, kept_weight, uniform(how));
}

// The sums of this block's chunks of the row, a warp's each time.
DEVICE void sum_chunks(const Logits& row, SamplePartial* partials) {
    const int lane = threadIdx.x % 32, n_chunks = div_ceil(row.n, CHUNK);
    for (int chunk = row.blocks.rank * WARPS + threadIdx.x / 32; chunk < n_chunks; chunk += WARPS * row.blocks.size) {
        const int from = chunk * CHUNK + 4 * lane;
        float4 x[CHUNK / 128];
#pragma unroll
        for (int i = 0; i < CHUNK / 128; i++) x[i] = load4(row.at, from + 128 * i, row.n, row.aligned);
        u64 best = 0;
#pragma unroll
        for (int i = 0; i < CHUNK / 128; i++) {
            // The greatest of four; the first of equals.
            int at = from + 128 * i;
            float max = x[i].x;
            if (x[i].y > max) max = x[i].y, at = from + 128 * i + 1;
            if (x[i].z > max) max = x[i].z, at = from + 128 * i + 2;
            if (x[i].w > max) max = x[i].w, at = from + 128 * i + 3;
            best = greater(best, key_of(max, at));
        }
        best = warp_reduce(best, greater);
        float max = logit_of(best), sum = 0.0f;
        if (max > minus_infinity()) {
            // Beyond the vocabulary stands -infinity, whose exponential is zero.
#pragma unroll
            for (int i = 0; i < CHUNK / 128; i++) {
                sum += (__expf(x[i].x - max) + __expf(x[i].y - max)) + (__expf(x[i].z - max) + __expf(x[i].w - max));
            }
        }
        double total = warp_reduce((double)sum, [](double a, double b) { return a + b; });
        if (lane == 0) partials[chunk] = SamplePartial{best, total};
    }
}

// The greatest key and the model's normaliser, from all chunks of the row.
DEVICE Softmax combine(SampleShared& s, const SamplePartial* partials, int n_chunks, u64& best) {
    bool there = threadIdx.x < n_chunks;
    u64 key = there ? __ldcg(&partials[threadIdx.x].best) : 0;
    double sum = there ? __ldcg(&partials[threadIdx.x].sum) : 0.0;
    best = block_reduce(key, s.warps, greater);
    float max = logit_of(best);
    if (sum > 0.0) sum *= exp((double)logit_of(key) - (double)max);
    sum = block_reduce(sum, s.sums, [](double a, double b) { return a + b; });
    return Softmax{max, log(sum)};
}

KERNEL __launch_bounds__(THREADS) sample_f32(const __grid_constant__ SampleArgs args) {
    __shared__ SampleShared s;
    let_next_start();
    wait_for_previous();
    const int row_idx = blockIdx.y, n_chunks = div_ceil(args.n_vocab, CHUNK);
    const Blocks blocks{blockIdx.x, gridDim.x};
    float* logits = args.logits + (i64)row_idx * args.ld;
    const Logits row{logits, args.n_vocab, (u64)logits % 16 == 0, blocks};
    SamplePartial* partials = args.partials + (i64)row_idx * n_chunks;
    sum_chunks(row, partials);
    blocks.meet();
    u64 best;
    Softmax softmax = combine(s, partials, n_chunks, best);
    if (args.n_top > 0) report_top(s, args, row, softmax);
    const SampleRow how = args.rows[row_idx];
    SampleChange* changes = args.changes + how.first_change;
    const bool draws = how.target == NO_TOKEN, changed = draws && how.n_changes > 0;
    u32 id = how.target;
    if (changed) {
        // Others may still read the logits.
        blocks.meet();
        if (blocks.rank == 0) adjust(how, changes, logits, row.n);
        blocks.meet();
        best = 0;
        row.each([&](float logit, u32 id) { best = greater(best, key_of(logit, id)); });
        best = block_reduce(best, s.warps, greater);
        if (threadIdx.x == 0) s.key = best;
        blocks.meet();
#pragma unroll 1
        for (u32 rank = 0; rank < blocks.size; rank++) best = greater(best, load_of(blocks, &s.key, rank));
        blocks.meet();
    }
    if (draws) id = choose(s, how, row, best);
    if (blocks.rank == 0) {
        float logit = changed ? logit_before(s, how, changes, logits, id) : cleaned(logits[id]);
        if (threadIdx.x == 0) args.ids[row_idx] = id, args.logprobs[row_idx] = softmax.at(logit);
    }
    // Nobody leaves while others may read its shared memory.
    blocks.meet();
}

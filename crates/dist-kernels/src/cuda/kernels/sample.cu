// sample: one token a row, a function of the row's logits, its parameters and nothing else. Bound by reading the
// logits once; a row that filters reads them again from L2, two times a filter and once for the draw.
//
// Layout: logits f32 [rows, ld], the first n_vocab columns count. Scratch: partials [rows, chunks], tickets [rows],
// zero before and after.
//
// Launch: grid (chunks = div_ceil(n_vocab, 8192), rows), 1024 threads. Each block sums up its chunk; the last block of
// a row to end does the rest of the row. n_vocab is at most 524,288.
//
// The weights are the CPU's bit for bit (the same exponential, the same order of operations). Sums of weights are
// taken in double precision for the draw, in whole numbers of 2^-44 for the choice of the nucleus, so that the order
// of the additions does not matter; tokens, and with them all keys, are never equal.

constexpr int THREADS = 1024, WARPS = THREADS / 32, CHUNK = 8192, MAX_CHUNKS = 64;
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
    __syncthreads();
    if (t == 0) s.n_members = 0;
    __syncthreads();
    row.each([&](float logit, u32 id) {
        u64 key = key_of(logit, id);
        if (key >= worst) s.keys[atomicAdd(&s.n_members, 1)] = key;
    });
    __syncthreads();
    if (t < n) {
        u64 key = s.keys[t];
        int rank = 0;
        for (int other = 0; other < n; other++) rank += s.keys[other] > key;
        i64 to = (i64)blockIdx.y * n + rank;
        args.top_ids[to] = id_of(key);
        args.top_logprobs[to] = softmax.at(logit_of(key));
    }
    __syncthreads();
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

// Inverse of the distribution function: the first token, by id, at which the running sum exceeds the share `u`.
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
    __syncthreads();
    for (int at = t / 32; at < STRIDES; at += WARPS) {
        double sum = at * stride < row.n ? sum_lane(at * stride + lane * per_lane) : 0.0;
        sum = warp_reduce(sum, [](double a, double b) { return a + b; });
        if (lane == 0) s.masses[at] = sum;
    }
    if (t == 0) s.found = STRIDES, s.n_members = 0;
    __syncthreads();
    double mass = s.masses[t], total, before = sum_before(mass, s.sums, total), left = u * total;
    if (mass > 0.0 && left < before + mass) atomicMin(&s.found, t);
    // Should rounding carry the walk past the end, the last possible token is the one.
    if (mass > 0.0) atomicMax(&s.n_members, t);
    __syncthreads();
    int found = s.found < STRIDES ? s.found : s.n_members;
    if (t == found) s.log_sum = left - before;
    __syncthreads();
    if (t < 32) {
        left = s.log_sum;
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

// Draws a token of the adjusted logits, of which `best` is the likeliest.
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

// The greatest key and the model's normaliser, from all chunks of the row.
DEVICE Softmax combine(SampleShared& s, const SamplePartial* partials, int n_chunks, u64& best) {
    if (threadIdx.x < 32) {
        u64 keys[2];
        double sums[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int chunk = threadIdx.x + 32 * i;
            bool there = chunk < n_chunks;
            keys[i] = there ? __ldcg(&partials[chunk].best) : 0;
            sums[i] = there ? __ldcg(&partials[chunk].sum) : 0.0;
        }
        u64 key = warp_reduce(greater(keys[0], keys[1]), greater);
        float max = logit_of(key);
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (sums[i] > 0.0) sum += sums[i] * exp((double)logit_of(keys[i]) - (double)max);
        }
        sum = warp_reduce(sum, [](double a, double b) { return a + b; });
        if (threadIdx.x == 0) s.key = key, s.log_sum = log(sum);
    }
    __syncthreads();
    best = s.key;
    return Softmax{logit_of(best), s.log_sum};
}

KERNEL __launch_bounds__(THREADS) sample_f32(const __grid_constant__ SampleArgs args) {
    __shared__ SampleShared s;
    let_next_start();
    wait_for_previous();
    const int t = threadIdx.x, chunk = blockIdx.x, n_chunks = gridDim.x, row_idx = blockIdx.y;
    float* logits = args.logits + (i64)row_idx * args.ld;
    const Logits row{logits, args.n_vocab, (u64)logits % 16 == 0};
    const int from = chunk * CHUNK + 4 * t, end = min_of(row.n, (chunk + 1) * CHUNK);
    float x[8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 v = load4(logits, from + 4 * THREADS * i, end, row.aligned);
        x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) best = greater(best, key_of(x[i], from + 4 * THREADS * (i / 4) + i % 4));
    best = block_reduce(best, s.warps, greater);
    double sum = 0.0;
    if (logit_of(best) > minus_infinity()) {
        // Beyond the vocabulary stands -infinity, whose exponential is zero.
#pragma unroll
        for (int i = 0; i < 8; i++) sum += (double)exponential(__fsub_rn(x[i], logit_of(best)));
    }
    sum = block_reduce(sum, s.sums, [](double a, double b) { return a + b; });
    SamplePartial* partials = args.partials + (i64)row_idx * n_chunks;
    if (t == 0) {
        partials[chunk] = SamplePartial{best, sum};
        __threadfence();
        s.last = atomicAdd(&args.tickets[row_idx], 1) == n_chunks - 1;
        __threadfence();
    }
    __syncthreads();
    if (!s.last) return;
    if (t == 0) args.tickets[row_idx] = 0;
    Softmax softmax = combine(s, partials, n_chunks, best);
    if (args.n_top > 0) report_top(s, args, row, softmax);
    const SampleRow how = args.rows[row_idx];
    SampleChange* changes = args.changes + how.first_change;
    u32 id = how.target;
    if (id == NO_TOKEN) {
        if (how.n_changes > 0) {
            adjust(how, changes, logits, row.n);
            __syncthreads();
            best = 0;
            row.each([&](float logit, u32 id) { best = greater(best, key_of(logit, id)); });
            best = block_reduce(best, s.warps, greater);
        }
        id = choose(s, how, row, best);
    }
    float logit = how.n_changes > 0 && how.target == NO_TOKEN ? logit_before(s, how, changes, logits, id)
                                                              : cleaned(logits[id]);
    if (t == 0) args.ids[row_idx] = id, args.logprobs[row_idx] = softmax.at(logit);
}

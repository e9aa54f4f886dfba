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
    if (max == minus_infinity()) return how.fallback < row.n ? how.fallback : 0;
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
    SampleChange* changes = how.changes;
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

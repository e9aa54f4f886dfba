//! The order of tokens by likelihood and selections in it: partial ones, the vocabulary is never sorted as a whole.
//!
//! Logits here hold no NaN: `sample.rs` cleans them first.

/// Place of a token in the order: greater is likelier, and among equal logits the lower id is greater.
pub(super) fn key(logit: f32, id: u32) -> u64 {
    // Adding +0 turns −0 into +0: they are equal as numbers.
    let bits = (logit + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!id)
}

/// The token that a key stands for.
pub(super) fn id_of(key: u64) -> u32 {
    !(key as u32)
}

/// The likeliest token; 0 if there is none.
pub(super) fn best(logits: &[f32]) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&l| l >= max).unwrap_or(0) as u32
}

/// Leaves the keys of the `n` likeliest tokens in `keys`, best first.
pub(super) fn top_n(logits: &[f32], n: usize, keys: &mut Vec<u64>) {
    keys.clear();
    if n == 0 {
        return;
    }
    // Candidates gather up to twice the number wanted, then the worse half goes and what remains sets the bar.
    let room = 2 * n.max(32);
    let mut bar = f32::NEG_INFINITY;
    for (chunk_idx, chunk) in logits.chunks(16).enumerate() {
        // Counting instead of stopping at the first lets the compiler compare several at once.
        if chunk.iter().fold(0, |n, &l| n + u32::from(l >= bar)) == 0 {
            continue;
        }
        for (lane, &logit) in chunk.iter().enumerate().filter(|&(_, &l)| l >= bar) {
            keys.push(key(logit, (16 * chunk_idx + lane) as u32));
        }
        if keys.len() + 16 > room {
            keep_best(keys, n);
            // Later tokens have greater ids, so that an equal logit is worse than the bar and does no harm.
            bar = keys.iter().min().map_or(bar, |&worst| logits[id_of(worst) as usize]);
        }
    }
    keep_best(keys, n);
    keys.sort_unstable_by(|a, b| b.cmp(a));
}

/// Keeps the `n` greatest keys, in any order.
fn keep_best(keys: &mut Vec<u64>, n: usize) {
    if keys.len() > n {
        keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        keys.truncate(n);
    }
}

/// Buckets of equal width in tempered logits below the greatest one; the last one holds the rest.
const BUCKETS: usize = 2048;
/// Buckets per unit: the last one starts 32 below the greatest, at e⁻³² of its weight.
const PER_UNIT: f32 = 64.0;

/// The vocabulary sorted coarsely, so that only one bucket has to be sorted finely.
///
/// The bucket falls as the logit falls, because subtraction, division and truncation are monotone.
pub(super) struct Buckets {
    bucket_of: Vec<u16>,
    n_tokens: Vec<u32>,
    mass: Vec<f64>,
    members: Vec<u64>,
}

/// The tokens whose key is at least `key`, and the sum of their weights.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    /// The worst key that is kept.
    pub(super) key: u64,
    bucket: usize,
    mass: f64,
}

impl Buckets {
    pub(super) fn new() -> Self {
        let (n_tokens, mass) = (vec![0; BUCKETS], vec![0.0; BUCKETS]);
        Self { bucket_of: Vec::new(), n_tokens, mass, members: Vec::new() }
    }

    /// Sorts the tokens by their distance from `max`; `weights` are their unnormalised probabilities.
    pub(super) fn fill(&mut self, logits: &[f32], weights: &[f32], max: f32, temperature: f32) {
        self.n_tokens.fill(0);
        self.mass.fill(0.0);
        self.bucket_of.clear();
        self.bucket_of.extend(logits.iter().map(|&logit| {
            let below = (max - logit) / temperature * PER_UNIT;
            below.min((BUCKETS - 1) as f32) as u16
        }));
        for (&bucket, &weight) in self.bucket_of.iter().zip(weights) {
            self.n_tokens[usize::from(bucket)] += 1;
            self.mass[usize::from(bucket)] += f64::from(weight);
        }
    }

    /// All tokens.
    pub(super) fn all(&self) -> Kept {
        Kept { key: 0, bucket: BUCKETS - 1, mass: self.mass.iter().sum() }
    }

    /// The `k` likeliest tokens; `k` is at least one and at most the vocabulary.
    pub(super) fn likeliest(&mut self, logits: &[f32], weights: &[f32], k: usize) -> Kept {
        let (mut bucket, mut n, mut mass) = (0, 0, 0.0);
        while n + (self.n_tokens[bucket] as usize) < k {
            n += self.n_tokens[bucket] as usize;
            mass += self.mass[bucket];
            bucket += 1;
        }
        self.collect(logits, bucket, 0);
        let taken = k - n;
        self.members.select_nth_unstable_by(taken - 1, |a, b| b.cmp(a));
        let key = self.members[taken - 1];
        // The sum must not depend on how the selection shuffles its input.
        for (id, &logit) in logits.iter().enumerate() {
            if usize::from(self.bucket_of[id]) == bucket && self::key(logit, id as u32) >= key {
                mass += f64::from(weights[id]);
            }
        }
        Kept { key, bucket, mass }
    }

    /// The smallest part of `kept`, likeliest first, whose weight reaches `share` of it; at least one token.
    pub(super) fn nucleus(&mut self, logits: &[f32], weights: &[f32], kept: Kept, share: f32) -> Kept {
        let wanted = f64::from(share) * kept.mass;
        let (mut bucket, mut mass) = (0, 0.0);
        while bucket < kept.bucket && mass + self.mass[bucket] < wanted {
            mass += self.mass[bucket];
            bucket += 1;
        }
        self.collect(logits, bucket, if bucket == kept.bucket { kept.key } else { 0 });
        self.members.sort_unstable_by(|a, b| b.cmp(a));
        let mut key = kept.key;
        for &member in &self.members {
            key = member;
            mass += f64::from(weights[id_of(member) as usize]);
            if mass >= wanted {
                break;
            }
        }
        Kept { key, bucket, mass }
    }

    /// The keys of one bucket's tokens that are at least `from`.
    fn collect(&mut self, logits: &[f32], bucket: usize, from: u64) {
        self.members.clear();
        for (id, (&logit, &own)) in logits.iter().zip(&self.bucket_of).enumerate() {
            let key = key(logit, id as u32);
            if usize::from(own) == bucket && key >= from {
                self.members.push(key);
            }
        }
    }
}

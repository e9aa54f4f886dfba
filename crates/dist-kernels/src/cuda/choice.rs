//! Which variant of a kernel a shape runs on, and the shape of its launch. A choice depends on the number of rows only by
//! its bucket, so that a row gives the same bits alone and among others of its bucket.

mod gemm;
mod streaming;

#[cfg(test)]
pub(super) use gemm::gemm_launches;
pub(super) use gemm::{Gemm, GemmChoices, gemm_takes};
pub(super) use streaming::{Chip, streaming, streaming_rows_max};

/// A kernel of `gemm` without its type, its tile and its threads.
pub(super) fn gemm_general(rows: usize, n: usize, k: usize, n_sms: usize) -> (&'static str, usize, u32) {
    if !k.is_multiple_of(8) {
        ("gemm_any", 128, 256)
    } else if rows.div_ceil(128) * n.div_ceil(128) >= n_sms {
        ("gemm_t128x128", 128, 256)
    } else {
        ("gemm_t64x64", 64, 128)
    }
}

/// Rows times heads of a group from which on attention takes a sequence's rows in large tiles.
const PREFILL_FROM: usize = 32;

/// Whether attention is for prompts: `attention_prefill` takes it, with the same shapes as `attention_decode`.
pub(super) fn is_prefill(shape: DecodeShape) -> bool {
    shape.max_rows > 1 && shape.max_rows * shape.n_heads / shape.n_kv_heads >= PREFILL_FROM
}

/// Head sizes that `attention_decode` is made for, each with its variants: for as many blocks as multiprocessors at most,
/// for up to twice as many, and for more.
const DECODE_HEADS: [(usize, [&str; 3]); 4] = [
    (64, ["attention_decode_d64w12", "attention_decode_d64s2", "attention_decode_d64s2"]),
    (80, ["attention_decode_d80", "attention_decode_d80", "attention_decode_d80s2"]),
    (96, ["attention_decode_d96"; 3]),
    (128, ["attention_decode_d128w8", "attention_decode_d128", "attention_decode_d128s2"]),
];
/// Its entries of a tile.
const DECODE_ENTRIES: usize = 8;
/// More parts of a context cost more than they give.
const SPLITS_MAX: usize = 32;

/// The shape of a launch of `attention_decode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decode {
    /// Without its type.
    pub(super) symbol: &'static str,
    /// Parts of a context.
    pub(super) splits: usize,
    /// Tiles of a sequence's rows and heads that share a KV head.
    pub(super) tiles: usize,
    /// Floats of one tile's part.
    pub(super) part_floats: usize,
}

/// What attention is asked for, as far as its launch depends on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct DecodeShape {
    pub(super) n_seqs: usize,
    pub(super) max_rows: usize,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) d_head: usize,
    pub(super) block_size: usize,
}

/// `None` where the kernel does not take the shape.
pub(super) fn decode(shape: DecodeShape, n_sms: usize) -> Option<Decode> {
    let (_, [few, twice, many]) = *DECODE_HEADS.iter().find(|head| head.0 == shape.d_head)?;
    if !shape.block_size.is_multiple_of(16) {
        return None;
    }
    let group = shape.n_heads / shape.n_kv_heads;
    let tiles = (shape.max_rows * group).div_ceil(DECODE_ENTRIES);
    // Buckets of sequences: one more or less of them changes nobody's sums.
    let blocks = shape.n_seqs.next_power_of_two() * shape.n_kv_heads * tiles;
    let splits = (n_sms / blocks.max(1)).clamp(1, SPLITS_MAX);
    let symbol = match blocks {
        _ if blocks <= n_sms => few,
        _ if blocks <= 2 * n_sms => twice,
        _ => many,
    };
    Some(Decode { symbol, splits, tiles, part_floats: DECODE_ENTRIES * (shape.d_head + 2) })
}

/// A kernel of `add_bias_norm` without its type, and its threads; `None` for rows that are too long.
pub(super) fn norm(d: usize) -> Option<(&'static str, u32)> {
    let (symbol, per_thread) = match d {
        _ if d.is_multiple_of(8) && d <= 8192 => ("add_bias_norm", 8),
        _ if d.is_multiple_of(8) && d <= 12288 => ("add_bias_norm_long", 16),
        _ if d <= 16384 => ("add_bias_norm_odd", 16),
        _ => return None,
    };
    Some((symbol, (d.div_ceil(per_thread).next_multiple_of(32)) as u32))
}

#[cfg(test)]
mod tests {
    use super::super::units::Unit;
    use super::*;

    /// Whether every symbol above is one of its unit's: a name that is mistyped would be found at run time only.
    pub(super) fn has(unit: &str, symbol: &str) -> bool {
        Unit::find(unit).is_some_and(|unit| {
            let made = unit.variants.iter().any(|variant| variant.symbol == symbol);
            let written =
                |end: &str| unit.files.iter().any(|file| file.text.contains(&format!("{symbol}_{end}")));
            let pasted = unit.files.iter().any(|file| file.text.contains(&format!("({symbol}_##dtype,")));
            made || pasted || (written("bf16") && written("f16"))
        })
    }

    #[test]
    fn every_choice_is_a_kernel_that_there_is() {
        for n in [1, 777, 4096, 50257] {
            assert!((1..=64).all(|rows| has("gemm", gemm_general(rows, n, n, 132).0)));
        }
        for (d_head, symbols) in DECODE_HEADS {
            assert!(symbols.iter().all(|symbol| has("attention_decode", symbol)));
            assert!(has("attention_prefill", &format!("attention_prefill_d{d_head}")));
            assert!(has("attention_prefill_hopper", &format!("attention_prefill_hopper_d{d_head}")));
        }
        for d in [64, 8192, 8200, 12288, 12289, 65] {
            let (symbol, threads) = norm(d).unwrap();
            assert!(has("norm", symbol) && threads <= 1024, "{d}: {symbol} {threads}");
        }
    }

    #[test]
    fn a_graph_bucket_of_sequences_has_one_kernel() {
        let shape =
            DecodeShape { n_seqs: 1, max_rows: 1, n_heads: 32, n_kv_heads: 32, d_head: 64, block_size: 16 };
        for bucket in [3..=4, 5..=8, 9..=16, 17..=32, 33..=64] {
            let last = decode(DecodeShape { n_seqs: *bucket.end(), ..shape }, 132);
            let all = bucket.clone().map(|n_seqs| decode(DecodeShape { n_seqs, ..shape }, 132));
            assert!(all.into_iter().all(|choice| choice == last), "{bucket:?}");
        }
    }

    #[test]
    fn a_single_long_sequence_is_split_and_many_are_not() {
        let shape =
            DecodeShape { n_seqs: 1, max_rows: 1, n_heads: 32, n_kv_heads: 32, d_head: 128, block_size: 16 };
        let one = decode(shape, 132).unwrap();
        assert_eq!((one.splits, one.symbol), (4, "attention_decode_d128w8"));
        let many = decode(DecodeShape { n_seqs: 64, ..shape }, 132).unwrap();
        assert_eq!((many.splits, many.symbol), (1, "attention_decode_d128s2"));
        let wave = decode(DecodeShape { n_seqs: 8, ..shape }, 132).unwrap();
        assert_eq!((wave.splits, wave.symbol), (1, "attention_decode_d128"));
        for (n_seqs, symbol) in [(4, "attention_decode_d64w12"), (5, "attention_decode_d64s2")] {
            let choice = decode(DecodeShape { n_seqs, d_head: 64, ..shape }, 132).unwrap();
            assert_eq!(choice.symbol, symbol, "{n_seqs} sequences");
        }
        assert_eq!(decode(DecodeShape { d_head: 24, ..shape }, 132), None);
        assert_eq!(decode(DecodeShape { block_size: 8, ..shape }, 132), None);
    }
}

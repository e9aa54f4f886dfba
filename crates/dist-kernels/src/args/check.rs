//! The contract of each step, in one place: both backends go through it, so a shape is wrong everywhere or nowhere.

use dist_core::DType;

use super::{
    AddBiasArgs, AddBiasNormArgs, AttentionArgs, EmbedArgs, GatherRowsArgs, K_SEGMENTS, LinearArgs,
    LogitsArgs, Norm, Prologue, Ragged, SampleArgs, Then,
};
use crate::backend::Backend;
use crate::weight::Buffer;

/// Asserts that `buf` holds at least `len` elements of `dtype`.
fn expect(what: &str, buf: &impl Buffer, dtype: DType, len: usize) {
    assert!(buf.dtype() == dtype, "{what} is {} but {dtype} is needed", buf.dtype());
    assert!(buf.len() >= len, "{what} has {} elements but {len} are needed", buf.len());
}

/// Activations: f32 on the CPU, f16 or bf16 on an accelerator; all of one step alike.
fn expect_act(what: &str, buf: &impl Buffer, len: usize) {
    assert!(buf.dtype().is_float(), "{what} is {} but activations are floats", buf.dtype());
    assert!(buf.len() >= len, "{what} has {} elements but {len} are needed", buf.len());
}

impl<B: Backend> Norm<'_, B> {
    /// Panics unless the vectors have `d` elements.
    pub fn check(&self, d: usize) {
        match self {
            Self::None => {}
            Self::Layer { weight, bias, .. } => {
                expect_act("norm weight", *weight, d);
                expect_act("norm bias", *bias, d);
            }
            Self::Rms { weight, .. } => expect_act("norm weight", *weight, d),
        }
    }
}

impl<B: Backend> EmbedArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        expect_act("embed: out [rows, d]", self.out, self.rows * self.d);
        for lookup in self.tokens.iter().chain(&self.positions) {
            expect("embed: ids [rows]", lookup.ids, DType::U32, self.rows);
            assert_eq!(lookup.table.k, self.d, "embed: table is [n, d]");
        }
        if let Some(drawn) = self.drawn {
            expect("embed: drawn", drawn, DType::U32, 0);
        }
    }
}

impl<B: Backend> LinearArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        let (n, k) = (self.weight.n, self.weight.k);
        expect_act("linear: x [rows, k]", self.x, self.rows * k);
        expect_act("linear: out [rows, n]", self.out, self.rows * n);
        assert_eq!(
            self.weight.parts.iter().map(|p| p.n).sum::<usize>(),
            n,
            "linear: parts are stacked along n"
        );
        assert!((1..=K_SEGMENTS).contains(&self.k_segments), "linear: {} k segments", self.k_segments);
        if let Some(bias) = self.epilogue.bias {
            expect_act("linear: bias [n]", bias, n);
        }
        if let Prologue::Norm(norm) = &self.prologue {
            norm.check(k);
        }
        if let Then::AppendKv(append) = &self.epilogue.then {
            let d_kv = append.layout.n_kv_heads_local * append.layout.d_head;
            assert!(n > 2 * d_kv, "linear: {n} outputs are q | k | v with k and v of {d_kv}");
            expect("linear: slots [rows]", append.slots, DType::I32, self.rows);
            assert_eq!(append.kv.k.dtype(), append.layout.dtype, "linear: cache type");
        }
    }
}

impl<B: Backend> Ragged<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        let most = self.max_rows * self.n_seqs;
        assert!(self.max_rows <= self.rows && most >= self.rows, "{} rows a sequence at most", self.max_rows);
        expect("q_offsets [n_seqs + 1]", self.q_offsets, DType::U32, self.n_seqs + 1);
        expect("context_lens [n_seqs]", self.context_lens, DType::U32, self.n_seqs);
        expect(
            "block_tables [n_seqs, max_blocks]",
            self.block_tables,
            DType::U32,
            self.n_seqs * self.max_blocks,
        );
    }
}

impl<B: Backend> AttentionArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        let (h, kv, d) = (self.n_heads_local, self.layout.n_kv_heads_local, self.layout.d_head);
        self.seqs.check();
        assert!(kv > 0 && h.is_multiple_of(kv), "attention: {h} query heads over {kv} KV heads");
        expect_act("attention: out [rows, h · d]", self.out, self.seqs.rows * h * d);
        expect_act("attention: qkv [rows, (h + 2 kv) · d]", self.qkv, self.seqs.rows * (h + 2 * kv) * d);
        assert_eq!(self.kv.k.dtype(), self.layout.dtype, "attention: cache type");
        assert_eq!(self.kv.k.len(), self.kv.v.len(), "attention: keys and values");
        assert!(self.window != Some(0), "attention: an empty window");
    }
}

impl<B: Backend> AddBiasNormArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        let len = self.rows * self.d;
        expect_act("add_bias_norm: normed [rows, d]", self.normed, len);
        expect_act("add_bias_norm: residual [rows, d]", self.residual, len);
        if let Some(delta) = self.delta {
            expect_act("add_bias_norm: delta [rows, d]", delta, len);
        }
        if let Some(bias) = self.bias {
            expect_act("add_bias_norm: bias [d]", bias, self.d);
        }
        self.norm.check(self.d);
    }
}

impl<B: Backend> AddBiasArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        expect_act("add_bias: x [rows, n]", self.x, self.rows * self.n);
        expect_act("add_bias: bias [n]", self.bias, self.n);
    }
}

impl<B: Backend> GatherRowsArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        expect_act("gather_rows: out [n_out, d]", self.out, self.n_out * self.d);
        expect_act("gather_rows: x [rows, d]", self.x, self.rows * self.d);
        expect("gather_rows: indices [n_out]", self.indices, DType::U32, self.n_out);
    }
}

impl<B: Backend> LogitsArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        expect("logits: out [rows, n]", self.out, DType::F32, self.rows * self.head.n);
        expect_act("logits: x [rows, k]", self.x, self.rows * self.head.k);
    }
}

impl<B: Backend> SampleArgs<'_, B> {
    /// Panics unless all shapes fit.
    pub fn check(&self) {
        let n = self.rows.len();
        assert!(
            self.n_vocab <= self.ld && self.n_top <= self.n_vocab,
            "sample: vocabulary of {}",
            self.n_vocab
        );
        expect("sample: logits [rows, ld]", self.logits, DType::F32, n * self.ld);
        expect("sample: ids [rows]", self.ids, DType::U32, n);
        expect("sample: logprobs [rows]", self.logprobs, DType::F32, n);
        expect("sample: top_ids [rows, n_top]", self.top_ids, DType::U32, n * self.n_top);
        expect("sample: top_logprobs [rows, n_top]", self.top_logprobs, DType::F32, n * self.n_top);
    }
}

//! Embeddings from tables in every type, cut for vocabulary-parallel ranks, with offsets and in several parts.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

use std::time::Duration;

use dist_core::DType;
use dist_core::philox::{NormalTable, stream_key};
use dist_kernels::Backend;
use dist_kernels::args::{DRAWN, EmbedArgs, Lookup};
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout, Weight};
use half::{bf16, f16};

const D: usize = 21;
const ROWS: usize = 10;

fn backend(path: CpuPath, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path, spin: Duration::from_micros(20) }).unwrap()
}

fn numbers(name: &str) -> Vec<f32> {
    let (table, key) = (NormalTable::new(1.0), stream_key(5, name));
    (0..ROWS * D).map(|i| table.at(key, i as u64)).collect()
}

fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// A table of the rows `part` of `x`, in pieces of `piece` rows that lie an odd number of bytes into their memory.
fn table(
    backend: &mut CpuBackend,
    dtype: DType,
    x: &[f32],
    part: std::ops::Range<usize>,
    piece: usize,
) -> Weight<CpuBuf> {
    let mut bytes = vec![0xFF];
    for &x in &x[part.start * D..part.end * D] {
        match dtype {
            DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
            DType::BF16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            _ => bytes.extend(x.to_le_bytes()),
        }
    }
    let bytes = HostBytes::new(bytes);
    let parts = (0..part.len()).step_by(piece).map(|first| HostPart {
        bytes: bytes.clone(),
        offset: 1 + first * D * dtype.bytes(),
        n: piece.min(part.len() - first),
        ld: D,
    });
    backend.prepare(HostWeight { parts: parts.collect(), dtype, layout: Layout::Nk, k: D }).unwrap()
}

fn ids(ids: &[u32]) -> CpuBuf {
    CpuBuf::from_slice("test", ids).unwrap()
}

const TOKENS: [u32; 6] = [3, 9, 0, 3, 7, 1];
const POSITIONS: [u32; 6] = [0, 1, 2, 7, 4, 5];
const OFFSET: u32 = 2;

#[test]
fn tables_of_every_type_are_added() {
    let (tokens, positions) = (numbers("tokens"), numbers("positions"));
    for path in [CpuPath::Auto, CpuPath::Portable] {
        for (dtype, piece) in [(DType::F32, 10), (DType::F16, 3), (DType::BF16, 1)] {
            let mut backend = backend(path, 2);
            let token_table = table(&mut backend, dtype, &tokens, 0..ROWS, piece);
            let position_table = table(&mut backend, dtype, &positions, 0..ROWS, piece);
            let mut out = CpuBuf::from_slice("test", &[f32::NAN; TOKENS.len() * D]).unwrap();
            let args = EmbedArgs {
                out: &mut out,
                rows: TOKENS.len(),
                d: D,
                tokens: Some(Lookup { ids: &ids(&TOKENS), table: &token_table, offset: 0, first: 0 }),
                positions: Some(Lookup {
                    ids: &ids(&POSITIONS),
                    table: &position_table,
                    offset: OFFSET,
                    first: 0,
                }),
                drawn: None,
            };
            backend.embed(args).unwrap();
            for (idx, out) in out.slice::<f32>().iter().enumerate() {
                let (row, column) = (idx / D, idx % D);
                let token = stored(dtype, tokens[TOKENS[row] as usize * D + column]);
                let position = stored(dtype, positions[(POSITIONS[row] + OFFSET) as usize * D + column]);
                assert_eq!(out.to_bits(), (token + position).to_bits(), "row {row}, {dtype}, path {path:?}");
            }
        }
    }
}

#[test]
fn ids_may_be_places_among_the_drawn() {
    let tokens = numbers("tokens");
    for path in [CpuPath::Auto, CpuPath::Portable] {
        let mut backend = backend(path, 1);
        let table = table(&mut backend, DType::F32, &tokens, 0..ROWS, ROWS);
        let mut out = CpuBuf::from_slice("test", &[f32::NAN; 3 * D]).unwrap();
        let (told, drawn) = (ids(&[2, DRAWN | 1, DRAWN]), ids(&[7, 5]));
        let tokens_of = Some(Lookup { ids: &told, table: &table, offset: 0, first: 0 });
        let drawn = Some(&drawn);
        backend
            .embed(EmbedArgs { out: &mut out, rows: 3, d: D, tokens: tokens_of, positions: None, drawn })
            .unwrap();
        for (row, token) in [2, 5, 7].into_iter().enumerate() {
            assert_eq!(out.slice::<f32>()[row * D..][..D], tokens[token * D..][..D], "path {path:?}");
        }
    }
}

#[test]
fn the_parts_of_all_ranks_add_up_to_the_whole() {
    let tokens = numbers("tokens");
    for path in [CpuPath::Auto, CpuPath::Portable] {
        let mut backend = backend(path, 1);
        let mut sum = vec![0.0; TOKENS.len() * D];
        for (first, part) in [(0_u32, 0..4), (4, 4..8), (8, 8..ROWS)] {
            let table = table(&mut backend, DType::F32, &tokens, part, 2);
            let mut out = CpuBuf::from_slice("test", &[f32::NAN; TOKENS.len() * D]).unwrap();
            let args = EmbedArgs {
                out: &mut out,
                rows: TOKENS.len(),
                d: D,
                tokens: Some(Lookup { ids: &ids(&TOKENS), table: &table, offset: 0, first }),
                positions: None,
                drawn: None,
            };
            backend.embed(args).unwrap();
            sum.iter_mut().zip(out.slice::<f32>()).for_each(|(sum, x)| *sum += x);
        }
        for (row, &token) in TOKENS.iter().enumerate() {
            assert_eq!(sum[row * D..][..D], tokens[token as usize * D..][..D], "path {path:?}");
        }
    }
}

#[test]
fn positions_alone_add_to_what_is_there() {
    let positions = numbers("positions");
    let mut backend = backend(CpuPath::Auto, 1);
    let table = table(&mut backend, DType::F32, &positions, 0..ROWS, ROWS);
    let mut out = CpuBuf::from_slice("test", &[1.0_f32; 2 * D]).unwrap();
    let args = EmbedArgs {
        out: &mut out,
        rows: 2,
        d: D,
        tokens: None,
        positions: Some(Lookup { ids: &ids(&[0, 6]), table: &table, offset: OFFSET, first: 0 }),
        drawn: None,
    };
    backend.embed(args).unwrap();
    for (idx, x) in out.slice::<f32>().iter().enumerate() {
        let expected = 1.0 + positions[[2, 8][idx / D] * D + idx % D];
        assert_eq!(x.to_bits(), expected.to_bits(), "path {}", backend.describe().path);
    }
}

#[test]
#[should_panic(expected = "position 8 of row 1 is not in the table")]
fn a_position_beyond_the_table_is_a_bug() {
    let mut backend = backend(CpuPath::Auto, 1);
    let table = table(&mut backend, DType::F32, &numbers("positions"), 0..ROWS, ROWS);
    let mut out = CpuBuf::from_slice("test", &[0.0_f32; 2 * D]).unwrap();
    let positions = Some(Lookup { ids: &ids(&[0, 8]), table: &table, offset: OFFSET, first: 0 });
    let _ = backend.embed(EmbedArgs { out: &mut out, rows: 2, d: D, tokens: None, positions, drawn: None });
}

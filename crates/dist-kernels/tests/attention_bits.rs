//! The bits of a row of attention: the same in any chunk, batch, place, path and with any number of threads.

mod attention_case;

use attention_case::{Blocks, Heads, Seq, attend, backend};
use dist_kernels::cpu::CpuPath;

/// Shapes that use whole strips, rests, tails of vectors, groups and windows.
fn shapes() -> [Heads; 5] {
    [
        Heads::new(2, 2, 64),
        Heads::new(3, 3, 20),
        Heads::new(8, 2, 16),
        Heads { window: Some(19), ..Heads::new(2, 2, 8) },
        Heads { window: Some(40), ..Heads::new(4, 1, 12) },
    ]
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// All rows of a sequence in one step.
fn whole(heads: Heads, n: usize) -> Vec<u32> {
    bits(
        &attend(
            &mut backend(CpuPath::Auto, 1),
            heads,
            Blocks::InOrder(16),
            &[Seq { id: 3, rows: n, context: n }],
        )[0],
    )
}

#[test]
fn both_paths_agree() {
    for heads in shapes() {
        let seqs = [Seq { id: 3, rows: 70, context: 70 }, Seq { id: 4, rows: 1, context: 90 }];
        let run = |path| {
            let out = attend(&mut backend(path, 2), heads, Blocks::InOrder(16), &seqs);
            out.iter().map(|out| bits(out)).collect::<Vec<_>>()
        };
        assert!(run(CpuPath::Auto) == run(CpuPath::Portable), "portable differs from auto: {heads:?}");
    }
}

#[test]
fn threads_change_nothing() {
    for heads in shapes() {
        let expected = whole(heads, 75);
        for threads in 1..=4 {
            let mut backend = backend(CpuPath::Auto, threads);
            let out =
                attend(&mut backend, heads, Blocks::InOrder(16), &[Seq { id: 3, rows: 75, context: 75 }]);
            assert!(bits(&out[0]) == expected, "{threads} threads on {}: {heads:?}", backend.describe().path);
        }
    }
}

#[test]
fn chunks_change_nothing() {
    const N: usize = 75;
    for path in [CpuPath::Auto, CpuPath::Portable] {
        for heads in shapes() {
            let expected = whole(heads, N);
            for chunk in [1, 2, 7, 16, 36, 74] {
                let mut backend = backend(path, 2);
                let mut out = Vec::new();
                for start in (0..N).step_by(chunk) {
                    let context = N.min(start + chunk);
                    let seq = Seq { id: 3, rows: context - start, context };
                    out.extend(attend(&mut backend, heads, Blocks::InOrder(16), &[seq]).remove(0));
                }
                let name = backend.describe().path;
                assert!(bits(&out) == expected, "chunks of {chunk} on path {name}: {heads:?}");
            }
        }
    }
}

#[test]
fn the_place_of_blocks_changes_nothing() {
    for heads in shapes() {
        let expected = whole(heads, 75);
        for blocks in [Blocks::Scattered(16), Blocks::Scattered(1), Blocks::InOrder(5), Blocks::Scattered(64)]
        {
            let mut backend = backend(CpuPath::Auto, 2);
            let out = attend(&mut backend, heads, blocks, &[Seq { id: 3, rows: 75, context: 75 }]);
            assert!(bits(&out[0]) == expected, "{blocks:?} on path {}: {heads:?}", backend.describe().path);
        }
    }
}

#[test]
fn company_changes_nothing() {
    for heads in shapes() {
        let seqs: Vec<Seq> = (0..24)
            .map(|id| {
                let context = 1 + (id as usize * 29) % 97;
                Seq { id, rows: if id % 3 == 0 { context.div_ceil(2) } else { 1 }, context }
            })
            .collect();
        let mut backend = backend(CpuPath::Auto, 3);
        let together = attend(&mut backend, heads, Blocks::Scattered(16), &seqs);
        for (seq, together) in seqs.iter().zip(together) {
            let alone = attend(&mut backend, heads, Blocks::InOrder(16), &[*seq]);
            let name = backend.describe().path;
            assert!(bits(&alone[0]) == bits(&together), "{seq:?} on path {name}: {heads:?}");
        }
    }
}

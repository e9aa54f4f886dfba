//! What ranks get of a checkpoint: cuts that together are the whole, views of the map, the same random weights for
//! every degree.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod checkpoint_case;

use checkpoint_case::{Case, FIXTURES, MMAP, READ, demo_dir, elements, fixture_dir};
use dist_core::{DType, TensorSpec, decoder_specs, presets};
use dist_kernels::weight::Layout;
use dist_models::checkpoint::Checkpoint;

fn is_matrix(spec: &TensorSpec) -> bool {
    spec.shape.len() == 2
}

/// Puts the cuts of all ranks where their slices say that they are from, each place exactly once unless replicated.
fn gather(checkpoint: &Checkpoint, spec: &TensorSpec, tp: usize) -> Vec<Vec<f32>> {
    let mut whole = vec![vec![f32::NAN; spec.shape[1]]; spec.shape[0]];
    for rank in 0..tp {
        let weight = checkpoint.weight(spec, tp, rank).unwrap();
        let (slice, local) = (spec.slice(tp, rank), elements(&weight));
        let mine: Vec<usize> = slice.ranges.iter().flat_map(Clone::clone).collect();
        if slice.dim == 0 {
            assert_eq!((local.len(), weight.k), (mine.len(), spec.shape[1]), "{} of rank {rank}", spec.name);
            for (row, n) in local.into_iter().zip(mine) {
                whole[n] = row;
            }
        } else {
            assert_eq!((local.len(), weight.k), (spec.shape[0], mine.len()), "{} of rank {rank}", spec.name);
            for (n, row) in local.into_iter().enumerate() {
                for (value, &k) in row.into_iter().zip(&mine) {
                    whole[n][k] = value;
                }
            }
        }
    }
    whole
}

fn gather_vector(checkpoint: &Checkpoint, spec: &TensorSpec, tp: usize) -> Vec<f32> {
    let mut whole = vec![f32::NAN; spec.shape[0]];
    for rank in 0..tp {
        let local = checkpoint.vector(spec, tp, rank).unwrap();
        let mine: Vec<usize> = spec.slice(tp, rank).ranges.into_iter().flatten().collect();
        assert_eq!(local.len(), mine.len(), "{} of rank {rank}", spec.name);
        local.into_iter().zip(mine).for_each(|(value, n)| whole[n] = value);
    }
    whole
}

#[test]
fn cuts_of_all_ranks_are_the_whole_mapped_or_read() {
    for name in FIXTURES {
        let mapped = Checkpoint::open(&fixture_dir(name), &MMAP).unwrap();
        let read = Checkpoint::open(&fixture_dir(name), &READ).unwrap();
        for spec in decoder_specs(mapped.config()) {
            for tp in 1..=4 {
                if is_matrix(&spec) {
                    let whole = elements(&mapped.weight(&spec, 1, 0).unwrap());
                    assert_eq!(gather(&mapped, &spec, tp), whole, "{name} {} tp {tp}", spec.name);
                    assert_eq!(gather(&read, &spec, tp), whole, "{name} {} tp {tp} read", spec.name);
                } else {
                    let whole = mapped.vector(&spec, 1, 0).unwrap();
                    assert_eq!(gather_vector(&mapped, &spec, tp), whole, "{name} {} tp {tp}", spec.name);
                    assert_eq!(gather_vector(&read, &spec, tp), whole, "{name} {} tp {tp} read", spec.name);
                }
            }
        }
    }
}

fn floats(case: &mut Case, name: &str) -> Vec<f32> {
    let bytes = &case.find(name).bytes;
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The fused weight is q, then k, then v, whatever the family's way to store them.
#[test]
fn fused_weights_are_what_the_files_hold() {
    let spec = |checkpoint: &Checkpoint, name: &str| {
        decoder_specs(checkpoint.config()).into_iter().find(|spec| spec.name == name).unwrap()
    };
    let mut gpt2 = Case::fixture("gpt2");
    let checkpoint = gpt2.open().unwrap();
    let weight = checkpoint.weight(&spec(&checkpoint, "layers.1.attn.qkv.weight"), 1, 0).unwrap();
    assert_eq!((weight.layout, weight.dtype, weight.n(), weight.k), (Layout::Kn, DType::F32, 192, 64));
    let stored = floats(&mut gpt2, "transformer.h.1.attn.c_attn.weight");
    for (n, row) in elements(&weight).iter().enumerate() {
        for (k, value) in row.iter().enumerate() {
            assert_eq!(value.to_bits(), stored[k * 192 + n].to_bits());
        }
    }
    let mut opt = Case::fixture("opt");
    let checkpoint = opt.open().unwrap();
    let weight = checkpoint.weight(&spec(&checkpoint, "layers.2.attn.qkv.weight"), 1, 0).unwrap();
    assert_eq!((weight.layout, weight.parts.len(), weight.n()), (Layout::Nk, 3, 192));
    let (mut stored, mut bias) = (Vec::new(), Vec::new());
    for part in ["q", "k", "v"] {
        let name = format!("model.decoder.layers.2.self_attn.{part}_proj");
        stored.extend(floats(&mut opt, &format!("{name}.weight")));
        bias.extend(floats(&mut opt, &format!("{name}.bias")));
    }
    assert_eq!(elements(&weight).concat(), stored);
    assert_eq!(checkpoint.vector(&spec(&checkpoint, "layers.2.attn.qkv.bias"), 1, 0).unwrap(), bias);
}

#[test]
fn rows_that_pad_the_vocabulary_are_not_made() {
    let checkpoint = Checkpoint::open(&fixture_dir("gpt2"), &MMAP).unwrap();
    let spec = &decoder_specs(checkpoint.config())[0];
    assert_eq!((spec.name.as_str(), spec.shape[0]), ("embed.tokens.weight", 384));
    let rows = |tp: usize| -> Vec<usize> {
        (0..tp).map(|rank| checkpoint.weight(spec, tp, rank).unwrap().n()).collect()
    };
    assert_eq!(rows(5), [77, 77, 77, 77, 76]);
    assert_eq!(rows(256)[190..194], [2, 2, 0, 0]);
}

/// Whether an address is in a mapping of a file whose path ends so.
fn is_mapped(address: usize, path: &str) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.ends_with(path)).any(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let bound = |text: &str| usize::from_str_radix(text, 16).unwrap();
        (bound(start)..bound(rest.split_once(' ').unwrap().0)).contains(&address)
    })
}

#[test]
fn mapped_weights_are_views_of_the_file() {
    for name in FIXTURES {
        let checkpoint = Checkpoint::open(&fixture_dir(name), &MMAP).unwrap();
        let path = format!("{name}/model.safetensors");
        for spec in decoder_specs(checkpoint.config()).iter().filter(|spec| is_matrix(spec)) {
            for part in checkpoint.weight(spec, 2, 1).unwrap().parts {
                let first = part.bytes.as_slice().as_ptr().addr() + part.offset;
                assert!(is_mapped(first, &path), "{name} {}", spec.name);
            }
        }
    }
}

#[test]
fn random_weights_are_the_same_for_every_degree() {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let mut config = Checkpoint::open(&fixture_dir("gpt2-erf-inner"), &MMAP).unwrap().config().clone();
        // An odd vocabulary and width, so that cuts fall between the generator's groups of eight.
        (config.n_vocab, config.d_ff, config.weight_dtype) = (383, 111, dtype);
        let checkpoint = Checkpoint::random(config, 7);
        for spec in decoder_specs(checkpoint.config()) {
            if is_matrix(&spec) {
                let whole = elements(&checkpoint.weight(&spec, 1, 0).unwrap());
                for tp in 2..=4 {
                    assert_eq!(gather(&checkpoint, &spec, tp), whole, "{} tp {tp}", spec.name);
                }
            } else {
                let value = f32::from(u8::from(spec.name.ends_with("weight")));
                assert_eq!(checkpoint.vector(&spec, 1, 0).unwrap(), vec![value; spec.shape[0]]);
            }
        }
    }
}

#[test]
fn random_weights_follow_seed_and_name() {
    let config = presets::preset("gpt3-125m", None).unwrap();
    let specs = decoder_specs(&config);
    let weight = |seed: u64, name: &str| {
        let spec = specs.iter().find(|spec| spec.name == name).unwrap();
        elements(&Checkpoint::random(config.clone(), seed).weight(spec, 1, 0).unwrap()).concat()
    };
    let (name, other) = ("layers.0.mlp.fc1.weight", "layers.1.mlp.fc1.weight");
    let values = weight(1, name);
    assert_eq!(values, weight(1, name));
    let n_equal =
        |other: &[f32]| values.iter().zip(other).filter(|(a, b)| a.to_bits() == b.to_bits()).count();
    // About 2,000 bf16 values are likely, so one in several hundred agrees by chance.
    assert!(n_equal(&weight(2, name)) < values.len() / 100);
    assert!(n_equal(&weight(1, other)) < values.len() / 100);
    let n = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let std = (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n).sqrt();
    // Four standard errors at 2.36 million draws, and half of bf16's last place.
    assert!(mean.abs() < 4.0 * 0.02 / n.sqrt() && (std / 0.02 - 1.0).abs() < 0.003, "{mean} {std}");
}

#[test]
fn bytes_of_weights_are_counted_once() {
    for name in FIXTURES {
        let checkpoint = Checkpoint::open(&fixture_dir(name), &MMAP).unwrap();
        assert_eq!(checkpoint.weight_bytes(), 4 * checkpoint.config().n_params(), "{name}");
    }
    let demo = Checkpoint::open(&demo_dir(), &MMAP).unwrap();
    assert_eq!(demo.config().weight_dtype, DType::BF16);
    assert_eq!(demo.weight_bytes(), 2 * demo.config().n_params());
}

#[test]
fn a_tensor_that_the_model_lacks_is_an_error() {
    let checkpoint = Checkpoint::open(&fixture_dir("gpt2"), &MMAP).unwrap();
    let mut spec = decoder_specs(checkpoint.config())[0].clone();
    spec.shape[0] += 1;
    let error = checkpoint.weight(&spec, 1, 0).unwrap_err().to_string();
    assert_eq!(error, "gpt2: the checkpoint has no tensor embed.tokens.weight of shape [385, 64]");
}

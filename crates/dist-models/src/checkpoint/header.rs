//! Reads the header of a safetensors file, which nobody vouches for: every number is checked before it is used.
//!
//! Format: a little-endian u64, the length of the header; the header, a JSON object from tensor names to type, shape
//! and byte range; the data. The ranges must cover the data exactly once.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::{CheckpointError, Findings, clip};

/// Headers beyond this are refused, as the safetensors library does.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;
/// No tensor has more dimensions.
const MAX_DIMS: usize = 8;
/// How a Git LFS pointer begins.
const LFS_PREFIX: [u8; 8] = *b"version ";

/// A tensor as a file holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawTensor {
    /// Its name in the file.
    pub(super) name: String,
    /// Its type, as the file spells it.
    pub(super) dtype: String,
    /// Its shape.
    pub(super) shape: Vec<usize>,
    /// First byte, from the beginning of the file.
    pub(super) start: usize,
    /// Length in bytes.
    pub(super) n_bytes: usize,
}

/// Bits of an element of a type in a safetensors file.
fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

fn malformed(
    file: &str,
    what: &str,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> CheckpointError {
    let mut findings = Findings::default();
    findings.add(what, expected, found);
    CheckpointError::Malformed { file: file.to_owned(), findings }
}

/// Where the header of a file of `file_len` bytes ends, from the file's first eight bytes.
pub(super) fn end(file: &str, first: &[u8], file_len: u64) -> Result<usize, CheckpointError> {
    let Ok(first) = <[u8; 8]>::try_from(first) else {
        return Err(malformed(file, "(file)", "at least 8 bytes", format!("{file_len} bytes")));
    };
    if first == LFS_PREFIX {
        return Err(CheckpointError::LfsPointer { file: file.to_owned() });
    }
    let len = u64::from_le_bytes(first);
    let limit = MAX_HEADER_BYTES.min(file_len.saturating_sub(8));
    if len > limit {
        let expected = format!("at most {limit} bytes (the file has {file_len})");
        return Err(malformed(file, "(length of the header)", expected, format!("{len} bytes")));
    }
    Ok(8 + len as usize)
}

/// The tensors of a file of `file_len` bytes whose header, after the length, is `header`; ordered by name.
pub(super) fn parse(file: &str, header: &[u8], file_len: u64) -> Result<Vec<RawTensor>, CheckpointError> {
    let entries: Entries = serde_json::from_slice(header)
        .map_err(|error| malformed(file, "(header)", "a JSON object of tensors", clip(&error.to_string())))?;
    let data_start = 8 + header.len() as u64;
    let data_len = file_len.saturating_sub(data_start);
    let mut findings = Findings::default();
    check_cover(&entries.0, data_len, &mut findings);
    let mut tensors: Vec<RawTensor> = entries
        .0
        .into_iter()
        .filter_map(|(name, entry)| check(name, entry, data_start, &mut findings))
        .collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    for twins in tensors.windows(2).filter(|pair| pair[0].name == pair[1].name) {
        findings.add(&twins[0].name, "one entry", "two");
    }
    if findings.is_empty() {
        return Ok(tensors);
    }
    Err(CheckpointError::Malformed { file: file.to_owned(), findings })
}

/// The ranges must follow each other from the first to the last byte of the data.
fn check_cover(entries: &[(String, Entry)], data_len: u64, findings: &mut Findings) {
    let mut order: Vec<&(String, Entry)> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.data_offsets.0, entry.data_offsets.1));
    let described = order.iter().map(|(_, entry)| entry.data_offsets.1).max().unwrap_or(0);
    if described > data_len {
        findings.add(
            "(data)",
            format!("{described} bytes, as the header describes"),
            format!("{data_len} bytes"),
        );
    }
    let (mut next, mut is_beyond) = (0, false);
    for (name, Entry { data_offsets: (start, end), .. }) in order {
        let found = || format!("bytes {start} to {end}");
        if end < start {
            findings.add(name, "a range that ends after its start", found());
            continue;
        }
        if *end > data_len && !is_beyond {
            // All that follow are beyond as well; one says where it begins.
            is_beyond = true;
            findings.add(name, format!("a range within the {data_len} bytes of data"), found());
        }
        match (*start).cmp(&next) {
            std::cmp::Ordering::Less => {
                findings.add(name, format!("a range from byte {next} on (no overlap)"), found());
            }
            std::cmp::Ordering::Greater => {
                findings.add(name, format!("a range from byte {next} on (no hole)"), found());
            }
            std::cmp::Ordering::Equal => {}
        }
        next = next.max(*end);
    }
    if described < data_len {
        findings.add(
            "(data)",
            format!("{described} bytes, as the header describes"),
            format!("{data_len} bytes"),
        );
    }
}

fn check(name: String, entry: Entry, data_start: u64, findings: &mut Findings) -> Option<RawTensor> {
    let (start, end) = entry.data_offsets;
    let Some(bits) = dtype_bits(&entry.dtype) else {
        findings.add(
            &name,
            "a safetensors type such as F32, F16 or BF16",
            format!("{:?}", clip(&entry.dtype)),
        );
        return None;
    };
    let n_bits = entry.shape.iter().try_fold(bits, |product, &dim| product.checked_mul(dim));
    let Some(n_bits) = n_bits else {
        findings.add(&name, "fewer than 2^64 bits", format!("shape {:?}", entry.shape));
        return None;
    };
    let n_bytes = end.checked_sub(start)?; // A finding already.
    if n_bits != n_bytes.saturating_mul(8) {
        let expected = format!("{} bytes for {} {:?}", n_bits.div_ceil(8), entry.dtype, entry.shape);
        findings.add(&name, expected, format!("{n_bytes} bytes"));
        return None;
    }
    let start = usize::try_from(start.checked_add(data_start)?).ok()?; // Beyond the file, a finding already.
    let shape = entry.shape.iter().map(|&dim| usize::try_from(dim)).collect::<Result<_, _>>().ok()?;
    Some(RawTensor { name, dtype: entry.dtype, shape, start, n_bytes: n_bytes as usize })
}

/// A tensor of the header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    #[serde(deserialize_with = "dims")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A list of numbers that cannot be long.
fn dims<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Dims;
    impl<'de> Visitor<'de> for Dims {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX_DIMS} dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut out = Vec::new();
            while let Some(dim) = seq.next_element()? {
                if out.len() == MAX_DIMS {
                    return Err(A::Error::invalid_length(MAX_DIMS + 1, &self));
                }
                out.push(dim);
            }
            Ok(out)
        }
    }
    deserializer.deserialize_seq(Dims)
}

/// All tensors in the order of the header, twins included: a map would hide them.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let entry = map.next_value().map_err(|error| {
                            A::Error::custom(format_args!("tensor {:?}: {error}", clip(&name)))
                        })?;
                        entries.push((name, entry));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

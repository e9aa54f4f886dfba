//! Plans of products of many rows: whether the own kernel or the library's algorithm is the faster one, found once by
//! measuring and kept on disk beside the compiled kernels, one file for each GPU, driver, library and source of the own
//! kernels. A file is somebody else's until it is read: it is bounded, and one that is not sound is ignored and
//! written anew.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::io;
use std::path::{Path, PathBuf};

use dist_core::DType;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::{hex, write_beside};
use super::driver::{Algo, EpilogueKind, ProductShape};
use super::regular_file;

/// A file's form; it changes with the fields below.
const FORM: u32 = 1;
const FILE_BYTES_MAX: u64 = 4 << 20;
const PLANS_MAX: usize = 4096;
/// Products of so many rows at most are not planned: kernels of their own stream the weight.
const ROWS_UNPLANNED: usize = 64;
/// From here on buckets are as wide as this.
const ROWS_WIDE: usize = 8192;
/// The largest number that the kernels take for a dimension.
const DIMENSION_MAX: usize = i32::MAX as usize;

/// The last number of rows that shares a plan with `rows`; `None` for rows that are too few to be planned.
pub fn bucket(rows: usize) -> Option<usize> {
    match rows {
        0..=ROWS_UNPLANNED => None,
        _ if rows <= ROWS_WIDE => Some(rows.next_power_of_two()),
        _ => Some(rows.next_multiple_of(ROWS_WIDE)),
    }
}

/// The first number of rows of the bucket that ends with `last`.
pub fn first_of_bucket(last: usize) -> usize {
    if last <= ROWS_WIDE { last / 2 + 1 } else { last - ROWS_WIDE + 1 }
}

/// The buckets of all numbers of rows up to `rows_max`, by their last numbers.
pub fn buckets(rows_max: usize) -> impl Iterator<Item = usize> {
    let first = bucket(ROWS_UNPLANNED + 1);
    let next = |&last: &usize| bucket(last + 1);
    std::iter::successors(first, next).take_while(move |&last| first_of_bucket(last) <= rows_max)
}

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlanKey {
    /// The last number of rows of its bucket.
    pub rows: usize,
    /// The product.
    pub shape: ProductShape,
}

impl PlanKey {
    fn is_sound(&self) -> bool {
        let ProductShape { n, k, ld, dtype, .. } = self.shape;
        let are_dimensions = [n, k, ld, self.rows].iter().all(|dim| (1..=DIMENSION_MAX).contains(dim));
        let is_native = matches!(dtype, DType::BF16 | DType::F16);
        are_dimensions && ld >= k && is_native && bucket(self.rows) == Some(self.rows)
    }

    /// The place among others in a file.
    fn order(&self) -> (usize, usize, usize, String, usize) {
        let ProductShape { n, k, ld, dtype, out_f32, epilogue } = self.shape;
        (n, k, ld, format!("{dtype} {out_f32} {epilogue:?}"), self.rows)
    }
}

/// What measuring has found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Microseconds that the own kernel takes.
    pub own_us: f64,
    /// The library's fastest algorithm, if it has any.
    pub library: Option<LibraryPlan>,
}

/// An algorithm of the library's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LibraryPlan {
    /// Microseconds that it takes.
    pub us: f64,
    /// The algorithm.
    pub algo: Algo,
}

/// Which of the two a plan says is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Winner {
    /// The own kernel.
    Own,
    /// The library's algorithm.
    Library(Algo),
}

impl Plan {
    /// The faster one; the own kernel among equals.
    pub fn winner(&self) -> Winner {
        match self.library {
            Some(library) if library.us < self.own_us => Winner::Library(library.algo),
            _ => Winner::Own,
        }
    }
}

/// What a file of plans holds for; another one has its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlansOf {
    /// The GPU's name.
    pub gpu: String,
    /// What the driver says of its version.
    pub driver: String,
    /// The library's number of its version.
    pub library: usize,
    /// A hash of the own kernels' source.
    pub source: String,
}

/// A plan in a file. Every field has its place here and no other is taken: what is read takes no memory but that of
/// its lines.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    rows: usize,
    n: usize,
    k: usize,
    ld: usize,
    dtype: DType,
    out_f32: bool,
    epilogue: EpilogueKind,
    own_us: f64,
    library_us: Option<f64>,
    /// Hexadecimal.
    algo: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    form: u32,
    of: PlansOf,
    plans: Vec<Line>,
}

/// All plans that there are for a GPU, its driver and its library.
#[derive(Clone, Debug)]
pub struct PlanCache {
    path: PathBuf,
    of: PlansOf,
    plans: HashMap<PlanKey, Plan>,
}

impl PlanCache {
    /// Those that are in `dir`; none, and a warning, where the file is damaged.
    pub fn open(dir: &Path, of: PlansOf) -> Self {
        let name = serde_json::to_vec(&of).map(|bytes| hex(&Sha256::digest(bytes))).expect("plain values");
        let path = dir.join(format!("gemm-plans-{}.json", &name[..32]));
        let plans = read(&path, &of).unwrap_or_else(|why| {
            tracing::warn!("{} is damaged ({why}): its products are measured anew", path.display());
            HashMap::new()
        });
        Self { path, of, plans }
    }

    /// Their file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The plan for `key`.
    pub fn get(&self, key: &PlanKey) -> Option<&Plan> {
        self.plans.get(key)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.plans.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.plans.is_empty()
    }

    /// Takes a plan in; where the file would grow too long, the others go.
    pub fn insert(&mut self, key: PlanKey, plan: Plan) {
        if self.plans.len() >= PLANS_MAX && !self.plans.contains_key(&key) {
            self.plans.clear();
        }
        self.plans.insert(key, plan);
    }

    /// SHA-256 of the file that holds these plans, for a report of what ran.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(encode(&self.plans, &self.of)))
    }

    /// Writes them, beside their place first, so that nobody reads half of them.
    pub fn save(&self) -> io::Result<()> {
        write_beside(&self.path, &encode(&self.plans, &self.of))
    }
}

/// The file that holds `plans` for `of`; the same plans give the same bytes.
pub fn encode<S: BuildHasher>(plans: &HashMap<PlanKey, Plan, S>, of: &PlansOf) -> Vec<u8> {
    let mut plans: Vec<_> = plans.iter().collect();
    plans.sort_by_key(|(key, _)| key.order());
    let plans = plans.into_iter().map(|(key, plan)| Line::new(key, plan)).collect();
    let file = File { form: FORM, of: of.clone(), plans };
    let mut bytes = serde_json::to_vec_pretty(&file).expect("numbers that were measured are finite");
    bytes.push(b'\n');
    bytes
}

impl Line {
    fn new(key: &PlanKey, plan: &Plan) -> Self {
        let ProductShape { n, k, ld, dtype, out_f32, epilogue } = key.shape;
        let (own_us, library_us) = (plan.own_us, plan.library.map(|library| library.us));
        let algo = plan.library.map(|library| hex(&library.algo.0));
        Self { rows: key.rows, n, k, ld, dtype, out_f32, epilogue, own_us, library_us, algo }
    }

    fn key(&self) -> PlanKey {
        let &Self { rows, n, k, ld, dtype, out_f32, epilogue, .. } = self;
        PlanKey { rows, shape: ProductShape { n, k, ld, dtype, out_f32, epilogue } }
    }
}

/// The plans of a file; none if there is no file, and why it cannot be used if there is.
fn read(path: &Path, of: &PlansOf) -> Result<HashMap<PlanKey, Plan>, String> {
    let Some(bytes) = regular_file::read(path, FILE_BYTES_MAX)? else { return Ok(HashMap::new()) };
    parse(&bytes, of)
}

/// The plans in the bytes of a file that is for `of`, or why there are none. Any bytes may come: they take a few times
/// their own memory at most, and that is bounded.
pub fn parse(bytes: &[u8], of: &PlansOf) -> Result<HashMap<PlanKey, Plan>, String> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it is longer than {FILE_BYTES_MAX} bytes"));
    }
    let file: File = serde_json::from_slice(bytes).map_err(|error| short(&error.to_string()))?;
    if file.form != FORM || file.of != *of {
        return Err("it is for something else".to_owned());
    }
    if file.plans.len() > PLANS_MAX {
        return Err(format!("it has more than {PLANS_MAX} plans"));
    }
    file.plans.into_iter().map(plan).collect()
}

fn plan(line: Line) -> Result<(PlanKey, Plan), String> {
    let key = line.key();
    let Line { own_us, library_us, algo, .. } = line;
    let is_time = |us: f64| us.is_finite() && us > 0.0;
    if !key.is_sound() || !is_time(own_us) || !library_us.is_none_or(is_time) {
        return Err(format!("no product is like {key:?}, {own_us} us, {library_us:?} us"));
    }
    let library = match (library_us, algo) {
        (None, None) => None,
        (Some(us), Some(algo)) => Some(LibraryPlan { us, algo: Algo(unhex(&algo)?) }),
        _ => return Err("a time without an algorithm, or the other way round".to_owned()),
    };
    Ok((key, Plan { own_us, library }))
}

/// A message without what a file may have put into it: a name of any length, or what a terminal obeys.
fn short(message: &str) -> String {
    const CHARS_MAX: usize = 200;
    message.chars().filter(|c| !c.is_control()).take(CHARS_MAX).collect()
}

fn unhex(digits: &str) -> Result<[u8; 64], String> {
    let mut bytes = [0; 64];
    if digits.len() != 2 * bytes.len() {
        return Err(format!("an algorithm has {} digits", digits.len()));
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        for &digit in pair {
            let value = char::from(digit).to_digit(16).ok_or("an algorithm has other digits")?;
            *byte = *byte << 4 | value as u8;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;

//! What multiplies many rows: the own kernel, or an algorithm of cuBLASLt's where a plan says that it is faster. Here the
//! library is held open, and what it must know of each product that it is to compute.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::cache::hex;
use super::choice::GemmChoices;
use super::driver::{Algo, Blas, BlasProduct, Context, Driver, Operands, Result, Stream};
use super::libraries::Libraries;
use super::plans::{Plan, PlanCache, PlanKey, PlansOf, Winner, first_of_bucket};
use super::units::Unit;

/// What multiplies more than 64 rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GemmChoice {
    /// The one that plans say is faster; the own kernel where there is no plan.
    #[default]
    Measured,
    /// The own kernel.
    Own,
    /// cuBLASLt where it is there and takes the product: the plan's algorithm, or the one that it offers first.
    Library,
}

/// The library and the plans that are made for its version.
#[derive(Debug)]
struct Opened {
    blas: Blas,
    plans: PlanCache,
}

/// A product that the library knows.
#[derive(Debug)]
struct Ready {
    product: BlasProduct,
    algo: Algo,
}

/// Who multiplies what.
#[derive(Debug)]
pub(super) struct Gemms {
    choice: GemmChoice,
    libraries: Arc<Libraries>,
    dir: PathBuf,
    driver: String,
    opened: Option<Opened>,
    /// Whether it was tried to open it.
    is_tried: bool,
    /// Products that the library has computed.
    n_computed: u64,
    /// Products of the library; `None` for those that own kernels compute.
    ready: HashMap<PlanKey, Option<Ready>>,
    /// Launches of the own kernel.
    pub(super) own: GemmChoices,
}

impl Gemms {
    /// Plans are kept in `dir`.
    pub(super) fn new(
        choice: GemmChoice,
        context: &Context,
        (libraries, driver): (&Arc<Libraries>, &Driver),
        dir: &Path,
    ) -> Self {
        let mut gemms = Self {
            choice,
            libraries: Arc::clone(libraries),
            dir: dir.to_owned(),
            driver: driver.version().to_string(),
            opened: None,
            is_tried: false,
            n_computed: 0,
            ready: HashMap::new(),
            own: GemmChoices::default(),
        };
        if choice == GemmChoice::Library {
            gemms.open(context);
        }
        gemms
    }

    /// Opens the library and reads its plans, the first time; whether it is there, and wanted.
    pub(super) fn open(&mut self, context: &Context) -> bool {
        if self.choice == GemmChoice::Own {
            return false;
        }
        if !self.is_tried {
            self.is_tried = true;
            let opened = Blas::open(&self.libraries, context).map(|blas| {
                let of = PlansOf {
                    gpu: context.info().name.clone(),
                    driver: self.driver.clone(),
                    library: blas.version(),
                    source: source_hash(context.info().capability),
                };
                Opened { blas, plans: PlanCache::open(&self.dir, of) }
            });
            if let Err(error) = &opened {
                tracing::warn!("own kernels multiply many rows, for cuBLASLt cannot be used: {error}");
            }
            self.opened = opened.ok();
        }
        self.opened.is_some()
    }

    /// The library, if it is open.
    pub(super) fn blas(&self) -> Option<&Blas> {
        Some(&self.opened.as_ref()?.blas)
    }

    /// The plans, if the library is open.
    pub(super) fn plans(&self) -> Option<&PlanCache> {
        Some(&self.opened.as_ref()?.plans)
    }

    /// Whether the library is to compute all that it takes.
    pub(super) fn wants_library(&self) -> bool {
        self.choice == GemmChoice::Library
    }

    /// How many products the library has computed, those of recordings among them.
    pub(super) fn n_computed(&self) -> u64 {
        self.n_computed
    }

    /// Takes what has been measured.
    pub(super) fn insert(&mut self, key: &PlanKey, plan: Plan) -> Result<()> {
        if let Some(opened) = &mut self.opened {
            opened.plans.insert(*key, plan);
        }
        self.follow(key).map(drop)
    }

    /// From now on follows the plan for `key`; `false` if there is none, or the library refuses its algorithm.
    pub(super) fn follow(&mut self, key: &PlanKey) -> Result<bool> {
        let Some(Opened { blas, plans }) = &self.opened else { return Ok(false) };
        let Some(plan) = plans.get(key) else { return Ok(false) };
        let ready = match plan.library {
            None => None,
            Some(library) => {
                let mut product = blas.product(&key.shape)?;
                for rows in [first_of_bucket(key.rows), key.rows] {
                    if !blas.takes(&mut product, rows, library.algo)? {
                        return Ok(false);
                    }
                }
                let runs = self.choice == GemmChoice::Library || plan.winner() != Winner::Own;
                runs.then_some(Ready { product, algo: library.algo })
            }
        };
        self.ready.insert(*key, ready);
        Ok(true)
    }

    /// Asks the library for a product of `rows` rows, if it is to compute those of `key`; whether it does.
    pub(super) fn multiply(
        &mut self,
        stream: &Stream,
        key: &PlanKey,
        operands: &Operands,
        rows: usize,
    ) -> Result<bool> {
        let Some(Opened { blas, .. }) = &self.opened else { return Ok(false) };
        if self.choice == GemmChoice::Library && !self.ready.contains_key(key) {
            self.ready.insert(*key, first_offered(blas, key)?);
        }
        let Some(Some(ready)) = self.ready.get_mut(key) else { return Ok(false) };
        blas.multiply(stream, &mut ready.product, ready.algo, operands, rows)?;
        self.n_computed += 1;
        Ok(true)
    }
}

fn first_offered(blas: &Blas, key: &PlanKey) -> Result<Option<Ready>> {
    let mut product = blas.product(&key.shape)?;
    let algo = blas.candidates(&mut product, key.rows)?.first().copied();
    Ok(algo.map(|algo| Ready { product, algo }))
}

/// Of all that the own kernels' speed depends on: their source for a GPU of `capability`, and the choice of a variant.
fn source_hash(capability: (u32, u32)) -> String {
    let mut hash = Sha256::new();
    for unit in ["gemm", "gemm_hopper", "gemm_hopper_wide"].into_iter().filter_map(Unit::find) {
        if let Some(arch) = unit.arch_for(capability) {
            hash.update(unit.program(arch).source.as_bytes());
        }
    }
    hash.update(include_str!("choice/gemm.rs"));
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_of_the_kernels_that_a_gpu_runs() {
        let [ampere, ada, hopper] = [(8, 0), (8, 9), (9, 0)].map(source_hash);
        assert_eq!(ampere.len(), 64);
        // The same general kernels; Hopper has one of its own beside.
        assert_eq!(ampere, ada);
        assert_ne!(ampere, hopper);
    }
}

//! Making plans: for each product and each bucket of rows, the own kernel and the library's candidates are timed at the
//! bucket's end, as graphs that rotate over weights beyond L2, so that neither the host nor the cache is what is measured.
//!
//! A candidate is taken only if the rows of the bucket's smallest product have the same bits as among all rows of its
//! largest: so a row's bits depend on nobody else of its bucket, as far as that comparison shows.

mod scratch;

use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use scratch::Scratch;

use super::backend::CudaBackend;
use super::buf::CudaBuf;
use super::driver::{Algo, BlasProduct, CudaError, EpilogueKind, Graph, Operands, ProductShape};
use super::plans::{LibraryPlan, Plan, PlanKey, buckets, first_of_bucket};
use crate::error::{KernelError, Result};
use crate::weight::Weight;

/// Time for a first look at all candidates of a product, of which at least so many get it.
const FIRST_LOOK: Duration = Duration::from_millis(60);
const LOOKED_AT_LEAST: usize = 3;
/// Candidates that are measured against the own kernel, and how far they may be behind the fastest at first sight.
const FINALISTS: usize = 4;
const CLOSE: f64 = 1.3;
/// Microseconds for measuring them, and how often each is timed.
const FINAL_US: f64 = 30e3;
const TIMES_LEAST: usize = 3;
const TIMES_MOST: usize = 15;
/// Products of a graph, and the multiplications and additions from which on one is enough.
const PER_GRAPH: usize = 8;
const FLOPS_ALONE: f64 = 2e11;
/// Rows whose bits are compared.
const ROWS_COMPARED: usize = 64;

/// What tuning has found.
#[derive(Clone, Debug, Default)]
pub struct TuneReport {
    /// The library's number of its version; `None` where own kernels compute everything.
    pub library: Option<usize>,
    /// Plans that were there already.
    pub n_kept: usize,
    /// Plans that were made.
    pub n_measured: usize,
    /// Products that were not measured, for there is not as much memory; own kernels compute them.
    pub n_without_memory: usize,
    /// How long it took.
    pub seconds: f64,
    /// The plans of what was asked for, with the times of both.
    pub plans: Vec<(PlanKey, Plan)>,
    /// SHA-256 of all plans, which is that of their file.
    pub hash: Option<String>,
    /// Their file.
    pub path: Option<PathBuf>,
}

impl ProductShape {
    /// That of the products by `weight`.
    pub fn of(weight: &Weight<CudaBuf>, out_f32: bool, epilogue: EpilogueKind) -> Self {
        let (ld, dtype) = (weight.parts[0].ld, weight.dtype);
        Self { n: weight.n, k: weight.k, ld, dtype, out_f32, epilogue }
    }
}

/// Something that can compute a product: the own kernel, or an algorithm.
struct Contestant {
    algo: Option<Algo>,
    graph: Graph,
    /// Microseconds of a product, one for each time that the graph was run.
    us: Vec<f64>,
}

impl Contestant {
    fn median(&self) -> f64 {
        let mut us = self.us.clone();
        us.sort_by(f64::total_cmp);
        us[us.len() / 2]
    }
}

impl CudaBackend {
    /// Finds out, for each product and all numbers of rows from 65 to `rows_max`, whether the own kernel or cuBLASLt is
    /// the faster one, and from now on uses that. What is known from before, from a file too, is not measured again;
    /// what is new is written to the file.
    ///
    /// It takes memory for the largest of the products and gives it back: call it before the cache takes what is free.
    /// Without cuBLASLt, and with [`super::GemmChoice::Own`], nothing happens.
    pub fn tune_shapes(&mut self, products: &[ProductShape], rows_max: usize) -> Result<TuneReport> {
        let begun = Instant::now();
        self.finish_weights()?;
        if !self.gemms.open(&self.context) {
            return Ok(TuneReport { seconds: begun.elapsed().as_secs_f64(), ..TuneReport::default() });
        }
        let mut report = TuneReport::default();
        let (mut wanted, mut missing) = (Vec::new(), Vec::new());
        for shape in products.iter().filter(|shape| shape.is_for_library()) {
            assert!(shape.n > 0 && shape.k > 0 && shape.ld >= shape.k, "{shape:?}");
            for key in buckets(rows_max).map(|rows| PlanKey { rows, shape: *shape }) {
                if wanted.contains(&key) {
                    continue;
                }
                wanted.push(key);
                if self.gemms.follow(&key)? {
                    report.n_kept += 1;
                } else {
                    missing.push(key);
                }
            }
        }
        if !missing.is_empty() {
            report.n_measured = self.measure_all(&missing)?;
            report.n_without_memory = missing.len() - report.n_measured;
        }
        report.library = self.gemms.blas().map(super::driver::Blas::version);
        if let Some(plans) = self.gemms.plans() {
            if report.n_measured > 0
                && let Err(error) = plans.save()
            {
                tracing::warn!("plans cannot be stored: {}: {error}", plans.path().display());
            }
            report.plans = wanted.iter().filter_map(|key| Some((*key, *plans.get(key)?))).collect();
            report.hash = Some(plans.hash());
            report.path = Some(plans.path().to_owned());
        }
        report.seconds = begun.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Measures what there is memory for; how many that were.
    fn measure_all(&mut self, keys: &[PlanKey]) -> Result<usize> {
        let (mut scratch, fitting) = Scratch::new(&self.context, keys)?;
        for key in &fitting {
            scratch.fill(&self.stream, key.shape.dtype)?;
            let plan = self.measure(key, &mut scratch)?;
            tracing::debug!("{key:?}: {plan:?}");
            self.gemms.insert(key, plan)?;
        }
        if fitting.len() < keys.len() {
            let n = keys.len() - fitting.len();
            tracing::warn!("too little memory is free to measure {n} products: own kernels compute them");
        }
        Ok(fitting.len())
    }

    fn measure(&mut self, key: &PlanKey, scratch: &mut Scratch) -> Result<Plan> {
        let blas = self.gemms.blas().expect("opened by `tune`");
        let mut product = blas.product(&key.shape)?;
        let algos = blas.candidates(&mut product, key.rows)?;
        let mut own = self.contestant(None, &mut product, key, scratch)?;
        let mut others = Vec::new();
        let begun = Instant::now();
        for (i, algo) in algos.into_iter().enumerate() {
            if i >= LOOKED_AT_LEAST && begun.elapsed() > FIRST_LOOK {
                break;
            }
            match self.contestant(Some(algo), &mut product, key, scratch) {
                Ok(contestant) => others.push(contestant),
                Err(KernelError::Cuda(error @ CudaError::Blas { .. })) => {
                    tracing::debug!("an algorithm that was offered fails: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        others.sort_by(|a, b| a.median().total_cmp(&b.median()));
        others.truncate(FINALISTS);
        // Who is far behind at first sight keeps that time.
        let fastest = others.first().map_or(own.median(), |other| other.median().min(own.median()));
        let n_close = others.iter().take_while(|other| other.median() <= CLOSE * fastest).count();
        self.measure_in_turn(&mut own, &mut others[..n_close], repeats(key, scratch))?;
        others.sort_by(|a, b| a.median().total_cmp(&b.median()));
        let mut library = None;
        for (algo, us) in others.iter().filter_map(|other| Some((other.algo?, other.median()))) {
            if self.keeps_bits(algo, &mut product, key, scratch)? {
                library = Some(LibraryPlan { us, algo });
                break;
            }
            tracing::debug!("{key:?}: an algorithm's bits depend on the number of rows");
        }
        Ok(Plan { own_us: own.median(), library })
    }

    /// A contestant that has run, and a first time of it.
    fn contestant(
        &mut self,
        algo: Option<Algo>,
        product: &mut BlasProduct,
        key: &PlanKey,
        scratch: &Scratch,
    ) -> Result<Contestant> {
        // Kernels are loaded when they run first, which a recording does not allow.
        self.compete(algo, product, &key.shape, &scratch.operands(key, 0), key.rows)?;
        self.stream.synchronize()?;
        let repeats = repeats(key, scratch);
        let stream = Rc::clone(&self.stream);
        let graph = stream.capture(|| {
            (0..repeats).try_for_each(|i| {
                self.compete(algo, product, &key.shape, &scratch.operands(key, i), key.rows)
            })
        })?;
        graph.upload(&stream)?;
        let us = vec![self.graph_us(&graph, repeats)?];
        Ok(Contestant { algo, graph, us })
    }

    fn compete(
        &mut self,
        algo: Option<Algo>,
        product: &mut BlasProduct,
        shape: &ProductShape,
        operands: &Operands,
        rows: usize,
    ) -> Result<()> {
        let Some(algo) = algo else { return self.multiply_own(shape, operands, rows) };
        let blas = self.gemms.blas().expect("opened by `tune`");
        Ok(blas.multiply(&self.stream, product, algo, operands, rows)?)
    }

    /// Times all of them anew, one after the other, and again, so that a clock that changes changes it for all.
    fn measure_in_turn(
        &mut self,
        own: &mut Contestant,
        others: &mut [Contestant],
        repeats: usize,
    ) -> Result<()> {
        let all: f64 = std::iter::once(&*own).chain(&*others).map(|one| one.us[0] * repeats as f64).sum();
        let times = ((FINAL_US / all) as usize).clamp(TIMES_LEAST, TIMES_MOST);
        let mut all: Vec<_> = std::iter::once(own).chain(others).collect();
        for time in 0..times {
            for one in &mut all {
                let us = self.graph_us(&one.graph, repeats)?;
                if time == 0 {
                    one.us.clear();
                }
                one.us.push(us);
            }
        }
        Ok(())
    }

    /// Microseconds of one of the `repeats` products of a graph.
    fn graph_us(&self, graph: &Graph, repeats: usize) -> Result<f64> {
        let (start, end) = (self.context.timed_event()?, self.context.timed_event()?);
        self.stream.record(&start)?;
        graph.launch(&self.stream)?;
        self.stream.record(&end)?;
        end.synchronize()?;
        // A clock of finite steps must not say that something takes no time.
        Ok((f64::from(end.ms_since(&start)?) * 1e3 / repeats as f64).max(1e-3))
    }

    /// Whether the last rows of the bucket's smallest product have the same bits among all rows of its largest.
    fn keeps_bits(
        &mut self,
        algo: Algo,
        product: &mut BlasProduct,
        key: &PlanKey,
        scratch: &mut Scratch,
    ) -> Result<bool> {
        let fewest = first_of_bucket(key.rows);
        let row_bytes = key.shape.n * key.shape.out_bytes();
        let first = (fewest - ROWS_COMPARED) * row_bytes;
        let mut found = [vec![0; ROWS_COMPARED * row_bytes], vec![0; ROWS_COMPARED * row_bytes]];
        for (rows, found) in [key.rows, fewest].into_iter().zip(&mut found) {
            scratch.poison(&self.stream, first, found.len())?;
            let operands = scratch.operands(key, 0);
            match self.compete(Some(algo), product, &key.shape, &operands, rows) {
                Ok(()) => scratch.outputs(&self.stream, first, found)?,
                Err(KernelError::Cuda(CudaError::Blas { .. })) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(found[0] == found[1])
    }
}

/// Products of a graph: as many as rotate over weights beyond L2, where one alone is short.
fn repeats(key: &PlanKey, scratch: &Scratch) -> usize {
    let ProductShape { n, k, .. } = key.shape;
    let flops = 2.0 * (key.rows * n) as f64 * k as f64;
    if flops > FLOPS_ALONE { 1 } else { scratch.n_weights(key).clamp(2, PER_GRAPH) }
}

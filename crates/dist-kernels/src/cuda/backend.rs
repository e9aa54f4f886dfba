//! The GPU behind the [`Backend`] trait: options, memory, and each step handed to its kernel.

use std::rc::Rc;
use std::sync::Arc;

use dist_core::DType;
use dist_core::raw::{PeerHandle, PeerWindow, RawBuf};

use super::buf::CudaBuf;
use super::cache::KernelCache;
use super::driver::{Context, DeviceInfo, DeviceMemory, Driver, EpilogueKind, Graph, ProductShape, Stream};
use super::gemms::{GemmChoice, Gemms};
use super::inputs::{Inputs, Way};
use super::launch::{ROWS_BYTES, Reader};
use super::launched::{Beside, graph_in_words};
use super::libraries::Libraries;
use super::loaded::{Kernel, Kernels};
use super::outputs::{CudaFetch, Outputs};
use super::sample::PackedRows;
use super::staging::{Staging, StagingOptions};
use super::tune::TuneReport;
use super::weight::{copy_bytes, row_elements};
use crate::args::{
    AddBiasArgs, AddBiasNormArgs, AttentionArgs, EmbedArgs, GatherRowsArgs, LinearArgs, LogitsArgs, Product,
    SampleArgs, SampleRow,
};
use crate::backend::Backend;
use crate::error::{KernelError, Result};
use crate::weight::{HostWeight, Layout, Weight, WeightPart};

pub(super) const NAME: &str = "cuda";
/// Half of what the arrays of a step pass through.
const INPUT_BYTES: usize = 1 << 20;

/// How a [`CudaBackend`] shall run.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// NVIDIA's libraries.
    pub libraries: Arc<Libraries>,
    /// Where compiled kernels are kept.
    pub cache: KernelCache,
    /// The driver's number of the GPU.
    pub ordinal: usize,
    /// What weights in `f32` become; without it they are refused, for no kernel takes them.
    pub cast: Option<DType>,
    /// How weights travel.
    pub staging: StagingOptions,
    /// What multiplies many rows.
    pub gemm: GemmChoice,
}

/// The backend that runs on one NVIDIA GPU. It belongs to the thread that made it.
#[derive(Debug)]
pub struct CudaBackend {
    pub(super) kernels: Kernels,
    pub(super) stream: Rc<Stream>,
    pub(super) inputs: Inputs,
    outputs: Outputs,
    /// `copy_pieces`.
    pub(super) copy: Rc<Kernel>,
    /// What was launched last, if it was a kernel of ours.
    pub(super) last: Option<Rc<Kernel>>,
    /// What it was otherwise.
    pub(super) beside: Beside,
    /// Whether what is asked is recorded and not done.
    pub(super) is_recording: bool,
    /// Names of what is being recorded.
    pub(super) recorded: Vec<String>,
    /// Whether steps may be recorded.
    has_graphs: bool,
    pub(super) gemms: Gemms,
    /// Taken when the first weight comes.
    weights: Option<Staging>,
    pub(super) scratch: Scratch,
    pub(super) packed: PackedRows,
    cast: Option<DType>,
    staging: StagingOptions,
    /// For the readers of weights, who take the GPU as well.
    driver: Driver,
    pub(super) context: Context,
}

/// Memory that kernels use between two lines of theirs, grown to the largest that was asked for.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The output of a norm on its way into `linear`.
    pub(super) normed: Option<DeviceMemory>,
    /// Parts of contexts, and who of a tile is done.
    pub(super) attention: Option<DeviceMemory>,
    pub(super) counters: Option<DeviceMemory>,
    /// The next piece of attention's work, zero between launches.
    pub(super) next: Option<DeviceMemory>,
    /// Sums of parts of rows of logits, and who of a row is done.
    pub(super) sample: Option<DeviceMemory>,
    pub(super) tickets: Option<DeviceMemory>,
    /// What a step's rows ask of sampling.
    pub(super) rows: Option<DeviceMemory>,
    /// The same for graphs, which know it by its address.
    pub(super) rows_of_graphs: Option<DeviceMemory>,
    pub(super) changes: Option<DeviceMemory>,
    /// What was too small: graphs that were recorded before still use it.
    pub(super) outgrown: Vec<DeviceMemory>,
}

/// Memory of at least `n_bytes`, zeroed when it is taken; what it held is lost where it grows.
pub(super) fn grown<'a>(
    (slot, outgrown): (&'a mut Option<DeviceMemory>, &mut Vec<DeviceMemory>),
    context: &Context,
    what: &str,
    n_bytes: usize,
) -> Result<&'a DeviceMemory> {
    if slot.as_ref().is_none_or(|memory| memory.n_bytes() < n_bytes) {
        let larger = context.alloc(what, n_bytes)?;
        outgrown.extend(slot.replace(larger));
    }
    Ok(slot.as_ref().expect("filled above"))
}

impl CudaBackend {
    /// Opens the driver and takes a GPU for this thread.
    pub fn new(options: CudaOptions) -> Result<Self> {
        let CudaOptions { libraries, cache, ordinal, cast, staging, gemm } = options;
        if let Some(dtype) = cast.filter(|&dtype| !is_native(dtype)) {
            return Err(KernelError::WeightType { backend: NAME, dtype });
        }
        let driver = Driver::open(&libraries)?;
        let context = Context::new(&driver, ordinal)?;
        // Their buffers are taken while kernels are loaded and the checkpoint is opened.
        let weights = Some(Staging::new(&driver, ordinal, staging)?);
        let stream = Rc::new(context.stream()?);
        let inputs = Inputs::new(&context, INPUT_BYTES)?;
        let gemms = Gemms::new(gemm, &context, (&libraries, &driver), cache.dir());
        let mut kernels = Kernels::new(context.clone(), libraries, cache);
        Ok(Self {
            copy: kernels.get("rows", "copy_pieces")?,
            kernels,
            stream,
            inputs,
            gemms,
            outputs: Outputs::default(),
            last: None,
            beside: Beside::Nothing,
            is_recording: false,
            recorded: Vec::new(),
            has_graphs: true,
            weights,
            scratch: Scratch::default(),
            packed: PackedRows::default(),
            cast,
            staging,
            driver,
            context,
        })
    }

    /// Launches every kernel by itself, also those of steps that could be recorded: an error then is of one of them.
    #[must_use]
    pub fn without_graphs(self) -> Self {
        Self { has_graphs: false, ..self }
    }

    /// Waits for weights that are under way, and asks for arrays that wait to be copied: steps come after both.
    pub(super) fn ready(&mut self) -> Result<()> {
        self.finish_weights()?;
        let way = Way { stream: &self.stream, copy: &self.copy };
        Ok(self.inputs.flush(way)?)
    }

    /// Copies `src` before the next step.
    pub(super) fn send(&mut self, dst: &DeviceMemory, at: usize, src: &[u8]) -> Result<()> {
        let way = Way { stream: &self.stream, copy: &self.copy };
        Ok(self.inputs.upload(way, dst, at, src)?)
    }

    /// The GPU that it runs on.
    pub fn describe(&self) -> &DeviceInfo {
        self.context.info()
    }

    /// Bytes of the GPU's memory that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize)> {
        Ok(self.context.memory()?)
    }

    /// How many products of many rows cuBLASLt has computed; own kernels have computed the others.
    pub fn n_products_of_library(&self) -> u64 {
        self.gemms.n_computed()
    }

    /// Waits for the last weights, which come on a stream of their own, and gives their buffers back.
    pub(super) fn finish_weights(&mut self) -> Result<()> {
        match self.weights.take() {
            Some(staging) => Ok(staging.finish()?),
            None => Ok(()),
        }
    }

    /// The type that weights of `stored` have on the GPU.
    fn weight_type(&self, stored: DType) -> Result<DType> {
        if is_native(stored) {
            return Ok(stored);
        }
        let cast = self.cast.filter(|_| stored == DType::F32);
        cast.ok_or(KernelError::WeightType { backend: NAME, dtype: stored })
    }
}

/// Whether kernels are made for it.
fn is_native(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(KernelError::Unsupported { backend: NAME, what })
}

impl Backend for CudaBackend {
    type Buf = CudaBuf;
    type Graph = Graph;
    type Fetch = CudaFetch;

    const STEPS_AHEAD: usize = 1;

    fn alloc(&mut self, what: &str, dtype: DType, len: usize) -> Result<CudaBuf> {
        let n_bytes = len.checked_mul(dtype.bytes()).ok_or_else(|| KernelError::OutOfMemory {
            what: what.to_owned(),
            needed: usize::MAX,
            available: self.memory().map_or(0, |(free, _)| free),
        })?;
        Ok(CudaBuf { memory: self.context.alloc(what, n_bytes)?, dtype, len })
    }

    /// One matrix `[n, k]`: the parts are joined, and a weight that lies the other way is turned round once.
    fn prepare(&mut self, weight: HostWeight) -> Result<Weight<CudaBuf>> {
        let dtype = self.weight_type(weight.dtype)?;
        weight.check()?;
        let (n, k, ld) = (weight.n(), weight.k, row_elements(weight.k));
        let mut data = self.alloc("a weight", dtype, n * ld)?;
        if self.weights.is_none() {
            self.weights = Some(Staging::new(&self.driver, self.describe().ordinal, self.staging)?);
        }
        let staging = self.weights.as_mut().expect("taken above");
        let fill = Box::new(move |from, bytes: &mut [u8]| copy_bytes(&weight, from, dtype, bytes));
        staging.load(&mut data.memory, 0, (n, ld * dtype.bytes()), fill)?;
        Ok(Weight { parts: vec![WeightPart { data, n, ld }], dtype, layout: Layout::Nk, n, k })
    }

    fn tune(&mut self, products: &[Product<'_, Self>], rows_max: usize) -> Result<()> {
        let shape = |product: &Product<'_, Self>| {
            let epilogue = EpilogueKind::of(product.has_bias, product.activation)?;
            Some(ProductShape::of(product.weight, product.is_head, epilogue))
        };
        let shapes: Vec<_> = products.iter().filter_map(shape).collect();
        let report = self.tune_shapes(&shapes, rows_max)?;
        let TuneReport { n_kept, n_measured, seconds, hash, .. } = &report;
        tracing::info!(n_kept, n_measured, seconds, hash, "plans of products of many rows");
        Ok(())
    }

    fn upload(&mut self, dst: &mut CudaBuf, at: usize, src: &[u8]) -> Result<()> {
        let sent = self.send(&dst.memory, at * dst.dtype.bytes(), src);
        self.after_launch(sent)
    }

    fn download(&mut self, src: &CudaBuf, at: usize, dst: &mut [u8]) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        self.ask(Self::ready)?;
        self.after_launch(self.stream.download(dst, &src.memory, at * src.dtype.bytes()))
    }

    fn fetch(&mut self, pieces: &[(&CudaBuf, usize)]) -> Result<CudaFetch> {
        self.ask(Self::ready)?;
        let way = Way { stream: &self.stream, copy: &self.copy };
        let fetch = self.outputs.fetch(&self.context, way, pieces);
        self.after_launch(fetch)
    }

    fn finish(&mut self, fetch: CudaFetch, dst: &mut [u8]) -> Result<()> {
        let finished = self.outputs.finish(&fetch, dst);
        self.after_launch(finished)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.ask(Self::ready)?;
        self.after_launch(self.stream.synchronize())
    }

    fn raw<'a>(&mut self, buf: &'a mut CudaBuf, len: usize) -> RawBuf<'a> {
        let bytes = len * buf.dtype.bytes();
        assert!(bytes <= buf.memory.n_bytes(), "{bytes} bytes of {}", buf.memory.n_bytes());
        RawBuf::Device { ptr: buf.address(), bytes, dtype: buf.dtype }
    }

    fn embed(&mut self, args: EmbedArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_embed(&args)
        })
    }

    fn linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_linear(args)
        })
    }

    fn attention(&mut self, args: AttentionArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_attention(&args)
        })
    }

    fn add_bias_norm(&mut self, args: AddBiasNormArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_norm(&args)
        })
    }

    fn add_bias(&mut self, args: AddBiasArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_add_bias(&args)
        })
    }

    fn gather_rows(&mut self, args: GatherRowsArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_gather(&args)
        })
    }

    fn logits(&mut self, args: LogitsArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| {
            gpu.ready()?;
            gpu.launch_logits(&args)
        })
    }

    fn sample(&mut self, args: SampleArgs<'_, Self>) -> Result<()> {
        args.check();
        self.ask(|gpu| gpu.launch_sample(&args))
    }

    /// The first run takes and loads what the kernels need, which a recording does not allow.
    fn capture(&mut self, run: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<Graph>> {
        if !self.has_graphs {
            return Ok(None);
        }
        run(self)?;
        let rows = (&mut self.scratch.rows_of_graphs, &mut self.scratch.outgrown);
        grown(rows, &self.context, "rows to sample", ROWS_BYTES)?;
        self.synchronize()?;
        let stream = Rc::clone(&self.stream);
        self.is_recording = true;
        let graph = stream.capture(|| run(self));
        self.is_recording = false;
        let recorded = std::mem::take(&mut self.recorded);
        let graph = graph?;
        let words = graph_in_words(graph.n_nodes(), recorded.iter().map(String::as_str));
        graph.upload(&self.stream)?;
        Ok(Some(graph.named(words)))
    }

    fn replay(&mut self, graph: &Graph, rows: &[SampleRow]) -> Result<()> {
        self.ask(|gpu| {
            if !rows.is_empty() {
                gpu.tell_sampling(rows, Reader::Graph)?;
            }
            gpu.ready()
        })?;
        let launched = graph.launch(&self.stream);
        self.after_launch(launched)?;
        (self.last, self.beside) = (None, Beside::Graph(graph.words()));
        Ok(())
    }

    fn share(&mut self, _buf: &CudaBuf) -> Result<PeerHandle> {
        unsupported("share memory with peers")
    }

    fn open(&mut self, _me: usize, _handles: &[PeerHandle], _bytes: usize) -> Result<PeerWindow> {
        unsupported("open the memory of peers")
    }
}

//! Graphs: what a stream was asked, recorded once and asked again with one call.

use std::rc::Rc;

use cudarc::driver::result::{graph, stream};
use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::error::{CudaError, dropped, failed};
use super::{Context, Result, Stream};

/// A recorded sequence. What its kernels use must live as long as it is launched.
#[derive(Debug)]
pub struct Graph {
    handle: CUgraphExec,
    n_nodes: usize,
    words: Rc<str>,
    _context: Context,
}

impl Stream {
    /// Records what `run` asks of this stream, without doing it. An error of `run` ends the recording, and so does another
    /// thread that waits for all of this GPU: where a module or cuBLASLt is given back, too.
    pub fn capture<E: From<CudaError>>(
        &self,
        run: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        // Only this thread is watched for calls that cannot be recorded: another rank's thread may take memory.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive as long as `self`.
        unsafe { stream::begin_capture(self.handle, mode) }
            .map_err(|error| failed("cuStreamBeginCapture", "a graph", error))?;
        let ran = run();
        // SAFETY: the recording was begun above. It is ended whatever became of `run`.
        let recorded = unsafe { stream::end_capture(self.handle) };
        let recorded = recorded.map(|graph| Recorded { graph });
        ran?;
        let recorded = recorded.map_err(|error| failed("cuStreamEndCapture", "a graph", error))?;
        Ok(recorded.instantiate(&self.context)?)
    }
}

/// A graph that cannot be launched yet.
struct Recorded {
    graph: CUgraph,
}

impl Recorded {
    fn instantiate(&self, context: &Context) -> Result<Graph> {
        let mut n_nodes = 0;
        // SAFETY: the graph is alive as long as `self`; without a list only the number is asked for.
        unsafe { sys::cuGraphGetNodes(self.graph, std::ptr::null_mut(), &raw mut n_nodes) }
            .result()
            .map_err(|error| failed("cuGraphGetNodes", "a graph", error))?;
        // SAFETY: as above.
        let handle = unsafe { graph::instantiate(self.graph, CUgraphInstantiate_flags(0)) };
        let handle =
            handle.map_err(|error| failed("cuGraphInstantiate", format!("{n_nodes} nodes"), error))?;
        let words = format!("a graph of {n_nodes} launches").into();
        Ok(Graph { handle, n_nodes, words, _context: context.clone() })
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.graph.is_null() {
            // SAFETY: given by the end of a recording, destroyed here only.
            dropped("cuGraphDestroy", unsafe { graph::destroy(self.graph) });
        }
    }
}

impl Graph {
    /// Asks for all of it, after what was asked of `stream` before.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        unsafe { graph::launch(self.handle, stream.handle) }
            .map_err(|error| failed("cuGraphLaunch", &*self.words, error))
    }

    /// Takes it to the GPU, so that its first launch takes no longer than the others.
    pub fn upload(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        unsafe { graph::upload(self.handle, stream.handle) }
            .map_err(|error| failed("cuGraphUpload", &*self.words, error))
    }

    /// The same graph, called `words` where an error has to name it.
    #[must_use]
    pub(in crate::cuda) fn named(mut self, words: Rc<str>) -> Self {
        self.words = words;
        self
    }

    /// What it is, for errors that come to light after it was launched.
    pub fn words(&self) -> Rc<str> {
        Rc::clone(&self.words)
    }

    /// Kernels, copies and fills in it.
    pub fn n_nodes(&self) -> usize {
        self.n_nodes
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `instantiate`, destroyed here only; the driver lets a launch that runs come to its end.
        dropped("cuGraphExecDestroy", unsafe { graph::exec_destroy(self.handle) });
    }
}

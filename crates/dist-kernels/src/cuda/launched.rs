//! What a GPU was asked for last: an error that comes to light later is of it, or of what came before.

use std::rc::Rc;

use super::backend::CudaBackend;
use super::driver::CudaError;
use crate::error::{KernelError, Result};

/// How a product of NVIDIA's library is called.
const LIBRARY: &str = "a product of cuBLASLt";

/// What was asked for last, where it is no single kernel of ours.
#[derive(Clone, Debug, Default)]
pub(super) enum Beside {
    /// Nothing that can be named.
    #[default]
    Nothing,
    /// A product of cuBLASLt.
    Library,
    /// A graph, in words.
    Graph(Rc<str>),
}

/// A graph in words: how large it is, and the kernels in it, each once and in their order.
pub(super) fn graph_in_words<'a>(n_nodes: usize, names: impl IntoIterator<Item = &'a str>) -> Rc<str> {
    let mut distinct: Vec<&str> = Vec::new();
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    format!("a graph of {n_nodes} launches ({})", distinct.join(", ")).into()
}

impl CudaBackend {
    /// Does what an op asks for: an error of it may be of what was asked for before, and what is recorded is remembered
    /// by name.
    pub(super) fn ask(&mut self, op: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let (before, n_products) = (self.last.take(), self.gemms.n_computed());
        let asked = op(self);
        if self.gemms.n_computed() > n_products {
            (self.last, self.beside) = (None, Beside::Library);
        } else if self.last.is_none() {
            self.last = before;
            return self.after_launch(asked);
        }
        if self.is_recording {
            let name = self.last.as_ref().map_or(LIBRARY, |kernel| kernel.function.name()).to_owned();
            self.recorded.push(name);
        }
        self.after_launch(asked)
    }

    /// An error of a kernel comes to light in a later call: says what may have been it.
    pub(super) fn after_launch<T, E: Into<KernelError>>(
        &self,
        result: std::result::Result<T, E>,
    ) -> Result<T> {
        result.map_err(|error| match error.into() {
            KernelError::Cuda(error) => self.after(error).into(),
            other => other,
        })
    }

    fn after(&self, error: CudaError) -> CudaError {
        match (&self.last, &self.beside) {
            (Some(kernel), _) => error.after(kernel.function.name()),
            (None, Beside::Library) => error.after(LIBRARY),
            (None, Beside::Graph(words)) => error.after(words),
            (None, Beside::Nothing) => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::graph_in_words;

    #[test]
    fn a_graph_names_each_kernel_once() {
        let names = ["embed", "linear", "norm", "linear", "norm", "sample"];
        assert_eq!(&*graph_in_words(6, names), "a graph of 6 launches (embed, linear, norm, sample)");
    }
}

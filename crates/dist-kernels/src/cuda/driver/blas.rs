//! NVIDIA's matrix products, cuBLASLt: `out[rows, n] = epilogue(x[rows, k] · weight[n, k]ᵀ)` by an algorithm that the
//! caller picks. The library is optional, and thinks in columns: to it, the transposed `weight` times `x` is `out`.
//!
//! Only algorithms that do not share `k` between blocks are offered, so that how many parts a sum has does not depend on
//! the number of rows. Whether an algorithm changes its order of adding with the number of rows all the same, the library
//! does not say: whoever relies on it compares bits.

use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtEpilogue_t as LtEpilogue,
    cublasLtMatmulAlgoConfigAttributes_t as AlgoAttribute, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute,
    cublasLtMatrixLayoutAttribute_t as LayoutAttribute, cublasLtReductionScheme_t as Reduction,
    cudaDataType as DataType,
};
use dist_core::DType;

use super::super::libraries::Libraries;
use super::error::CudaError;
use super::product::{EpilogueKind, Operands, ProductShape};
use super::{Context, DeviceMemory, Result, Stream};

/// Memory that algorithms work in: what the library's makers advise for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that are asked for at most.
const CANDIDATES_MAX: usize = 16;
/// `CUBLAS_OP_T`, which cudarc does not list.
const TRANSPOSED: i32 = 1;

/// An algorithm of the library's, whose bytes mean something to one version of it only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Algo(pub [u8; 64]);

impl Algo {
    fn of(algo: sys::cublasLtMatmulAlgo_t) -> Self {
        Self(bytemuck::cast(algo.data))
    }

    fn of_library(self) -> sys::cublasLtMatmulAlgo_t {
        sys::cublasLtMatmulAlgo_t { data: bytemuck::cast(self.0) }
    }

    /// Whether one block adds up all of `k`. What the library does not tell is taken for what it was asked for.
    fn adds_alone(self) -> bool {
        let algo = self.of_library();
        let value = |attribute| {
            let (mut value, mut written) = (0_i32, 0);
            // SAFETY: the algorithm and the numbers live as long as the call, and the size is the number's.
            let status = unsafe {
                sys::cublasLtMatmulAlgoConfigGetAttribute(
                    &raw const algo,
                    attribute,
                    (&raw mut value).cast(),
                    size_of::<i32>(),
                    &raw mut written,
                )
            };
            status.result().map_or(0, |()| value)
        };
        value(AlgoAttribute::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) == 0
            && value(AlgoAttribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1
    }
}

/// The library, ready on one GPU, and the memory that its algorithms work in. One stream at a time may use it.
#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    preference: sys::cublasLtMatmulPreference_t,
    workspace: DeviceMemory,
}

impl Blas {
    /// Opens the library for the thread's GPU and takes its workspace.
    pub fn open(libraries: &Libraries, context: &Context) -> Result<Self> {
        // Before any other call: without the library they panic.
        libraries.cublas_lt()?;
        let what = &context.info().name;
        let workspace = context.alloc("the workspace of cuBLASLt", WORKSPACE_BYTES)?;
        let handle = result::create_handle().map_err(|error| refused("cublasLtCreate", what, error))?;
        let mut blas = Self { handle, preference: std::ptr::null_mut(), workspace };
        blas.preference = result::create_matmul_pref()
            .map_err(|error| refused("cublasLtMatmulPreferenceCreate", what, error))?;
        blas.prefer(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES as u64)?;
        let scheme = Reduction::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        blas.prefer(PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme)?;
        Ok(blas)
    }

    fn prefer<T: Copy>(&self, attribute: PreferenceAttribute, value: T) -> Result<()> {
        let (from, size) = ((&raw const value).cast::<c_void>(), size_of::<T>());
        // SAFETY: the preference lives as long as `self`, the value as long as the call.
        unsafe { result::set_matmul_pref_attribute(self.preference, attribute, from, size) }
            .map_err(|error| refused("cublasLtMatmulPreferenceSetAttribute", format!("{attribute:?}"), error))
    }

    /// The library's own number of its version: 130100 is 13.1.0.
    pub fn version(&self) -> usize {
        // SAFETY: the library is open.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Prepares a product: what of it does not depend on its rows.
    pub fn product(&self, shape: &ProductShape) -> Result<BlasProduct> {
        let input = data_type(shape.dtype);
        let output = if shape.out_f32 { DataType::CUDA_R_32F } else { input };
        let (n, k) = (shape.n as u64, shape.k as u64);
        let product = BlasProduct {
            weight: Layout::new(input, (k, n), shape.ld)?,
            x: Layout::new(input, (k, 1), shape.k)?,
            out: Layout::new(output, (n, 1), shape.n)?,
            desc: Desc::new(shape)?,
            shape: *shape,
        };
        product.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        let epilogue = of_library(shape.epilogue) as u32;
        product.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
        if shape.epilogue.has_bias() {
            // Aligned as the ones to come, until then.
            product.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, self.workspace.address())?;
        }
        Ok(product)
    }

    /// Algorithms for `rows` rows, the one first that the library takes for the fastest. None, where it has none.
    pub fn candidates(&self, product: &mut BlasProduct, rows: usize) -> Result<Vec<Algo>> {
        product.set_rows(rows)?;
        let nothing = sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let mut found = [nothing; CANDIDATES_MAX];
        let mut n_found = 0;
        // SAFETY: handle, descriptors and preference are alive; as many results are there as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                product.desc.0,
                product.weight.0,
                product.x.0,
                product.out.0,
                product.out.0,
                self.preference,
                CANDIDATES_MAX as i32,
                found.as_mut_ptr(),
                &raw mut n_found,
            )
        };
        match status {
            sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => {}
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => return Ok(Vec::new()),
            other => {
                let what = format!("{rows} rows of {:?}", product.shape);
                return Err(refused("cublasLtMatmulAlgoGetHeuristic", what, CublasError(other)));
            }
        }
        let found = found.iter().take(n_found.max(0) as usize).filter(|found| fits(found));
        Ok(found.map(|found| Algo::of(found.algo)).filter(|algo| algo.adds_alone()).collect())
    }

    /// Whether `algo`, which may come from anywhere, is one for `rows` rows that [`Self::candidates`] could offer.
    pub fn takes(&self, product: &mut BlasProduct, rows: usize, algo: Algo) -> Result<bool> {
        product.set_rows(rows)?;
        let raw = algo.of_library();
        let mut found = sys::cublasLtMatmulHeuristicResult_t {
            algo: raw,
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        // SAFETY: handle and descriptors are alive, algorithm and result live as long as the call.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                product.desc.0,
                product.weight.0,
                product.x.0,
                product.out.0,
                product.out.0,
                &raw const raw,
                &raw mut found,
            )
        };
        Ok(status.result().is_ok() && fits(&found) && algo.adds_alone())
    }

    /// Asks `stream` for the product of `rows` rows. That the addresses lead to as much memory as the product needs is
    /// the caller's to know, and that nobody uses the library on another stream.
    pub(crate) fn multiply(
        &self,
        stream: &Stream,
        product: &mut BlasProduct,
        algo: Algo,
        operands: &Operands,
        rows: usize,
    ) -> Result<()> {
        product.set_rows(rows)?;
        if product.shape.epilogue.has_bias() {
            product.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias)?;
        }
        let (one, zero, algo) = (1.0_f32, 0.0_f32, algo.of_library());
        let out = operands.out as *mut c_void;
        // SAFETY: handle, descriptors, stream and workspace are alive, and what the host holds is read before the call
        // returns. The addresses come from buffers that the ops of this crate hold, which args check and `cuMemFree`
        // guards, as for kernels; the stream's order keeps two products apart that use the workspace.
        let done = unsafe {
            result::matmul(
                self.handle,
                product.desc.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                operands.weight as *const c_void,
                product.weight.0,
                operands.x as *const c_void,
                product.x.0,
                out,
                product.out.0,
                out,
                product.out.0,
                &raw const algo,
                self.workspace.address() as *mut c_void,
                self.workspace.n_bytes(),
                stream.handle.cast(),
            )
        };
        done.map_err(|error| refused("cublasLtMatmul", format!("{rows} rows of {:?}", product.shape), error))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if !self.preference.is_null() {
            // SAFETY: made by `open`, destroyed here only.
            ended("cublasLtMatmulPreferenceDestroy", unsafe { result::destroy_matmul_pref(self.preference) });
        }
        // SAFETY: as above.
        ended("cublasLtDestroy", unsafe { result::destroy_handle(self.handle) });
    }
}

/// What the library must know of a product; its rows are set before each use.
#[derive(Debug)]
pub struct BlasProduct {
    weight: Layout,
    x: Layout,
    out: Layout,
    desc: Desc,
    shape: ProductShape,
}

impl BlasProduct {
    fn set_rows(&mut self, rows: usize) -> Result<()> {
        self.x.set_columns(rows as u64)?;
        self.out.set_columns(rows as u64)
    }
}

/// A matrix by columns.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DataType, (rows, columns): (u64, u64), ld: usize) -> Result<Self> {
        let layout = result::create_matrix_layout(dtype, rows, columns, ld as i64);
        layout.map(Self).map_err(|error| {
            refused("cublasLtMatrixLayoutCreate", format!("{rows} x {columns}, {ld} apart"), error)
        })
    }

    fn set_columns(&mut self, columns: u64) -> Result<()> {
        let attribute = LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_COLS;
        let (from, size) = ((&raw const columns).cast::<c_void>(), size_of::<u64>());
        // SAFETY: the layout lives as long as `self`, the number as long as the call.
        unsafe { result::set_matrix_layout_attribute(self.0, attribute, from, size) }
            .map_err(|error| refused("cublasLtMatrixLayoutSetAttribute", format!("{columns} rows"), error))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed here only; no call keeps it.
        ended("cublasLtMatrixLayoutDestroy", unsafe { result::destroy_matrix_layout(self.0) });
    }
}

/// What is done with the matrices.
#[derive(Debug)]
struct Desc(sys::cublasLtMatmulDesc_t);

impl Desc {
    fn new(shape: &ProductShape) -> Result<Self> {
        let desc = result::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F);
        desc.map(Self).map_err(|error| refused("cublasLtMatmulDescCreate", format!("{shape:?}"), error))
    }

    fn set<T: Copy>(&self, attribute: DescAttribute, value: T) -> Result<()> {
        let (from, size) = ((&raw const value).cast::<c_void>(), size_of::<T>());
        // SAFETY: the descriptor lives as long as `self`, the value as long as the call.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, from, size) }
            .map_err(|error| refused("cublasLtMatmulDescSetAttribute", format!("{attribute:?}"), error))
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed here only; no call keeps it.
        ended("cublasLtMatmulDescDestroy", unsafe { result::destroy_matmul_desc(self.0) });
    }
}

fn fits(found: &sys::cublasLtMatmulHeuristicResult_t) -> bool {
    found.state.result().is_ok() && found.workspaceSize <= WORKSPACE_BYTES
}

fn of_library(epilogue: EpilogueKind) -> LtEpilogue {
    match epilogue {
        EpilogueKind::None => LtEpilogue::CUBLASLT_EPILOGUE_DEFAULT,
        EpilogueKind::Bias => LtEpilogue::CUBLASLT_EPILOGUE_BIAS,
        EpilogueKind::Relu => LtEpilogue::CUBLASLT_EPILOGUE_RELU,
        EpilogueKind::BiasRelu => LtEpilogue::CUBLASLT_EPILOGUE_RELU_BIAS,
        EpilogueKind::Gelu => LtEpilogue::CUBLASLT_EPILOGUE_GELU,
        EpilogueKind::BiasGelu => LtEpilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
    }
}

fn data_type(dtype: DType) -> DataType {
    match dtype {
        DType::BF16 => DataType::CUDA_R_16BF,
        DType::F16 => DataType::CUDA_R_16F,
        _ => panic!("no product takes {dtype}"),
    }
}

fn refused(call: &'static str, what: impl Into<String>, error: CublasError) -> CudaError {
    CudaError::Blas { call, what: what.into(), status: format!("{:?}", error.0) }
}

/// As for the driver's values, nobody is there to be told.
fn ended(call: &'static str, result: std::result::Result<(), CublasError>) {
    if let Err(error) = result {
        tracing::debug!("{}", refused(call, "a value that ends", error));
    }
}

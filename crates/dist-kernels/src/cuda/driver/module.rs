//! Modules of machine code, the kernels in them, and what a launch of each may ask for.

use std::ffi::CString;
use std::rc::Rc;

use cudarc::driver::result::{self, function};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute_enum as Attribute, CUmodule, CUresult};

use super::error::{CudaError, dropped, failed};
use super::{Context, Result};

/// What every GPU gives a block without being asked.
const SHARED_BYTES_FREE: usize = 48 << 10;

/// Machine code on a GPU.
#[derive(Clone, Debug)]
pub struct Module(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    handle: CUmodule,
    context: Context,
}

impl Context {
    /// Loads machine code; `name` stands in errors.
    pub fn module(&self, name: &str, cubin: &[u8]) -> Result<Module> {
        // The driver reads as far as the image's own tables say: what is no whole ELF file must not reach it.
        if !is_elf(cubin) {
            let why = "its machine code is not an ELF file".to_owned();
            return Err(CudaError::Kernel { module: name.to_owned(), kernel: "at all".to_owned(), why });
        }
        // SAFETY: a whole image, which the driver copies.
        let handle = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
        let handle = handle.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = self.memory().map_or(0, |(free, _)| free);
                CudaError::OutOfMemory { what: format!("the kernels of {name}"), needed: cubin.len(), free }
            }
            _ => failed("cuModuleLoadData", name, error),
        })?;
        Ok(Module(Rc::new(Inner { name: name.to_owned(), handle, context: self.clone() })))
    }
}

/// Whether `bytes` begin as a 64-bit ELF file does and reach to the end of its section headers.
fn is_elf(bytes: &[u8]) -> bool {
    let number = |at: usize, n: usize| {
        let bytes = bytes.get(at..at + n)?;
        Some(bytes.iter().rev().fold(0_u64, |number, &byte| number << 8 | u64::from(byte)))
    };
    let end = || number(0x28, 8)?.checked_add(number(0x3a, 2)? * number(0x3c, 2)?);
    bytes.starts_with(b"\x7fELF\x02") && end().is_some_and(|end| end <= bytes.len() as u64)
}

impl Module {
    /// The kernel of that name. It may ask for as much shared memory as the module's integer `NAME_shared` says, if
    /// there is one.
    pub fn function(&self, name: &str) -> Result<Function> {
        let inner = &self.0;
        let c_name = CString::new(name).expect("names of kernels hold no zero byte");
        // SAFETY: the module is alive.
        let handle = unsafe { result::module::get_function(inner.handle, c_name) };
        let handle = handle.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_NOT_FOUND => {
                self.no_kernel(name, "the module has no such symbol".to_owned())
            }
            _ => failed("cuModuleGetFunction", name, error),
        })?;
        // SAFETY: a kernel of a module that is alive. Loading it now keeps the driver from doing so inside a capture.
        unsafe { sys::cuFuncLoad(handle) }.result().map_err(|error| failed("cuFuncLoad", name, error))?;
        let params = params_of(handle, name)?;
        let mut function =
            Function { module: self.clone(), name: name.to_owned(), handle, params, shared_bytes: 0 };
        if let Some(shared) = self.integer(&format!("{name}_shared"))? {
            function.allow_shared(shared as usize)?;
        }
        Ok(function)
    }

    /// An integer that the module defines; `None` if there is none of that name.
    pub fn integer(&self, name: &str) -> Result<Option<i32>> {
        let c_name = CString::new(name).expect("names of integers hold no zero byte");
        // SAFETY: the module is alive.
        let (address, n_bytes) = match unsafe { result::module::get_global(self.0.handle, c_name) } {
            Ok(found) => found,
            Err(error) if error.0 == CUresult::CUDA_ERROR_NOT_FOUND => return Ok(None),
            Err(error) => return Err(failed("cuModuleGetGlobal", name, error)),
        };
        let mut value = [0_u8; 4];
        if n_bytes != value.len() {
            return Err(self.no_kernel(name, format!("it is {n_bytes} bytes and no integer")));
        }
        // SAFETY: the driver has just said that as many bytes are there.
        unsafe { result::memcpy_dtoh_sync(&mut value, address) }
            .map_err(|error| failed("cuMemcpyDtoH", name, error))?;
        Ok(Some(i32::from_le_bytes(value)))
    }

    fn no_kernel(&self, name: &str, why: String) -> CudaError {
        CudaError::Kernel { module: self.0.name.clone(), kernel: name.to_owned(), why }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: loaded by `Context::module`, unloaded here only; functions keep their module.
        dropped("cuModuleUnload", unsafe { result::module::unload(self.handle) });
    }
}

/// The sizes of a kernel's parameters, in order.
fn params_of(handle: CUfunction, name: &str) -> Result<Vec<usize>> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: a kernel of a module that is alive, and two integers to fill.
        match unsafe { sys::cuFuncGetParamInfo(handle, sizes.len(), &raw mut offset, &raw mut size) } {
            CUresult::CUDA_SUCCESS => sizes.push(size),
            // How the driver says that there are no more.
            CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(sizes),
            other => return Err(failed("cuFuncGetParamInfo", name, cudarc::driver::DriverError(other))),
        }
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Function {
    pub(super) module: Module,
    pub(super) name: String,
    pub(super) handle: CUfunction,
    /// Sizes of its parameters.
    pub(super) params: Vec<usize>,
    /// Shared memory that a launch may add.
    pub(super) shared_bytes: usize,
}

impl Function {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shared memory of a launch: what `NAME_shared` says, or what was allowed since.
    pub fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// Lets launches ask for up to `n_bytes` of shared memory.
    pub fn allow_shared(&mut self, n_bytes: usize) -> Result<()> {
        let most = self.module.0.context.info().shared_bytes_max;
        if n_bytes > most {
            let why = format!("it needs {n_bytes} bytes of shared memory, a block has at most {most}");
            return Err(self.module.no_kernel(&self.name, why));
        }
        if n_bytes > SHARED_BYTES_FREE {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the kernel's module is alive.
            unsafe { function::set_function_attribute(self.handle, attribute, n_bytes as i32) }
                .map_err(|error| failed("cuFuncSetAttribute", &self.name, error))?;
        }
        self.shared_bytes = n_bytes;
        Ok(())
    }

    /// Blocks that a multiprocessor holds at once.
    pub fn blocks_per_sm(&self, threads: u32, shared_bytes: usize) -> Result<usize> {
        // SAFETY: the kernel's module is alive.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(self.handle, threads as i32, shared_bytes)
        };
        let blocks = blocks
            .map_err(|error| failed("cuOccupancyMaxActiveBlocksPerMultiprocessor", &self.name, error))?;
        Ok(blocks as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::is_elf;

    #[test]
    fn only_whole_elf_files_reach_the_driver() {
        let mut elf = vec![0_u8; 200];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[0x28] = 100; // where section headers begin
        (elf[0x3a], elf[0x3c]) = (50, 2); // their size and number
        assert!(is_elf(&elf));
        for len in [0, 5, 0x3d, 199] {
            assert!(!is_elf(&elf[..len]), "{len}");
        }
        assert!(!is_elf(b"//\n.version 9.0\n"));
    }
}

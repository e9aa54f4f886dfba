//! NVRTC, the compiler of CUDA C++ in a library: source in, cubin and log out. Its functions are looked up in the very
//! file that [`super::libraries`] has opened, so that the version that is told is the version that compiles.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use libloading::Library;

use super::compile::{CompileError, Compiled, Compiler, Program};
use super::driver::signals;
use super::libraries::{Opened, Version};

type Handle = *mut c_void;
type Status = c_int;

/// NVRTC's functions, by their documented signatures.
#[derive(Clone, Copy, Debug)]
struct Functions {
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Handle) -> Status,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    n_archs: unsafe extern "C" fn(*mut c_int) -> Status,
    archs: unsafe extern "C" fn(*mut c_int) -> Status,
}

/// An open NVRTC.
#[derive(Debug)]
pub struct Nvrtc {
    opened: Opened,
    functions: Functions,
}

impl Nvrtc {
    pub(super) fn new(opened: Opened) -> Result<Self, libloading::Error> {
        let functions = Functions::of(&opened.library)?;
        Ok(Self { opened, functions })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.opened.path
    }

    /// The compute capabilities that it compiles for, in order; none if it does not say.
    pub fn capabilities(&self) -> Vec<(u32, u32)> {
        let mut n = 0;
        // SAFETY: NVRTC's documented signature, and a number to fill.
        let status = unsafe { (self.functions.n_archs)(&raw mut n) };
        let mut numbers: Vec<c_int> = vec![0; if status == 0 { n.max(0) as usize } else { 0 }];
        // SAFETY: NVRTC writes as many numbers as it has just said.
        let status = unsafe { (self.functions.archs)(numbers.as_mut_ptr()) };
        numbers.retain(|&number| status == 0 && number > 0);
        numbers.sort_unstable();
        numbers.into_iter().map(|number| (number as u32 / 10, number as u32 % 10)).collect()
    }

    fn error(&self, unit: &str, arch: String, status: Status, log: &str) -> CompileError {
        // SAFETY: NVRTC returns a static string for any number.
        let meaning = unsafe { CStr::from_ptr((self.functions.error_string)(status)) };
        let meaning = meaning.to_string_lossy().into_owned();
        CompileError::Refused { unit: unit.to_owned(), arch, meaning, log: log.trim().to_owned() }
    }
}

impl Compiler for Nvrtc {
    fn version(&self) -> Version {
        self.opened.version
    }

    fn compile(&self, program: &Program) -> Result<Compiled, CompileError> {
        let refused = |status, log: &str| self.error(program.unit, program.arch.to_string(), status, log);
        let source = c_string(&program.source);
        let file = c_string(&format!("{}.cu", program.unit));
        let options: Vec<CString> = program.options().iter().map(|option| c_string(option)).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut work = Work { handle: null_mut(), functions: self.functions };
        // SAFETY: all strings live until the call returns, and no headers are given.
        let status = unsafe {
            (self.functions.create)(&raw mut work.handle, source.as_ptr(), file.as_ptr(), 0, null(), null())
        };
        if status != 0 {
            return Err(refused(status, ""));
        }
        let n_options = options.len() as c_int;
        // SAFETY: the program was made above; the options live until the call returns.
        let compile = || unsafe { (self.functions.compile)(work.handle, n_options, options.as_ptr()) };
        let status = signals::kept_while(compile);
        let log = work.bytes(self.functions.log_size, self.functions.log);
        let log = log.map(|log| String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned());
        if status != 0 {
            return Err(refused(status, &log.unwrap_or_default()));
        }
        let cubin = work.bytes(self.functions.cubin_size, self.functions.cubin);
        let cubin = cubin.map_err(|status| refused(status, ""))?;
        Ok(Compiled { cubin, log: log.map_err(|status| refused(status, ""))? })
    }
}

/// A program that is being compiled.
struct Work {
    handle: Handle,
    functions: Functions,
}

impl Work {
    /// One of its results: first its size is asked for, then its bytes.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
        read: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, Status> {
        let mut n = 0;
        // SAFETY: the handle is alive as long as `self`.
        let status = unsafe { size(self.handle, &raw mut n) };
        if status != 0 {
            return Err(status);
        }
        let mut bytes = vec![0_u8; n];
        // SAFETY: NVRTC writes as many bytes as it has just said.
        let status = unsafe { read(self.handle, bytes.as_mut_ptr().cast()) };
        if status == 0 { Ok(bytes) } else { Err(status) }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made by `create`, and destroyed here only.
            unsafe { (self.functions.destroy)(&raw mut self.handle) };
        }
    }
}

impl Functions {
    fn of(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: signatures as NVIDIA documents them; they are the same in versions 12 and 13. The library is never
        // closed (`Opened`), so the functions stay where they are.
        unsafe {
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram")?,
                compile: *library.get(b"nvrtcCompileProgram")?,
                destroy: *library.get(b"nvrtcDestroyProgram")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize")?,
                log: *library.get(b"nvrtcGetProgramLog")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize")?,
                cubin: *library.get(b"nvrtcGetCUBIN")?,
                error_string: *library.get(b"nvrtcGetErrorString")?,
                n_archs: *library.get(b"nvrtcGetNumSupportedArchs")?,
                archs: *library.get(b"nvrtcGetSupportedArchs")?,
            })
        }
    }
}

/// Our own sources and options, which hold no zero byte.
fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no zero byte")
}

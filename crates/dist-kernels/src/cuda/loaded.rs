//! The kernels of a GPU: each unit is read from the cache or compiled, and loaded, when the first of its kernels is
//! asked for.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::cache::KernelCache;
use super::compile::CompileError;
use super::driver::{Context, Function, Module, Result};
use super::gathered::Gathered;
use super::libraries::Libraries;
use super::units::{UNITS, Unit};

/// A kernel that is ready.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) function: Function,
    /// Threads of a block, if its unit says so.
    pub(super) threads: u32,
    /// Rows of a block's tile, if its unit says so.
    pub(super) rows: u32,
    /// Columns that are stored at once, if its unit says so.
    pub(super) part: u32,
    /// Elements of a head that the copy engine swizzles together, if its unit says so.
    pub(super) atom: u32,
}

/// All kernels that were asked for so far.
#[derive(Debug)]
pub(super) struct Kernels {
    context: Context,
    libraries: Arc<Libraries>,
    cache: KernelCache,
    gathered: Gathered,
    modules: HashMap<&'static str, Module>,
    loaded: HashMap<String, Rc<Kernel>>,
}

impl Kernels {
    pub(super) fn new(context: Context, libraries: Arc<Libraries>, cache: KernelCache) -> Self {
        Self {
            context,
            libraries,
            cache,
            gathered: Gathered::default(),
            modules: HashMap::new(),
            loaded: HashMap::new(),
        }
    }

    /// The kernel `symbol` of `unit`.
    pub(super) fn get(&mut self, unit: &'static str, symbol: &str) -> Result<Rc<Kernel>> {
        if let Some(kernel) = self.loaded.get(symbol) {
            return Ok(Rc::clone(kernel));
        }
        let module = self.module(unit)?;
        let told =
            |what| -> Result<u32> { Ok(module.integer(&format!("{symbol}_{what}"))?.unwrap_or(0) as u32) };
        let (threads, rows, atom) = (told("threads")?, told("rows")?, told("atom")?);
        let part = told("part")?;
        let kernel = Rc::new(Kernel { function: module.function(symbol)?, threads, rows, part, atom });
        self.loaded.insert(symbol.to_owned(), Rc::clone(&kernel));
        Ok(kernel)
    }

    fn module(&mut self, name: &'static str) -> Result<Module> {
        if let Some(module) = self.modules.get(name) {
            return Ok(module.clone());
        }
        let unit = Unit::find(name).expect("units are asked for by their names");
        let capability = self.context.info().capability;
        let arch = unit.arch_for(capability).ok_or_else(|| CompileError::NoCompiler {
            unit: name.to_owned(),
            arch: format!("compute capability {}.{}", capability.0, capability.1),
            why: "the unit is for other GPUs".to_owned(),
        })?;
        let wanted = unit.program(arch);
        let cubin = match self.libraries.nvrtc() {
            Ok(nvrtc) => {
                let usual = UNITS.iter().filter(|unit| unit.is_usual(capability));
                let usual =
                    || usual.filter_map(|unit| Some(unit.program(unit.arch_for(capability)?))).collect();
                self.gathered.take(&wanted, usual, (&self.cache, nvrtc))
            }
            Err(why) => self.cache.get(&wanted, Err(&why)),
        }?;
        let module = self.context.module(name, &cubin.bytes)?;
        self.modules.insert(name, module.clone());
        Ok(module)
    }
}

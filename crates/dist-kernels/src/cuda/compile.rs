//! Kernel sources as the compiler takes them: which architectures there are, what a program is, and what ptxas says of
//! the registers, spills and shared memory of each kernel. Who compiles is a [`Compiler`]: NVRTC, or a test's own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::libraries::Version;

/// What GPUs of one kind understand, such as `sm_80`. With an `a` it is for one chip alone and knows its own
/// instructions: `sm_90a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// Major and minor number of the compute capability.
    pub capability: (u32, u32),
    /// Whether it ends in `a`.
    pub is_own: bool,
}

impl Arch {
    /// Ampere's, and of all GPUs 8.x.
    pub const SM_80: Self = Self { capability: (8, 0), is_own: false };
    /// Hopper's without its own instructions.
    pub const SM_90: Self = Self { capability: (9, 0), is_own: false };
    /// Hopper's own.
    pub const SM_90A: Self = Self { capability: (9, 0), is_own: true };

    /// Whether a GPU of `capability` runs what was compiled for this.
    pub fn runs_on(self, capability: (u32, u32)) -> bool {
        let (own, theirs) = (self.capability, capability);
        if self.is_own { own == theirs } else { own.0 == theirs.0 && own.1 <= theirs.1 }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "sm_{major}{minor}{}", if self.is_own { "a" } else { "" })
    }
}

/// Why text is no architecture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no architecture from sm_80 on: write sm_80, sm_90 or sm_90a")]
pub struct ArchError(String);

impl FromStr for Arch {
    type Err = ArchError;

    fn from_str(text: &str) -> Result<Self, ArchError> {
        let wrong = || ArchError(text.to_owned());
        let digits = text.strip_prefix("sm_").ok_or_else(wrong)?;
        let (digits, is_own) = digits.strip_suffix('a').map_or((digits, false), |digits| (digits, true));
        let is_number = (2..=3).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: u32 =
            digits.parse().ok().filter(|_| is_number && !digits.starts_with('0')).ok_or_else(wrong)?;
        if number < 80 || is_own && number < 90 {
            return Err(wrong());
        }
        Ok(Self { capability: (number / 10, number % 10), is_own })
    }
}

impl Serialize for Arch {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What is compiled in one go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Which unit it is of.
    pub unit: &'static str,
    /// All of its text.
    pub source: String,
    /// What it is for.
    pub arch: Arch,
}

impl Program {
    /// The compiler's options. They are part of the cache's key.
    pub fn options(&self) -> Vec<String> {
        // Templates that one variant does not use are no news.
        let common = ["--std=c++17", "--ptxas-options=-v", "--diag-suppress=177"].map(str::to_owned);
        [format!("--gpu-architecture={}", self.arch)].into_iter().chain(common).collect()
    }
}

/// What came of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// What the compiler said.
    pub log: String,
}

/// Someone who compiles programs.
pub trait Compiler: Sync {
    /// Its version, a part of the cache's key.
    fn version(&self) -> Version;

    /// Compiles.
    fn compile(&self, program: &Program) -> Result<Compiled, CompileError>;
}

/// Why there are no kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The compiler did not take it.
    #[error("{unit} does not compile for {arch}: {meaning}\n{log}")]
    Refused {
        /// The unit.
        unit: String,
        /// What it was compiled for.
        arch: String,
        /// The compiler's name for it.
        meaning: String,
        /// What it said.
        log: String,
    },
    /// Neither are they in the cache nor can they be compiled.
    #[error("the kernels of {unit} for {arch} are not in the cache, and there is no compiler: {why}")]
    NoCompiler {
        /// The unit.
        unit: String,
        /// What they are needed for.
        arch: String,
        /// Why there is none.
        why: String,
    },
}

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory, in which what has no register lies: an array that is indexed, or what spills.
    pub stack_bytes: u32,
    /// Bytes that are stored because registers do not suffice.
    pub spill_store_bytes: u32,
    /// Bytes that are loaded for the same reason.
    pub spill_load_bytes: u32,
    /// Bytes of shared memory, without what a launch adds.
    pub shared_bytes: u32,
}

impl Usage {
    /// Whether anything lies in local memory.
    pub fn spills(&self) -> bool {
        self.stack_bytes > 0 || self.spill_store_bytes > 0 || self.spill_load_bytes > 0
    }
}

/// The resources of each kernel in the log of `ptxas -v`, in its order.
pub fn usages(log: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Usage { kernel, ..Usage::default() });
            continue;
        }
        let Some(usage) = found.last_mut() else { continue };
        // A function that is called and not inlined has lines of its own below its kernel's: all count.
        let add = |to: &mut u32, unit: &str| *to += number_before(line, unit).unwrap_or(0);
        add(&mut usage.stack_bytes, " bytes stack frame");
        add(&mut usage.spill_store_bytes, " bytes spill stores");
        add(&mut usage.spill_load_bytes, " bytes spill loads");
        if line.contains("Used ") {
            usage.registers = usage.registers.max(number_before(line, " registers").unwrap_or(0));
            usage.shared_bytes = usage.shared_bytes.max(number_before(line, " bytes smem").unwrap_or(0));
        }
    }
    found
}

/// Lines that warn. That products which should overlap wait for each other is such a line.
pub fn warnings(log: &str) -> Vec<String> {
    let warns = |line: &&str| line.to_ascii_lowercase().contains("warning") || line.contains("serializ");
    log.lines().filter(warns).map(|line| line.trim().to_owned()).collect()
}

/// The number that stands before `unit`.
fn number_before(line: &str, unit: &str) -> Option<u32> {
    let before = &line[..line.find(unit)?];
    let start = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
    before[start..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
ptxas info    : 0 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'linear_m1_bf16' for 'sm_90a'
ptxas info    : Function properties for linear_m1_bf16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : Compile time = 140.1 ms
ptxas info    : Compiling entry function 'add_bias_norm_f16' for 'sm_90a'
ptxas info    : Function properties for add_bias_norm_f16
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 416 bytes cmem[0]
ptxas info    : Function properties for helper
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

    #[test]
    fn the_log_of_ptxas_is_read_kernel_by_kernel() {
        let found = usages(LOG);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].kernel.as_str(), found[0].registers, found[0].spills()),
            ("linear_m1_bf16", 168, false)
        );
        let expected = Usage {
            kernel: "add_bias_norm_f16".to_owned(),
            registers: 40,
            stack_bytes: 48,
            spill_store_bytes: 12,
            spill_load_bytes: 8,
            shared_bytes: 256,
        };
        assert_eq!(found[1], expected);
        assert!(found[1].spills());
        assert_eq!(usages(""), []);
    }

    #[test]
    fn warnings_are_found() {
        assert_eq!(warnings(LOG), [""; 0]);
        let log = "a.cu(3): warning #550-D: set but never used\nptxas info : (C7510) Potential Performance Loss: \
                   wgmma.mma_async instructions are serialized due to\n";
        assert_eq!(warnings(log).len(), 2);
    }

    #[test]
    fn architectures_are_read_and_told() {
        for text in ["sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120a"] {
            assert_eq!(text.parse::<Arch>().unwrap().to_string(), text);
        }
        assert_eq!("sm_120".parse::<Arch>().unwrap().capability, (12, 0));
        for text in [
            "", "80", "sm_", "sm_a", "sm_8", "sm_75", "sm_80a", "sm_0080", "sm_90b", "sm_9000", "sm_ 90",
            "SM_90",
        ] {
            let error = text.parse::<Arch>().unwrap_err();
            assert!(error.to_string().contains("sm_90a"), "{text}: {error}");
        }
    }

    #[test]
    fn machine_code_runs_on_its_own_kind() {
        assert!(Arch::SM_80.runs_on((8, 0)) && Arch::SM_80.runs_on((8, 9)));
        assert!(!Arch::SM_80.runs_on((9, 0)) && !Arch::SM_90.runs_on((8, 9)));
        assert!(Arch::SM_90A.runs_on((9, 0)) && !Arch::SM_90A.runs_on((10, 0)));
    }
}

//! The kernels' sources, which are part of this library, and how they are put together: a unit is a list of files and of
//! the variants that its templates are made into. `KERNELS.md` says what each kernel does.

use std::fmt::Write as _;

use super::compile::{Arch, Program};

/// A file of kernel source.
#[derive(Clone, Copy, Debug)]
pub struct SourceFile {
    /// Its name in `src/cuda/kernels/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// One variant of a template, made for bf16 and for f16: `MACRO(symbol_bf16, Bf16, numbers…)`.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// The macro of the unit's last file.
    pub template: &'static str,
    /// The kernel's name without its type.
    pub symbol: &'static str,
    /// The template's numbers; the file says what they are.
    pub shape: &'static [u32],
}

/// What is compiled to one module.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    /// Its name.
    pub name: &'static str,
    /// Its files, in order; the prelude comes before them.
    pub files: &'static [SourceFile],
    /// What its templates are made into; files that make all of their kernels themselves need none.
    pub variants: &'static [Variant],
    /// What it is compiled for beforehand. A GPU that runs none of these gets its own.
    pub archs: &'static [Arch],
}

/// The type names of CUDA C++, beside the ends of kernels' names.
const TYPES: [(&str, &str); 2] = [("bf16", "Bf16"), ("f16", "F16")];

macro_rules! source_file {
    ($name:literal) => {
        SourceFile { name: $name, text: include_str!(concat!("kernels/", $name)) }
    };
}

const PRELUDE: SourceFile = source_file!("prelude.cuh");
const LINEAR_PARTS: SourceFile = source_file!("linear.cuh");
const WGMMA_PARTS: SourceFile = source_file!("linear_wgmma.cuh");
const GEMM_HOPPER: &[SourceFile] =
    &[LINEAR_PARTS, source_file!("gemm_hopper.cuh"), source_file!("gemm_hopper.cu")];
const GENERAL: &[Arch] = &[Arch::SM_80, Arch::SM_90];
const HOPPER: &[Arch] = &[Arch::SM_90A];

const fn variant(template: &'static str, symbol: &'static str, shape: &'static [u32]) -> Variant {
    Variant { template, symbol, shape }
}

/// All units.
pub const UNITS: &[Unit] = &[
    Unit {
        name: "linear",
        files: &[LINEAR_PARTS, source_file!("linear.cu")],
        variants: &[
            variant("LINEAR", "linear_m1n1", &[1, 1, 1, 2, 8]),
            variant("LINEAR", "linear_m1n1s4", &[1, 1, 1, 2, 4]),
            variant("LINEAR", "linear_m2n1u2", &[2, 1, 1, 2, 5]),
            variant("LINEAR", "linear_m3n1u2", &[3, 1, 1, 2, 3]),
            variant("LINEAR", "linear_m4n1s5", &[4, 1, 2, 2, 5]),
            variant("LINEAR", "linear_m1n2", &[1, 2, 1, 2, 6]),
            variant("LINEAR", "linear_m2n2u2", &[2, 2, 1, 2, 4]),
        ],
        archs: GENERAL,
    },
    Unit {
        name: "linear_ring",
        files: &[LINEAR_PARTS, WGMMA_PARTS, source_file!("linear_ring.cu")],
        variants: &[
            variant("LINEAR_RING", "linear_ring_w1n1", &[1, 1, 4]),
            variant("LINEAR_RING", "linear_ring_w2n1", &[2, 1, 4]),
            variant("LINEAR_RING", "linear_ring_w3n1", &[3, 1, 2]),
            variant("LINEAR_RING", "linear_ring_w1n2", &[1, 2, 4]),
            variant("LINEAR_RING", "linear_ring_w2n2", &[2, 2, 4]),
            variant("LINEAR_RING", "linear_ring_w3n2", &[3, 2, 2]),
            variant("LINEAR_RING", "linear_ring_w1n4", &[1, 4, 4]),
            variant("LINEAR_RING", "linear_ring_w2n4", &[2, 4, 2]),
            variant("LINEAR_RING", "linear_ring_w3n4", &[3, 4, 2]),
            variant("LINEAR_RING", "linear_ring_w1n8", &[1, 8, 2]),
            variant("LINEAR_RING", "linear_ring_w2n8", &[2, 8, 2]),
            variant("LINEAR_RING", "linear_ring_w3n8", &[3, 8, 2]),
        ],
        archs: HOPPER,
    },
    Unit {
        name: "attention_decode",
        files: &[source_file!("attention_decode.cu")],
        variants: &[
            variant("ATTENTION_DECODE", "attention_decode_d64s2", &[64, 8, 4, 2, 4]),
            variant("ATTENTION_DECODE", "attention_decode_d64w12", &[64, 8, 12, 2, 1]),
            variant("ATTENTION_DECODE", "attention_decode_d80", &[80, 8, 4, 4, 2]),
            variant("ATTENTION_DECODE", "attention_decode_d80s2", &[80, 8, 4, 2, 3]),
            variant("ATTENTION_DECODE", "attention_decode_d96", &[96, 8, 4, 4, 2]),
            variant("ATTENTION_DECODE", "attention_decode_d128", &[128, 8, 4, 3, 2]),
            variant("ATTENTION_DECODE", "attention_decode_d128s2", &[128, 8, 4, 2, 3]),
            variant("ATTENTION_DECODE", "attention_decode_d128w8", &[128, 8, 8, 2, 1]),
        ],
        archs: GENERAL,
    },
    Unit { name: "gemm", files: &[LINEAR_PARTS, source_file!("gemm.cu")], variants: &[], archs: GENERAL },
    // Two units, for nothing takes as long to compile, and units are compiled at the same time.
    Unit {
        name: "gemm_hopper",
        files: GEMM_HOPPER,
        variants: &[
            variant("GEMM", "gemm_hopper_t128x64", &[64]),
            variant("GEMM", "gemm_hopper_t128x96", &[96]),
            variant("GEMM", "gemm_hopper_t128x128", &[128]),
        ],
        archs: HOPPER,
    },
    Unit {
        name: "gemm_hopper_wide",
        files: GEMM_HOPPER,
        variants: &[
            variant("GEMM", "gemm_hopper_t128x160", &[160]),
            variant("GEMM", "gemm_hopper_t128x192", &[192]),
            variant("GEMM", "gemm_hopper_t128x256", &[256]),
        ],
        archs: HOPPER,
    },
    Unit {
        name: "attention_prefill_hopper",
        files: &[
            source_file!("attention_prefill.cuh"),
            source_file!("attention_prefill_wgmma.cuh"),
            source_file!("attention_prefill_hopper.cu"),
        ],
        variants: &[
            variant("ATTENTION_PREFILL_HOPPER", "attention_prefill_hopper_d64", &[64, 3, 2, 4]),
            variant("ATTENTION_PREFILL_HOPPER", "attention_prefill_hopper_d80", &[80, 2, 2, 3]),
            variant("ATTENTION_PREFILL_HOPPER", "attention_prefill_hopper_d96", &[96, 2, 2, 3]),
            variant("ATTENTION_PREFILL_HOPPER", "attention_prefill_hopper_d128", &[128, 2, 2, 2]),
        ],
        archs: HOPPER,
    },
    Unit {
        name: "attention_prefill",
        files: &[source_file!("attention_prefill.cuh"), source_file!("attention_prefill.cu")],
        variants: &[
            variant("ATTENTION_PREFILL", "attention_prefill_d64", &[64, 2, 64]),
            variant("ATTENTION_PREFILL", "attention_prefill_d80", &[80, 2, 64]),
            variant("ATTENTION_PREFILL", "attention_prefill_d96", &[96, 2, 32]),
            variant("ATTENTION_PREFILL", "attention_prefill_d128", &[128, 2, 32]),
        ],
        archs: GENERAL,
    },
    Unit { name: "norm", files: &[source_file!("norm.cu")], variants: &[], archs: GENERAL },
    Unit { name: "rows", files: &[source_file!("rows.cu")], variants: &[], archs: GENERAL },
    Unit { name: "read", files: &[source_file!("read.cu")], variants: &[], archs: GENERAL },
    Unit { name: "attention_any", files: &[source_file!("attention_any.cu")], variants: &[], archs: GENERAL },
    Unit {
        name: "sample",
        files: &[source_file!("sample.cuh"), source_file!("sample.cu")],
        variants: &[],
        archs: GENERAL,
    },
];

impl Unit {
    /// The unit of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        UNITS.iter().find(|unit| unit.name == name)
    }

    /// What to compile it to for a GPU of `capability`; `None` if it is not for such.
    pub fn arch_for(&self, capability: (u32, u32)) -> Option<Arch> {
        let listed = self.archs.iter().copied().filter(|arch| arch.runs_on(capability)).max();
        let is_general = self.archs.iter().any(|arch| !arch.is_own);
        listed.or_else(|| (is_general && capability >= (8, 0)).then_some(Arch { capability, is_own: false }))
    }

    /// Whether models of common shapes need it on a GPU of `capability`.
    pub fn is_usual(&self, capability: (u32, u32)) -> bool {
        match self.name {
            "attention_any" | "read" => false,
            // Hopper's own take their places.
            "gemm" | "attention_prefill" => capability != (9, 0),
            _ => true,
        }
    }

    /// The whole program for `arch`.
    pub fn program(&self, arch: Arch) -> Program {
        self.program_with(arch, &[])
    }

    /// With variants beside its own ones, as a model may want them.
    pub fn program_with(&self, arch: Arch, more: &[Variant]) -> Program {
        let mut source = String::from(PRELUDE.text);
        for file in self.files {
            // Messages of the compiler name the file.
            let _ = write!(source, "\n#line 1 \"{}\"\n{}", file.name, file.text);
        }
        source.push('\n');
        for variant in self.variants.iter().chain(more) {
            let shape: Vec<_> = variant.shape.iter().map(u32::to_string).collect();
            for (end, name) in TYPES {
                let (template, symbol) = (variant.template, variant.symbol);
                let _ = writeln!(source, "{template}({symbol}_{end}, {name}, {})", shape.join(", "));
            }
        }
        Program { unit: self.name, source, arch }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::compile::{Compiler, usages};
    use super::*;

    #[test]
    fn names_are_unique_and_sources_are_whole() {
        let names: BTreeSet<_> = UNITS.iter().map(|unit| unit.name).collect();
        assert_eq!(names.len(), UNITS.len());
        for unit in UNITS {
            let source = unit.program(unit.archs[0]).source;
            assert!(source.starts_with(PRELUDE.text) && source.contains("KERNEL"), "{}", unit.name);
            for variant in unit.variants {
                for end in ["bf16", "f16"] {
                    assert_eq!(
                        source.matches(&format!("{}_{end},", variant.symbol)).count(),
                        1,
                        "{variant:?}"
                    );
                }
                assert!(source.contains(&format!("#define {}(", variant.template)), "{variant:?}");
            }
            assert_eq!(Unit::find(unit.name).map(|found| found.name), Some(unit.name));
        }
    }

    #[test]
    fn a_gpu_gets_what_it_runs_best() {
        let (general, hopper) = (Unit::find("norm").unwrap(), Unit::find("linear_ring").unwrap());
        let told = |unit: &Unit, capability| unit.arch_for(capability).map(|arch| arch.to_string());
        assert_eq!(told(general, (8, 0)).as_deref(), Some("sm_80"));
        assert_eq!(told(general, (8, 9)).as_deref(), Some("sm_80"));
        assert_eq!(told(general, (9, 0)).as_deref(), Some("sm_90"));
        assert_eq!(told(general, (12, 0)).as_deref(), Some("sm_120"));
        assert_eq!(told(general, (7, 5)), None);
        assert_eq!(told(hopper, (9, 0)).as_deref(), Some("sm_90a"));
        assert_eq!((told(hopper, (8, 0)), told(hopper, (10, 0))), (None, None));
    }

    #[test]
    fn variants_of_a_model_are_added() {
        let unit = Unit::find("attention_decode").unwrap();
        let more = [variant("ATTENTION_DECODE", "attention_decode_d112", &[112, 8, 4, 3, 2])];
        let source = unit.program_with(Arch::SM_80, &more).source;
        assert!(source.ends_with("ATTENTION_DECODE(attention_decode_d112_f16, F16, 112, 8, 4, 3, 2)\n"));
    }

    /// Every unit that this GPU runs loads there, and none of its kernels has anything in local memory.
    #[test]
    fn units_load_on_the_gpu() {
        let Some(gpu) = super::super::test_support::Gpu::find("units_load_on_the_gpu") else { return };
        let capability = gpu.context.info().capability;
        let mut n_kernels = 0;
        for (unit, arch) in UNITS.iter().filter_map(|unit| Some((unit, unit.arch_for(capability)?))) {
            let compiled = gpu.libraries.nvrtc().unwrap().compile(&unit.program(arch)).unwrap();
            let module = gpu.context.module(unit.name, &compiled.cubin).unwrap();
            for usage in usages(&compiled.log) {
                assert!(!usage.spills(), "{usage:?}");
                module.function(&usage.kernel).unwrap();
                n_kernels += 1;
            }
        }
        assert!(n_kernels >= UNITS.len(), "{n_kernels} kernels");
    }
}

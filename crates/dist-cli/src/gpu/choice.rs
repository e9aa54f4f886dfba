//! Which device a run takes: what was asked for, held against what is there.

use std::fmt;
use std::str::FromStr;

use dist_kernels::cuda::cache::KernelCache;
use dist_kernels::cuda::driver::{CudaError, DeviceInfo, Driver};
use dist_kernels::cuda::libraries::{Libraries, LibraryError};
use dist_kernels::cuda::units::UNITS;

use crate::problem::Problem;

/// What `--device` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuAsked {
    /// The best that there is.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU: that of a number, or any.
    Cuda(Option<usize>),
}

impl FromStr for GpuAsked {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(None)),
            Some(("cuda", number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => {
                number.parse().map(|ordinal| Self::Cuda(Some(ordinal))).map_err(|_| told(text))
            }
            _ => Err(told(text)),
        }
    }
}

impl fmt::Display for GpuAsked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(ordinal)) => write!(f, "cuda:{ordinal}"),
        }
    }
}

fn told(text: &str) -> String {
    format!("{text} is no device: write auto, cpu, cuda or cuda:N")
}

/// The device of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor; where a GPU was looked for, why none is taken.
    Cpu {
        /// One line.
        why: Option<String>,
        /// Whether there is a GPU, or a driver for one.
        is_here: bool,
    },
    /// The GPU of that number.
    Cuda {
        /// As the driver counts.
        ordinal: usize,
    },
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu { why: None, .. } => f.write_str("the CPU"),
            Self::Cpu { why: Some(why), .. } => write!(f, "the CPU: {why}"),
            Self::Cuda { ordinal } => write!(f, "GPU {ordinal}"),
        }
    }
}

/// What a GPU needs to run models, as far as it is there.
#[derive(Clone, Debug)]
pub struct Usable {
    /// All GPUs.
    pub devices: Result<Vec<DeviceInfo>, CudaError>,
    /// Why no kernels can be had for a GPU, one answer a GPU.
    pub kernels: Vec<Option<String>>,
}

/// Looks at the driver, its GPUs, and where their kernels would come from.
pub fn usable(libraries: &Libraries, cache: Option<&KernelCache>) -> Usable {
    let devices = Driver::open(libraries).and_then(|driver| driver.devices());
    let kernels = devices.iter().flatten().map(|device| missing_kernels(device, libraries, cache)).collect();
    Usable { devices, kernels }
}

/// Why kernels for `device` can neither be compiled nor all be read.
fn missing_kernels(
    device: &DeviceInfo,
    libraries: &Libraries,
    cache: Option<&KernelCache>,
) -> Option<String> {
    let no_compiler = libraries.nvrtc().err()?;
    let programs = UNITS.iter().filter_map(|unit| Some(unit.program(unit.arch_for(device.capability)?)));
    let missing = programs.filter(|program| !cache.is_some_and(|cache| cache.holds(program)));
    let missing: Vec<_> = missing.map(|program| program.unit).collect();
    (!missing.is_empty()).then(|| format!("{no_compiler}; not in the kernel cache: {}", missing.join(", ")))
}

/// The device of a run, or why what was asked for cannot be had.
pub fn choose(asked: GpuAsked, look: impl FnOnce() -> Usable) -> anyhow::Result<DeviceChoice> {
    let ordinal = match asked {
        GpuAsked::Cpu => return Ok(DeviceChoice::Cpu { why: None, is_here: false }),
        GpuAsked::Auto => None,
        GpuAsked::Cuda(ordinal) => Some(ordinal.unwrap_or(0)),
    };
    let usable = look();
    let is_here = !matches!(usable.devices, Err(CudaError::Library(LibraryError::NotFound { .. })));
    // A driver that is there and of no use is the machine's fault and not the flag's.
    let is_broken = is_here && usable.devices.is_err();
    match (pick(ordinal, &usable), ordinal) {
        (Ok(ordinal), _) => Ok(DeviceChoice::Cuda { ordinal }),
        (Err((why, _)), None) => Ok(DeviceChoice::Cpu { why: Some(why), is_here }),
        (Err((why, help)), Some(_)) => {
            let problem = if is_broken { Problem::failed } else { Problem::usage };
            let problem = problem(format!("--device {asked}: {why}"));
            let help = help.unwrap_or_else(|| "write --device cpu, or leave it out".to_owned());
            // Where no GPU can be had at all, the way on is another device.
            let has_any = usable.devices.is_ok_and(|devices| !devices.is_empty());
            let way_on = "use --device cpu; dist-cli doctor shows what a GPU lacks here";
            Err(problem.help(if has_any { help } else { format!("{way_on} ({help})") }).into())
        }
    }
}

/// GPUs as the flag names them.
fn listed(devices: &[DeviceInfo]) -> String {
    let one = |device: &DeviceInfo| format!("cuda:{} ({})", device.ordinal, device.name);
    devices.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The GPU of that number, or the first that will do; else why not, and what to do.
fn pick(ordinal: Option<usize>, usable: &Usable) -> Result<usize, (String, Option<String>)> {
    let devices = usable.devices.as_ref().map_err(|error| (error.to_string(), error.help()))?;
    let of_error = |error: CudaError| (error.to_string(), error.help());
    let fits = |ordinal: usize| {
        let Some(device) = devices.get(ordinal) else {
            let error = CudaError::NoSuchGpu { ordinal, n: devices.len() };
            return Err((error.to_string(), Some(format!("choose one that is here: {}", listed(devices)))));
        };
        if !device.is_supported() {
            let (name, capability) = (device.name.clone(), device.capability);
            return Err(of_error(CudaError::Capability { name, capability }));
        }
        let help =
            || "pip install nvidia-cuda-nvrtc==13.0.88, or fill the cache: dist-cli kernels build".to_owned();
        usable.kernels[ordinal].clone().map_or(Ok(ordinal), |why| Err((why, Some(help()))))
    };
    let none = || Err(of_error(CudaError::NoGpu));
    if let Some(ordinal) = ordinal {
        return if devices.is_empty() { none() } else { fits(ordinal) };
    }
    let mut tried = (0..devices.len()).map(fits);
    // The first reason is told where none will do.
    tried.next().unwrap_or_else(none).or_else(|first| tried.find_map(Result::ok).ok_or(first))
}

#[cfg(test)]
mod tests {
    use dist_kernels::cuda::libraries::Version;

    use super::*;

    fn device(ordinal: usize, major: u32) -> DeviceInfo {
        DeviceInfo {
            ordinal,
            name: format!("GPU of {major}"),
            capability: (major, 0),
            total_bytes: 80 << 30,
            n_sms: 100,
            shared_bytes_max: 200 << 10,
            l2_bytes: 50 << 20,
            memory_bytes_per_s: 3_352_000_000_000,
        }
    }

    fn with(majors: &[u32]) -> Usable {
        let devices: Vec<_> = majors.iter().enumerate().map(|(idx, &major)| device(idx, major)).collect();
        Usable { kernels: vec![None; devices.len()], devices: Ok(devices) }
    }

    #[track_caller]
    fn check(asked: &str, usable: &Usable, expected: &str) {
        let told = match choose(asked.parse().unwrap(), || usable.clone()) {
            Ok(choice) => choice.to_string(),
            Err(error) => format!("error: {error}"),
        };
        assert!(told.contains(expected), "{asked}: {told}");
    }

    #[test]
    fn devices_are_read() {
        let read = |text: &str| text.parse::<GpuAsked>();
        assert_eq!(read("auto"), Ok(GpuAsked::Auto));
        assert_eq!(read("cpu"), Ok(GpuAsked::Cpu));
        assert_eq!((read("cuda"), read("cuda:12")), (Ok(GpuAsked::Cuda(None)), Ok(GpuAsked::Cuda(Some(12)))));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cpu:0", "cuda:99999999999999999999"]
        {
            assert!(read(text).unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn auto_takes_a_gpu_that_is_fit_and_says_why_not_otherwise() {
        check("auto", &with(&[9]), "GPU 0");
        check("auto", &with(&[7, 8]), "GPU 1");
        check("auto", &with(&[7]), "the CPU: GPU of 7 has compute capability 7.0");
        check("auto", &with(&[]), "the CPU: NVIDIA's driver is here, but it sees no GPU");
        let version = |major| Version { major, minor: 0 };
        let too_old = CudaError::DriverTooOld { found: version(11), least: version(12) };
        check("auto", &Usable { devices: Err(too_old), ..with(&[]) }, "the CPU: NVIDIA's driver is too old");
        let no_kernels = Usable { kernels: vec![Some("no NVRTC".to_owned())], ..with(&[9]) };
        check("auto", &no_kernels, "the CPU: no NVRTC");
    }

    #[test]
    fn a_gpu_that_was_asked_for_is_taken_or_refused() {
        check("cuda", &with(&[9]), "GPU 0");
        check("cuda:1", &with(&[9, 8]), "GPU 1");
        check("cuda:2", &with(&[9, 8]), "error: --device cuda:2: there is no GPU 2: the driver sees 2");
        check("cuda:0", &with(&[7, 8]), "error: --device cuda:0: GPU of 7 has compute capability 7.0");
    }

    #[track_caller]
    fn help(asked: &str, usable: &Usable) -> String {
        let error = choose(asked.parse().unwrap(), || usable.clone()).expect_err("it cannot be had");
        crate::problem::help_of(&error).expect("a way on")
    }

    #[test]
    fn what_is_proposed_is_there() {
        let told = help("cuda:2", &with(&[9, 8]));
        assert_eq!(told, "choose one that is here: cuda:0 (GPU of 9), cuda:1 (GPU of 8)");
        for none in [with(&[]), Usable { devices: Err(CudaError::NoGpu), ..with(&[]) }] {
            for asked in ["cuda", "cuda:0", "cuda:3"] {
                check(
                    asked,
                    &none,
                    &format!("error: --device {asked}: NVIDIA's driver is here, but it sees no GPU"),
                );
                let told = help(asked, &none);
                assert!(
                    told.starts_with("use --device cpu; dist-cli doctor") && !told.contains("cuda:"),
                    "{told}"
                );
            }
        }
    }

    #[test]
    fn a_driver_that_is_here_and_of_no_use_is_told_as_the_machines_fault() {
        let path = std::path::PathBuf::from("libcuda.so.1");
        let incomplete =
            LibraryError::Incomplete { name: "the CUDA driver", path, symbols: vec!["cuLaunchKernelEx"] };
        let usable = || Usable { devices: Err(incomplete.clone().into()), ..with(&[]) };
        let told = choose(GpuAsked::Auto, usable).unwrap();
        assert!(
            matches!(&told, DeviceChoice::Cpu { why: Some(why), is_here: true } if why.contains("lacks cuLaunch"))
        );
        let error = choose(GpuAsked::Cuda(None), usable).unwrap_err();
        assert_eq!(crate::problem::exit_of(&error), crate::problem::Exit::Failed);
        let error = choose(GpuAsked::Cuda(Some(7)), || with(&[9])).unwrap_err();
        assert_eq!(crate::problem::exit_of(&error), crate::problem::Exit::Usage);
    }

    #[test]
    fn nobody_looks_for_a_gpu_if_the_cpu_was_asked_for() {
        let choice = choose(GpuAsked::Cpu, || panic!("looked")).unwrap();
        assert_eq!(choice, DeviceChoice::Cpu { why: None, is_here: false });
    }

    #[test]
    fn without_libraries_there_is_nothing_to_use() {
        let libraries = Libraries::new(dist_kernels::cuda::libraries::LibraryDirs::default());
        let usable = usable(&libraries, None);
        assert!(matches!(usable.devices, Err(CudaError::Library(_))), "{usable:?}");
        assert!(
            missing_kernels(&device(0, 9), &libraries, None).is_some_and(|why| why.contains("linear_ring"))
        );
    }
}

//! The driver on a GPU: copies, launches, graphs and errors. Without a GPU each test says that it is skipped.

use std::env;
use std::process::Command;

use super::super::test_support::Gpu;
use super::*;

const SOURCE: &str = r#"
#if __CUDA_ARCH__ >= 900
#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define WAIT
#endif
struct Scale { float* y; const float* x; float factor; int n; };
extern "C" __global__ void scale(const __grid_constant__ Scale args) {
    WAIT;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.n) args.y[i] = args.factor * args.x[i];
}
// Turns each block's numbers round by way of shared memory, which has room for many more.
extern "C" __device__ const int turn_shared = 100 << 10;
extern "C" __global__ void turn(const __grid_constant__ Scale args) {
    WAIT;
    extern __shared__ float shared[];
    int last = (turn_shared / 4) - 1;
    shared[last - threadIdx.x] = args.x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    args.y[blockIdx.x * blockDim.x + threadIdx.x] = shared[last - (blockDim.x - 1 - threadIdx.x)];
}
#if __CUDA_ARCH__ >= 900
// Each block tells its place in its cluster.
extern "C" __global__ void place(const __grid_constant__ Scale args) {
    WAIT;
    unsigned rank, size;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    if (threadIdx.x == 0) args.y[blockIdx.x] = size * 100 + rank;
}
#endif
"#;

#[derive(Clone, Copy)]
#[repr(C)]
struct Scale {
    y: u64,
    x: u64,
    factor: f32,
    n: i32,
}

const N: usize = 10_000;

/// Numbers that are no pattern.
fn numbers() -> Vec<f32> {
    (0..N as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e4).collect()
}

struct Fixture {
    module: Module,
    stream: Stream,
    x: DeviceMemory,
    y: DeviceMemory,
    // The last one that goes.
    gpu: Gpu,
}

impl Fixture {
    fn new(test: &str) -> Option<Self> {
        let gpu = Gpu::find(test)?;
        let module = gpu.module(SOURCE);
        let stream = gpu.context.stream().unwrap();
        let mut x = gpu.context.alloc("x", N * 4).unwrap();
        let y = gpu.context.alloc("y", N * 4).unwrap();
        stream.upload(&mut x, 0, bytemuck::cast_slice(&numbers())).unwrap();
        Some(Self { module, stream, x, y, gpu })
    }

    fn args(&self, factor: f32) -> Scale {
        Scale { y: self.y.address(), x: self.x.address(), factor, n: N as i32 }
    }

    fn y(&self) -> Vec<f32> {
        let mut y = vec![0.0; N];
        self.stream.download(bytemuck::cast_slice_mut(&mut y), &self.y, 0).unwrap();
        y
    }
}

#[test]
fn a_kernel_runs_and_its_memory_comes_back() {
    let Some(it) = Fixture::new("a_kernel_runs_and_its_memory_comes_back") else { return };
    assert_eq!(it.y(), vec![0.0; N], "new memory is zero");
    let scale = it.module.function("scale").unwrap();
    scale.launch(&it.stream, &scale.over([N.div_ceil(256) as u32, 1, 1], 256), &it.args(3.0), &[]).unwrap();
    let expected: Vec<_> = numbers().iter().map(|x| 3.0 * x).collect();
    assert_eq!(it.y(), expected);
}

#[test]
fn holds_on_a_gpu_end_one_by_one() {
    let Some(it) = Fixture::new("holds_on_a_gpu_end_one_by_one") else { return };
    let driver = Driver::open(&it.gpu.libraries).unwrap();
    drop(Context::new(&driver, 0).unwrap());
    let n = driver.devices().unwrap().len();
    assert_eq!(Context::new(&driver, n).unwrap_err(), CudaError::NoSuchGpu { ordinal: n, n });
    // What was refused or has ended has taken nothing away.
    assert_eq!(it.y(), vec![0.0; N]);
    drop(it);
    let again = Context::new(&driver, 0).unwrap();
    let (free, total) = again.memory().unwrap();
    assert!(0 < free && free <= total && total <= again.info().total_bytes);
}

#[test]
fn shared_memory_and_clusters_are_what_was_asked_for() {
    let Some(it) = Fixture::new("shared_memory_and_clusters_are_what_was_asked_for") else { return };
    let turn = it.module.function("turn").unwrap();
    assert_eq!(turn.shared_bytes(), 100 << 10);
    turn.launch(&it.stream, &turn.over([1, 1, 1], 500), &it.args(0.0), &[]).unwrap();
    let expected: Vec<_> = numbers()[..500].iter().rev().copied().collect();
    assert_eq!(it.y()[..500], expected);
    assert!(turn.blocks_per_sm(256, turn.shared_bytes()).unwrap() >= 1);
    let too_much = it.module.function("scale").unwrap().allow_shared(1 << 20).unwrap_err();
    assert!(too_much.to_string().contains("1048576 bytes of shared memory"), "{too_much}");
    if it.gpu.context.info().is_hopper_or_later() {
        let place = it.module.function("place").unwrap();
        let launch = Launch { cluster: 4, ..place.over([8, 1, 1], 32) };
        assert!(place.clusters_at_once(&launch).unwrap() >= 1);
        place.launch(&it.stream, &launch, &it.args(0.0), &[]).unwrap();
        assert_eq!(it.y()[..8], [400.0, 401.0, 402.0, 403.0, 400.0, 401.0, 402.0, 403.0]);
    }
}

#[test]
fn a_graph_gives_what_the_launches_give() {
    let Some(mut it) = Fixture::new("a_graph_gives_what_the_launches_give") else { return };
    let scale = it.module.function("scale").unwrap();
    let launch = scale.over([N.div_ceil(256) as u32, 1, 1], 256);
    let (first, second) = (it.args(1.1), Scale { x: it.y.address(), ..it.args(0.7) });
    let run = || {
        scale.launch(&it.stream, &launch, &first, &[])?;
        scale.launch(&it.stream, &launch, &second, &[])
    };
    run().unwrap();
    let eager = it.y();
    let graph = it.stream.capture::<CudaError>(run).unwrap();
    assert_eq!(graph.n_nodes(), 2);
    graph.upload(&it.stream).unwrap();
    for _ in 0..3 {
        // Poisoned, so that a graph that does nothing is seen.
        it.stream.fill(&mut it.y, 0, 0xff, N * 4).unwrap();
        graph.launch(&it.stream).unwrap();
        assert_eq!(it.y(), eager);
    }
}

#[test]
fn a_recording_that_fails_leaves_the_stream_usable() {
    let Some(it) = Fixture::new("a_recording_that_fails_leaves_the_stream_usable") else { return };
    let error = it.stream.capture::<CudaError>(|| Err(CudaError::NoGpu)).unwrap_err();
    assert_eq!(error, CudaError::NoGpu);
    // Waiting cannot be recorded.
    let error = it.stream.capture(|| it.stream.synchronize()).unwrap_err();
    assert!(matches!(&error, CudaError::Call { call: "cuStreamSynchronize", .. }), "{error}");
    let empty = it.stream.capture::<CudaError>(|| Ok(())).unwrap();
    assert_eq!(empty.n_nodes(), 0);
    assert_eq!(it.y(), vec![0.0; N]);
}

#[test]
fn pinned_memory_travels_both_ways() {
    let Some(it) = Fixture::new("pinned_memory_travels_both_ways") else { return };
    let context = &it.gpu.context;
    let mut there = context.alloc_pinned("there", N * 4).unwrap();
    let mut back = context.alloc_pinned("back", N * 4).unwrap();
    assert!(back.bytes().iter().all(|&byte| byte == 0));
    there.bytes_mut().copy_from_slice(bytemuck::cast_slice(&numbers()));
    let (begin, end) = (context.timed_event().unwrap(), context.timed_event().unwrap());
    it.stream.record(&begin).unwrap();
    it.stream.copy_in(&it.y, 0, &there, 0, N * 4).unwrap();
    let other = context.stream().unwrap();
    it.stream.record(&end).unwrap();
    other.wait(&end).unwrap();
    other.copy_out(&mut back, 4, &it.y, 8, N * 4 - 8).unwrap();
    other.synchronize().unwrap();
    assert!(end.is_done().unwrap() && end.ms_since(&begin).unwrap() >= 0.0);
    assert_eq!(back.bytes()[4..N * 4 - 4], there.bytes()[8..]);
}

#[test]
fn too_much_memory_is_refused_with_both_numbers() {
    let Some(it) = Fixture::new("too_much_memory_is_refused_with_both_numbers") else { return };
    let total = it.gpu.context.info().total_bytes;
    let error = it.gpu.context.alloc("KV blocks", total * 2).unwrap_err();
    let CudaError::OutOfMemory { what, needed, free } = &error else { panic!("{error}") };
    assert_eq!((what.as_str(), *needed), ("KV blocks", total * 2));
    assert!((1..total).contains(free) && error.help().is_some_and(|help| help.contains("--max-seqs")));
    // Nothing is broken by it.
    assert_eq!(it.y(), vec![0.0; N]);
}

#[test]
fn kernels_that_are_not_there_and_other_arguments_are_named() {
    let Some(it) = Fixture::new("kernels_that_are_not_there_and_other_arguments_are_named") else { return };
    let error = it.module.function("scael").unwrap_err();
    assert!(matches!(&error, CudaError::Kernel { kernel, .. } if kernel == "scael"), "{error}");
    assert_eq!(it.module.integer("turn_shared").unwrap(), Some(100 << 10));
    assert_eq!(it.module.integer("scale_shared").unwrap(), None);
    let scale = it.module.function("scale").unwrap();
    let launch = || scale.launch(&it.stream, &scale.over([1, 1, 1], 32), &0_u64, &[]);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(launch)).is_err());
    let error = it.gpu.context.module("noise", b"not machine code").unwrap_err();
    assert!(error.to_string().contains("noise"), "{error}");
    let error = scale.launch(&it.stream, &scale.over([1, 1, 1], 4096), &it.args(1.0), &[]).unwrap_err();
    assert!(error.to_string().contains("cuLaunchKernelEx failed for scale"), "{error}");
}

#[test]
fn tensor_maps_are_checked_by_the_driver() {
    let Some(it) = Fixture::new("tensor_maps_are_checked_by_the_driver") else { return };
    let spec = TensorMapSpec {
        address: it.x.address(),
        rows: 64,
        columns: 64,
        ld: 64,
        box_rows: 8,
        box_columns: 64,
        reads_ahead: true,
    };
    if !it.gpu.context.info().is_hopper_or_later() {
        return;
    }
    let map = it.gpu.context.tensor_map(&spec).unwrap();
    assert_ne!(map, it.gpu.context.tensor_map(&TensorMapSpec { rows: 32, ..spec }).unwrap());
    let error = it.gpu.context.tensor_map(&TensorMapSpec { address: spec.address + 2, ..spec }).unwrap_err();
    assert!(error.to_string().contains("cuTensorMapEncodeTiled"), "{error}");
}

/// After a kernel's wrong access nothing works any more in a process, so that it happens in one of its own.
#[test]
fn a_wrong_access_is_an_error_with_a_name() {
    const CHILD: &str = "DIST_TEST_WRONG_ACCESS";
    let Some(it) = Fixture::new("a_wrong_access_is_an_error_with_a_name") else { return };
    if env::var_os(CHILD).is_none() {
        let name = "cuda::driver::tests::a_wrong_access_is_an_error_with_a_name";
        let child =
            Command::new(env::current_exe().unwrap()).args(["--exact", name]).env(CHILD, "1").output();
        let child = child.unwrap();
        let told = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    let scale = it.module.function("scale").unwrap();
    let nowhere = Scale { y: 16, ..it.args(1.0) };
    scale.launch(&it.stream, &scale.over([1, 1, 1], 32), &nowhere, &[]).unwrap();
    let error = it.stream.synchronize().unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    assert!(error.help().is_some_and(|help| help.contains("compute-sanitizer")));
    assert!(it.gpu.context.alloc("more", 4).is_err());
}

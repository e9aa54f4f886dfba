//! What is called in NVIDIA's driver and in cuBLASLt: each function as the code names it, and the symbol that cudarc looks
//! up for it when it is first called. cudarc panics on a symbol that is not there, so all of them are looked up before.
//! The house's own check (`tests/tidy/calls.rs`) keeps the lists as long as the code's calls and as true as cudarc.

/// Of the driver.
pub(super) const DRIVER: &[(&str, &str)] = &[
    ("driver::DriverError::error_name", "cuGetErrorName"),
    ("driver::DriverError::error_string", "cuGetErrorString"),
    ("driver::result::init", "cuInit"),
    ("driver::result::mem_get_info", "cuMemGetInfo_v2"),
    ("driver::result::malloc_sync", "cuMemAlloc_v2"),
    ("driver::result::free_sync", "cuMemFree_v2"),
    ("driver::result::malloc_host", "cuMemHostAlloc"),
    ("driver::result::free_host", "cuMemFreeHost"),
    ("driver::result::memset_d8_async", "cuMemsetD8Async"),
    ("driver::result::memcpy_htod_async", "cuMemcpyHtoDAsync_v2"),
    ("driver::result::memcpy_dtoh_async", "cuMemcpyDtoHAsync_v2"),
    ("driver::result::memcpy_dtod_async", "cuMemcpyDtoDAsync_v2"),
    ("driver::result::memcpy_dtoh_sync", "cuMemcpyDtoH_v2"),
    ("driver::result::device::get_count", "cuDeviceGetCount"),
    ("driver::result::device::get", "cuDeviceGet"),
    ("driver::result::device::get_name", "cuDeviceGetName"),
    ("driver::result::device::get_attribute", "cuDeviceGetAttribute"),
    ("driver::result::device::total_mem", "cuDeviceTotalMem_v2"),
    ("driver::result::primary_ctx::retain", "cuDevicePrimaryCtxRetain"),
    ("driver::result::primary_ctx::release", "cuDevicePrimaryCtxRelease_v2"),
    ("driver::result::ctx::get_current", "cuCtxGetCurrent"),
    ("driver::result::ctx::set_current", "cuCtxSetCurrent"),
    ("driver::result::stream::create", "cuStreamCreate"),
    ("driver::result::stream::synchronize", "cuStreamSynchronize"),
    ("driver::result::stream::wait_event", "cuStreamWaitEvent"),
    ("driver::result::stream::begin_capture", "cuStreamBeginCapture_v2"),
    ("driver::result::stream::end_capture", "cuStreamEndCapture"),
    ("driver::result::stream::destroy", "cuStreamDestroy_v2"),
    ("driver::result::event::create", "cuEventCreate"),
    ("driver::result::event::record", "cuEventRecord"),
    ("driver::result::event::synchronize", "cuEventSynchronize"),
    ("driver::result::event::elapsed", "cuEventElapsedTime_v2"),
    ("driver::result::event::destroy", "cuEventDestroy_v2"),
    ("driver::sys::cuEventQuery", "cuEventQuery"),
    ("driver::result::module::load_data", "cuModuleLoadData"),
    ("driver::result::module::get_function", "cuModuleGetFunction"),
    ("driver::result::module::get_global", "cuModuleGetGlobal_v2"),
    ("driver::result::module::unload", "cuModuleUnload"),
    ("driver::result::function::set_function_attribute", "cuFuncSetAttribute"),
    (
        "driver::result::occupancy::max_active_block_per_multiprocessor",
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    ),
    ("driver::sys::cuOccupancyMaxActiveClusters", "cuOccupancyMaxActiveClusters"),
    ("driver::sys::cuFuncLoad", "cuFuncLoad"),
    ("driver::sys::cuFuncGetParamInfo", "cuFuncGetParamInfo"),
    ("driver::sys::cuLaunchKernelEx", "cuLaunchKernelEx"),
    ("driver::sys::cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled"),
    ("driver::sys::cuGraphGetNodes", "cuGraphGetNodes"),
    ("driver::result::graph::instantiate", "cuGraphInstantiateWithFlags"),
    ("driver::result::graph::upload", "cuGraphUpload"),
    ("driver::result::graph::launch", "cuGraphLaunch"),
    ("driver::result::graph::exec_destroy", "cuGraphExecDestroy"),
    ("driver::result::graph::destroy", "cuGraphDestroy"),
];

/// Of cuBLASLt.
pub(super) const CUBLAS_LT: &[(&str, &str)] = &[
    ("cublaslt::result::create_handle", "cublasLtCreate"),
    ("cublaslt::result::destroy_handle", "cublasLtDestroy"),
    ("cublaslt::result::create_matmul_desc", "cublasLtMatmulDescCreate"),
    ("cublaslt::result::set_matmul_desc_attribute", "cublasLtMatmulDescSetAttribute"),
    ("cublaslt::result::destroy_matmul_desc", "cublasLtMatmulDescDestroy"),
    ("cublaslt::result::create_matmul_pref", "cublasLtMatmulPreferenceCreate"),
    ("cublaslt::result::set_matmul_pref_attribute", "cublasLtMatmulPreferenceSetAttribute"),
    ("cublaslt::result::destroy_matmul_pref", "cublasLtMatmulPreferenceDestroy"),
    ("cublaslt::result::create_matrix_layout", "cublasLtMatrixLayoutCreate"),
    ("cublaslt::result::set_matrix_layout_attribute", "cublasLtMatrixLayoutSetAttribute"),
    ("cublaslt::result::destroy_matrix_layout", "cublasLtMatrixLayoutDestroy"),
    ("cublaslt::result::matmul", "cublasLtMatmul"),
    ("cublaslt::sys::cublasLtGetVersion", "cublasLtGetVersion"),
    ("cublaslt::sys::cublasLtMatmulAlgoCheck", "cublasLtMatmulAlgoCheck"),
    ("cublaslt::sys::cublasLtMatmulAlgoConfigGetAttribute", "cublasLtMatmulAlgoConfigGetAttribute"),
    ("cublaslt::sys::cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmulAlgoGetHeuristic"),
];

/// The symbols of the driver's library that are looked up.
pub fn of_driver() -> impl Iterator<Item = &'static str> {
    DRIVER.iter().map(|(_, symbol)| *symbol)
}

/// The symbols of cuBLASLt that are looked up.
pub fn of_cublas_lt() -> impl Iterator<Item = &'static str> {
    CUBLAS_LT.iter().map(|(_, symbol)| *symbol)
}

//! Tensor maps: how the copy engine of Hopper finds a box of a matrix. Made by the host, read by kernels.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType_enum as DataType, CUtensorMapFloatOOBfill_enum as Outside,
    CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
    CUtensorMapSwizzle_enum as Swizzle,
};

use super::error::failed;
use super::{Context, Result};

/// A map; a kernel takes it by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(128))]
pub struct TensorMap(CUtensorMap);

/// A matrix of 16-bit elements and the box that a copy takes of it. What lies outside the matrix is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Its first element; a multiple of 16.
    pub address: u64,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
    /// Elements from a row to the next; a multiple of 8.
    pub ld: usize,
    /// Rows of a box, at most 256.
    pub box_rows: u32,
    /// Columns of a box: 64 or 32, which are 128 or 64 bytes, swizzled as tensor cores read them.
    pub box_columns: u32,
    /// Whether L2 reads 256 bytes of a row at a time: for what is read more than once. A matrix that is only read through
    /// comes 4 % faster without (H200).
    pub reads_ahead: bool,
}

/// Keys or values of a cache as `attention_prefill_hopper` reads them: eight rows after eight rows, each eight cut into
/// atoms of a head's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheMapSpec {
    /// Its first element; a multiple of 16.
    pub address: u64,
    /// Its rows, of `d_head` elements each; a multiple of 8.
    pub rows: usize,
    /// Elements of a row.
    pub d_head: usize,
    /// Elements of an atom: 64, 32 or 16, which is the half the bytes of the swizzle.
    pub atom: u32,
    /// Rows of a box; a multiple of 8.
    pub box_rows: u32,
}

impl Context {
    /// Makes the map of a cache; what lies outside is zero. As for others, whether it is there is not checked.
    pub fn cache_map(&self, spec: &CacheMapSpec) -> Result<TensorMap> {
        let mut map = TensorMap(CUtensorMap { opaque: [0; 16] });
        let (atom, d_head) = (u64::from(spec.atom), spec.d_head as u64);
        let dims = [atom, 8, d_head / atom, spec.rows as u64 / 8];
        let strides = [2 * d_head, 2 * atom, 16 * d_head];
        let (boxes, steps) = ([spec.atom, 8, spec.d_head as u32 / spec.atom, spec.box_rows / 8], [1_u32; 4]);
        let swizzle = match spec.atom {
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        };
        // SAFETY: the arrays have four dimensions, and one stride less, as the call is told.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                DataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                4,
                spec.address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().map_err(|error| failed("cuTensorMapEncodeTiled", format!("{spec:?}"), error))?;
        Ok(map)
    }

    /// Makes the map. Whether the matrix is there is not checked: a kernel that reads elsewhere fails.
    pub fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let mut map = TensorMap(CUtensorMap { opaque: [0; 16] });
        let (dims, strides) = ([spec.columns as u64, spec.rows as u64], [spec.ld as u64 * 2]);
        let (boxes, steps) = ([spec.box_columns, spec.box_rows], [1_u32, 1]);
        let swizzle = match spec.box_columns {
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let promotion = if spec.reads_ahead {
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B
        } else {
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE
        };
        // SAFETY: the arrays have two dimensions, and one stride less, as the call is told.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                DataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                2,
                spec.address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                promotion,
                Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().map_err(|error| failed("cuTensorMapEncodeTiled", format!("{spec:?}"), error))?;
        Ok(map)
    }
}

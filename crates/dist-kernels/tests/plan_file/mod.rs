//! What must hold for any bytes that stand where a file of GEMM plans should: an error of bounded length, or sound plans
//! that are the same when they are written and read again. The fuzz target `gemm_plans` and the replay of its seeds
//! share it.

// The file that shares it may be no test in the eyes of the compiler.
#![allow(clippy::expect_used, unreachable_pub)]

use dist_kernels::cuda::plans::{PlansOf, bucket, encode, parse};
use serde_json::Value;

/// Bytes of a message at most.
const MESSAGE_BYTES: usize = 1024;

/// Reads them as plans for what they say that they are for, so that more than that is read of them.
pub fn check(bytes: &[u8]) {
    let told = |file: Value| serde_json::from_value::<PlansOf>(file["of"].clone()).ok();
    let of = serde_json::from_slice(bytes).ok().and_then(told).unwrap_or_else(of_the_seeds);
    let plans = match parse(bytes, &of) {
        Ok(plans) => plans,
        Err(why) => return assert!(why.len() < MESSAGE_BYTES && !why.contains('\n'), "{why}"),
    };
    for (key, plan) in &plans {
        assert_eq!(bucket(key.rows), Some(key.rows));
        let times = [Some(plan.own_us), plan.library.map(|library| library.us)];
        assert!(times.into_iter().flatten().all(|us| us.is_finite() && us > 0.0), "{plan:?}");
    }
    if bytes.len() > 1 << 20 {
        // Written with its spaces it may be too long a file.
        return;
    }
    let again = encode(&plans, &of);
    assert_eq!(parse(&again, &of).as_ref(), Ok(&plans));
    assert_eq!(encode(&plans, &of), again);
    let other = PlansOf { library: !of.library, ..of };
    assert!(parse(&again, &other).is_err(), "plans of another library were taken");
}

/// What the plans of the seeds are for.
pub fn of_the_seeds() -> PlansOf {
    let (gpu, driver) = ("a GPU".to_owned(), "13.0".to_owned());
    PlansOf { gpu, driver, library: 130_100, source: "0123".to_owned() }
}

//! Numbers with bounds, for clap: what is wrong with a value is said where it was written.

use std::str::FromStr;
use std::time::Duration;

fn number<T: FromStr>(text: &str, is_allowed: impl Fn(&T) -> bool, allowed: &str) -> Result<T, String> {
    text.trim().parse().ok().filter(is_allowed).ok_or_else(|| format!("must be {allowed}"))
}

/// A temperature or such: finite, at least 0.
pub(super) fn at_least_0(text: &str) -> Result<f32, String> {
    number(text, |x: &f32| x.is_finite() && *x >= 0.0, "a finite number of at least 0")
}

/// A share without the zero.
pub(super) fn share(text: &str) -> Result<f32, String> {
    number(text, |x: &f32| *x > 0.0 && *x <= 1.0, "above 0 and at most 1")
}

/// A share, zero too.
pub(super) fn share_or_0(text: &str) -> Result<f32, String> {
    number(text, |x: &f32| (0.0..=1.0).contains(x), "from 0 to 1")
}

/// A divisor.
pub(super) fn above_0(text: &str) -> Result<f32, String> {
    number(text, |x: &f32| x.is_finite() && *x > 0.0, "a finite number above 0")
}

/// Any number but the infinite ones.
pub(super) fn finite(text: &str) -> Result<f32, String> {
    number(text, |x: &f32| x.is_finite(), "a finite number")
}

/// A rate or a size.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    number(text, |x: &f64| x.is_finite() && *x > 0.0, "a finite number above 0")
}

/// A count.
pub(super) fn count(text: &str) -> Result<usize, String> {
    number(text, |n: &usize| (1..=1 << 24).contains(n), "a whole number from 1 to 16777216")
}

/// A number of threads.
pub(super) fn threads(text: &str) -> Result<usize, String> {
    number(text, |n: &usize| (1..=1024).contains(n), "from 1 to 1024")
}

/// A time limit.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = number(text, |x: &f64| *x >= 0.001 && *x <= 1e6, "seconds, from 0.001 to 1000000")?;
    Ok(Duration::from_secs_f64(seconds))
}

/// `ID=VALUE`.
pub(super) fn bias(text: &str) -> Result<(u32, f32), String> {
    let told = || "must be ID=VALUE, a token id and a number (-inf bans the token)".to_owned();
    let (id, value) = text.split_once('=').ok_or_else(told)?;
    let (id, value) = (id.trim().parse(), value.trim().parse::<f32>());
    match (id, value) {
        (Ok(id), Ok(value)) if !value.is_nan() => Ok((id, value)),
        _ => Err(told()),
    }
}

/// A text that is not empty.
pub(super) fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_meaning_is_refused() {
        for text in ["NaN", "-0.1", "inf", "", "warm"] {
            assert!(at_least_0(text).is_err(), "{text}");
        }
        assert_eq!(at_least_0("0.5"), Ok(0.5));
        assert!(share("0").is_err() && share("1.5").is_err() && share_or_0("0").is_ok());
        assert!(above_0("0").is_err() && finite("-2").is_ok());
        assert!(count("0").is_err() && count("99999999").is_err());
        assert_eq!(bias("5=-inf"), Ok((5, f32::NEG_INFINITY)));
        assert!(bias("5").is_err() && bias("5=NaN").is_err() && bias("-5=1").is_err());
    }
}

//! NVRTC catches SIGINT and SIGTERM while its front end runs, in a way that allocates memory and ends the process with a
//! status of its own: where the signal meets another allocation, the process hangs. What the program wants done with these
//! signals is put back as soon as that is seen.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a handler of NVRTC's may stand.
const PERIOD: Duration = Duration::from_micros(200);
const SIGNALS: [c_int; 2] = [libc::SIGINT, libc::SIGTERM];

type Actions = [libc::sigaction; SIGNALS.len()];

struct Watch {
    /// Compilations under way.
    n: usize,
    /// What was to be done with the signals before the first of them.
    before: Option<Actions>,
    is_watched: bool,
}

static WATCH: Mutex<Watch> = Mutex::new(Watch { n: 0, before: None, is_watched: false });

fn watch() -> MutexGuard<'static, Watch> {
    WATCH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does `work`, which calls NVRTC.
pub(in crate::cuda) fn kept_while<R>(work: impl FnOnce() -> R) -> R {
    let _kept = Kept::new();
    work()
}

struct Kept;

impl Kept {
    fn new() -> Self {
        let mut watch = watch();
        watch.n += 1;
        if watch.n == 1 {
            watch.before = Some(SIGNALS.map(action));
        }
        if !watch.is_watched {
            // Without a thread signals are as NVRTC has them.
            watch.is_watched =
                std::thread::Builder::new().name("signals".to_owned()).spawn(look_after).is_ok();
        }
        Self
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut watch = watch();
        watch.put_back();
        watch.n -= 1;
    }
}

impl Watch {
    /// A handler that the program has set meanwhile stays.
    fn put_back(&self) {
        for (&signal, before) in SIGNALS.iter().zip(self.before.iter().flatten()) {
            if is_of_nvrtc(action(signal).sa_sigaction) {
                // SAFETY: what `sigaction` has given for the same signal.
                unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
            }
        }
    }
}

fn look_after() {
    loop {
        std::thread::sleep(PERIOD);
        let mut watch = watch();
        if watch.n == 0 {
            watch.is_watched = false;
            return;
        }
        watch.put_back();
    }
}

fn action(signal: c_int) -> libc::sigaction {
    let mut now = MaybeUninit::zeroed();
    // SAFETY: it only asks; all zeros are an action, if the call should leave it so.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr());
        now.assume_init()
    }
}

/// Whether the handler is a function of NVRTC's library.
fn is_of_nvrtc(handler: libc::sighandler_t) -> bool {
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        return false;
    }
    let mut found: MaybeUninit<libc::Dl_info> = MaybeUninit::zeroed();
    // SAFETY: any address may be asked for; the name, if there is one, is a string that lives as long as the library,
    // which is not closed.
    let name = unsafe {
        if libc::dladdr(handler as *const _, found.as_mut_ptr()) == 0 {
            return false;
        }
        let name = found.assume_init().dli_fname;
        if name.is_null() {
            return false;
        }
        std::ffi::CStr::from_ptr(name)
    };
    name.to_string_lossy().contains("nvrtc")
}

#[cfg(test)]
mod tests {
    use super::*;

    extern "C" fn handle(_: c_int) {}

    #[test]
    fn only_handlers_of_nvrtc_are_put_back() {
        assert!(!is_of_nvrtc(libc::SIG_DFL) && !is_of_nvrtc(libc::SIG_IGN));
        assert!(!is_of_nvrtc(handle as extern "C" fn(c_int) as libc::sighandler_t));
        let before = SIGNALS.map(|signal| action(signal).sa_sigaction);
        assert_eq!(kept_while(|| SIGNALS.map(|signal| action(signal).sa_sigaction)), before);
        // The thread ends when nothing is compiled.
        while watch().is_watched {
            std::thread::sleep(PERIOD);
        }
    }
}

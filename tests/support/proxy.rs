//! A connection through a middleman that can break it off or hold everything back.

#![allow(clippy::unwrap_used, reason = "a test may fail here")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Default)]
struct State {
    streams: Mutex<Vec<TcpStream>>,
    is_held: AtomicBool,
}

/// Passes connections on to `target` until told otherwise.
pub(crate) struct Proxy {
    addr: SocketAddr,
    state: Arc<State>,
}

impl Proxy {
    /// Listens at a port of its own.
    pub(crate) fn to(target: String) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let (addr, state) = (listener.local_addr().expect("an address"), Arc::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                near.set_nodelay(true).expect("a socket");
                far.set_nodelay(true).expect("a socket");
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().expect("a socket"), to.try_clone().expect("a socket"));
                    let state = Arc::clone(&shared);
                    std::thread::spawn(move || pass_on(from, to, &state));
                }
                shared.streams.lock().unwrap().extend([near, far]);
            }
        });
        Self { addr, state }
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> String {
        self.addr.to_string()
    }

    /// Closes both ends of every connection.
    pub(crate) fn close(&self) {
        for stream in self.state.streams.lock().unwrap().drain(..) {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Passes nothing on any more; both ends stay open.
    pub(crate) fn hold(&self) {
        self.state.is_held.store(true, Ordering::Release);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.close();
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, state: &State) {
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        while state.is_held.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_secs(1));
        }
        if to.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    // The other end learns of a close as it would without us.
    let _ = to.shutdown(Shutdown::Both);
}

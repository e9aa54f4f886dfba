//! The watchdog: one thread for each rank that tells all others, ten times a second, where its rank is, and listens to
//! theirs. It answers while the rank computes for long, and it sees a closed connection at once.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dist_core::Rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::board::{Board, Gone};
use super::progress::Progress;
use crate::codec::{FrameDecoder, from_bytes, message_frame};
use crate::error::Departure;

/// Time between two words to each peer.
const BEAT: Duration = Duration::from_millis(100);

/// Largest message between watchdogs.
const WORD_LIMIT: usize = 64 << 10;

/// How long the last word may take to get out.
const FAREWELL: Duration = Duration::from_millis(200);

/// What watchdogs say.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Word {
    /// How often the rank has got on, and where it is.
    Beat(u64, Option<Progress>),
    /// We give up because of this rank, which did not come.
    Lost(Rank),
    /// We give up because of this rank, which is no more.
    Gone(Rank),
    Left,
    Panicked,
    Failed(String),
}

/// One peer's connection.
#[derive(Debug)]
struct Line {
    rank: Rank,
    stream: TcpStream,
    decoder: FrameDecoder,
    /// Bytes that the socket did not take yet.
    unsent: Vec<u8>,
    is_open: bool,
}

/// What the rank's own thread shares with its watchdog.
#[derive(Debug)]
struct Orders {
    stop: AtomicBool,
    /// To be told to all before anything else.
    words: Mutex<Vec<Word>>,
}

/// The watchdog of a rank; dropping it tells the others how the rank ended, and ends the thread.
#[derive(Debug)]
pub(crate) struct Watch {
    board: Arc<Board>,
    orders: Arc<Orders>,
    wake: Mutex<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the thread on connections to all peers.
    pub(crate) fn start(
        me: Rank,
        world_size: usize,
        peers: Vec<(Rank, TcpStream, FrameDecoder)>,
    ) -> std::io::Result<Self> {
        let board = Arc::new(Board::new(me, world_size, Instant::now()));
        let orders = Arc::new(Orders { stop: AtomicBool::new(false), words: Mutex::new(Vec::new()) });
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let mut lines = Vec::new();
        for (rank, stream, mut decoder) in peers {
            stream.set_nonblocking(true)?;
            decoder.set_limit(WORD_LIMIT);
            lines.push(Line { rank, stream, decoder, unsent: Vec::new(), is_open: true });
        }
        let mut dog = Dog { board: Arc::clone(&board), orders: Arc::clone(&orders), woken, lines };
        let name = format!("watch-{}", me.0);
        let thread = std::thread::Builder::new().name(name).spawn(move || dog.run())?;
        Ok(Self { board, orders, wake: Mutex::new(wake), thread: Some(thread) })
    }

    /// What is known of the others.
    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Tells all that this rank gives up because `rank` did not come.
    pub(crate) fn tell_lost(&self, rank: Rank) {
        self.tell(Word::Lost(rank));
    }

    /// Tells all that this rank gives up because `rank` went like this.
    pub(crate) fn tell_loss(&self, rank: Rank, why: &Departure) {
        self.tell(if matches!(why, Departure::GivenUp { .. }) { Word::Lost(rank) } else { Word::Gone(rank) });
    }

    /// Tells all that this rank gives up by itself.
    pub(crate) fn tell_failed(&self, why: &str) {
        // A sentence is enough, and it has to fit in a frame.
        let why: String = why.chars().take(2_000).collect();
        self.tell(Word::Failed(why));
    }

    fn tell(&self, word: Word) {
        self.orders.words.lock().unwrap_or_else(PoisonError::into_inner).push(word);
        self.wake();
    }

    fn wake(&self) {
        // A full pipe wakes as well.
        let _ = self.wake.lock().unwrap_or_else(PoisonError::into_inner).write(&[0]);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tell(if std::thread::panicking() { Word::Panicked } else { Word::Left });
        self.orders.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // A panic of the watchdog is no reason for one here.
            let _ = thread.join();
        }
    }
}

/// The thread's own state.
#[derive(Debug)]
struct Dog {
    board: Arc<Board>,
    orders: Arc<Orders>,
    woken: UnixStream,
    lines: Vec<Line>,
}

impl Dog {
    fn run(&mut self) {
        let mut next_beat = Instant::now();
        while !self.orders.stop.load(Ordering::Acquire) {
            self.pass_on();
            let now = Instant::now();
            if now >= next_beat {
                next_beat = now + BEAT;
                self.say(&Word::Beat(self.board.steps(), self.board.progress(now)));
            }
            self.wait(next_beat.saturating_duration_since(now));
            self.listen();
        }
        self.pass_on();
        let until = Instant::now() + FAREWELL;
        while self.lines.iter().any(|line| line.is_open && !line.unsent.is_empty()) && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(1));
            self.lines.iter_mut().for_each(Line::flush);
        }
        for line in &self.lines {
            // The peer may have closed it before us.
            let _ = line.stream.shutdown(Shutdown::Write);
        }
    }

    /// What the rank's thread wants to be told.
    fn pass_on(&mut self) {
        let words = std::mem::take(&mut *self.orders.words.lock().unwrap_or_else(PoisonError::into_inner));
        for word in words {
            self.say(&word);
        }
    }

    fn say(&mut self, word: &Word) {
        let Ok(frame) = message_frame(word, WORD_LIMIT) else { return };
        for line in &mut self.lines {
            // A peer that does not read gets no more beats; what counts is still queued for it.
            if line.is_open && (line.unsent.is_empty() || !matches!(word, Word::Beat(..))) {
                line.unsent.extend_from_slice(&frame);
                line.flush();
            }
        }
    }

    fn wait(&mut self, limit: Duration) {
        let mut fds = vec![PollFd::from_borrowed_fd(self.woken.as_fd(), PollFlags::IN)];
        for line in self.lines.iter().filter(|line| line.is_open) {
            let also = if line.unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            fds.push(PollFd::from_borrowed_fd(line.stream.as_fd(), PollFlags::IN | also));
        }
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        if poll(&mut fds, Some(&limit)).is_err() {
            // An interrupted wait is a short one; any other failure must not become a busy loop.
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(fds);
        let mut wakes = [0; 64];
        while matches!(self.woken.read(&mut wakes), Ok(n) if n == wakes.len()) {}
    }

    fn listen(&mut self) {
        for line in self.lines.iter_mut().filter(|line| line.is_open) {
            line.flush();
            line.listen(&self.board);
        }
    }
}

impl Line {
    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // A broken connection is seen by the read that follows.
                Err(_) => return,
            }
        }
    }

    fn listen(&mut self, board: &Board) {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return self.close(board),
                Ok(n) => {
                    self.decoder.feed(&bytes[..n]);
                    if !self.hear(board) {
                        return self.close(board);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return self.close(board),
            }
        }
    }

    /// `false` if the peer talks nonsense.
    fn hear(&mut self, board: &Board) -> bool {
        loop {
            let word = match self.decoder.next_frame() {
                Ok(Some(payload)) => from_bytes::<Word>(payload),
                Ok(None) => return true,
                Err(_) => return false,
            };
            let gone = match word {
                Ok(Word::Beat(steps, progress)) => {
                    board.on_beat(self.rank, steps, progress, Instant::now());
                    continue;
                }
                Ok(Word::Lost(rank)) => Gone::Lost { rank, is_gone: false },
                Ok(Word::Gone(rank)) => Gone::Lost { rank, is_gone: true },
                Ok(Word::Left) => Gone::Departed(Departure::Left),
                Ok(Word::Panicked) => Gone::Departed(Departure::Panicked),
                Ok(Word::Failed(why)) => Gone::Departed(Departure::Failed(why)),
                Err(_) => return false,
            };
            board.on_gone(self.rank, gone);
        }
    }

    fn close(&mut self, board: &Board) {
        self.is_open = false;
        board.on_gone(self.rank, Gone::Closed);
    }
}

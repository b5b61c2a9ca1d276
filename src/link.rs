//! What the main thread and the queue threads tell each other.
//!
//! To the first queue thread: wishes, with an eventfd that its ring reads. To the main thread:
//! events of all of them on a channel, with an eventfd that its poll watches, and a report
//! (counters, health) that the first renews twice a second and on demand. Nothing here is touched
//! on the path of a guest request.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use qcow2::{Health, Memory, Stats};

/// What a queue thread tells once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The engine is ready and the fetch commands are on their way.
    Ready,
    /// The thread has ended: the image is closed, or the reason why it is not.
    Ended(Result<(), String>),
}

/// A snapshot of the engine.
#[derive(Clone, Debug)]
pub struct Report {
    pub stats: Stats,
    pub health: Health,
    pub memory: Memory,
}

/// The end of a queue thread.
#[derive(Clone)]
pub struct QueueEnd {
    shared: Arc<Shared>,
    events: Sender<Event>,
}

/// The main thread's end.
pub struct MainEnd {
    shared: Arc<Shared>,
    events: Receiver<Event>,
}

struct Shared {
    to_queue: EventFd,
    to_main: EventFd,
    stop: AtomicBool,
    /// The last report and how many there were.
    report: Mutex<(u64, Option<Report>)>,
    renewed: Condvar,
}

/// Both ends.
pub fn link() -> io::Result<(MainEnd, QueueEnd)> {
    // The queue's ring waits for its descriptor; the main thread polls first.
    let shared = Arc::new(Shared {
        to_queue: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        to_main: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        stop: AtomicBool::new(false),
        report: Mutex::new((0, None)),
        renewed: Condvar::new(),
    });
    let (sender, receiver) = channel();
    let main = MainEnd { shared: Arc::clone(&shared), events: receiver };
    Ok((main, QueueEnd { shared, events: sender }))
}

impl QueueEnd {
    /// The descriptor to read eight bytes from to be woken.
    pub fn wake_fd(&self) -> RawFd {
        self.shared.to_queue.as_fd().as_raw_fd()
    }

    /// Whether the main thread wants an image closed whose device was never started.
    pub fn stop_wanted(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Tells the main thread.
    pub fn tell(&self, event: Event) {
        // A main thread that is gone needs no news; the process is about to end.
        let _ = self.events.send(event);
        let _ = self.shared.to_main.write(1);
    }

    /// Renews the report.
    pub fn report(&self, report: Report) {
        let mut current = self.shared.report.lock().unwrap_or_else(PoisonError::into_inner);
        *current = (current.0 + 1, Some(report));
        drop(current);
        self.shared.renewed.notify_all();
    }
}

impl MainEnd {
    /// Readable when there is an event.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.to_main.as_fd()
    }

    /// The next event, if there is one.
    pub fn event(&self) -> Option<Event> {
        let _ = self.shared.to_main.read();
        self.events.try_recv().ok()
    }

    /// Waits for the next event, no longer than `limit`.
    pub fn wait_event(&self, limit: Duration) -> Option<Event> {
        self.events.recv_timeout(limit).ok()
    }

    /// Asks the queue thread to close an image whose device was never started.
    pub fn ask_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// A fresh report, or the last one if the queue thread does not answer within `limit`.
    pub fn fresh_report(&self, limit: Duration) -> Option<Report> {
        let current = self.shared.report.lock().unwrap_or_else(PoisonError::into_inner);
        let before = current.0;
        self.wake();
        let waited = self.shared.renewed.wait_timeout_while(current, limit, |now| now.0 == before);
        let (current, _) = waited.unwrap_or_else(PoisonError::into_inner);
        current.1.clone()
    }

    fn wake(&self) {
        let _ = self.shared.to_queue.write(1);
    }
}

//! What the main thread and the queue threads tell each other.
//!
//! To each queue thread: a wish, with an eventfd that its ring reads. To the main thread: events of
//! all of them on a channel, with an eventfd that its poll watches, and reports. Each queue renews
//! its own twice a second and on demand, the first one that of the engine, too. Nothing here is
//! touched on the path of a guest request.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use qcow2::{Health, Memory, Stats};

use crate::meter::Meter;
use crate::watch::{Episode, Ticks};

/// What a queue thread tells once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The queue has all it needs, the first one the engine, too, and waits for
    /// [`MainEnd::let_go`].
    Opened,
    /// The fetch commands are on their way.
    Ready,
    /// The driver takes the device from the queue: requests come only as long as it waits for those
    /// that were under way. Told once.
    Leaving,
    /// From now on the image takes no writes, for this reason. Each queue tells it when it hears of
    /// it. (That a journal could not be adopted is told with the end, and can be tried again.)
    Failed(String),
    /// The thread has ended: the image is closed, or the reason why it is not.
    Ended(Result<(), String>),
}

/// A snapshot of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub stats: Stats,
    pub health: Health,
    pub memory: Memory,
    /// Clusters that a crash may leave counted and not used.
    pub leak_bound: u64,
}

/// A snapshot of one queue.
#[derive(Clone, Debug, Default)]
pub struct QueueReport {
    /// How many reports there were before; 0: none yet.
    pub renewed: u64,
    pub meter: Meter,
    /// Requests that the engine has, and operations that the kernel has.
    pub requests: usize,
    pub operations: usize,
    /// Operations that do not return, at this tick.
    pub stuck: Vec<Episode>,
    pub tick: Ticks,
}

/// All reports there are.
#[derive(Clone, Debug)]
pub struct Reports {
    pub engine: Option<Report>,
    pub queues: Vec<QueueReport>,
    /// Queues that did not answer in time; theirs are old.
    pub silent: Vec<bool>,
}

/// The end of a queue thread.
#[derive(Clone)]
pub struct QueueEnd {
    shared: Arc<Shared>,
    events: Sender<Event>,
    number: usize,
}

/// The main thread's end.
pub struct MainEnd {
    shared: Arc<Shared>,
    events: Receiver<Event>,
}

struct Shared {
    to_queues: Vec<EventFd>,
    to_main: EventFd,
    stop: AtomicBool,
    /// Queues may ask for requests.
    go: (Mutex<bool>, Condvar),
    reports: Mutex<(Option<Report>, Vec<QueueReport>)>,
    renewed: Condvar,
}

/// Both ends, the latter for the first of so many queues.
pub fn link(queues: u16) -> io::Result<(MainEnd, QueueEnd)> {
    // A queue's ring waits for its descriptor; the main thread polls first.
    let to_queue = |_| Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
    let shared = Arc::new(Shared {
        to_queues: (0..queues).map(to_queue).collect::<io::Result<_>>()?,
        to_main: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        stop: AtomicBool::new(false),
        go: (Mutex::new(false), Condvar::new()),
        reports: Mutex::new((None, vec![QueueReport::default(); queues.into()])),
        renewed: Condvar::new(),
    });
    let (sender, receiver) = channel();
    let main = MainEnd { shared: Arc::clone(&shared), events: receiver };
    Ok((main, QueueEnd { shared, events: sender, number: 0 }))
}

impl QueueEnd {
    /// The same end for another queue.
    pub fn of_queue(&self, number: u16) -> Self {
        Self { number: number.into(), ..self.clone() }
    }

    /// The descriptor to read eight bytes from to be woken.
    pub fn wake_fd(&self) -> RawFd {
        self.shared.to_queues[self.number].as_fd().as_raw_fd()
    }

    /// Whether the main thread wants an image closed whose device was never started.
    pub fn stop_wanted(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Waits until requests may be asked for. Nothing is under way meanwhile.
    pub fn wait_for_go(&self) {
        let (go, changed) = &self.shared.go;
        let locked = go.lock().unwrap_or_else(PoisonError::into_inner);
        drop(changed.wait_while(locked, |go| !*go));
    }

    /// Tells the main thread.
    pub fn tell(&self, event: Event) {
        // A main thread that is gone needs no news; the process is about to end.
        let _ = self.events.send(event);
        let _ = self.shared.to_main.write(1);
    }

    /// Renews the report of this queue, and that of the engine if there is one.
    pub fn report(&self, engine: Option<Report>, renew: impl FnOnce(&mut QueueReport)) {
        let mut reports = self.shared.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.0 = engine.or(reports.0);
        let queue = &mut reports.1[self.number];
        queue.renewed += 1;
        renew(queue);
        drop(reports);
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

    /// Lets the queues ask for requests.
    pub fn let_go(&self) {
        let (go, changed) = &self.shared.go;
        *go.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }

    /// Asks the queue thread to close an image whose device was never started.
    pub fn ask_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Fresh reports; of queue threads that do not answer within `limit`, the last ones.
    pub fn fresh_reports(&self, limit: Duration) -> Reports {
        let reports = self.shared.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let before: Vec<u64> = reports.1.iter().map(|queue| queue.renewed).collect();
        let silent = |queues: &[QueueReport]| -> Vec<bool> {
            queues.iter().zip(&before).map(|(queue, before)| queue.renewed == *before).collect()
        };
        self.wake();
        let waits = |reports: &mut (_, Vec<QueueReport>)| silent(&reports.1).contains(&true);
        let waited = self.shared.renewed.wait_timeout_while(reports, limit, waits);
        let (reports, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Reports { engine: reports.0, queues: reports.1.clone(), silent: silent(&reports.1) }
    }

    /// Lets each queue thread look what there is to do.
    pub fn wake(&self) {
        for queue in &self.shared.to_queues {
            let _ = queue.write(1);
        }
    }
}

//! What the queue threads share: the engine behind one lock, and how they wake each other.
//!
//! No call into the engine does I/O, so one plain mutex around it is enough: a queue thread takes
//! it once or twice a turn, hands in what has happened, and takes out what is for its own queue.
//! An event on one queue can make something ready for another; the thread that sees it pokes the
//! other's ring, which wakes up and looks.
//!
//! **Invariant:** a poke is not lost. Whoever has seen something for another queue sets its flag,
//! and pokes if it was clear; the other clears the flag before it takes the lock. So either the
//! poker's flag comes before that lock, and what was seen is found, or a new poke follows.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use qcow2::Engine;

use crate::journal::Journal;

/// The engine and its queues.
pub struct Core {
    engine: Mutex<Locked>,
    peers: Vec<Peer>,
    /// Queues to which requests may still come.
    open: AtomicUsize,
    /// Bytes of the virtual disk.
    size: AtomicU64,
    begin: Instant,
}

/// What the lock is around.
pub struct Locked {
    pub engine: Engine,
    journal: Option<Journal>,
    /// Requests wait outside, and an engine that is closed is not the end.
    pub held: bool,
}

impl Locked {
    /// Brings the journal up to date: before anything is taken from the engine.
    pub fn record(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.follow(&mut self.engine);
        }
    }
}

struct Peer {
    /// The descriptor of its ring; -1 while there is none.
    ring: AtomicI32,
    poked: AtomicBool,
}

impl Core {
    /// For `queues` queues.
    pub fn new(engine: Engine, journal: Option<Journal>, queues: u16) -> Self {
        let peer = || Peer { ring: AtomicI32::new(-1), poked: AtomicBool::new(false) };
        Self {
            size: AtomicU64::new(engine.virtual_size()),
            engine: Mutex::new(Locked { engine, journal, held: false }),
            peers: (0..queues).map(|_| peer()).collect(),
            open: AtomicUsize::new(queues.into()),
            begin: Instant::now(),
        }
    }

    /// How many queues there are.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.peers.len()).expect("made from a u16")
    }

    /// The engine. A thread that panics takes the process with it, so the lock is never poisoned.
    pub fn lock(&self) -> MutexGuard<'_, Locked> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the virtual disk: no request reaches beyond.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Holds requests back from now on; false: the device is being stopped.
    pub fn hold(&self) -> bool {
        let mut locked = self.lock();
        let open = self.open.load(Ordering::Acquire);
        locked.held = open == self.peers.len() && self.is_driven();
        locked.held
    }

    /// Is there a thread for each queue, which carries out what the engine wants?
    pub fn is_driven(&self) -> bool {
        self.peers.iter().all(|peer| peer.ring.load(Ordering::Acquire) >= 0)
    }

    /// Another engine for the same image, made from the present one, which is closed.
    pub fn replace<E>(&self, make: impl FnOnce(&mut Engine) -> Result<Engine, E>) -> Result<(), E> {
        let mut locked = self.lock();
        // The last thing that the old one has recorded is that nothing is of need any more.
        locked.record();
        assert!(
            locked.engine.is_idle(),
            "replies are with their queues before an engine is closed"
        );
        locked.engine = make(&mut locked.engine)?;
        self.size.store(locked.engine.virtual_size(), Ordering::Release);
        if self.open.load(Ordering::Acquire) == 0 {
            locked.engine.close();
        }
        Ok(())
    }

    /// Milliseconds since this was made: the engine's time.
    pub fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// From now on, `queue` is woken through this ring; `None`: no longer.
    pub fn register(&self, queue: u16, ring: Option<RawFd>) {
        self.peers[usize::from(queue)].ring.store(ring.unwrap_or(-1), Ordering::Release);
    }

    /// The ring to poke so that `queue` looks, unless it is about to look anyway.
    pub fn to_poke(&self, queue: u16) -> Option<RawFd> {
        let peer = &self.peers[usize::from(queue)];
        if peer.poked.swap(true, Ordering::AcqRel) {
            return None;
        }
        let ring = peer.ring.load(Ordering::Acquire);
        (ring >= 0).then_some(ring)
    }

    /// `queue` was woken and is about to look.
    pub fn woken(&self, queue: u16) {
        self.peers[usize::from(queue)].poked.store(false, Ordering::Release);
    }

    /// No requests can come to one more queue. Whether it was the last.
    pub fn ended_one(&self) -> bool {
        self.open.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

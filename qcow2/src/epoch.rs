//! Epochs: which completed writes an fdatasync has made durable.
//!
//! An epoch is cut when an fdatasync is *submitted*. It covers exactly the writes whose completion
//! was seen by then; what completes while the fdatasync is in flight belongs to the next one.
//!
//! ```text
//!   completions:   w1  w2      w3      w4
//!   epoch:       1  1   │  2    2  │    3
//!                    sync(1)──►ok  sync(2)──►ok
//! ```
//!
//! When `sync(1)` returns, w1 and w2 are durable; w3, which completed meanwhile, is not.

use crate::planted::{self, Bug};

/// The number of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Epoch(u64);

/// The epochs of one file.
#[derive(Clone, Debug)]
pub(crate) struct Epochs {
    /// What completes now belongs to this one.
    open: u64,
    /// All of this one and before is durable.
    durable: u64,
    /// The newest epoch in which a write has completed.
    last_write: u64,
    in_flight: Option<u64>,
}

impl Epochs {
    /// With `volatile`, what was done before counts as not durable.
    pub(crate) fn new(volatile: bool) -> Self {
        Self { open: 1, durable: 0, last_write: u64::from(volatile), in_flight: None }
    }

    /// The epoch of what has completed by now: that of the newest write, which may be a while ago.
    /// (The open one would be too late. If nothing else is written, no fdatasync follows that could
    /// make it durable, and who waits for it is forgotten.)
    pub(crate) fn of_writes(&self) -> Epoch {
        Epoch(self.last_write)
    }

    pub(crate) fn is_durable(&self, epoch: Epoch) -> bool {
        epoch.0 <= self.durable
    }

    /// A write has completed, or has failed after some of it may have got there.
    pub(crate) fn note_write(&mut self) {
        self.last_write = self.open;
    }

    /// Has any write completed that is not durable?
    pub(crate) fn is_volatile(&self) -> bool {
        self.last_write > self.durable
    }

    /// An fdatasync is submitted.
    pub(crate) fn cut(&mut self) {
        debug_assert_eq!(self.in_flight, None, "one fdatasync at a time");
        self.in_flight = Some(self.open);
        self.open += 1;
    }

    /// It has succeeded. (After a failed one nothing is durable ever again.)
    pub(crate) fn succeeded(&mut self) {
        let covered = self.in_flight.take().expect("an fdatasync in flight");
        self.durable = covered;
        if planted::is(Bug::EpochCutAtCompletion) {
            self.durable = self.open;
            self.open += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_completes_during_a_sync_is_not_covered_by_it() {
        let mut epochs = Epochs::new(false);
        epochs.note_write();
        let before = epochs.of_writes();
        epochs.cut();
        epochs.note_write();
        let during = epochs.of_writes();
        assert!(!epochs.is_durable(before));
        epochs.succeeded();
        assert!(epochs.is_durable(before) && !epochs.is_durable(during));
        assert!(epochs.is_volatile());
        epochs.cut();
        epochs.succeeded();
        assert!(epochs.is_durable(during) && !epochs.is_volatile());
    }

    #[test]
    fn what_is_told_late_is_as_durable_as_what_it_tells_of() {
        let mut epochs = Epochs::new(false);
        epochs.note_write();
        epochs.cut();
        epochs.succeeded();
        assert!(!epochs.is_volatile() && epochs.is_durable(epochs.of_writes()));
    }

    #[test]
    fn what_was_there_at_open_is_volatile_until_the_first_sync() {
        let mut epochs = Epochs::new(true);
        assert!(epochs.is_volatile());
        epochs.cut();
        epochs.succeeded();
        assert!(!epochs.is_volatile());
    }
}

//! The journal of recovery as a driver keeps it: bytes that survive the death of a process.

use std::vec;
use std::vec::Vec;

use crate::engine::Engine;
use crate::journal::{JournalError, JournalEvent, Log, Record};
use crate::planted::{self, Bug};
use crate::testing::prng::Prng;
use crate::testing::size;

/// The number that stands for the image.
const IMAGE: u64 = 1;

/// A journal.
#[derive(Clone, Debug)]
pub struct Kept {
    bytes: Vec<u8>,
    log: Log,
    /// What a driver with a planted bug puts off until after the next operations and answers.
    late: Vec<JournalEvent>,
}

impl Kept {
    /// An empty one with so many records in each segment.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        let mut bytes = vec![0; size(Log::len_for(capacity))];
        let log = Log::create(&mut bytes, capacity, IMAGE);
        Self { bytes, log, late: Vec::new() }
    }

    /// One with these records in it.
    #[must_use]
    pub fn with(records: &[Record]) -> Self {
        let mut kept = Self::new(64);
        for &record in records {
            kept.log.apply(&mut kept.bytes, JournalEvent::Record(record));
        }
        kept
    }

    /// A new process finds the bytes, and all records in them.
    ///
    /// # Errors
    /// See [`Log::open`].
    pub fn found(self) -> Result<(Self, Vec<Record>), JournalError> {
        let (log, records) = Log::open(&self.bytes, IMAGE)?;
        Ok((Self { log, late: Vec::new(), ..self }, records))
    }

    /// Does what the engine wants.
    pub fn take(&mut self, engine: &mut Engine) {
        for event in core::mem::take(&mut self.late) {
            self.log.apply(&mut self.bytes, event);
        }
        while let Some(event) = engine.next_record() {
            if planted::is(Bug::RecordsOvertaken) {
                self.late.push(event);
            } else {
                self.log.apply(&mut self.bytes, event);
            }
        }
    }

    /// The process is killed in the middle of that.
    pub fn tear(&mut self, engine: &mut Engine, prng: &mut Prng) {
        let mut events: Vec<_> = core::iter::from_fn(|| engine.next_record()).collect();
        events.truncate(prng.index(events.len() + 1));
        let Some(last) = events.pop() else { return };
        for event in events {
            self.log.apply(&mut self.bytes, event);
        }
        let before = self.bytes.clone();
        self.log.apply(&mut self.bytes, last);
        // Of one store after the other only the first few; several steps are whole, or not begun.
        let differs = |at: &usize| before[*at] != self.bytes[*at];
        let all: Vec<usize> = (0..before.len()).filter(differs).collect();
        let torn = match last {
            JournalEvent::Clear if prng.one_in(2) => 0,
            JournalEvent::Clear => return,
            _ => prng.index(all.len() + 1),
        };
        for &at in &all[torn..] {
            self.bytes[at] = before[at];
        }
    }
}

//! Requests that are made here: what drives a queue in `bench`, in the place of the ublk driver.
//!
//! With stamps, each 8-byte word that is written tells its own place on the disk, and of each
//! sector that is read, one word is looked at: another one each time, so that in the end all are.

use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::Instant;

use clap::ValueEnum;
use fastrand::Rng;

use crate::payload::Payload;
use crate::ublk::{self, IoDesc};

/// Bytes of a stamp.
const WORD: usize = 8;

/// What the requests are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Read,
    Write,
    Randread,
    Randwrite,
    /// Half of them reads.
    Randrw,
}

impl Kind {
    /// Whether nothing is written.
    pub fn is_read(self) -> bool {
        matches!(self, Self::Read | Self::Randread)
    }

    fn is_random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
}

/// What all queues are to do together.
#[derive(Clone)]
pub struct Plan {
    pub kind: Kind,
    /// Bytes of a request.
    pub bytes: u32,
    /// Requests go to the first so many bytes of the disk, a multiple of `bytes`.
    pub size: u64,
    /// Requests of all queues.
    pub count: u64,
    pub queues: u16,
    /// A FLUSH after so many writes; 0: none.
    pub flush_after: u64,
    pub stamps: bool,
    pub seed: u64,
    /// All queues begin at the same time.
    pub start: Arc<Barrier>,
    pub outcome: Arc<Mutex<Outcome>>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    pub began: Option<Instant>,
    pub ended: Option<Instant>,
    /// Requests that were replied to, FLUSHes too.
    pub replied: u64,
    /// The first thing that went wrong.
    pub wrong: Option<String>,
}

/// The requests of one queue.
pub struct Generator {
    plan: Plan,
    /// Of these, reads and writes are counted.
    left: u64,
    free: Vec<u16>,
    descriptors: Vec<IoDesc>,
    rng: Rng,
    /// The next block of a sequence, and the end of this queue's part.
    next: u64,
    blocks: u64,
    writes: u64,
    to_flush: bool,
    begun: bool,
    replied: u64,
    block: Vec<u8>,
}

impl Generator {
    /// Those of queue `number`, at most `depth` at a time.
    pub fn new(plan: Plan, number: u16, depth: u16) -> Self {
        let (queues, number) = (u64::from(plan.queues), u64::from(number));
        let extra = u64::from(number < plan.count % queues);
        let blocks = plan.size / u64::from(plan.bytes);
        Self {
            left: plan.count / queues + extra,
            free: (0..depth).rev().collect(),
            descriptors: vec![IoDesc::default(); depth.into()],
            rng: Rng::with_seed(plan.seed ^ number << 32),
            next: blocks / queues * number,
            blocks,
            writes: 0,
            to_flush: false,
            begun: false,
            replied: 0,
            block: vec![0x5a; plan.bytes as usize],
            plan,
        }
    }

    /// Lets requests come: the first one waits until all queues ask for theirs.
    pub fn begin(&mut self) {
        self.begun = true;
    }

    /// Whether there is another request now.
    pub fn has_more(&self) -> bool {
        self.begun && !self.free.is_empty() && (self.left > 0 || self.to_flush)
    }

    /// The next request's tag.
    pub fn made(&mut self, payload: &Payload) -> Option<u16> {
        if !self.has_more() {
            return None;
        }
        if self.replied == 0 && self.free.len() == self.descriptors.len() {
            self.plan.start.wait();
            self.outcome(|outcome| {
                outcome.began.get_or_insert_with(Instant::now);
            });
        }
        let tag = self.free.pop()?;
        self.descriptors[usize::from(tag)] = self.next(tag, payload);
        Some(tag)
    }

    /// The request of a tag.
    pub fn descriptor(&self, tag: u16) -> IoDesc {
        self.descriptors[usize::from(tag)]
    }

    /// The reply to the request of a tag.
    pub fn replied(&mut self, tag: u16, result: i32, payload: &Payload) {
        let desc = self.descriptor(tag);
        self.free.push(tag);
        self.replied += 1;
        let wrong = match result {
            ..0 => Some(crate::errno::describe(-result)),
            _ if self.plan.stamps && desc.op() == ublk::OP_READ => self.check(tag, &desc, payload),
            _ => None,
        };
        if let Some(wrong) = wrong {
            let offset = desc.start_sector * ublk::SECTOR;
            let text = format!("operation {} at byte {offset}: {wrong}", desc.op());
            self.outcome(|outcome| {
                outcome.wrong.get_or_insert(text);
            });
            (self.left, self.to_flush) = (0, false);
        }
        if self.is_over() {
            let replied = self.replied;
            self.outcome(|outcome| {
                outcome.ended = Some(Instant::now());
                outcome.replied += replied;
            });
        }
    }

    /// Whether everything was replied to.
    pub fn is_over(&self) -> bool {
        self.left == 0 && !self.to_flush && self.free.len() == self.descriptors.len()
    }

    fn next(&mut self, tag: u16, payload: &Payload) -> IoDesc {
        if std::mem::take(&mut self.to_flush) {
            return IoDesc { op_flags: ublk::OP_FLUSH.into(), ..IoDesc::default() };
        }
        self.left -= 1;
        let block = match self.plan.kind.is_random() {
            true => self.rng.u64(0..self.blocks),
            false => {
                let block = self.next;
                self.next = if block + 1 == self.blocks { 0 } else { block + 1 };
                block
            }
        };
        let offset = block * u64::from(self.plan.bytes);
        let read = self.plan.kind.is_read() || self.plan.kind == Kind::Randrw && self.rng.bool();
        if !read {
            self.write(tag, offset, payload);
        }
        IoDesc {
            op_flags: if read { ublk::OP_READ } else { ublk::OP_WRITE }.into(),
            nr_sectors: self.plan.bytes / 512,
            start_sector: offset / ublk::SECTOR,
            addr: 0,
        }
    }

    fn write(&mut self, tag: u16, offset: u64, payload: &Payload) {
        self.writes += 1;
        self.to_flush =
            self.plan.flush_after > 0 && self.writes.is_multiple_of(self.plan.flush_after);
        if self.plan.stamps {
            for (word, at) in self.block.chunks_exact_mut(WORD).zip((offset..).step_by(WORD)) {
                word.copy_from_slice(bytemuck::bytes_of(&stamp(at)));
            }
        }
        payload.copy_in(tag, 0, &self.block).expect("copying to memory does not fail");
    }

    /// What is wrong with what was read.
    fn check(&mut self, tag: u16, desc: &IoDesc, payload: &Payload) -> Option<String> {
        let word = 8 * self.rng.u32(0..512 / 8);
        for sector in 0..desc.nr_sectors {
            let at = sector * 512 + word;
            let mut bytes = [0; WORD];
            payload.copy_out(tag, at, &mut bytes);
            let want = stamp(desc.start_sector * ublk::SECTOR + u64::from(at));
            if bytes != bytemuck::bytes_of(&want) {
                return Some(format!("byte {at} of what was read is not what --stamp writes"));
            }
        }
        None
    }

    fn outcome(&self, change: impl FnOnce(&mut Outcome)) {
        change(&mut self.plan.outcome.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What the eight bytes at this offset of the disk are.
fn stamp(offset: u64) -> u64 {
    // An odd number, the golden ratio's: no offset below 2^63 gives 0.
    (offset + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

//! A seeded sequence of requests through the engine, compared with a model byte for byte.

use qcow2::testing::{Files, Prng};
use qcow2::{Health, OpId, Request};

use crate::make::SHORT;
use crate::row::{Backing, Row, SIZE};

const SECTOR: u64 = 512;

/// A sequence of some hundred requests ends long before.
const MOST_STEPS: u64 = 1 << 20;

/// What a tag does.
#[derive(Clone)]
struct Busy {
    request: Request,
    /// What a write puts there.
    bytes: Vec<u8>,
    /// A discard that was replied to: this reads what it has left.
    discard: bool,
}

/// An image being worked on, and what is known of it.
pub struct Drive<'a> {
    files: Files,
    row: Row,
    pub model: Vec<u8>,
    prng: &'a mut Prng,
    busy: Vec<Option<Busy>>,
    /// Operations that have ended short: the next time they end in full.
    short: Vec<OpId>,
    /// Where requests went lately.
    recent: Vec<u64>,
    log: &'a mut Vec<String>,
    /// Discards keep the space.
    pub keep: bool,
    now_ms: u64,
}

fn size(value: u64) -> usize {
    usize::try_from(value).expect("small")
}

fn range(request: Request) -> (u64, u64) {
    match request {
        Request::Read { offset, len }
        | Request::Write { offset, len, .. }
        | Request::WriteZeroes { offset, len, .. }
        | Request::Discard { offset, len } => (offset, offset + u64::from(len)),
        Request::Flush => (0, 0),
    }
}

/// Where two ranges of bytes differ first.
pub fn difference(found: &[u8], expected: &[u8], offset: u64) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    if found.len() != expected.len() {
        return Err(format!("{} bytes, not {}", found.len(), expected.len()));
    }
    let mut places = found.iter().zip(expected).enumerate().filter(|(_, (a, b))| a != b);
    let count = places.clone().count();
    let (at, (found, expected)) = places.clone().next().expect("they differ");
    let last = offset + places.next_back().map_or(0, |(at, _)| at as u64);
    let at = offset + at as u64;
    Err(format!("byte {at} is {found:#x}, not {expected:#x}; {count} differ, the last at {last}"))
}

impl<'a> Drive<'a> {
    pub fn new(
        files: Files,
        row: Row,
        model: Vec<u8>,
        prng: &'a mut Prng,
        log: &'a mut Vec<String>,
    ) -> Self {
        let busy = vec![None; files.buffers.len()];
        let (short, recent) = (Vec::new(), vec![0]);
        Self { files, row, model, prng, busy, short, recent, log, keep: false, now_ms: 0 }
    }

    /// Makes so many requests, and closes the image.
    pub fn run(mut self, requests: u64) -> Result<Vec<u8>, String> {
        let (mut made, mut steps) = (0, 0);
        while made < requests || !self.files.in_flight.is_empty() {
            steps += 1;
            if steps > MOST_STEPS {
                let (round, ops) = (self.files.engine.waits(), &self.files.in_flight);
                return Err(format!("it goes round and round: {round} {ops:?}"));
            }
            let in_flight = self.files.in_flight.len();
            if in_flight != 0 && (made == requests || !self.has_room() || self.prng.below(3) != 0) {
                self.complete()?;
            } else if in_flight == 0 && !self.has_room() {
                break;
            } else if self.submit() {
                made += 1;
                self.take_replies()?;
            }
            if self.prng.one_in(64) {
                self.now_ms += self.prng.below(10_000);
                self.files.engine.tick(self.now_ms);
            }
        }
        let hang: Vec<_> = self.busy.iter().flatten().map(|busy| busy.request).collect();
        if !hang.is_empty() {
            return Err(format!("requests hang: {hang:?} {}", self.files.engine.waits()));
        }
        let all = self.files.read_all()?;
        difference(&all, &self.model, 0).map_err(|text| format!("at the end: {text}"))?;
        match self.files.close() {
            Health::Good => Ok(self.model),
            Health::Failed(failure) => Err(format!("the engine has failed: {failure:?}")),
        }
    }

    fn has_room(&self) -> bool {
        self.busy.iter().any(Option::is_none)
    }

    fn complete(&mut self) -> Result<(), String> {
        let index = self.prng.index(self.files.in_flight.len());
        let id = self.files.in_flight[index].id;
        let mut most = u32::MAX;
        if let Some(number) = self.short.iter().position(|&known| known == id) {
            self.short.swap_remove(number);
        } else if self.prng.one_in(20) {
            self.short.push(id);
            most = 512 * (1 + u32::try_from(self.prng.below(8)).expect("small"));
        }
        self.files.complete(index, most);
        self.take_replies()
    }

    fn place(&mut self) -> u64 {
        let cluster = self.row.cluster();
        let near = |prng: &mut Prng| prng.below(32) * SECTOR;
        let place = match self.prng.below(8) {
            0..3 => self.prng.below(SIZE),
            3 | 4 => self.prng.below(SIZE / cluster) * cluster,
            5 => (self.prng.below(SIZE / cluster) * cluster).saturating_sub(near(self.prng)),
            6 => self.recent[self.prng.index(self.recent.len())] + near(self.prng),
            _ if self.row.backing() == Backing::Shorter => SHORT - near(self.prng).min(SHORT),
            _ => SIZE - near(self.prng),
        };
        place.min(SIZE - SECTOR) & !(SECTOR - 1)
    }

    fn len(&mut self, most: u64) -> u64 {
        let cluster = self.row.cluster();
        let len = match self.prng.below(8) {
            0..4 => (1 + self.prng.below(16)) * SECTOR,
            4 => cluster * (1 + self.prng.below(4)),
            5 => SECTOR + self.prng.below(cluster * 2),
            6 => SECTOR + self.prng.below(256 << 10),
            _ => SECTOR + self.prng.below(1 << 20),
        };
        len.min(most) & !(SECTOR - 1)
    }

    /// Submits any request; false if its range is in use.
    fn submit(&mut self) -> bool {
        let Some(tag) = self.busy.iter().position(Option::is_none) else { return false };
        let kind = self.prng.below(20);
        let offset = self.place();
        let most = if kind < 14 { 2 << 20 } else { 6 << 20 };
        let bytes = self.len(most.min(SIZE - offset));
        let len = u32::try_from(bytes).expect("small");
        let request = match kind {
            0 => Request::Flush,
            1..6 => Request::Read { offset, len },
            6..14 => Request::Write { offset, len, fua: self.prng.one_in(8) },
            14..16 => Request::WriteZeroes { offset, len, unmap: true },
            16 | 17 => Request::WriteZeroes { offset, len, unmap: false },
            _ => Request::Discard { offset, len },
        };
        let (start, end) = range(request);
        let apart = |busy: &Busy| {
            let (at, until) = range(busy.request);
            let reads = |busy: &Busy| matches!(busy.request, Request::Read { .. });
            let two = matches!(request, Request::Read { .. }) && reads(busy) && !busy.discard;
            at >= end || until <= start || two
        };
        if !self.busy.iter().flatten().all(apart) {
            return false;
        }
        self.log.push(format!("{tag}: {request:?}"));
        if end != 0 {
            self.recent.push(start);
            if self.recent.len() > 8 {
                self.recent.remove(0);
            }
        }
        let bytes = match request {
            Request::Write { .. } => self.payload(start, bytes),
            _ => Vec::new(),
        };
        let buffer = match request {
            Request::Read { .. } => vec![0xaa; len as usize],
            _ => bytes.clone(),
        };
        self.busy[tag] = Some(Busy { request, bytes, discard: false });
        self.files.submit(u16::try_from(tag).expect("a tag"), request, buffer);
        true
    }

    /// Bytes that say for each sector where and when it was written.
    fn payload(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let mark = self.prng.any();
        let mut bytes = vec![mark.to_be_bytes()[0] | 1; size(len)];
        for (sector, place) in bytes.chunks_exact_mut(512).zip((offset..).step_by(512)) {
            sector[..8].copy_from_slice(&place.to_be_bytes());
            sector[8..16].copy_from_slice(&mark.to_be_bytes());
        }
        bytes
    }

    fn take_replies(&mut self) -> Result<(), String> {
        while let Some(reply) = self.files.replies.pop() {
            let tag = usize::from(reply.tag);
            let busy = self.busy[tag].take().ok_or("a reply to nothing")?;
            self.log.push(format!("{tag}: replied"));
            let request = busy.request;
            if let Err(error) = reply.result {
                return Err(format!("{request:?} ends with {error:?}"));
            }
            self.replied(tag, busy).map_err(|text| format!("{request:?}: {text}"))?;
        }
        Ok(())
    }

    fn replied(&mut self, tag: usize, busy: Busy) -> Result<(), String> {
        let (start, end) = range(busy.request);
        let known = &mut self.model[size(start)..size(end)];
        match busy.request {
            Request::Read { .. } if busy.discard => {
                let bytes = std::mem::take(&mut self.files.buffers[tag]);
                return self.discarded(start, &bytes);
            }
            Request::Read { .. } => return difference(&self.files.buffers[tag], known, start),
            Request::Write { .. } => known.copy_from_slice(&busy.bytes),
            Request::WriteZeroes { .. } => known.fill(0),
            Request::Discard { offset, len } => {
                // Nobody else uses this range before it was looked at.
                let request = Request::Read { offset, len };
                self.busy[tag] = Some(Busy { request, bytes: Vec::new(), discard: true });
                let tag = u16::try_from(tag).expect("a tag");
                self.files.submit(tag, request, vec![0xaa; len as usize]);
            }
            Request::Flush => {}
        }
        Ok(())
    }

    /// Whole clusters are zeros now; the rest is what it was. A data file whose host can't punch
    /// keeps its bytes, and so does version 2, which has no zero clusters, where a hole would show
    /// what lies beneath or the space is to be kept.
    fn discarded(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let cluster = self.row.cluster();
        let may_stay = (self.row.has_data_file() && self.files.plain)
            || (self.row.is_v2() && (self.keep || self.row.backing() != Backing::None));
        let start = offset.next_multiple_of(cluster);
        let end = offset + bytes.len() as u64;
        let end = if end == SIZE { end } else { end - end % cluster };
        for (found, place) in bytes.chunks_exact(512).zip((offset..).step_by(512)) {
            let known = &mut self.model[size(place)..][..512];
            let whole = start <= place && place < end;
            let zeros = found.iter().all(|&byte| byte == 0);
            if whole && !zeros && !may_stay {
                return Err(format!("sector {} of a whole cluster is not zeros", place / 512));
            }
            if !(whole && zeros) {
                difference(found, known, place)?;
            }
            known.copy_from_slice(found);
        }
        Ok(())
    }
}

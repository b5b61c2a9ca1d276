//! The journal of recovery: mappings that a killed process had only in memory, and their form in a
//! file.
//!
//! A write that was acknowledged and not flushed may be lost when power is lost; it may **not** be
//! lost when only the server is killed, because the device and the file system on it live on. The
//! data is safe (completed writes are in the page cache), the mapping is not. So with recovery on
//! ([`Options::journal`](crate::Options)) the engine says every change of a mapping before it sends
//! off the operation or the answer that may follow from it, and the driver keeps that in a file
//! that is mapped into memory, on tmpfs: a store there survives the process and costs no system
//! call. The order on disk stays as it is; only a successor on the same boot reads the journal, and
//! nobody may have changed the image in between.
//!
//! (Rejected: to have L2 entries and refcounts written before each answer. That is a round trip to
//! the disk for every allocating write.)
//!
//! # Two segments
//!
//! ```text
//!   round    n              n + 1
//!            begin … end    begin … end
//!   events   Switch  Retire Switch  Retire
//!            │              │
//!   new      └► segment 1   └► segment 0      Retire empties the other one
//! ```
//!
//! A round makes durable all that was mapped when it began ([`flush`](crate::flush)), so when it
//! has succeeded the segment that was in use before is of no more need. If it fails, the image
//! takes no more writes, and both segments stay.
//!
//! What a successor finds is the older segment and then the newer, in the order in which they were
//! written; of several records for one guest cluster **the last counts**. A record that was being
//! written when the process died fails its CRC-32 and ends its segment: nothing that follows from
//! it was sent off. Each use of a segment has a number of its own, so that records of an earlier
//! use are not taken for new ones.
//!
//! # In the file
//!
//! ```text
//!   0      header of segment 0: magic, version, records per segment, number, image, CRC-32
//!   64     header of segment 1
//!   128    records of segment 0: guest cluster, two words, number, CRC-32: 32 bytes each
//!   …      records of segment 1
//! ```
//!
//! All numbers are big-endian. What is read may hold anything; it is checked once more, against
//! the image, when it is adopted ([`adopt`](crate::adopt)).

use alloc::vec::Vec;
use core::fmt;

use byteorder::{BigEndian, ByteOrder};

use crate::units::GuestCluster;

/// How a guest cluster is mapped from now on: its L2 entry, as it will be on disk in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The guest cluster.
    pub guest: GuestCluster,
    /// Its L2 entry.
    pub word: u64,
    /// The second word of an extended L2 entry; otherwise 0.
    pub bitmap: u64,
}

/// What the driver has to do to the journal: see [`Log::apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalEvent {
    /// Add this.
    Record(Record),
    /// What follows goes into the other segment, which is empty.
    Switch,
    /// The segment that was in use before the last `Switch` is of no more need.
    Retire,
    /// Nothing in the journal is of any more need: the records of a predecessor are durable, or the
    /// image is closed.
    Clear,
}

/// Why a journal cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalError {
    /// Neither of its headers is one.
    NotOne,
    /// It was written by another version of this program.
    Version(u32),
    /// It is of another image.
    OtherImage,
    /// The file has another length than its header says: needed, found.
    Length(u64, u64),
    /// The two segments do not follow each other.
    Torn,
}

impl fmt::Display for JournalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOne => write!(f, "not a journal (neither header is whole)"),
            Self::Version(found) => write!(
                f,
                "the journal has version {found}, expected {VERSION}: recover with the program \
                 that wrote it"
            ),
            Self::OtherImage => write!(f, "the journal belongs to another image"),
            Self::Length(need, have) => {
                write!(f, "the journal is truncated: {need} bytes are needed, it has {have}")
            }
            Self::Torn => write!(f, "the two segments of the journal do not follow each other"),
        }
    }
}

impl core::error::Error for JournalError {}

const MAGIC: u64 = 0x7562_6c6b_716a_6e6c;
const VERSION: u32 = 1;
/// Bytes of a header and of a record.
const HEADER: usize = 64;
const RECORD: usize = 32;

/// A journal in memory that the caller keeps: which segment is in use and how far.
#[derive(Clone, Debug)]
pub struct Log {
    capacity: u32,
    image: u64,
    /// The number of the present use.
    number: u64,
    current: usize,
    /// Records in it.
    used: u32,
}

impl Log {
    /// The length of a journal with so many records in each segment, in bytes.
    #[must_use]
    pub fn len_for(capacity: u32) -> u64 {
        (2 * HEADER) as u64 + 2 * u64::from(capacity) * RECORD as u64
    }

    /// Makes an empty journal of [`len_for`](Log::len_for) bytes, for an image that is known by
    /// this number, whatever that is.
    ///
    /// # Panics
    /// If `bytes` has another length.
    pub fn create(bytes: &mut [u8], capacity: u32, image: u64) -> Self {
        assert_eq!(bytes.len() as u64, Self::len_for(capacity), "the driver's bug");
        bytes[..2 * HEADER].fill(0);
        let log = Self { capacity, image, number: 1, current: 0, used: 0 };
        log.write_header(bytes);
        log
    }

    /// Reads what a predecessor has left: all records in their order. The journal stays as it is
    /// until [`apply`](Log::apply) clears it.
    ///
    /// # Errors
    /// Something that no predecessor leaves, however it died.
    pub fn open(bytes: &[u8], image: u64) -> Result<(Self, Vec<Record>), JournalError> {
        let headers = [header(bytes, 0)?, header(bytes, 1)?];
        let newer = match headers {
            [None, None] => return Err(JournalError::NotOne),
            [Some(_), None] => 0,
            [None, Some(_)] => 1,
            [Some(one), Some(two)] => {
                if one.capacity != two.capacity || one.number.abs_diff(two.number) != 1 {
                    return Err(JournalError::Torn);
                }
                usize::from(two.number > one.number)
            }
        };
        let mut records = Vec::new();
        for segment in [1 - newer, newer] {
            let Some(found) = headers[segment] else { continue };
            if found.image != image {
                return Err(JournalError::OtherImage);
            }
            let need = Self::len_for(found.capacity);
            if bytes.len() as u64 != need {
                return Err(JournalError::Length(need, bytes.len() as u64));
            }
            let all = (0..found.capacity).map(|index| place(found.capacity, segment, index));
            records.extend(all.map_while(|at| record(&bytes[at..at + RECORD], found.number)));
        }
        let Header { capacity, number, .. } = headers[newer].expect("the newer one is there");
        // Whatever was in use is full now: only `Clear` may follow.
        Ok((Self { capacity, image, number, current: newer, used: capacity }, records))
    }

    /// Records in each segment: what [`Options::journal`](crate::Options) has to be.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Does what the engine says. If the process is killed in the middle of this, a successor finds
    /// the journal as it was before, or as it is afterwards.
    ///
    /// # Panics
    /// If `bytes` is not the journal, or the engine has another capacity in its options.
    pub fn apply(&mut self, bytes: &mut [u8], event: JournalEvent) {
        match event {
            JournalEvent::Record(record) => {
                assert!(self.used < self.capacity, "the engine keeps to the options");
                let at = place(self.capacity, self.current, self.used);
                bytes[at..at + RECORD].copy_from_slice(&encode(record, self.number));
                self.used += 1;
            }
            JournalEvent::Switch => {
                (self.current, self.number, self.used) = (1 - self.current, self.number + 1, 0);
                self.write_header(bytes);
            }
            JournalEvent::Retire => erase(bytes, 1 - self.current),
            // The older segment goes first: without the newer one it would say what is not so any
            // more. And one of the headers is always there.
            JournalEvent::Clear => {
                erase(bytes, 1 - self.current);
                self.apply(bytes, JournalEvent::Switch);
                erase(bytes, 1 - self.current);
            }
        }
    }

    fn write_header(&self, bytes: &mut [u8]) {
        let mut header = [0; HEADER];
        BigEndian::write_u64(&mut header, MAGIC);
        BigEndian::write_u32(&mut header[8..], VERSION);
        BigEndian::write_u32(&mut header[12..], self.capacity);
        BigEndian::write_u64(&mut header[16..], self.number);
        BigEndian::write_u64(&mut header[24..], self.image);
        let crc = crc32fast::hash(&header[..HEADER - 4]);
        BigEndian::write_u32(&mut header[HEADER - 4..], crc);
        bytes[self.current * HEADER..][..HEADER].copy_from_slice(&header);
    }
}

/// Where a record lies.
fn place(capacity: u32, segment: usize, index: u32) -> usize {
    2 * HEADER + (segment * capacity as usize + index as usize) * RECORD
}

fn erase(bytes: &mut [u8], segment: usize) {
    bytes[segment * HEADER..][..HEADER].fill(0);
}

#[derive(Clone, Copy)]
struct Header {
    capacity: u32,
    number: u64,
    image: u64,
}

/// The header of a segment. `None`: the segment is empty, or its header was being written.
fn header(bytes: &[u8], segment: usize) -> Result<Option<Header>, JournalError> {
    let Some(header) = bytes.get(segment * HEADER..(segment + 1) * HEADER) else {
        return Ok(None);
    };
    let crc = BigEndian::read_u32(&header[HEADER - 4..]);
    if BigEndian::read_u64(header) != MAGIC || crc != crc32fast::hash(&header[..HEADER - 4]) {
        return Ok(None);
    }
    match BigEndian::read_u32(&header[8..]) {
        VERSION => {}
        version => return Err(JournalError::Version(version)),
    }
    Ok(Some(Header {
        capacity: BigEndian::read_u32(&header[12..]),
        number: BigEndian::read_u64(&header[16..]),
        image: BigEndian::read_u64(&header[24..]),
    }))
}

/// What a record holds of the number of its segment's use. It is believed only if it fits.
fn short(number: u64) -> u32 {
    u32::try_from(number & u64::from(u32::MAX)).expect("32 bits")
}

fn encode(record: Record, number: u64) -> [u8; RECORD] {
    let mut out = [0; RECORD];
    BigEndian::write_u64(&mut out, record.guest.0);
    BigEndian::write_u64(&mut out[8..], record.word);
    BigEndian::write_u64(&mut out[16..], record.bitmap);
    BigEndian::write_u32(&mut out[24..], short(number));
    let crc = crc32fast::hash(&out[..RECORD - 4]);
    BigEndian::write_u32(&mut out[RECORD - 4..], crc);
    out
}

fn record(bytes: &[u8], number: u64) -> Option<Record> {
    let crc = BigEndian::read_u32(&bytes[RECORD - 4..]);
    if BigEndian::read_u32(&bytes[24..]) != short(number) || crc != crc32fast::hash(&bytes[..28]) {
        return None;
    }
    Some(Record {
        guest: GuestCluster(BigEndian::read_u64(bytes)),
        word: BigEndian::read_u64(&bytes[8..]),
        bitmap: BigEndian::read_u64(&bytes[16..]),
    })
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    const IMAGE: u64 = 77;

    fn new(capacity: u32) -> (Vec<u8>, Log) {
        let mut bytes = vec![0xee; usize::try_from(Log::len_for(capacity)).unwrap()];
        let log = Log::create(&mut bytes, capacity, IMAGE);
        (bytes, log)
    }

    fn of(guest: u64) -> Record {
        Record { guest: GuestCluster(guest), word: guest << 16 | 1 << 63, bitmap: !guest }
    }

    fn found(bytes: &[u8]) -> Vec<u64> {
        let (_, records) = Log::open(bytes, IMAGE).unwrap();
        assert!(records.iter().all(|&record| record == of(record.guest.0)));
        records.iter().map(|record| record.guest.0).collect()
    }

    fn add(log: &mut Log, bytes: &mut [u8], guest: u64) {
        log.apply(bytes, JournalEvent::Record(of(guest)));
    }

    #[test]
    fn records_are_found_in_their_order_until_they_are_retired() {
        let (mut bytes, mut log) = new(3);
        assert_eq!(found(&bytes), [0; 0]);
        for guest in [5, 6, 7] {
            add(&mut log, &mut bytes, guest);
        }
        log.apply(&mut bytes, JournalEvent::Switch);
        assert_eq!(found(&bytes), [5, 6, 7]);
        add(&mut log, &mut bytes, 5);
        assert_eq!(found(&bytes), [5, 6, 7, 5]);
        log.apply(&mut bytes, JournalEvent::Retire);
        assert_eq!(found(&bytes), [5]);
        log.apply(&mut bytes, JournalEvent::Switch);
        // Of the three that were there before none is believed.
        assert_eq!(found(&bytes), [5]);
        add(&mut log, &mut bytes, 9);
        assert_eq!(found(&bytes), [5, 9]);
        log.apply(&mut bytes, JournalEvent::Clear);
        assert_eq!(found(&bytes), [0; 0]);
        add(&mut log, &mut bytes, 4);
        assert_eq!(found(&bytes), [4]);
    }

    /// Whatever a journal has been through, a kill in the middle of the next event leaves what was
    /// there before or what is there afterwards.
    #[test]
    fn a_torn_event_has_happened_or_not() {
        use JournalEvent::{Clear, Record, Retire, Switch};
        let events = [
            Record(of(1)),
            Record(of(2)),
            Switch,
            Record(of(1)),
            Retire,
            Switch,
            Record(of(3)),
            Clear,
            Record(of(4)),
            Switch,
            Clear,
        ];
        let (mut bytes, mut log) = new(2);
        for event in events {
            let (before, all) = (bytes.clone(), found(&bytes));
            log.apply(&mut bytes, event);
            let after = found(&bytes);
            if event == Clear {
                // Several steps; what is between is not to be seen from outside.
                continue;
            }
            for torn in 0..=bytes.len() {
                let mut mixed = before.clone();
                mixed[..torn].copy_from_slice(&bytes[..torn]);
                let mixed = found(&mixed);
                assert!(mixed == all || mixed == after, "{event:?} {torn}: {mixed:?}");
            }
        }
    }

    #[test]
    fn a_successor_of_a_kill_finds_and_clears() {
        let (mut bytes, mut log) = new(4);
        add(&mut log, &mut bytes, 1);
        log.apply(&mut bytes, JournalEvent::Switch);
        add(&mut log, &mut bytes, 2);
        let (mut log, records) = Log::open(&bytes, IMAGE).unwrap();
        assert_eq!((records.len(), log.capacity()), (2, 4));
        log.apply(&mut bytes, JournalEvent::Clear);
        assert_eq!(found(&bytes), [0; 0]);
        for guest in [7, 8, 9, 10] {
            add(&mut log, &mut bytes, guest);
        }
        assert_eq!(found(&bytes), [7, 8, 9, 10]);
    }

    #[test]
    fn what_is_no_journal_is_refused() {
        let (bytes, _) = new(4);
        let open = |bytes: &[u8], image| Log::open(bytes, image).map(|_| ()).unwrap_err();
        assert_eq!(open(&[], IMAGE), JournalError::NotOne);
        assert_eq!(open(&vec![0; 4096], IMAGE), JournalError::NotOne);
        assert_eq!(open(&bytes, IMAGE + 1), JournalError::OtherImage);
        let (need, have) = (Log::len_for(4), Log::len_for(4) - 1);
        assert_eq!(open(&bytes[..bytes.len() - 1], IMAGE), JournalError::Length(need, have));
        for at in 0..HEADER {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            assert_eq!(open(&bytes, IMAGE), JournalError::NotOne, "{at}");
        }
        let mut twice = bytes.clone();
        twice.copy_within(..HEADER, HEADER);
        assert_eq!(open(&twice, IMAGE), JournalError::Torn);
    }

    #[test]
    fn any_bytes_are_read_without_a_panic() {
        let mut prng = crate::testing::Prng::new(3);
        for _ in 0..2000 {
            let (mut bytes, mut log) = new(4);
            for _ in 0..prng.below(12) {
                match prng.below(4) {
                    0 => log.apply(&mut bytes, JournalEvent::Switch),
                    1 => log.apply(&mut bytes, JournalEvent::Retire),
                    2 => log.apply(&mut bytes, JournalEvent::Clear),
                    _ if log.used < log.capacity => add(&mut log, &mut bytes, prng.below(9)),
                    _ => {}
                }
            }
            for _ in 0..prng.below(3) {
                let at = prng.index(bytes.len());
                bytes[at] = u8::try_from(prng.below(256)).unwrap();
            }
            bytes.truncate(prng.index(bytes.len() + 1).max(bytes.len() * 3 / 4));
            // No record is made up, whatever was damaged.
            if let Ok((_, records)) = Log::open(&bytes, IMAGE) {
                assert!(records.iter().all(|&record| record == of(record.guest.0)));
            }
        }
    }
}

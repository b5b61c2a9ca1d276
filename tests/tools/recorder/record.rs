//! What is written and recorded: the sectors, the log, and what a sector may hold by it.

use std::collections::BTreeMap;
use std::io::BufRead;

use anyhow::{Context, Result, bail, ensure};
use qcow2::testing::Prng;

pub const SECTOR: usize = 512;
const MAGIC: &[u8; 8] = b"UBQ2REC1";

/// Fills one sector of write `seq`.
pub fn fill(sector: &mut [u8], address: u64, seq: u64, identity: u64) {
    sector[..8].copy_from_slice(MAGIC);
    sector[8..16].copy_from_slice(&address.to_be_bytes());
    sector[16..24].copy_from_slice(&seq.to_be_bytes());
    sector[24..32].copy_from_slice(&identity.to_be_bytes());
    let mut filler = Prng::new(address ^ seq.rotate_left(32) ^ identity);
    for word in sector[32..508].chunks_mut(8) {
        word.copy_from_slice(&filler.any().to_be_bytes()[..word.len()]);
    }
    let crc = crc32fast::hash(&sector[..508]);
    sector[508..512].copy_from_slice(&crc.to_be_bytes());
}

pub fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// What a sector turns out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Zeros,
    /// As at the start, and not zeros.
    Base,
    Written {
        seq: u64,
    },
    /// Not one of ours, of another log, or meant for another address.
    Foreign,
    /// Begins as one of ours, and the rest does not fit.
    Torn,
}

/// What `sector` holds, if at the start it held `base`.
pub fn content(sector: &[u8], base: &[u8], address: u64, identity: u64) -> Content {
    if sector == [0; SECTOR] {
        return Content::Zeros;
    }
    if sector == base {
        return Content::Base;
    }
    let of_here = sector[..8] == *MAGIC
        && number(&sector[8..16]) == address
        && number(&sector[24..32]) == identity;
    if number(&sector[508..512]) != u64::from(crc32fast::hash(&sector[..508])) {
        return if sector[..8] == *MAGIC { Content::Torn } else { Content::Foreign };
    }
    if of_here { Content::Written { seq: number(&sector[16..24]) } } else { Content::Foreign }
}

/// What becomes of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    Zeros,
    Discard,
}

impl Kind {
    pub fn letter(self) -> char {
        match self {
            Self::Write => 'w',
            Self::Zeros => 'z',
            Self::Discard => 't',
        }
    }
}

/// A write in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub first: u64,
    pub count: u64,
}

/// What is known of one sector that was ever submitted.
#[derive(Debug, Default)]
pub struct Expected {
    /// The newest durable sequence number; 0 if there is none, and it may be as at the start.
    pub durable: u64,
    /// Submitted, and not known to be overwritten by a durable one: a discard overwrites nothing.
    pub maybe: Vec<u64>,
}

/// All that a log says.
#[derive(Debug, Default)]
pub struct Log {
    pub identity: u64,
    pub span: u64,
    pub last_seq: u64,
    pub durable_writes: u64,
    pub sectors: BTreeMap<u64, Expected>,
    pub pending: BTreeMap<u64, (Kind, Extent)>,
    /// Those that are not writes.
    pub kinds: BTreeMap<u64, Kind>,
}

impl Log {
    pub fn parse(reader: impl BufRead) -> Result<Self> {
        let mut log = Self::default();
        for (index, line) in reader.lines().enumerate() {
            let line = line?;
            log.event(&line).with_context(|| format!("line {} of the log: {line}", index + 1))?;
        }
        ensure!(log.span > 0, "the log is empty");
        Ok(log)
    }

    pub fn event(&mut self, line: &str) -> Result<()> {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next().unwrap_or_default();
        let numbers = words.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        match (kind, numbers.as_slice()) {
            ("log", &[identity, span]) => (self.identity, self.span) = (identity, span),
            ("w", &[seq, first, count]) => {
                self.submitted(seq, Kind::Write, Extent { first, count })?;
            }
            ("z", &[seq, first, count]) => {
                self.submitted(seq, Kind::Zeros, Extent { first, count })?;
            }
            ("t", &[seq, first, count]) => {
                self.submitted(seq, Kind::Discard, Extent { first, count })?;
            }
            ("d", &[from, to]) => self.durable(from, to)?,
            ("o", &[sector, seq]) => {
                self.sectors.insert(sector, Expected { durable: seq, maybe: Vec::new() });
            }
            _ => bail!("not understood"),
        }
        Ok(())
    }

    pub fn submitted(&mut self, seq: u64, kind: Kind, extent: Extent) -> Result<()> {
        ensure!(seq > self.last_seq, "sequence numbers rise");
        self.last_seq = seq;
        if kind != Kind::Write {
            self.kinds.insert(seq, kind);
        }
        for sector in extent.first..extent.first + extent.count {
            self.sectors.entry(sector).or_default().maybe.push(seq);
        }
        self.pending.insert(seq, (kind, extent));
        Ok(())
    }

    /// Is this what a sector may hold of which `seq` is the newest write?
    pub fn allows(&self, seq: u64, content: Content, base_is_zeros: bool) -> bool {
        match content {
            Content::Zeros if seq == 0 => base_is_zeros,
            Content::Zeros => self.kinds.contains_key(&seq),
            Content::Base => seq == 0,
            Content::Written { seq: found } => found == seq && !self.kinds.contains_key(&seq),
            Content::Foreign | Content::Torn => false,
        }
    }

    pub fn durable(&mut self, from: u64, to: u64) -> Result<()> {
        for seq in from..=to {
            let (kind, extent) =
                self.pending.remove(&seq).context("durable, but never submitted")?;
            self.durable_writes += 1;
            if kind == Kind::Discard {
                continue;
            }
            for sector in extent.first..extent.first + extent.count {
                let expected = self.sectors.entry(sector).or_default();
                expected.durable = expected.durable.max(seq);
                expected.maybe.retain(|&other| other > seq);
            }
        }
        Ok(())
    }
}

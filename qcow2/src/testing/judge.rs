//! Is a state of an image right? An own checker and reader, straight on the sectors.
//!
//! It shares nothing with the engine but the format: refcounts against references, COPIED, what
//! lies outside the file, and what every guest sector reads as. One call takes a few microseconds
//! on the images of the explorer.

use std::string::String;
use std::vec::Vec;

use crate::testing::guest::{Demand, describe};
use crate::testing::pool::{Pool, SECTOR, SectorId, WORDS, mix};
use crate::testing::rules::{COMPRESSED, COPIED, ZERO};
use crate::testing::size;

/// A state of an image file.
#[derive(Clone, Copy)]
pub struct State<'a> {
    /// All contents.
    pub pool: &'a Pool,
    /// The sectors of the file.
    pub sectors: &'a [SectorId],
    /// Its bytes.
    pub len: u64,
    /// The sectors of what lies beneath.
    pub backing: &'a [SectorId],
}

/// What was found where nothing is wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Clusters that are counted more often than referenced.
    pub leaks: u64,
    /// A hash of header, L1 and refcount table: all that opening looks at, but the length.
    pub top: u64,
}

/// The checker; it keeps its memory from state to state.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    references: Vec<u16>,
    counts: Vec<u16>,
    /// Clusters that an entry with the COPIED flag points to, and those without.
    copied: Vec<(usize, bool)>,
    content: Vec<SectorId>,
}

struct Header {
    bits: u32,
    version: u64,
    guest_sectors: usize,
    l1: usize,
    l1_entries: usize,
    table: usize,
    table_sectors: usize,
}

impl State<'_> {
    fn words(&self, sector: usize) -> &[u64; WORDS] {
        self.pool.words(self.sector(sector))
    }

    fn sector(&self, sector: usize) -> SectorId {
        self.sectors.get(sector).copied().unwrap_or_default()
    }

    fn header(&self) -> Result<Header, String> {
        let words = self.words(0);
        let bits = u32::try_from(words[2] & 0xffff_ffff).expect("32 bits");
        if words[0] >> 32 != 0x5146_49fb || !(9..=21).contains(&bits) {
            return Err("the header is destroyed".into());
        }
        Ok(Header {
            bits,
            version: words[0] & 0xffff_ffff,
            guest_sectors: size(words[3]) / SECTOR,
            l1: size(words[5]) / SECTOR,
            l1_entries: size(words[4] & 0xffff_ffff),
            table: size(words[6]) / SECTOR,
            table_sectors: size((words[7] >> 32) << bits) / SECTOR,
        })
    }
}

impl Judge {
    /// Looks at everything.
    ///
    /// # Errors
    /// What is wrong.
    pub fn judge(&mut self, state: State, demand: &Demand) -> Result<Summary, String> {
        let summary = self.check(state)?;
        if summary.leaks > demand.leaks {
            let (found, most) = (summary.leaks, demand.leaks);
            return Err(std::format!("{found} clusters are leaked, at most {most} may be"));
        }
        if self.content.len() != demand.len() {
            return Err(std::format!("the disk has {} sectors", self.content.len()));
        }
        for (place, &id) in self.content.iter().enumerate() {
            if !demand.of(place).contains(&id) {
                let may = demand.of(place).iter().map(|&id| describe(state.pool, id));
                let may: Vec<String> = may.collect();
                let found = describe(state.pool, id);
                return Err(std::format!("guest sector {place} holds {found}; it may: {may:?}"));
            }
        }
        Ok(summary)
    }

    /// What every guest sector of the last state read as.
    #[must_use]
    pub fn content(&self) -> &[SectorId] {
        &self.content
    }

    /// Looks at the tables, and reads the guest's sectors.
    ///
    /// # Errors
    /// What contradicts the format.
    pub fn check(&mut self, state: State) -> Result<Summary, String> {
        let header = state.header()?;
        let clusters = size(state.len.div_ceil(1 << header.bits));
        self.references.clear();
        self.references.resize(clusters, 0);
        self.counts.clear();
        self.counts.resize(clusters, 0);
        self.copied.clear();
        let mut top = state.pool.hash(state.sector(0));
        self.refer(0, &header, "the header")?;
        let per_cluster = (1 << header.bits) / SECTOR;
        let l1_sectors = (header.l1_entries * 8).div_ceil(SECTOR);
        for (what, first, count) in [
            ("the L1 table", header.l1, l1_sectors),
            ("the refcount table", header.table, header.table_sectors),
        ] {
            for cluster in first / per_cluster..(first + count).div_ceil(per_cluster) {
                self.refer(cluster, &header, what)?;
            }
        }
        let behind = self.read_refcounts(&state, &header, &mut top)?;
        self.read_l1(&state, &header, &mut top)?;
        let leaks = self.compare()?;
        Ok(Summary { leaks: leaks + behind, top })
    }

    fn refer(&mut self, cluster: usize, header: &Header, what: &str) -> Result<(), String> {
        let Some(references) = self.references.get_mut(cluster) else {
            let at = (cluster as u64) << header.bits;
            return Err(std::format!("{what} points to byte {at}, behind the end of the file"));
        };
        *references += 1;
        Ok(())
    }

    fn pointer(&mut self, word: u64, header: &Header, what: &str) -> Result<Option<usize>, String> {
        let offset = word & 0x00ff_ffff_ffff_fe00;
        if offset == 0 {
            return Ok(None);
        }
        if offset & ((1 << header.bits) - 1) != 0 {
            return Err(std::format!("{what} is {word:#x}: not aligned"));
        }
        let cluster = size(offset >> header.bits);
        self.refer(cluster, header, what)?;
        Ok(Some(cluster))
    }

    /// Reads all refcounts; returns how many count clusters behind the end of the file.
    fn read_refcounts(
        &mut self,
        state: &State,
        header: &Header,
        top: &mut u64,
    ) -> Result<u64, String> {
        let per_cluster = (1 << header.bits) / SECTOR;
        let mut behind = 0;
        for sector in 0..header.table_sectors {
            let id = state.sector(header.table + sector);
            if id == SectorId::ZERO {
                continue;
            }
            *top ^= mix(state.pool.hash(id), (sector as u64) << 1);
            for (at, &word) in state.pool.words(id).iter().enumerate() {
                if word == 0 {
                    continue;
                }
                if word & 0x1ff != 0 {
                    return Err(std::format!("refcount table entry {word:#x}: reserved bits"));
                }
                let Some(block) = self.pointer(word, header, "a refcount table entry")? else {
                    continue;
                };
                let base = (sector * WORDS + at) << (header.bits - 1);
                for step in 0..per_cluster {
                    let id = state.sector(block * per_cluster + step);
                    if id != SectorId::ZERO {
                        let words = state.pool.words(id);
                        behind += self.read_block(words, base + step * WORDS * 4);
                    }
                }
            }
        }
        Ok(behind)
    }

    fn read_block(&mut self, words: &[u64; WORDS], base: usize) -> u64 {
        let mut behind = 0;
        for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            for lane in 0..4 {
                let count = u16::try_from((word >> (48 - 16 * lane)) & 0xffff).expect("16 bits");
                match self.counts.get_mut(base + at * 4 + lane) {
                    Some(slot) => *slot = count,
                    None => behind += u64::from(count != 0),
                }
            }
        }
        behind
    }

    fn read_l1(&mut self, state: &State, header: &Header, top: &mut u64) -> Result<(), String> {
        self.content.clear();
        self.content.extend(state.backing.iter().take(header.guest_sectors));
        self.content.resize(header.guest_sectors, SectorId::ZERO);
        for sector in 0..(header.l1_entries * 8).div_ceil(SECTOR) {
            let id = state.sector(header.l1 + sector);
            if id == SectorId::ZERO {
                continue;
            }
            *top ^= mix(state.pool.hash(id), (sector as u64) << 1 | 1);
            let left = header.l1_entries - sector * WORDS;
            for (at, &word) in state.pool.words(id).iter().enumerate().take(left) {
                if word & !(0x00ff_ffff_ffff_fe00 | COPIED) != 0 {
                    return Err(std::format!("an L1 entry is {word:#x}: reserved bits"));
                }
                let Some(table) = self.pointer(word, header, "an L1 entry")? else { continue };
                self.copied.push((table, word & COPIED != 0));
                self.read_l2(state, header, sector * WORDS + at, table)?;
            }
        }
        Ok(())
    }

    fn read_l2(
        &mut self,
        state: &State,
        header: &Header,
        index: usize,
        table: usize,
    ) -> Result<(), String> {
        let per_cluster = (1 << header.bits) / SECTOR;
        let base = index << (header.bits - 3);
        for step in 0..per_cluster {
            let id = state.sector(table * per_cluster + step);
            if id == SectorId::ZERO {
                continue;
            }
            let words = state.pool.words(id);
            for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                let mut reserved = 0x3f00_0000_0000_01fe;
                if header.version < 3 {
                    reserved |= ZERO;
                }
                if word & (reserved | COMPRESSED) != 0 {
                    return Err(std::format!("an L2 entry is {word:#x}: reserved bits"));
                }
                let host = self.pointer(word, header, "an L2 entry")?;
                if let Some(host) = host {
                    self.copied.push((host, word & COPIED != 0));
                } else if word & COPIED != 0 {
                    return Err(std::format!("an L2 entry is {word:#x}: COPIED without offset"));
                }
                let place = (base + step * WORDS + at) * per_cluster;
                for within in 0..per_cluster.min(header.guest_sectors.saturating_sub(place)) {
                    self.content[place + within] = match host {
                        Some(host) if word & ZERO == 0 => state.sector(host * per_cluster + within),
                        _ => SectorId::ZERO,
                    };
                }
            }
        }
        Ok(())
    }

    /// Refcounts against references, and COPIED; returns how many clusters are leaked.
    fn compare(&self) -> Result<u64, String> {
        let mut leaks = 0;
        for (cluster, (&count, &references)) in self.counts.iter().zip(&self.references).enumerate()
        {
            if count < references {
                return Err(std::format!(
                    "cluster {cluster} is referenced {references} times, refcount {count}"
                ));
            }
            leaks += u64::from(count > references);
        }
        for &(cluster, copied) in &self.copied {
            let count = self.counts[cluster];
            if (count == 1) != copied {
                return Err(std::format!(
                    "an entry to cluster {cluster}: COPIED is {copied}, refcount {count}"
                ));
            }
        }
        Ok(leaks)
    }
}

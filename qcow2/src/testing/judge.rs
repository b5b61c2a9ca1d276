//! Is a state of an image right? An own checker and reader, straight on the sectors.
//!
//! It shares nothing with the engine but the format: refcounts against references, COPIED, what
//! lies outside the file or has two uses, and what every guest sector reads as, now and in each
//! snapshot. One call takes a few microseconds on the images of the explorer.

use std::string::String;
use std::vec::Vec;

use crate::testing::format::Format;
use crate::testing::guest::{Demand, describe};
use crate::testing::image::Setting;
use crate::testing::pool::{Pool, SectorId, WORDS, mix};

mod tables;

use tables::Owner;

/// A state of an image.
#[derive(Clone, Copy)]
pub struct State<'a> {
    /// All contents.
    pub pool: &'a Pool,
    /// The sectors of the file.
    pub sectors: &'a [SectorId],
    /// Its bytes.
    pub len: u64,
    /// The sectors of the external data file.
    pub data: &'a [SectorId],
    /// What never changes.
    pub setting: &'a Setting,
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
    clusters: Vec<Cluster>,
    /// Clusters that an active entry with the COPIED flag points to, and those without.
    copied: Vec<(usize, bool)>,
    content: Vec<SectorId>,
    /// What a snapshot reads as.
    kept: Vec<SectorId>,
}

/// What was found of a cluster.
#[derive(Clone, Copy, Debug, Default)]
struct Cluster {
    count: u64,
    references: u32,
    /// [`Use`]s.
    uses: u8,
}

/// What a cluster is used for: one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Use {
    /// Header, L1 tables, refcount table and blocks, table of snapshots, bitmaps.
    Fixed = 1,
    /// An L2 table of the disk as it is now, or of a snapshot.
    Table = 2,
    KeptTable = 4,
    /// Guest data, likewise.
    Data = 8,
    KeptData = 16,
    /// Compressed clusters.
    Packed = 32,
}

impl Use {
    /// The uses that a cluster may have besides this one.
    fn besides(self) -> u8 {
        match self {
            Self::Fixed => 0,
            Self::Table => Self::KeptTable as u8,
            Self::KeptTable => Self::Table as u8 | Self::KeptTable as u8,
            Self::Data => Self::KeptData as u8,
            Self::KeptData => Self::Data as u8 | Self::KeptData as u8,
            Self::Packed => Self::Packed as u8,
        }
    }
}

impl State<'_> {
    fn words(&self, sector: usize) -> &[u64; WORDS] {
        self.pool.words(self.sector(sector))
    }

    fn sector(&self, sector: usize) -> SectorId {
        self.sectors.get(sector).copied().unwrap_or_default()
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
        wanted(&self.content, "guest sector", state.pool, demand)?;
        if Format::of(state.words(0)).is_some_and(|format| format.raw) {
            let mut data = state.data.to_vec();
            data.resize(demand.len(), SectorId::ZERO);
            wanted(&data, "in the raw data file, sector", state.pool, demand)?;
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
    /// What contradicts the format, or is not as it was in a snapshot.
    pub fn check(&mut self, state: State) -> Result<Summary, String> {
        let format = Format::of(state.words(0)).ok_or("the header is destroyed")?;
        let clusters = crate::testing::size(state.len.div_ceil(1 << format.bits));
        self.clusters.clear();
        self.clusters.resize(clusters, Cluster::default());
        self.copied.clear();
        let mut top = state.pool.hash(state.sector(0));
        self.refer(0, Use::Fixed, "the header")?;
        let (l1, table) = (format.l1, format.table);
        self.refer_sectors(&format, l1.0, (l1.1 * 8).div_ceil(512), "the L1 table")?;
        self.refer_sectors(&format, table.0, table.1, "the refcount table")?;
        let behind = self.read_refcounts(&state, &format, &mut top)?;
        let mut content = core::mem::take(&mut self.content);
        let result = self.read_l1(&state, &format, l1, (Owner::Active, &mut content));
        self.content = content;
        top ^= result?;
        self.read_snapshots(&state, &format)?;
        self.read_others(&state, &format)?;
        let leaks = self.compare()?;
        Ok(Summary { leaks: leaks + behind, top })
    }

    fn read_snapshots(&mut self, state: &State, format: &Format) -> Result<(), String> {
        let tables = match format.snapshots.1 {
            0 => Vec::new(),
            _ => format.snapshot_tables(state.words(format.snapshots.0)),
        };
        if tables.len() != state.setting.snapshots.len() {
            return Err(std::format!("there are {} snapshots", tables.len()));
        }
        if !tables.is_empty() {
            self.refer_sectors(format, format.snapshots.0, 1, "the table of snapshots")?;
        }
        for (number, table) in tables.into_iter().enumerate() {
            let what = "the L1 table of a snapshot";
            self.refer_sectors(format, table.0, (table.1 * 8).div_ceil(512), what)?;
            let mut kept = core::mem::take(&mut self.kept);
            let result = self.read_l1(state, format, table, (Owner::Snapshot, &mut kept));
            self.kept = kept;
            result.map_err(|what| std::format!("snapshot {number}: {what}"))?;
            let wanted = &state.setting.snapshots[number];
            let differs = self.kept.iter().zip(wanted).position(|(found, wanted)| found != wanted);
            if let Some(place) = differs {
                let found = describe(state.pool, self.kept[place]);
                let wanted = describe(state.pool, wanted[place]);
                return Err(std::format!(
                    "sector {place} of snapshot {number} was {wanted} and is {found}"
                ));
            }
        }
        Ok(())
    }

    /// What is others' is counted, and as it was.
    fn read_others(&mut self, state: &State, format: &Format) -> Result<(), String> {
        for (first, kept) in &state.setting.others {
            self.refer_sectors(format, *first, 1, "a bitmap")?;
            for (place, &wanted) in (*first..).zip(kept) {
                if state.sector(place) != wanted {
                    let found = describe(state.pool, state.sector(place));
                    return Err(std::format!("sector {place}, of a bitmap, holds {found}"));
                }
            }
        }
        Ok(())
    }

    /// Notes a reference to a cluster.
    fn refer(&mut self, cluster: usize, usage: Use, what: &str) -> Result<(), String> {
        let Some(found) = self.clusters.get_mut(cluster) else {
            return Err(std::format!("{what} points to cluster {cluster}, behind the end"));
        };
        found.references += 1;
        if found.uses & !usage.besides() != 0 {
            let uses = found.uses;
            return Err(std::format!("cluster {cluster} is {usage:?} and has uses {uses:#x}"));
        }
        found.uses |= usage as u8;
        Ok(())
    }

    fn refer_sectors(
        &mut self,
        format: &Format,
        first: usize,
        count: usize,
        what: &str,
    ) -> Result<(), String> {
        let per_cluster = format.sectors();
        for cluster in first / per_cluster..(first + count).div_ceil(per_cluster) {
            self.refer(cluster, Use::Fixed, what)?;
        }
        Ok(())
    }

    /// Reads all refcounts; returns how many count clusters behind the end of the file.
    fn read_refcounts(
        &mut self,
        state: &State,
        format: &Format,
        top: &mut u64,
    ) -> Result<u64, String> {
        let mut behind = 0;
        for sector in 0..format.table.1 {
            let id = state.sector(format.table.0 + sector);
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
                let what = "a refcount table entry";
                let Some(block) = self.pointer(word, format, Use::Fixed, what)? else { continue };
                let base = (sector * WORDS + at) << format.block_bits();
                for step in 0..format.sectors() {
                    let id = state.sector(block * format.sectors() + step);
                    if id != SectorId::ZERO {
                        let base = base + step * format.counts_per_sector();
                        behind += self.read_block(format, state.pool.words(id), base);
                    }
                }
            }
        }
        Ok(behind)
    }

    fn read_block(&mut self, format: &Format, words: &[u64; WORDS], base: usize) -> u64 {
        let mut behind = 0;
        let per_word = format.counts_per_word();
        for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            for lane in 0..per_word {
                let count = format.count_in(word, lane);
                match self.clusters.get_mut(base + at * per_word + lane) {
                    Some(cluster) => cluster.count = count,
                    None => behind += u64::from(count != 0),
                }
            }
        }
        behind
    }

    /// Refcounts against references, and COPIED; returns how many clusters are leaked.
    fn compare(&self) -> Result<u64, String> {
        let mut leaks = 0;
        for (number, cluster) in self.clusters.iter().enumerate() {
            let Cluster { count, references, .. } = *cluster;
            if count < references.into() {
                return Err(std::format!(
                    "cluster {number} is referenced {references} times, refcount {count}"
                ));
            }
            leaks += u64::from(count > references.into());
        }
        for &(cluster, copied) in &self.copied {
            let count = self.clusters[cluster].count;
            if (count == 1) != copied {
                return Err(std::format!(
                    "an entry to cluster {cluster}: COPIED is {copied}, refcount {count}"
                ));
            }
        }
        Ok(leaks)
    }
}

/// Does every sector hold what it may?
fn wanted(content: &[SectorId], what: &str, pool: &Pool, demand: &Demand) -> Result<(), String> {
    for (place, &id) in content.iter().enumerate() {
        if !demand.of(place).contains(&id) {
            let may = demand.of(place).iter().map(|&id| describe(pool, id));
            let may: Vec<String> = may.collect();
            let found = describe(pool, id);
            return Err(std::format!("{what} {place} holds {found}; it may: {may:?}"));
        }
    }
    Ok(())
}

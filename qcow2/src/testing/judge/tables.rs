//! Reading L1 and L2 tables, those of the disk as it is and those of a snapshot.

use std::string::String;
use std::vec::Vec;

use super::{Judge, State, Use};
use crate::testing::format::{COMPRESSED, COPIED, Format, L1, OFFSET, Unit, ZERO};
use crate::testing::pool::{SectorId, WORDS, mix};
use crate::testing::size;

/// Whose tables they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Active,
    Snapshot,
}

impl Owner {
    fn uses(self) -> (Use, Use) {
        match self {
            Self::Active => (Use::Table, Use::Data),
            Self::Snapshot => (Use::KeptTable, Use::KeptData),
        }
    }
}

impl Judge {
    /// The cluster that a word names, with one more reference.
    pub(super) fn pointer(
        &mut self,
        word: u64,
        format: &Format,
        usage: Use,
        what: &str,
    ) -> Result<Option<usize>, String> {
        let Some(cluster) = format.pointer(word) else { return Ok(None) };
        if word & OFFSET & ((1 << format.bits) - 1) != 0 {
            return Err(std::format!("{what} is {word:#x}: not aligned"));
        }
        let cluster = size(cluster);
        self.refer(cluster, usage, what)?;
        Ok(Some(cluster))
    }

    /// Reads an L1 table and all beneath it: what its owner's sectors hold. Returns its hash.
    pub(super) fn read_l1(
        &mut self,
        state: &State,
        format: &Format,
        (start, entries): L1,
        (owner, content): (Owner, &mut Vec<SectorId>),
    ) -> Result<u64, String> {
        content.clear();
        content.extend(state.setting.beneath.iter().take(format.guest_sectors));
        content.resize(format.guest_sectors, SectorId::ZERO);
        let mut hash = 0;
        for sector in 0..(entries * 8).div_ceil(512) {
            let id = state.sector(start + sector);
            if id == SectorId::ZERO {
                continue;
            }
            hash ^= mix(state.pool.hash(id), (sector as u64) << 1 | 1);
            let left = entries - sector * WORDS;
            for (at, &word) in state.pool.words(id).iter().enumerate().take(left) {
                if word & !(OFFSET | COPIED) != 0 {
                    return Err(std::format!("an L1 entry is {word:#x}: reserved bits"));
                }
                let table = self.pointer(word, format, owner.uses().0, "an L1 entry")?;
                let Some(table) = table else { continue };
                if owner == Owner::Active {
                    self.copied.push((table, word & COPIED != 0));
                }
                self.read_l2(state, format, (sector * WORDS + at, table), (owner, content))?;
            }
        }
        Ok(hash)
    }

    fn read_l2(
        &mut self,
        state: &State,
        format: &Format,
        (index, table): (usize, usize),
        (owner, content): (Owner, &mut [SectorId]),
    ) -> Result<(), String> {
        let base = index * format.entries();
        for step in 0..format.sectors() {
            let id = state.sector(table * format.sectors() + step);
            if id == SectorId::ZERO {
                continue;
            }
            let base = base + step * WORDS / format.entry_words();
            for (at, entry) in format.entries_of(state.pool.words(id)) {
                if entry != [0, 0] {
                    self.read_entry(state, format, (base + at, entry), (owner, content))?;
                }
            }
        }
        Ok(())
    }

    fn read_entry(
        &mut self,
        state: &State,
        format: &Format,
        (guest, entry): (usize, [u64; 2]),
        (owner, content): (Owner, &mut [SectorId]),
    ) -> Result<(), String> {
        let place = guest * format.sectors();
        let end = (place + format.sectors()).min(content.len());
        if entry[0] & COMPRESSED != 0 {
            return self.read_compressed(state, format, entry, content.get_mut(place..end));
        }
        check_bits(format, guest, entry)?;
        let mut host = None;
        if format.data_file {
            // Nothing counts it.
            host = (entry[0] & COPIED != 0).then_some(guest);
        } else if let Some(at) = self.pointer(entry[0], format, owner.uses().1, "an L2 entry")? {
            host = Some(at);
            if owner == Owner::Active {
                self.copied.push((at, entry[0] & COPIED != 0));
            }
        }
        let per_unit = format.sectors() / format.units();
        for (within, slot) in content.get_mut(place..end).into_iter().flatten().enumerate() {
            match (format.unit(entry, within / per_unit), host) {
                (Unit::Nothing, _) => {}
                (Unit::Data, Some(host)) => {
                    let sector = host * format.sectors() + within;
                    *slot = match format.data_file {
                        true => state.data.get(sector).copied().unwrap_or_default(),
                        false => state.sector(sector),
                    };
                }
                _ => *slot = SectorId::ZERO,
            }
        }
        Ok(())
    }

    /// Nobody writes compressed clusters: each is one of those that were there at first, and its
    /// bytes are what they were.
    fn read_compressed(
        &mut self,
        state: &State,
        format: &Format,
        entry: [u64; 2],
        content: Option<&mut [SectorId]>,
    ) -> Result<(), String> {
        let what = "a compressed cluster";
        let known = state.setting.compressed.get(&entry[0]);
        let Some(known) = known.filter(|_| entry[1] == 0) else {
            return Err(std::format!("{what} {entry:#x?} was not there at first"));
        };
        for cluster in format.counted(entry[0]) {
            self.refer(size(cluster), Use::Packed, what)?;
        }
        let first = size(format.span(entry[0]).start) / 512;
        for (step, &id) in known.source.iter().enumerate() {
            if state.sector(first + step) != id {
                let sector = first + step;
                return Err(std::format!("the bytes of {what} have changed in sector {sector}"));
            }
        }
        for (slot, &id) in content.into_iter().flatten().zip(&known.content) {
            *slot = id;
        }
        Ok(())
    }
}

/// Bits that must not be there.
fn check_bits(format: &Format, guest: usize, [word, bitmap]: [u64; 2]) -> Result<(), String> {
    let mut reserved = 0x3f00_0000_0000_01fe;
    if format.version < 3 || format.extended {
        reserved |= ZERO;
    }
    let wrong = if word & reserved != 0 {
        "reserved bits"
    } else if bitmap & bitmap >> 32 & 0xffff_ffff != 0 {
        "allocated and zeros at once"
    } else if format.data_file {
        let here = (guest as u64) << format.bits;
        match (word & COPIED != 0, word & OFFSET) {
            (true, at) if at == here => return Ok(()),
            (false, 0) if bitmap << 32 == 0 => return Ok(()),
            _ => "not its place in the data file",
        }
    } else if word & OFFSET != 0 {
        return Ok(());
    } else if word & COPIED != 0 {
        "COPIED without offset"
    } else if bitmap << 32 != 0 {
        "allocated without offset"
    } else {
        return Ok(());
    };
    Err(std::format!("an L2 entry is {word:#x} {bitmap:#x}: {wrong}"))
}

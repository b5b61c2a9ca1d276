//! New refcounts, where the old ones are of no use: written beside them, then switched to.

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use super::counts::put;
use super::{Left, RepairError, RepairIo, Stage, Work, edit};
use crate::check::header::{Area, Head, MAX_REFCOUNT_TABLE_BYTES};
use crate::check::{CheckError, Kind, index};

/// Where the new table and its blocks go.
struct Plan {
    /// The first cluster of the table.
    table: u64,
    table_clusters: u64,
    /// The number of each block, in rising order, with the cluster it lies in.
    blocks: Vec<(u64, u64)>,
    /// The clusters of the file, then.
    clusters: u64,
}

impl<F: RepairIo + ?Sized> Work<'_, '_, F> {
    /// Writes new refcounts and switches to them. Returns what stood in the way, if anything; the
    /// counts in memory are then as before.
    pub(super) fn rebuild(&mut self) -> Result<Option<Left>, RepairError> {
        if self.state().incomplete {
            return Ok(Some(Left::Incomplete));
        }
        if self.state().slots.first().is_none_or(|slot| slot.kinds & Kind::TABLES != 0) {
            // The switch would change what is referenced.
            return Ok(Some(Left::Entangled));
        }
        let slots = &self.state().slots;
        let mut taken = Vec::new();
        taken.try_reserve(slots.len()).map_err(|_| CheckError::TooLarge)?;
        taken.extend(slots.iter().map(|slot| slot.count | slot.refs != 0 || slot.kinds != 0));
        // The references without those of the old refcounts.
        let head = self.head;
        self.head = Head { refcount_table: Area::default(), ..head };
        let walked = self.walk(Stage::Checking);
        self.head = head;
        walked?;
        let plan = match self.at_the_end() {
            Ok(plan) => match self.grow(&plan) {
                Ok(()) => Ok(plan),
                // A block device, say.
                Err(full) => match self.inside(&taken) {
                    Err(Left::NoRoom) => return Err(full),
                    plan => plan,
                },
            },
            Err(Left::NoRoom) => self.inside(&taken),
            left => left,
        };
        match plan {
            Ok(plan) => self.carry_out(&plan).map(|()| None),
            Err(left) => {
                self.walk(Stage::Checking)?;
                Ok(Some(left))
            }
        }
    }

    /// Everything behind the end of the file, with blocks only where something is counted.
    fn at_the_end(&self) -> Result<Plan, Left> {
        let (bits, state) = (self.head.block_bits(), self.state());
        let used = state.used_slots as u64;
        let per_block = index(1 << bits);
        let counted = state.slots[..state.used_slots].chunks(per_block);
        let counted = counted.map(|slots| slots.iter().any(|slot| slot.refs != 0));
        let counted = (0_u64..).zip(counted).filter(|&(_, any)| any);
        // Those that cover the new clusters come on top.
        let mut numbers: Vec<u64> =
            counted.map(|(nth, _)| nth).take_while(|&nth| nth < used >> bits).collect();
        let (old, mut new) = (numbers.len() as u64, 1);
        let (table_clusters, clusters) = loop {
            let last = (used >> bits) + new;
            let table_clusters = self.table_clusters(last)?;
            let clusters = used + table_clusters + old + new;
            if clusters <= last << bits {
                break (table_clusters, clusters);
            }
            new += 1;
        };
        // One cluster more: what begins less than a cluster behind the end is counted differently.
        if state.first_beyond.is_some_and(|first| first <= clusters) {
            return Err(Left::NoRoom);
        }
        numbers.extend((used >> bits..).take(index(new)));
        let blocks = numbers.into_iter().zip(used + table_clusters..).collect();
        Ok(Plan { table: used, table_clusters, blocks, clusters })
    }

    /// Everything in clusters of the file that are not `taken`.
    fn inside(&mut self, taken: &[bool]) -> Result<Plan, Left> {
        // Not the last one, which may be cut short.
        let clusters = self.state().host_clusters;
        let whole = self.file.len() >> self.head.cluster_bits;
        let numbers = 0..(self.state().used_slots as u64).div_ceil(1 << self.head.block_bits());
        let table_clusters = self.table_clusters(numbers.end)?;
        let free = |cluster: &u64| !taken[index(*cluster)];
        let mut table = None;
        let mut run = 0;
        for cluster in 1..whole {
            run = if free(&cluster) { run + 1 } else { 0 };
            if run == table_clusters {
                table = Some(cluster + 1 - run);
                break;
            }
        }
        let table = table.ok_or(Left::NoRoom)?;
        let outside = |cluster: &u64| !(table..table + table_clusters).contains(cluster);
        let places = (1..whole).filter(free).filter(outside);
        let blocks: Vec<_> = numbers.clone().zip(places).collect();
        if (blocks.len() as u64) < numbers.end {
            return Err(Left::NoRoom);
        }
        let own = (table..table + table_clusters).chain(blocks.iter().map(|&(_, place)| place));
        for cluster in own {
            self.checker.state.slots[index(cluster)].refs = 1;
        }
        Ok(Plan { table, table_clusters, blocks, clusters })
    }

    /// The clusters of a table with so many entries.
    fn table_clusters(&self, entries: u64) -> Result<u64, Left> {
        let bytes = (entries * 8).next_multiple_of(self.head.cluster_size());
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Left::TooLarge);
        }
        Ok(bytes >> self.head.cluster_bits)
    }

    /// Makes the file as long as a plan for its end wants it.
    fn grow(&mut self, plan: &Plan) -> Result<(), RepairError> {
        let len = plan.clusters << self.head.cluster_bits;
        self.file.set_len(len).map_err(|_| RepairError::Grow(len))
    }

    fn carry_out(&mut self, plan: &Plan) -> Result<(), RepairError> {
        let bits = self.head.cluster_bits;
        let total = plan.blocks.len() as u64;
        for (nth, &(number, place)) in (0..).zip(&plan.blocks) {
            self.write_block(plan, number, place << bits)?;
            (self.progress)(Stage::Refcounts, nth, total);
        }
        self.write_table(plan)?;
        self.sync()?;
        let clusters = u32::try_from(plan.table_clusters).unwrap_or(u32::MAX);
        let table = plan.table << bits;
        edit::header(self.file, |sector| edit::set_refcount_table(sector, table, clusters))?;
        self.sync()?;
        let largest = self.head.largest_refcount();
        for slot in &mut self.checker.state.slots {
            slot.count = slot.refs.min(largest);
            slot.kinds &= !Kind::LOWERED;
        }
        self.changed = true;
        Ok(())
    }

    fn write_block(&mut self, plan: &Plan, number: u64, place: u64) -> Result<(), RepairError> {
        let order = self.head.refcount_order;
        let largest = self.head.largest_refcount();
        let mut cluster = number << self.head.block_bits();
        let state = &self.checker.state;
        let used = state.used_slots as u64;
        fill(self.file, place, self.head.cluster_size(), |bytes| {
            for nth in 0..(bytes.len() * 8) >> order {
                let count = match state.slots.get(index(cluster)) {
                    Some(slot) if cluster < used => slot.refs.min(largest),
                    _ => (used..plan.clusters).contains(&cluster).into(),
                };
                put(bytes, order, nth, count);
                cluster += 1;
            }
        })
    }

    fn write_table(&mut self, plan: &Plan) -> Result<(), RepairError> {
        let bits = self.head.cluster_bits;
        let mut blocks = plan.blocks.iter().peekable();
        let mut number = 0;
        fill(self.file, plan.table << bits, plan.table_clusters << bits, |bytes| {
            for entry in bytes.chunks_exact_mut(8) {
                let block = blocks.next_if(|block| block.0 == number);
                BigEndian::write_u64(entry, block.map_or(0, |&(_, place)| place << bits));
                number += 1;
            }
        })
    }
}

/// Writes `len` bytes, which `make` makes piece by piece from zeros.
fn fill<F: RepairIo + ?Sized>(
    file: &mut F,
    start: u64,
    len: u64,
    mut make: impl FnMut(&mut [u8]),
) -> Result<(), RepairError> {
    let mut buffer = [0; 4096];
    let mut at = start;
    while at < start + len {
        let piece = &mut buffer[..index(start + len - at).min(4096)];
        piece.fill(0);
        make(piece);
        file.write_at(at, piece).map_err(|_| RepairError::Write(at))?;
        at += piece.len() as u64;
    }
    Ok(())
}

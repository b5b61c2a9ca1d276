//! The states that a power cut may leave.
//!
//! Every sector that is not synced holds, independently, its durable content or that of any later
//! change; the length lies anywhere between the old and the new. Where at most ten sectors are not
//! synced, all combinations are visited. Above that: all prefixes (in the order of submission and
//! in that of completion), all single omissions, all single inclusions, all but one structure and
//! only one structure, and random subsets. The sectors of an external data file count like others.

use std::string::String;
use std::vec::Vec;

use crate::testing::disk::{Disk, Structure, possible_lens};
use crate::testing::pool::{SECTOR, SectorId, mix};
use crate::testing::prng::Prng;
use crate::testing::size;

/// Up to so many sectors, all combinations are visited.
pub const EXHAUSTIVE: usize = 10;
/// With more combinations than three to the tenth a sample does even so.
const MOST: u64 = 59_049;
/// Random subsets where not all are visited.
const RANDOM: u64 = 48;
/// Lengths that are tried.
const LENGTHS: usize = 4;

/// One state.
#[derive(Clone, Copy)]
pub struct Cut<'a> {
    /// The sectors of the file.
    pub sectors: &'a [SectorId],
    /// Its bytes.
    pub len: u64,
    /// The sectors of the external data file.
    pub data: &'a [SectorId],
    /// A hash of sectors and length.
    pub hash: u64,
    /// The how manyth of this point in time.
    pub index: u64,
}

/// A sector that is not synced: its options are `start..start + count`, the durable one first.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    data: bool,
    sector: usize,
    start: usize,
    count: usize,
    choice: usize,
}

/// One change of one candidate.
#[derive(Clone, Copy, Debug)]
struct Step {
    candidate: usize,
    option: usize,
    serial: u64,
    completed: Option<u64>,
    structure: Structure,
}

/// Visits states; keeps its memory from one point in time to the next.
#[derive(Debug, Default)]
pub struct Cuts {
    candidates: Vec<Candidate>,
    options: Vec<SectorId>,
    /// Hash of the option at its sector.
    hashes: Vec<u64>,
    steps: Vec<Step>,
    found: Vec<(usize, u64, SectorId, Option<u64>, Structure)>,
    image: Vec<SectorId>,
    data: Vec<SectorId>,
    hash: u64,
    len: u64,
    index: u64,
    active: usize,
}

type Visit<'a> = &'a mut dyn FnMut(Cut, &Cuts) -> bool;

impl Cuts {
    /// Calls `visit` with each state, until that says false. What is picked follows from `seed`.
    pub fn visit(&mut self, disk: &Disk, data: Option<&Disk>, seed: u64, visit: Visit) {
        let mut prng = Prng::new(seed);
        self.candidates.clear();
        self.options.clear();
        self.hashes.clear();
        self.steps.clear();
        // Those of the data file first: whatever the length of the image, they are there.
        if let Some(data) = data {
            self.collect(data, true);
        }
        self.collect(disk, false);
        self.steps.sort_by_key(|step| step.serial);
        self.index = 0;
        for len in lengths(disk, &mut prng) {
            self.begin(disk, data, len);
            let mut product = 1_u64;
            for candidate in &self.candidates[..self.active] {
                product = product.saturating_mul(candidate.count as u64);
            }
            let all = self.active <= EXHAUSTIVE && product <= MOST;
            let goes_on = if all { self.every(visit) } else { self.sample(&mut prng, visit) };
            if !goes_on {
                return;
            }
        }
    }

    /// Finds the sectors that are not synced and what each may hold.
    fn collect(&mut self, disk: &Disk, is_data: bool) {
        self.found.clear();
        let end = disk.durable.len().max(disk.sectors().len());
        for change in disk.changes() {
            for sector in change.what.sectors(end) {
                if let Some(id) = change.what.at(sector) {
                    let structure = change.structure;
                    self.found.push((sector, change.serial, id, change.completed, structure));
                }
            }
        }
        self.found.sort_unstable_by_key(|&(sector, serial, ..)| (sector, serial));
        let pool = disk.pool().borrow();
        let mut rest = &self.found[..];
        while let Some(&(sector, ..)) = rest.first() {
            let count = rest.iter().take_while(|entry| entry.0 == sector).count();
            let (group, behind) = rest.split_at(count);
            rest = behind;
            let start = self.options.len();
            let durable = disk.durable.get(sector).copied().unwrap_or_default();
            self.options.push(durable);
            let candidate = self.candidates.len();
            let first_step = self.steps.len();
            for &(_, serial, id, completed, structure) in group {
                let known = self.options[start..].iter().position(|&option| option == id);
                let option = known.unwrap_or_else(|| {
                    self.options.push(id);
                    self.options.len() - 1 - start
                });
                self.steps.push(Step { candidate, option, serial, completed, structure });
            }
            let count = self.options.len() - start;
            if count == 1 {
                self.options.pop();
                self.steps.truncate(first_step);
                continue;
            }
            let place = place(sector, is_data);
            self.hashes
                .extend(self.options[start..].iter().map(|&option| pool.hash_at(place, option)));
            self.candidates.push(Candidate { data: is_data, sector, start, count, choice: 0 });
        }
    }

    /// Starts with what is durable, at this length.
    fn begin(&mut self, disk: &Disk, data: Option<&Disk>, len: u64) {
        let sectors = size(len.div_ceil(SECTOR as u64));
        self.len = len;
        self.image.clear();
        self.image.extend(disk.durable.iter().take(sectors));
        self.image.resize(sectors, SectorId::ZERO);
        let pool = disk.pool().borrow();
        self.hash = mix(len, 1);
        for (place, &id) in self.image.iter().enumerate() {
            self.hash ^= pool.hash_at(place, id);
        }
        self.data.clear();
        if let Some(data) = data {
            let ends = self.candidates.iter().filter(|it| it.data).map(|it| it.sector + 1);
            let end = ends.max().unwrap_or(0).max(data.durable.len());
            self.data.extend(&data.durable);
            self.data.resize(end, SectorId::ZERO);
        }
        for (sector, &id) in self.data.iter().enumerate() {
            self.hash ^= pool.hash_at(place(sector, true), id);
        }
        for candidate in &mut self.candidates {
            candidate.choice = 0;
        }
        let is_there = |candidate: &Candidate| candidate.data || candidate.sector < sectors;
        self.active = self.candidates.partition_point(is_there);
    }

    fn set(&mut self, candidate: usize, choice: usize) {
        if candidate >= self.active {
            return;
        }
        let it = &mut self.candidates[candidate];
        self.hash ^= self.hashes[it.start + it.choice] ^ self.hashes[it.start + choice];
        it.choice = choice;
        let file = if it.data { &mut self.data } else { &mut self.image };
        file[it.sector] = self.options[it.start + choice];
    }

    fn show(&mut self, visit: Visit) -> bool {
        let Self { len, hash, index, .. } = *self;
        self.index += 1;
        visit(Cut { sectors: &self.image, len, data: &self.data, hash, index }, self)
    }

    /// All combinations.
    fn every(&mut self, visit: Visit) -> bool {
        loop {
            if !self.show(visit) {
                return false;
            }
            let mut at = 0;
            loop {
                if at == self.active {
                    return true;
                }
                let Candidate { choice, count, .. } = self.candidates[at];
                if choice + 1 < count {
                    self.set(at, choice + 1);
                    break;
                }
                self.set(at, 0);
                at += 1;
            }
        }
    }

    fn sample(&mut self, prng: &mut Prng, visit: Visit) -> bool {
        let steps = core::mem::take(&mut self.steps);
        let goes_on = self.sample_of(&steps, prng, visit);
        self.steps = steps;
        goes_on
    }

    fn sample_of(&mut self, steps: &[Step], prng: &mut Prng, visit: Visit) -> bool {
        let mut by_completion: Vec<Step> =
            steps.iter().filter(|step| step.completed.is_some()).copied().collect();
        by_completion.sort_by_key(|step| step.completed);
        for order in [steps, &by_completion] {
            if !self.prefixes(order, visit) {
                return false;
            }
        }
        // Now by_completion is what a reader sees; go on from what was submitted last.
        self.only(steps, |_| true);
        let full: Vec<usize> =
            self.candidates[..self.active].iter().map(|candidate| candidate.choice).collect();
        for (candidate, &choice) in full.iter().enumerate() {
            self.set(candidate, 0);
            let goes_on = self.show(visit);
            self.set(candidate, choice);
            if !goes_on {
                return false;
            }
        }
        self.only(steps, |_| false);
        for (candidate, &choice) in full.iter().enumerate() {
            self.set(candidate, choice);
            let goes_on = self.show(visit);
            self.set(candidate, 0);
            if !goes_on {
                return false;
            }
        }
        for structure in STRUCTURES {
            for without in [true, false] {
                self.only(steps, |step| (step.structure == structure) != without);
                if !self.show(visit) {
                    return false;
                }
            }
        }
        for round in 0..RANDOM {
            for (candidate, &last) in full.iter().enumerate() {
                let count = self.candidates[candidate].count;
                let choice = match round % 3 {
                    0 => prng.index(count),
                    1 if prng.one_in(4) => prng.index(count),
                    1 => last,
                    _ if prng.one_in(4) => prng.index(count),
                    _ => 0,
                };
                self.set(candidate, choice);
            }
            if !self.show(visit) {
                return false;
            }
        }
        true
    }

    /// The durable state with the steps that `pick` picks.
    fn only(&mut self, steps: &[Step], pick: impl Fn(&Step) -> bool) {
        for candidate in 0..self.active {
            self.set(candidate, 0);
        }
        for step in steps.iter().filter(|step| pick(step)) {
            self.set(step.candidate, step.option);
        }
    }

    fn prefixes(&mut self, order: &[Step], visit: Visit) -> bool {
        self.only(&[], |_| false);
        let mut last = None;
        for step in order {
            if last.is_some_and(|serial| serial != step.serial) && !self.show(visit) {
                return false;
            }
            last = Some(step.serial);
            self.set(step.candidate, step.option);
        }
        self.show(visit)
    }

    /// The state shown last, in words.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut out = std::format!("  length {}\n", self.len);
        for (number, candidate) in self.candidates[..self.active].iter().enumerate() {
            let step = self
                .steps
                .iter()
                .rfind(|step| step.candidate == number && step.option == candidate.choice);
            let what = match step {
                Some(step) if candidate.choice != 0 => std::format!("change {}", step.serial),
                _ => "as durable".into(),
            };
            let structure =
                self.steps.iter().find(|step| step.candidate == number).map(|it| it.structure);
            let structure = structure.unwrap_or(Structure::Data);
            let file = if candidate.data { "data file, " } else { "" };
            let sector = candidate.sector;
            out += &std::format!("  {file}sector {sector} ({structure:?}): {what}\n");
        }
        out
    }
}

const STRUCTURES: [Structure; 7] = [
    Structure::Data,
    Structure::L2,
    Structure::L1,
    Structure::RefcountBlock,
    Structure::RefcountTable,
    Structure::Header,
    Structure::NewTable,
];

/// What a sector is known by in hashes.
fn place(sector: usize, is_data: bool) -> usize {
    sector | usize::from(is_data) << 40
}

/// The lengths to try: the shortest, the longest, and some between.
fn lengths(disk: &Disk, prng: &mut Prng) -> Vec<u64> {
    let all = possible_lens(disk);
    let (least, most) = (all[0], all[all.len() - 1]);
    let mut chosen = std::vec![most];
    if least != most {
        chosen.push(least);
        let sectors = (most - least) / SECTOR as u64;
        chosen.push(least + prng.below(sectors + 1) * SECTOR as u64);
    }
    if all.len() > 2 {
        chosen.push(all[1 + prng.index(all.len() - 2)]);
    }
    chosen.truncate(LENGTHS);
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

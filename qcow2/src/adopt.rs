//! Adoption: bringing what the [journal](crate::journal) of a killed process says into the image,
//! before anything is served.
//!
//! ```text
//!   check every record ──► fdatasync ──► install ──► a round ──► ready, the journal is cleared
//!   (reads only)           (as always)   (in memory, as writes do)
//! ```
//!
//! Of several records for one guest cluster the last counts. Where the L2 table on disk says
//! something else, it is older: the predecessor had recorded each change before it sent off
//! anything ([`record`](crate::record)). So the entry is replaced, by the machinery that serves
//! writes: a table is allocated where there is none, copied where a snapshot shares it, and what
//! the old entry referred to goes through quarantine. That old reference was counted down by
//! nobody, since a predecessor does that only when the unlinking is durable.
//!
//! The data is durable after the first fdatasync, as completed writes of a killed process are in
//! the page cache; what it names was counted, durably, before it was mapped. So an entry may go
//! into its L2 page at once.
//!
//! **The journal stays as it is until all is durable**: an adoption that is killed is begun again,
//! and finds some of it done. What was freed meanwhile is named by no record in force.
//!
//! A journal is data from a file. What each record names has to be a cluster inside the file, with
//! a refcount, that no metadata lies in and no other record names; else nothing is written, and the
//! image is not served ([`FailureKind::Journal`](crate::FailureKind)).

use alloc::vec::Vec;

use crate::allocator::RefcountPlace;
use crate::cache::Lookup;
use crate::engine::Engine;
use crate::entry::{Decoder, L2Entry, Mapping, Pointer, Reference};
use crate::error::{FailureKind, IoErrorKind, OpenError, OpenErrorInner};
use crate::image::Image;
use crate::journal::Record;
use crate::life::Life;
use crate::mark;
use crate::options::Options;
use crate::planted::{self, Bug};
use crate::request::{Step, Stop, Wait, Which};

/// What is left to be adopted.
#[derive(Clone, Debug)]
pub(crate) struct Adoption {
    /// In ascending order of their guest clusters, of which each has one.
    records: Vec<Record>,
    /// How many of them this phase is done with.
    done: usize,
    phase: Phase,
    /// What it waits for.
    wait: Wait,
    /// Some entry on disk was another.
    changed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before the first fdatasync.
    Check,
    /// It is in flight.
    Sync,
    Install,
    /// All is in memory: this round has to end.
    Round(u64),
}

impl Adoption {
    /// What `records`, in the order in which they were made, come to.
    pub(crate) fn new(
        image: &Image,
        options: &Options,
        records: &[Record],
    ) -> Result<Self, OpenError> {
        if options.journal == 0 || options.read_only {
            let (what, value) = ("the size of the journal", 0);
            let expected = "at least 1 to adopt one, with the image writable";
            return Err(OpenErrorInner::Option { what, value, expected }.into());
        }
        let mut last = records.to_vec();
        if !planted::is(Bug::FirstRecordCounts) {
            last.reverse();
        }
        // Stable: of each guest cluster the first stays, which is the last that was made.
        last.sort_by_key(|record| record.guest);
        last.dedup_by_key(|record| record.guest);
        let mut hosts = Vec::with_capacity(last.len());
        for &record in &last {
            let bad = |why| {
                let (guest, value) = (record.guest.0, record.word);
                OpenError::from(OpenErrorInner::Journal { guest, value, why })
            };
            hosts.extend(pointer_of(image, record).map_err(bad)?.map(|at| (at.at, record)));
        }
        hosts.sort_unstable_by_key(|&(at, _)| at);
        if let Some(pair) = hosts.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let (guest, value) = (pair[1].1.guest.0, pair[1].1.word);
            let why = "another guest cluster has the same place";
            return Err(OpenErrorInner::Journal { guest, value, why }.into());
        }
        let (done, phase, wait) = (0, Phase::Check, Wait::Nothing);
        Ok(Self { records: last, done, phase, wait, changed: false })
    }
}

/// The host cluster that a record names, if that is one the image may have.
fn pointer_of(image: &Image, record: Record) -> Result<Option<Pointer>, &'static str> {
    let Decoder { geometry, data_file, .. } = image.decoder;
    let clusters = geometry.clusters_for(image.virtual_size());
    if record.guest.0 >= clusters {
        return Err("the virtual disk ends before it");
    }
    let entry = L2Entry { word: record.word, bitmap: record.bitmap };
    if record.bitmap != 0 && !geometry.has_extended_l2() {
        return Err("the image has no subclusters");
    }
    let mut found = None;
    for unit in 0..1 << geometry.units_bits() {
        let mapping = image.decoder.l2(entry, record.guest, unit, image.file_len);
        found = match mapping.map_err(crate::entry::BadWord::text)? {
            Mapping::Data(at) => Some(at),
            Mapping::Zero { keeps } | Mapping::Unallocated { keeps } => keeps,
            Mapping::Compressed(_) => return Err("nobody writes compressed clusters"),
        };
    }
    if found.is_some_and(|at| !data_file && image.metadata.contains(at.at.index())) {
        return Err("metadata lies there");
    }
    Ok(found)
}

impl Engine {
    /// As [`new`](Engine::new), for the successor of a process that was killed while the device
    /// lived on: `records` is what [`Log::open`](crate::Log::open) has found in its journal, which
    /// is not to be touched before [`next_record`](Engine::next_record) says `Clear`. The image is
    /// ready when all that the predecessor acknowledged is durable. Pump until it is, or
    /// [`health`](Engine::health) has failed: then the journal has to be kept.
    ///
    /// # Errors
    /// As with [`new`](Engine::new); records that the image cannot have. (That their clusters are
    /// counted is looked up while opening, before anything is written, and ends in `Failed`.)
    pub fn recover(image: Image, options: &Options, records: &[Record]) -> Result<Self, OpenError> {
        let adoption = Adoption::new(&image, options, records)?;
        let mut engine = Self::build(image, options)?;
        engine.adoption = Some(adoption);
        engine.advance_adoption();
        Ok(engine)
    }

    /// Adopts as much as can be.
    pub(crate) fn advance_adoption(&mut self) {
        while let Some(adoption) = &self.adoption {
            if self.failed.is_some() || self.has_no_cluster_for(adoption.wait) {
                return;
            }
            let next = adoption.records.get(adoption.done).copied();
            let step = match (adoption.phase, next) {
                (Phase::Sync, _) => return,
                (Phase::Check, Some(record)) => self.check_record(record),
                (Phase::Check, None) => {
                    self.enter_adoption(Phase::Sync);
                    self.begin_open();
                    return;
                }
                (Phase::Install, Some(record)) => self.install(record),
                (Phase::Install, None) => {
                    let changed = adoption.changed && !planted::is(Bug::AdoptedEarly);
                    self.enter_adoption(Phase::Round(if changed { self.next_round() } else { 0 }));
                    self.round.wanted |= changed;
                    continue;
                }
                (Phase::Round(number), _) => {
                    if self.round.number < number || !self.round.is_idle() {
                        return;
                    }
                    self.finish_adoption();
                    return;
                }
            };
            let adoption = self.adoption.as_mut().expect("going on");
            match (step, next) {
                (Ok(()), _) => adoption.done += 1,
                (Err(Stop::Wait(wait)), _) => {
                    adoption.wait = wait;
                    return;
                }
                (Err(Stop::Fail(kind)), _) => self.fail_adoption(kind),
            }
        }
    }

    fn enter_adoption(&mut self, phase: Phase) {
        let adoption = self.adoption.as_mut().expect("going on");
        (adoption.phase, adoption.done, adoption.wait) = (phase, 0, Wait::Nothing);
    }

    /// The first fdatasync has returned: what was written by anybody before is durable.
    pub(crate) fn adoption_synced(&mut self) {
        if self.adoption.is_some() {
            self.enter_adoption(Phase::Install);
            self.life = if self.life == Life::Opening { Life::Adopting } else { self.life };
        }
    }

    fn finish_adoption(&mut self) {
        self.adoption = None;
        self.life = if self.life == Life::Adopting { Life::Serving } else { self.life };
        self.clear_records();
    }

    /// What it waits for will not come.
    pub(crate) fn fail_adoption(&mut self, kind: IoErrorKind) {
        let Some(adoption) = &self.adoption else { return };
        let guest = adoption.records.get(adoption.done).map_or(0, |record| record.guest.0);
        let offset = guest << self.geometry().cluster_bits();
        self.fail(FailureKind::Adoption(kind), offset);
    }

    /// The same, if what it waits for matches.
    pub(crate) fn fail_adoption_if(&mut self, kind: IoErrorKind, matches: impl Fn(Wait) -> bool) {
        let wait = self.adoption.as_ref().map_or(Wait::Nothing, |adoption| adoption.wait);
        if wait != Wait::Nothing && matches(wait) {
            self.fail_adoption(kind);
        }
    }

    /// Asking for a cluster again would be to try again what has just failed. Whether there may be
    /// one is decided where that is seen (`check_starved`).
    fn has_no_cluster_for(&self, wait: Wait) -> bool {
        let none = self.allocator.error.is_some() && self.allocator.reserved() == 0;
        wait == Wait::Reserve && none
    }

    pub(crate) fn adoption_waits_for(&self, wait: Wait) -> bool {
        self.adoption.as_ref().is_some_and(|adoption| adoption.wait == wait)
    }

    /// Is what a record names counted as it says? Reads only.
    fn check_record(&mut self, record: Record) -> Step<()> {
        let entry = L2Entry { word: record.word, bitmap: record.bitmap };
        let Reference::Cluster(pointer) = self.decoder.reference(entry, record.guest) else {
            return Ok(());
        };
        let count = match self.refcount_place(pointer.at.index()) {
            RefcountPlace::Page(page, index) => match self.refcount_cache.lookup(page) {
                Lookup::Hit(slot) => self.refcount_cache.refcount(slot, index),
                Lookup::Loading => return Err(Stop::Wait(Wait::Page(Which::Refcounts, page))),
                Lookup::Absent => return Err(self.load(Which::Refcounts, page)),
            },
            RefcountPlace::NoBlock | RefcountPlace::NoTable => 0,
        };
        // COPIED says that it is exactly one.
        if count == 0 || (pointer.copied && count != 1) {
            let offset = record.guest.0 << self.geometry().cluster_bits();
            self.fail(FailureKind::Journal, offset);
            return Err(Stop::Wait(Wait::Nothing));
        }
        Ok(())
    }

    /// Puts the entry into its L2 page, unless it is there.
    fn install(&mut self, record: Record) -> Step<()> {
        let guest = record.guest;
        let wanted = L2Entry { word: record.word, bitmap: record.bitmap };
        let table = self.l2_table(guest);
        let found = match table {
            None => L2Entry::default(),
            Some(table) => {
                let place = self.entry_place(table, guest);
                let slot = self.l2_page(place.page)?;
                self.l2_cache.entry(slot, place.index)
            }
        };
        if found == wanted {
            mark!("adopt.was_on_disk");
            return Ok(());
        }
        self.ensure_table(guest)?;
        match table {
            None => mark!("adopt.allocated_table"),
            Some(table) if !table.copied => mark!("adopt.copied_table"),
            Some(_) => {}
        }
        let table = self.l2_table(guest).expect("ensured");
        let place = self.entry_place(table, guest);
        let slot = self.l2_page_to_change(place)?;
        if !self.quarantine.has_room(2) {
            self.round.wanted = true;
            return Err(Stop::Wait(Wait::Quarantine));
        }
        if let Reference::Cluster(old) = self.decoder.reference(found, guest) {
            self.check_overlap(old.at, 1)?;
        }
        mark!("adopt.installed");
        let all = self.geometry().all_units();
        self.replace_entry(guest, slot, place.index, (wanted, all));
        self.adoption.as_mut().expect("going on").changed = true;
        Ok(())
    }
}

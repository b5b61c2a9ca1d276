//! A disk in memory that remembers every write, and what a crash may leave of them.

use std::collections::BTreeSet;
use std::mem;

use qcow2::check::repair::{RepairIo, WriteError};
use qcow2::check::{Checker, Finding, FindingKind, ReadAt, ReadError};

use crate::damage::{Map, u64_at};
use crate::dice::Dice;

const SECTOR: usize = 512;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    Write(u64, Vec<u8>),
    Len(u64),
    Sync,
}

/// A file in memory.
pub(crate) struct Disk {
    pub(crate) now: Vec<u8>,
    pub(crate) events: Vec<Event>,
    /// So many events succeed; then all fail.
    pub(crate) good: usize,
    /// It cannot grow, as a block device.
    pub(crate) fixed: bool,
}

impl Disk {
    pub(crate) fn new(image: &[u8]) -> Self {
        Self { now: image.to_vec(), events: Vec::new(), good: usize::MAX, fixed: false }
    }
}

impl Disk {
    fn take(&mut self, event: Event) -> Result<(), WriteError> {
        if self.events.len() >= self.good {
            return Err(WriteError);
        }
        apply(&mut self.now, &event);
        self.events.push(event);
        Ok(())
    }
}

pub(crate) fn apply(image: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(at, bytes) => {
            let at = usize::try_from(*at).unwrap();
            if image.len() < at + bytes.len() {
                image.resize(at + bytes.len(), 0);
            }
            image[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Event::Len(len) => image.resize(usize::try_from(*len).unwrap(), 0),
        Event::Sync => {}
    }
}

impl ReadAt for Disk {
    fn len(&self) -> u64 {
        self.now.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.now.read_at(offset, buf)
    }
}

impl RepairIo for Disk {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.take(Event::Write(offset, bytes.to_vec()))
    }

    fn sync(&mut self) -> Result<(), WriteError> {
        self.take(Event::Sync)
    }

    fn set_len(&mut self, len: u64) -> Result<(), WriteError> {
        assert!(len >= self.len(), "a repair never cuts anything off");
        if self.fixed && len > self.len() {
            return Err(WriteError);
        }
        self.take(Event::Len(len))
    }
}

/// The events with every write cut into sectors.
pub(crate) fn sectors(events: &[Event]) -> Vec<Event> {
    let mut cut = Vec::new();
    for event in events {
        let Event::Write(at, bytes) = event else {
            cut.push(event.clone());
            continue;
        };
        for (nth, sector) in bytes.chunks(SECTOR).enumerate() {
            cut.push(Event::Write(at + (nth * SECTOR) as u64, sector.to_vec()));
        }
    }
    cut
}

/// Goes through what a crash during a repair may leave of `before`: each prefix of the writes, and
/// a few of the subsets of those that were not synced. Says what is worse than before.
pub(crate) fn crash_states(before: &[u8], disk: &Disk, dice: &mut Dice) -> Result<usize, String> {
    let rebuilds = disk.events.iter().any(|event| matches!(event, Event::Len(_)));
    let judge = Judge::new(before, rebuilds);
    let mut durable = before.to_vec();
    let mut pending: Vec<Event> = Vec::new();
    let mut states = 0;
    for event in sectors(&disk.events) {
        let sync = event == Event::Sync;
        if !sync {
            pending.push(event);
        }
        let mut full = durable.clone();
        pending.iter().for_each(|event| apply(&mut full, event));
        judge.of(&full).map_err(|wrong| format!("after {states} states: {wrong}"))?;
        states += 1;
        for _ in 0..if sync { 3 } else { 1 } {
            let mut some = durable.clone();
            let kept = pending.iter().filter(|_| dice.below(2) == 0);
            kept.for_each(|event| apply(&mut some, event));
            judge.of(&some).map_err(|wrong| format!("after {states} states, some: {wrong}"))?;
            states += 1;
        }
        if sync {
            durable = full;
            pending.clear();
        }
    }
    Ok(states)
}

/// A cluster with a fault, or an entry.
type Fault = (bool, u64);

/// What is wrong with an image: everything, and what of it can lose data.
fn faults(image: &[u8], cluster: usize, leaks: bool) -> (BTreeSet<Fault>, BTreeSet<Fault>) {
    let mut checker = Checker::with_findings(usize::MAX);
    let (mut all, mut harmful) = (BTreeSet::new(), BTreeSet::new());
    if checker.check(image).is_err() {
        // No refcount table at all: every cluster may be wrong.
        return (all, harmful);
    }
    for &Finding { kind, at, found, expected, .. } in checker.findings() {
        let fault = match kind {
            FindingKind::Leak if !leaks && expected == 0 => continue,
            FindingKind::Leak
            | FindingKind::RefcountTooLow
            | FindingKind::RefcountOverflow
            | FindingKind::Overlap => (true, at / cluster as u64),
            FindingKind::SharedRefcountBlock => {
                (true, u64_at(image, usize::try_from(at).unwrap()) / cluster as u64)
            }
            FindingKind::Copied | FindingKind::NotCopied => {
                (true, (found & 0x00ff_ffff_ffff_fe00) / cluster as u64)
            }
            _ => (false, at),
        };
        all.insert(fault);
        // Without COPIED a write goes elsewhere, whatever the refcount is.
        let harmless = matches!(kind, FindingKind::Leak | FindingKind::NotCopied)
            || kind == FindingKind::Copied && found >> 63 == 0;
        if !harmless {
            harmful.insert(fault);
        }
    }
    (all, harmful)
}

struct Judge {
    cluster: usize,
    clusters: u64,
    judged: bool,
    /// New refcounts are made. An old entry that led behind the end of the file may then lead to
    /// them, and show leaks there for a while.
    rebuilds: bool,
    all: BTreeSet<Fault>,
    harmful: BTreeSet<Fault>,
    guest: Vec<(u64, Vec<u8>)>,
}

impl Judge {
    fn new(before: &[u8], rebuilds: bool) -> Self {
        let cluster = Map::of(before).cluster;
        let (all, harmful) = faults(before, cluster, true);
        let judged = Checker::new().check(before).is_ok();
        let clusters = before.len().div_ceil(cluster) as u64;
        Self { cluster, clusters, judged, rebuilds, all, harmful, guest: guest(before) }
    }

    fn of(&self, state: &[u8]) -> Result<(), String> {
        if guest(state) != self.guest {
            return Err("the guest reads something else".to_string());
        }
        let (all, harmful) = faults(state, self.cluster, !self.rebuilds);
        let judged = Checker::new().check(state).is_ok();
        // Nothing of the image lies behind its old end.
        let here = |&&(is_cluster, place): &&Fault| {
            place < if is_cluster { self.clusters } else { self.clusters * self.cluster as u64 }
        };
        let new: Vec<_> = harmful.difference(&self.harmful).filter(here).collect();
        if self.judged && !(judged && new.is_empty()) {
            return Err(format!("harmful now: {new:?}"));
        }
        let new: Vec<_> = all.difference(&self.all).filter(here).collect();
        if self.judged && !new.is_empty() {
            return Err(format!("wrong now: {new:?}"));
        }
        Ok(())
    }
}

/// What the guest reads: the entries of the active tables without COPIED, and what they lead to.
pub(crate) fn guest(image: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let map = Map::of(image);
    let external = image.get(79).is_some_and(|features| features & 4 != 0);
    let extended = image.get(79).is_some_and(|features| features & 16 != 0);
    let mut read = Vec::new();
    for (&at, is_l2) in
        map.l1.iter().map(|at| (at, false)).chain(map.l2.iter().map(|at| (at, true)))
    {
        let word = u64_at(image, at) & !(1 << 63);
        if word == 0 {
            // As behind the end of the file.
            continue;
        }
        let bitmap = is_l2 && extended && at % 16 == 8;
        let mut data = Vec::new();
        let offset = word & 0x00ff_ffff_ffff_fe00;
        // The header changes, whoever takes it for data.
        if is_l2 && !external && !bitmap && word >> 62 == 0 && offset >= map.cluster as u64 {
            let start = usize::try_from(offset).unwrap().min(image.len());
            let end = start.saturating_add(map.cluster).min(image.len());
            data = image[start..end].to_vec();
            // What is behind the end of the file reads as zeros, too.
            let last = data.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            data.truncate(last);
        }
        read.push((word, mem::take(&mut data)));
    }
    read
}

//! One test per rule: a sequence of operations that breaks it, and the disk refuses.
//!
//! The image has clusters of 512 bytes: header 0, refcount table 1, L1 2, refcount block 3, an L2
//! table 4 whose entry 0 points to cluster 5, and free clusters up to 16.

use std::vec;
use std::vec::Vec;

use super::*;
use crate::op::OpId;
use crate::testing::pool::Pool;

const CLUSTERS: usize = 16;
const TABLE: u64 = 1;
const L1: u64 = 2;
const BLOCK: u64 = 3;
const L2: u64 = 4;
const DATA: u64 = 5;

type Words = [u64; WORDS];

/// Refcounts of 1 for these clusters.
fn counting(clusters: &[u64]) -> Words {
    let mut words = [0; WORDS];
    for &cluster in clusters {
        set_count(&mut words, cluster, 1);
    }
    words
}

fn set_count(words: &mut Words, cluster: u64, count: u64) {
    let shift = 48 - 16 * (cluster % 4);
    let word = &mut words[size(cluster / 4)];
    *word = *word & !(0xffff << shift) | count << shift;
}

fn with(words: &[(usize, u64)]) -> Words {
    let mut out = [0; WORDS];
    for &(at, word) in words {
        out[at] = word;
    }
    out
}

fn to(cluster: u64) -> u64 {
    cluster << 9
}

struct Bench {
    disk: Disk,
    next: u32,
}

impl Bench {
    /// An image that is open and has been synced once.
    fn new() -> Self {
        let mut bench = Self::opened();
        bench.sync();
        bench
    }

    fn opened() -> Self {
        let pool = Pool::shared();
        let sectors = {
            let mut known = pool.borrow_mut();
            let mut sectors = vec![SectorId::ZERO; CLUSTERS];
            let header = with(&[
                (0, 0x5146_49fb_0000_0003),
                (2, 9),
                (3, 64 << 10),
                (4, 2),
                (5, to(L1)),
                (6, to(TABLE)),
                (7, 1 << 32),
                (12, 4 << 32 | 104),
            ]);
            sectors[0] = known.intern_words(&header);
            sectors[size(TABLE)] = known.intern_words(&with(&[(0, to(BLOCK))]));
            sectors[size(L1)] = known.intern_words(&with(&[(0, to(L2) | COPIED)]));
            sectors[size(BLOCK)] = known.intern_words(&counting(&[0, 1, 2, 3, 4, 5]));
            sectors[size(L2)] = known.intern_words(&with(&[(0, to(DATA) | COPIED)]));
            sectors[size(DATA)] = known.intern_words(&with(&[(0, 77)]));
            sectors
        };
        let mut disk = Disk::of_sectors(sectors, (CLUSTERS * SECTOR) as u64, &pool);
        disk.watch();
        Self { disk, next: 0 }
    }

    fn submit(&mut self, kind: OpKind, payload: Vec<SectorId>, guest: Option<u64>) -> Verdict {
        self.submit_legal(kind, payload, guest, true)
    }

    fn submit_legal(
        &mut self,
        kind: OpKind,
        payload: Vec<SectorId>,
        guest: Option<u64>,
        legal: bool,
    ) -> Verdict {
        self.next += 1;
        let submitted = Submitted { kind, payload, guest };
        self.disk.submit(OpId(self.next), &submitted, &|_, _| legal)
    }

    fn complete(&mut self) {
        self.disk.complete(OpId(self.next), u64::MAX);
    }

    fn meta(&mut self, cluster: u64, words: &Words) -> Verdict {
        let id = self.disk.pool().borrow_mut().intern_words(words);
        self.submit(OpKind::MetaWrite { offset: to(cluster), len: 512 }, vec![id], None)
    }

    fn data(&mut self, cluster: u64, guest: u64) -> Verdict {
        let id = self.disk.pool().borrow_mut().intern_words(&with(&[(1, guest + 1)]));
        let kind = OpKind::Write { tag: 0, at: 0, offset: to(cluster), len: 512 };
        self.submit(kind, vec![id], Some(guest))
    }

    fn read(&mut self, cluster: u64, guest: u64) {
        let kind = OpKind::Read { tag: 0, at: 0, offset: to(cluster), len: 512 };
        self.submit(kind, Vec::new(), Some(guest)).expect("reads are never refused");
    }

    fn punch(&mut self, cluster: u64) -> Verdict {
        self.submit(OpKind::Punch { offset: to(cluster), len: 512 }, Vec::new(), None)
    }

    /// Writes metadata, which is right, and waits for it.
    fn written(&mut self, cluster: u64, words: &Words) {
        self.meta(cluster, words).expect("this is in order");
        self.complete();
    }

    fn sync(&mut self) {
        self.submit(OpKind::Sync, Vec::new(), None).expect("a sync is in order");
        self.disk.complete_sync(OpId(self.next));
    }

    /// Copies a table to where it is not known as one yet.
    fn copied(&mut self, cluster: u64, words: &Words) {
        let id = self.disk.pool().borrow_mut().intern_words(words);
        let kind = OpKind::CopyWrite { buffer: 0, offset: to(cluster), len: 512 };
        self.submit(kind, vec![id], None).expect("this is in order");
        self.complete();
    }

    fn counts(&mut self, clusters: &[u64]) {
        let all: Vec<u64> = [0, 1, 2, 3, 4].iter().chain(clusters).copied().collect();
        self.written(BLOCK, &counting(&all));
    }
}

#[track_caller]
fn refused(verdict: &Verdict, rule: &str) {
    let broken = verdict.as_ref().expect_err("the disk has to refuse this");
    assert!(broken.rule.contains(rule), "refused for another reason: {broken:?}");
}

#[test]
fn the_right_order_is_accepted() {
    let mut bench = Bench::new();
    bench.counts(&[5, 6, 7]);
    bench.sync();
    bench.data(6, 1).unwrap();
    bench.complete();
    bench.sync();
    bench.written(L2, &with(&[(0, to(DATA) | COPIED), (1, to(6) | COPIED)]));
    bench.written(7, &with(&[(0, 0)]));
    bench.written(L1, &with(&[(0, to(L2) | COPIED), (1, to(7) | COPIED)]));
    bench.sync();
    bench.written(L2, &with(&[(0, to(DATA) | COPIED)]));
    bench.sync();
    bench.counts(&[5, 7]);
    bench.sync();
    bench.punch(6).unwrap();
}

#[test]
fn a_write_before_the_first_sync() {
    let mut bench = Bench::opened();
    refused(&bench.data(DATA, 0), "a writable open begins with a sync");
}

#[test]
fn a_write_after_a_failure() {
    let mut bench = Bench::new();
    bench.disk.latch(false);
    refused(&bench.data(DATA, 0), "nothing but reads");
    bench.read(DATA, 0);
}

#[test]
fn anything_but_the_mark_after_a_corruption_was_found() {
    const RULE: &str = "an image found corrupt is marked so, once, and left alone";
    let found = || {
        let mut bench = Bench::new();
        bench.disk.latch(true);
        let header = *bench.disk.pool().borrow().words(bench.disk.durable[0]);
        (bench, header)
    };
    let (mut bench, mut header) = found();
    refused(&bench.data(DATA, 0), RULE);
    let (mut bench, _) = found();
    refused(&bench.meta(L2, &[0; WORDS]), RULE);
    let (mut bench, _) = found();
    refused(&bench.meta(0, &header), RULE);
    let (mut bench, _) = found();
    refused(&bench.submit(OpKind::Sync, Vec::new(), None), RULE);
    header[9] |= 2;
    let (mut bench, mut other) = found();
    other[9] |= 3;
    refused(&bench.meta(0, &other), RULE);
    let (mut bench, _) = found();
    bench.written(0, &header);
    bench.sync();
    refused(&bench.meta(0, &header), RULE);
    // After another failure not even that.
    let mut bench = Bench::new();
    bench.disk.latch(false);
    bench.disk.latch(true);
    refused(&bench.meta(0, &header), "nothing but reads");
}

#[test]
fn a_metadata_write_into_another_in_flight() {
    let mut bench = Bench::new();
    bench.meta(BLOCK, &counting(&[0, 1, 2, 3, 4, 5, 6])).unwrap();
    refused(&bench.meta(BLOCK, &counting(&[0, 1, 2, 3, 4, 5])), "never overlaps");
}

#[test]
fn a_guest_write_into_a_punch_in_flight() {
    let mut bench = Bench::new();
    bench.punch(6).unwrap();
    refused(&bench.data(6, 1), "never overlaps");
}

#[test]
fn guest_writes_may_overlap_each_other() {
    let mut bench = Bench::new();
    bench.data(DATA, 0).unwrap();
    bench.data(DATA, 0).unwrap();
}

#[test]
fn an_entry_before_its_refcount_is_durable() {
    let mut bench = Bench::new();
    bench.counts(&[5, 6]);
    let words = with(&[(0, to(DATA) | COPIED), (1, to(6) | COPIED)]);
    refused(&bench.meta(L2, &words), "durable refcount");
    bench.complete();
    bench.sync();
    bench.meta(L2, &words).unwrap();
}

#[test]
fn a_sync_covers_only_what_had_completed() {
    let mut bench = Bench::new();
    let all = counting(&[0, 1, 2, 3, 4, 5, 6]);
    bench.meta(BLOCK, &all).unwrap();
    let write = OpId(bench.next);
    bench.submit(OpKind::Sync, Vec::new(), None).unwrap();
    bench.disk.complete(write, u64::MAX);
    bench.disk.complete_sync(OpId(bench.next));
    let words = with(&[(0, to(DATA) | COPIED), (1, to(6) | COPIED)]);
    refused(&bench.meta(L2, &words), "durable refcount");
}

#[test]
fn an_entry_whose_copied_flag_is_wrong() {
    let mut bench = Bench::new();
    bench.counts(&[5, 6]);
    bench.sync();
    let words = with(&[(0, to(DATA) | COPIED), (1, to(6))]);
    refused(&bench.meta(L2, &words), "COPIED is set exactly");
}

#[test]
fn an_entry_behind_the_end_of_the_file() {
    let mut bench = Bench::new();
    let end = CLUSTERS as u64;
    bench.counts(&[5, end]);
    bench.sync();
    let (from, to_byte) = (to(end), to(end + 1));
    bench.submit(OpKind::Extend { from, to: to_byte }, Vec::new(), None).unwrap();
    bench.complete();
    let words = with(&[(0, to(DATA) | COPIED), (1, to(end) | COPIED)]);
    refused(&bench.meta(L2, &words), "inside the durable file");
}

#[test]
fn an_entry_before_its_data() {
    let mut bench = Bench::new();
    bench.counts(&[5, 6]);
    bench.sync();
    let words = with(&[(0, to(DATA) | COPIED), (1, to(6) | COPIED)]);
    let id = bench.disk.pool().borrow_mut().intern_words(&words);
    let kind = OpKind::MetaWrite { offset: to(L2), len: 512 };
    refused(&bench.submit_legal(kind, vec![id], None, false), "points to bytes that are durable");
}

#[test]
fn a_table_with_entries_that_are_not_in_order_is_not_linked() {
    let mut bench = Bench::new();
    bench.counts(&[5, 7]);
    bench.sync();
    bench.written(7, &with(&[(0, to(6) | COPIED)]));
    let words = with(&[(0, to(L2) | COPIED), (1, to(7) | COPIED)]);
    refused(&bench.meta(L1, &words), "durable refcount");
}

#[test]
fn a_copy_of_a_table_before_it_is_durable() {
    let mut bench = Bench::new();
    bench.counts(&[5, 7]);
    bench.sync();
    bench.copied(7, &with(&[(0, to(DATA) | COPIED)]));
    let words = with(&[(0, to(7) | COPIED)]);
    refused(&bench.meta(L1, &words), "a copy of an L2 table is durable");
}

#[test]
fn a_refcount_block_before_it_is_durable() {
    let mut bench = Bench::new();
    bench.written(8, &counting(&[1]));
    let words = with(&[(0, to(BLOCK)), (1, to(8))]);
    refused(&bench.meta(TABLE, &words), "complete and durable before it is linked");
    bench.complete();
    bench.sync();
    let mut bench = Bench::new();
    bench.written(8, &counting(&[1]));
    bench.sync();
    bench.meta(TABLE, &words).unwrap();
}

#[test]
fn a_refcount_block_that_moves() {
    let mut bench = Bench::new();
    let words = with(&[(0, to(8))]);
    refused(&bench.meta(TABLE, &words), "stays where it is");
}

#[test]
fn a_decrement_before_the_unlinking_is_durable() {
    let mut bench = Bench::new();
    bench.written(L2, &[0; WORDS]);
    refused(&bench.meta(BLOCK, &counting(&[0, 1, 2, 3, 4])), "an unlinking is durable");
}

#[test]
fn a_refcount_raised_under_copied() {
    let mut bench = Bench::new();
    let mut words = counting(&[0, 1, 2, 3, 4, 5]);
    set_count(&mut words, DATA, 2);
    refused(&bench.meta(BLOCK, &words), "raised under a COPIED entry");
}

#[test]
fn a_header_before_its_refcount_table() {
    let mut bench = Bench::new();
    bench.counts(&[5, 9]);
    bench.sync();
    bench.written(9, &with(&[(0, to(BLOCK))]));
    let header = *bench.disk.pool().borrow().words(bench.disk.durable[0]);
    let mut words = header;
    words[6] = to(9);
    refused(&bench.meta(0, &words), "durable before the header names it");
    bench.complete();
    let mut bench = Bench::new();
    bench.counts(&[5, 9]);
    bench.written(9, &with(&[(0, to(BLOCK))]));
    bench.sync();
    bench.meta(0, &words).unwrap();
}

#[test]
fn a_new_refcount_table_without_the_old_entries() {
    let mut bench = Bench::new();
    bench.counts(&[5, 9]);
    bench.sync();
    let mut words = *bench.disk.pool().borrow().words(bench.disk.durable[0]);
    words[6] = to(9);
    refused(&bench.meta(0, &words), "keeps its entries");
}

#[test]
fn another_field_of_the_header() {
    let mut bench = Bench::new();
    let mut words = *bench.disk.pool().borrow().words(bench.disk.durable[0]);
    words[3] += 512;
    refused(&bench.meta(0, &words), "only the refcount table's fields");
}

#[test]
fn guest_data_over_metadata() {
    for cluster in [0, TABLE, L1, BLOCK, L2] {
        let mut bench = Bench::new();
        refused(&bench.data(cluster, 1), "never written where metadata lies");
    }
}

#[test]
fn a_cluster_reused_before_the_unlinking_is_durable() {
    let mut bench = Bench::new();
    bench.written(L2, &[0; WORDS]);
    refused(&bench.data(DATA, 1), "not written for another guest cluster");
}

#[test]
fn a_cluster_reused_under_a_read() {
    let mut bench = Bench::new();
    bench.read(DATA, 0);
    bench.written(L2, &[0; WORDS]);
    bench.sync();
    refused(&bench.data(DATA, 1), "not reused while an operation on the old mapping runs");
}

#[test]
fn a_punch_before_the_unlinking_is_durable() {
    let mut bench = Bench::new();
    bench.written(L2, &[0; WORDS]);
    refused(&bench.punch(DATA), "an unlinking is durable before the cluster is punched");
}

#[test]
fn a_punch_before_the_decrement_is_durable() {
    let mut bench = Bench::new();
    bench.written(L2, &[0; WORDS]);
    bench.sync();
    bench.counts(&[]);
    refused(&bench.punch(DATA), "a decrement is durable before the cluster is punched");
}

#[test]
fn a_punch_under_a_read() {
    let mut bench = Bench::new();
    bench.read(DATA, 0);
    bench.written(L2, &[0; WORDS]);
    bench.sync();
    bench.counts(&[]);
    bench.sync();
    refused(&bench.punch(DATA), "not punched while an operation on the old mapping runs");
}

#[test]
fn a_truncation_below_what_is_referenced() {
    let mut bench = Bench::new();
    bench.written(L2, &[0; WORDS]);
    let kind = OpKind::Truncate { to: to(DATA) };
    refused(&bench.submit(kind, Vec::new(), None), "nothing that may be referenced is cut off");
}

/// The same image with a snapshot that shares the L2 table and cluster 5: their refcounts are 2,
/// COPIED is clear. The table of snapshots is cluster 6, the L1 table of the only one cluster 7.
fn with_snapshot() -> Bench {
    let mut bench = Bench::opened();
    let pool = Rc::clone(bench.disk.pool());
    let mut header = *pool.borrow().words(bench.disk.durable[0]);
    header[7] |= 1;
    header[8] = to(6);
    let mut counts = counting(&[0, 1, 2, 3, 6, 7]);
    set_count(&mut counts, L2, 2);
    set_count(&mut counts, DATA, 2);
    for (cluster, words) in [
        (0, header),
        (L1, with(&[(0, to(L2))])),
        (BLOCK, counts),
        (L2, with(&[(0, to(DATA))])),
        (6, with(&[(0, to(7)), (1, 2 << 32 | 1 << 16 | 4), (4, 16)])),
        (7, with(&[(0, to(L2) | COPIED)])),
    ] {
        bench.disk.durable[size(cluster)] = pool.borrow_mut().intern_words(&words);
    }
    bench.disk.watch();
    bench.sync();
    bench
}

#[test]
fn a_write_into_what_a_snapshot_has() {
    for cluster in [L2, DATA, 6, 7] {
        let mut bench = with_snapshot();
        refused(&bench.data(cluster, 0), "a snapshot refers to never changes");
        bench.complete();
        refused(&bench.punch(cluster), "a snapshot refers to never changes");
    }
    let kind = OpKind::Truncate { to: to(7) };
    let verdict = with_snapshot().submit(kind, Vec::new(), None);
    refused(&verdict, "a snapshot refers to never changes");
}

#[test]
fn a_decrement_while_snapshot_and_disk_share_a_cluster() {
    let mut bench = with_snapshot();
    let mut words = *bench.disk.pool().borrow().words(bench.disk.durable[size(BLOCK)]);
    set_count(&mut words, L2, 1);
    refused(&bench.meta(BLOCK, &words), "an unlinking is durable");
    let mut bench = with_snapshot();
    set_count(&mut words, L2, 2);
    set_count(&mut words, DATA, 1);
    refused(&bench.meta(BLOCK, &words), "an unlinking is durable");
}

#[test]
fn the_right_order_of_copying_a_shared_table_is_accepted() {
    let mut bench = with_snapshot();
    let mut words = *bench.disk.pool().borrow().words(bench.disk.durable[size(BLOCK)]);
    set_count(&mut words, 8, 1);
    bench.written(BLOCK, &words);
    bench.sync();
    bench.copied(8, &with(&[(0, to(DATA))]));
    bench.sync();
    bench.written(L1, &with(&[(0, to(8) | COPIED)]));
    bench.sync();
    set_count(&mut words, L2, 1);
    bench.written(BLOCK, &words);
}

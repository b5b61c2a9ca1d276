//! What a FLUSH costs, and that it ends: counted in fdatasyncs on the simulated disk.

#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::path::Path;
use std::process::Command;

use qcow2::testing::image::{DataFile, ImageSpec};
use qcow2::testing::{Disk, Pool, Prng, World};
use qcow2::{Discards, OpKind, Options, Request};

const CLUSTER: u32 = 4096;

/// An empty image of 4 KiB clusters, opened over `backing` bytes.
fn open(name: &str, backing: usize) -> World {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rounds-{name}.qcow2"));
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"];
    let done = Command::new("qemu-img").args(create).arg(&path).arg("4M").status();
    assert!(done.expect("qemu-img must be installed").success());
    let disk = Disk::new(std::fs::read(&path).unwrap());
    let backing = (backing != 0).then(|| vec![7; backing]);
    let options = Options { depth: 64, reservation: 64 << 12, ..Options::default() };
    let mut world = World::open_over(disk, backing, &options).unwrap();
    world.settle();
    world
}

fn write(world: &mut World, tag: u16, cluster: u64) {
    let offset = cluster * u64::from(CLUSTER) + 512;
    world.submit(tag, Request::Write { offset, len: 512, fua: false }, vec![1; 512]);
}

/// The reply to `tag`, if it is there.
fn take(world: &mut World, tag: u16) -> bool {
    let before = world.replies.len();
    world.replies.retain(|reply| {
        assert_eq!(reply.result, Ok(()));
        reply.tag != tag
    });
    world.replies.len() != before
}

/// One write, one FLUSH, `times` times over; returns the fdatasyncs per FLUSH.
fn cost(world: &mut World, clusters: impl Iterator<Item = u64>) -> f64 {
    let (before, mut flushes) = (world.engine.stats().syncs, 0);
    for cluster in clusters {
        write(world, 0, cluster);
        world.settle();
        world.submit(1, Request::Flush, Vec::new());
        world.settle();
        assert!(take(world, 0) && take(world, 1));
        flushes += 1;
    }
    (world.engine.stats().syncs - before) as f64 / f64::from(flushes)
}

#[test]
fn a_flush_costs_one_sync_or_two_and_no_more() {
    let mut world = open("cost", 0);
    let new = cost(&mut world, 0..500);
    assert!((1.0..=1.10).contains(&new), "{new} for new clusters in zeroed space");
    let in_place = cost(&mut world, 0..100);
    assert!((in_place - 1.0).abs() < f64::EPSILON, "{in_place} in place");
    let mut world = open("cost-overlay", 4 << 20);
    let copied = cost(&mut world, 0..500);
    assert!((1.9..=2.1).contains(&copied), "{copied} for copy-on-write");
}

#[test]
fn a_flush_under_endless_copy_on_write_into_one_page_ends_after_two_syncs() {
    let mut world = open("endless", 4 << 20);
    // One page holds 512 entries: all of these clusters.
    for cluster in 0..8 {
        write(&mut world, u16::try_from(cluster).unwrap(), cluster);
    }
    world.settle();
    world.replies.clear();
    let mut next = 8;
    let mut busy = [false; 8];
    world.submit(60, Request::Flush, Vec::new());
    let before = world.engine.stats().syncs;
    for turn in 0..4000 {
        // Writers never stop: as soon as one has its answer, it writes to the next cluster.
        for tag in 0..8 {
            if take(&mut world, tag) {
                busy[usize::from(tag)] = false;
            }
            if !busy[usize::from(tag)] && next < 500 {
                write(&mut world, tag, next);
                busy[usize::from(tag)] = true;
                next += 1;
            }
        }
        if take(&mut world, 60) {
            let syncs = world.engine.stats().syncs - before;
            // The first may have been counted before: it was issued when the FLUSH came.
            assert!(syncs <= 2, "{syncs} fdatasyncs");
            assert!(next < 500, "the writers were still writing");
            return;
        }
        // The newest first: a sync is as slow as it can be, and much completes while it runs.
        let sync = |kind| matches!(kind, OpKind::Sync);
        let others = world.in_flight.iter().rposition(|op| !sync(op.kind));
        let index = match others {
            Some(index) if turn % 40 != 39 => index,
            _ => world.in_flight.iter().position(|op| sync(op.kind)).unwrap_or(0),
        };
        world.complete(index);
    }
    panic!("the FLUSH did not end");
}

#[test]
fn without_any_flush_mappings_are_durable_within_ten_seconds() {
    for backing in [0, 4 << 20] {
        let mut world = open(&format!("tick-{backing}"), backing);
        world.engine.tick(1000);
        write(&mut world, 0, 3);
        world.settle();
        assert!(take(&mut world, 0));
        // The server ticks twice a second.
        for now in (1500..=11_000).step_by(500) {
            world.engine.tick(now);
            world.pump(None);
            world.settle();
        }
        assert_eq!(world.engine.stats().overlay, 0, "nothing waits for its data any more");
        for seed in 0..40 {
            let cut = world.disk.power_cut(&mut Prng::new(seed));
            let beneath = (backing != 0).then(|| vec![7; backing]);
            let opened = World::open_over(Disk::new(cut), beneath, &Options::default());
            let mut after = opened.unwrap();
            after.settle();
            let offset = 3 * u64::from(CLUSTER) + 512;
            after.submit(0, Request::Read { offset, len: 512 }, vec![0xaa; 512]);
            after.settle();
            assert_eq!(after.buffers[0], [1; 512]);
        }
    }
}

/// Every cluster of the image, in an order that leaves no two neighbours together on the disk.
fn write_all_scattered(world: &mut World, clusters: u64) {
    for step in 0..clusters {
        // 37 has no factor with a power of two: each cluster comes once.
        let offset = (step * 37 % clusters) * 512;
        world.submit(0, Request::Write { offset, len: 512, fua: false }, vec![1; 512]);
        world.settle();
        assert!(take(world, 0));
    }
    world.submit(0, Request::Flush, Vec::new());
    world.settle();
    assert!(take(world, 0));
}

/// An empty image of 512-byte clusters.
fn open_tiny(name: &str, size: &str) -> World {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rounds-{name}.qcow2"));
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    let done = Command::new("qemu-img").args(create).arg(&path).arg(size).status();
    assert!(done.expect("qemu-img must be installed").success());
    let disk = Disk::new(std::fs::read(&path).unwrap());
    let options = Options { depth: 4, reservation: 16 << 10, ..Options::default() };
    let mut world = World::open(disk, &options).unwrap();
    world.settle();
    world
}

#[test]
fn a_discard_of_more_runs_than_quarantine_holds_does_not_wait_for_the_clock() {
    let mut world = open_tiny("scattered", "2M");
    write_all_scattered(&mut world, 4096);
    world.submit(0, Request::Discard { offset: 0, len: 2 << 20 }, Vec::new());
    world.settle();
    assert!(take(&mut world, 0), "it waits: {}", world.engine.waits());
}

#[test]
fn a_write_on_a_full_host_waits_for_what_was_discarded_before() {
    let mut world = open_tiny("full", "1M");
    write_all_scattered(&mut world, 1024);
    world.full = true;
    // The rest of the reservation goes first.
    let mut next = 1024;
    loop {
        let offset = next * 512;
        world.submit(1, Request::Write { offset, len: 512, fua: false }, vec![2; 512]);
        world.settle();
        next += 1;
        let reply = world.replies.pop().unwrap();
        if reply.result == Err(qcow2::IoErrorKind::NoSpace) {
            break;
        }
        assert_eq!(reply.result, Ok(()));
    }
    world.submit(0, Request::Discard { offset: 0, len: 64 << 10 }, Vec::new());
    world.settle();
    assert!(take(&mut world, 0));
    let offset = next * 512;
    world.submit(1, Request::Write { offset, len: 512, fua: false }, vec![2; 512]);
    world.settle();
    assert!(take(&mut world, 1), "there is room: {}", world.engine.waits());
}

/// The pages of many reads come in one turn, and there is room for few: each serves who waits for
/// it before it goes again.
#[test]
fn pages_that_come_together_are_each_of_use() {
    const READERS: u16 = 128;
    const TURN: usize = 8;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rounds-pages.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,preallocation=metadata"];
    let done = Command::new("qemu-img").args(create).arg(&path).arg("8M").status();
    assert!(done.expect("qemu-img must be installed").success());
    let disk = Disk::new(std::fs::read(&path).unwrap());
    let options = Options { depth: READERS, l2_cache: Some(16 * 512), ..Options::default() };
    let mut world = World::open(disk, &options).unwrap();
    world.settle();
    let (mut prng, mut replies) = (Prng::new(3), 0);
    let mut read = |world: &mut World, tag| {
        let request = Request::Read { offset: prng.below(16384) * 512, len: 512 };
        world.submit(tag, request, vec![0; 512]);
    };
    for tag in 0..READERS {
        read(&mut world, tag);
    }
    while replies < 4000 {
        world.gathers = true;
        for _ in 0..TURN.min(world.in_flight.len()) {
            world.complete(0);
        }
        world.gathers = false;
        world.go_on(None);
        for reply in std::mem::take(&mut world.replies) {
            replies += 1;
            read(&mut world, reply.tag);
        }
    }
    let reads = world.engine.stats().metadata_reads;
    // 16 of 256 pages are there: nearly every read of the guest needs one.
    assert!(reads < replies * 11 / 10 + 200, "{reads} reads of pages for {replies} requests");
}

/// An image of 4 KiB clusters, all of them data in a file of its own.
fn open_data_file(kind: DataFile, discards: Discards) -> World {
    let (spec, pool) = (ImageSpec::plain(12, 64 << 10), Pool::shared());
    let made = ImageSpec { every: 1, data_file: Some(kind), ..spec }.make(&mut pool.borrow_mut());
    let mut disk = Disk::sharing(&made.bytes, &pool);
    disk.watch();
    let data = made.data.map(|bytes| Disk::sharing(&bytes, &pool));
    let options = Options { discards, ..Options::default() };
    let mut world = World::open_on(disk, Vec::new(), data, &options).unwrap();
    world.settle();
    world.handed = Some(Vec::new());
    world
}

fn zeroed(world: &mut World, request: Request) -> Vec<OpKind> {
    world.submit(0, request, Vec::new());
    world.settle();
    assert!(take(world, 0));
    let (offset, len) = (8 * u64::from(CLUSTER), 2 * CLUSTER);
    world.submit(1, Request::Read { offset, len }, vec![0xaa; len as usize]);
    world.settle();
    assert!(take(world, 1));
    assert!(world.buffers[1].iter().all(|&byte| byte == 0), "{request:?}");
    let handed = world.handed.replace(Vec::new()).unwrap();
    let fills = |kind: &OpKind| matches!(kind, OpKind::Fill { .. } | OpKind::Read { .. });
    handed.into_iter().filter(|kind| !fills(kind)).collect()
}

#[test]
fn a_flush_after_a_discard_syncs_the_data_file() {
    let (offset, len) = (8 * u64::from(CLUSTER), 2 * CLUSTER);
    let discard = Request::Discard { offset, len };
    let zeroes = Request::WriteZeroes { offset, len, unmap: true };
    for kind in [DataFile::Raw, DataFile::Own(64 << 10)] {
        for (discards, request) in [
            (Discards::Unmap, discard),
            (Discards::Unmap, zeroes),
            (Discards::Keep, discard),
            (Discards::Keep, zeroes),
        ] {
            let mut world = open_data_file(kind, discards);
            let handed = zeroed(&mut world, request);
            let what = format!("{kind:?} {discards:?} {request:?} {handed:?}");
            let by_flag = kind != DataFile::Raw && (discards, request) == (Discards::Keep, discard);
            let changes = |world: &World| world.data.as_ref().unwrap().changes().len();
            assert_eq!(changes(&world) == 0, by_flag, "{what}");
            let syncs = world.engine.stats().syncs;
            world.submit(0, Request::Flush, Vec::new());
            world.settle();
            assert!(take(&mut world, 0));
            assert!(world.engine.stats().syncs > syncs, "{what}");
            assert_eq!(changes(&world), 0, "not all of it is durable: {what}");
            assert_eq!(world.broken, None);
        }
    }
}

#[test]
fn a_discard_that_keeps_the_space_leaves_a_data_file_allocated() {
    let (offset, len) = (8 * u64::from(CLUSTER), 2 * CLUSTER);
    let punches = |kind: &OpKind| matches!(kind, OpKind::Punch { .. });
    for kind in [DataFile::Raw, DataFile::Own(64 << 10)] {
        let mut world = open_data_file(kind, Discards::Keep);
        let before = world.data.as_ref().unwrap().bytes();
        let handed = zeroed(&mut world, Request::Discard { offset, len });
        assert!(!handed.iter().any(punches), "{kind:?}: {handed:?}");
        let after = world.data.as_ref().unwrap().bytes();
        let range = 8 << 12..10 << 12;
        if kind == DataFile::Raw {
            assert!(after[range].iter().all(|&byte| byte == 0), "raw, it reads otherwise");
        } else {
            assert!(after == before, "a zero cluster needs no change of the data");
            // It keeps its place, and says so in its entry.
            let disk = world.close().0.bytes();
            let at = |place: usize| u64::from_be_bytes(disk[place..place + 8].try_into().unwrap());
            let place = |place: usize| usize::try_from(at(place) & !(1 << 63)).unwrap();
            assert_eq!(at(place(place(40)) + 8 * 8), 1 << 63 | 8 << 12 | 1);
            continue;
        }
        // The same goes for the guest: what is written there is found again.
        write(&mut world, 2, 8);
        world.settle();
        assert!(take(&mut world, 2));
        assert_eq!(world.data.as_ref().unwrap().bytes()[8 << 12..][512], 1);
    }
    let mut world = open_data_file(DataFile::Raw, Discards::Unmap);
    let handed = zeroed(&mut world, Request::Discard { offset, len });
    assert_eq!(handed.iter().filter(|kind| punches(kind)).count(), 2, "{handed:?}");
}

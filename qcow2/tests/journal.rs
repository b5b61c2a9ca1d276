//! Recovery from a journal: what is refused, what is kept when it fails, and what it costs. That
//! what a killed process acknowledged is found again is the explorer's to show.

#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test may end so")]

use qcow2::testing::image::ImageSpec;
use qcow2::testing::kept::Kept;
use qcow2::testing::{Disk, Pool, Prng, World};
use qcow2::{
    Engine, FailureKind, GuestCluster, Health, IoErrorKind, JournalEvent, OpKind, Options, Outcome,
    Record, Request,
};

const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;
const JOURNAL: u32 = 64;

fn options() -> Options {
    Options { journal: JOURNAL, depth: 16, reservation: 16 << 12, ..Options::default() }
}

/// An image of 64 guest clusters, of which every other one is data.
fn image(spec: ImageSpec) -> Disk {
    let pool = Pool::shared();
    let made = spec.make(&mut pool.borrow_mut());
    Disk::sharing(&made.bytes, &pool)
}

fn half() -> ImageSpec {
    ImageSpec { every: 2, ..ImageSpec::plain(12, 64 * CLUSTER) }
}

fn record(guest: u64, word: u64) -> Record {
    Record { guest: GuestCluster(guest), word, bitmap: 0 }
}

fn write(world: &mut World, tag: u16, cluster: u64, byte: u8) {
    let (offset, len) = (cluster * CLUSTER, 4096);
    world.submit(tag, Request::Write { offset, len, fua: false }, vec![byte; 4096]);
}

fn read(world: &mut World, cluster: u64) -> Vec<u8> {
    let (offset, len) = (cluster * CLUSTER, 4096);
    world.submit(15, Request::Read { offset, len }, vec![0xee; 4096]);
    world.settle();
    assert!(world.replies.drain(..).all(|reply| reply.result.is_ok()));
    world.buffers[15].clone()
}

/// A world in which clusters `clusters` were written with their numbers and nothing was flushed,
/// when the process was killed.
fn killed(disk: Disk, options: &Options, clusters: &[u64]) -> (Disk, Kept) {
    let mut world = World::open(disk, options).unwrap();
    world.settle();
    for (tag, &cluster) in (0..).zip(clusters) {
        write(&mut world, tag, cluster, u8::try_from(cluster).unwrap());
    }
    while world.replies.len() < clusters.len() {
        world.complete(0);
    }
    let mut disk = world.disk;
    // What is in flight never gets there.
    world.in_flight.iter().for_each(|op| disk.cancel(op.id));
    disk.death(&mut Prng::new(1));
    (disk, world.kept.unwrap())
}

fn recover(disk: Disk, options: &Options, kept: Kept) -> Result<World, String> {
    World::recover(disk, Vec::new(), None, options, kept)
}

/// Where a guest cluster lies that is data.
fn place_of(disk: Disk, cluster: u64) -> u64 {
    let mut world = World::open(disk, &Options::default()).unwrap();
    world.settle();
    let offset = cluster * CLUSTER;
    world.submit(0, Request::Read { offset, len: 512 }, vec![0; 512]);
    loop {
        if let OpKind::Read { offset, .. } = world.in_flight[0].kind {
            return offset;
        }
        world.complete(0);
    }
}

#[test]
fn records_that_the_image_cannot_have_are_refused() {
    let disk = image(half());
    let len = disk.len();
    let refused = |records: &[Record], why: &str| {
        let told = recover(disk.clone(), &options(), Kept::with(records)).unwrap_err();
        assert!(told.contains("does not belong to this image"), "{told}");
        assert!(told.contains(why), "{told}");
    };
    refused(&[record(64, 0)], "the virtual disk ends");
    refused(&[record(u64::MAX, 0)], "the virtual disk ends");
    refused(&[record(1, COPIED | 512)], "not a multiple");
    refused(&[record(1, COPIED | len)], "outside the file");
    refused(&[record(1, 2)], "reserved");
    refused(&[record(1, 1 << 62 | 5 << 12)], "compressed");
    // Clusters 1 and 2 are the refcount table and the L1 table.
    refused(&[record(1, COPIED | CLUSTER)], "metadata");
    refused(&[record(1, COPIED | (2 * CLUSTER))], "metadata");
    refused(&[Record { bitmap: 1, ..record(1, 0) }], "no subclusters");
    let place = COPIED | place_of(disk.clone(), 0);
    refused(&[record(1, place), record(3, place)], "the same place");
    // Of one guest cluster the last counts.
    let world = recover(disk.clone(), &options(), Kept::with(&[record(1, 2), record(1, 0)]));
    world.unwrap();
    let none = Options { journal: 0, ..options() };
    let told = recover(disk.clone(), &none, Kept::with(&[])).unwrap_err();
    assert!(told.contains("size of the journal"), "{told}");
}

/// Handles operations, and lets those fail that `fails` says, until nothing is in flight.
fn drive(world: &mut World, mut fails: impl FnMut(OpKind) -> Option<IoErrorKind>) {
    world.pump(None);
    let mut left = 1000;
    while let Some(op) = world.in_flight.first() {
        left -= 1;
        assert!(left != 0, "operations follow each other without end: {op:?}");
        match fails(op.kind) {
            Some(kind) => world.fail(0, kind, 0),
            None => world.complete(0),
        }
    }
}

#[test]
fn a_cluster_that_is_not_counted_is_found_before_anything_is_written() {
    let mut bytes = image(half()).bytes();
    let len = bytes.len() as u64;
    bytes.resize(bytes.len() + 4096, 0);
    for word in [COPIED | len, len] {
        let disk = Disk::new(&bytes);
        let mut world = recover(disk, &options(), Kept::with(&[record(1, word)])).unwrap();
        drive(&mut world, |kind| {
            assert!(matches!(kind, OpKind::MetaRead { .. }), "{kind:?}");
            None
        });
        let Health::Failed(failure) = world.engine.health() else { panic!("it is served") };
        assert_eq!((failure.kind, failure.offset), (FailureKind::Journal, CLUSTER));
        assert!(!world.engine.is_ready());
        assert_eq!(world.kept.unwrap().found().unwrap().1.len(), 1, "the journal is kept");
    }
}

#[test]
fn what_is_written_is_found_after_a_kill_and_the_journal_is_empty_then() {
    let (disk, kept) = killed(image(half()), &options(), &[1, 3, 5, 41]);
    let mut world = recover(disk, &options(), kept).unwrap();
    world.settle();
    assert!(world.engine.is_ready());
    for cluster in [1, 3, 5, 41] {
        assert_eq!(read(&mut world, cluster), [u8::try_from(cluster).unwrap(); 4096]);
    }
    assert_eq!(world.kept.as_ref().unwrap().clone().found().unwrap().1, []);
    let (disk, health) = world.close();
    assert_eq!(health, Health::Good);
    let mut world = World::open(disk, &Options::default()).unwrap();
    world.settle();
    assert_eq!(read(&mut world, 3), [3; 4096]);
}

/// Lets one kind of operation fail during recovery; then recovers once more, on a good disk.
fn fails_once(
    spec: ImageSpec,
    which: fn(OpKind) -> bool,
    kind: IoErrorKind,
    expected: FailureKind,
) {
    let (disk, kept) = killed(image(spec), &options(), &[1, 3, 41]);
    let mut world = recover(disk, &options(), kept).unwrap();
    world.full = kind == IoErrorKind::NoSpace;
    drive(&mut world, |op| which(op).then_some(kind));
    let Health::Failed(failure) = world.engine.health() else { panic!("it is served") };
    assert_eq!(failure.kind, expected);
    assert!(!world.engine.is_ready());
    world.engine.close();
    world.settle();
    assert!(world.engine.is_closed());
    let (mut disk, kept) = (world.disk, world.kept.unwrap());
    assert_eq!(kept.clone().found().unwrap().1.len(), 3, "the journal is kept");
    disk.death(&mut Prng::new(1));
    let mut world = recover(disk, &options(), kept).unwrap();
    world.settle();
    for cluster in [1, 3, 41] {
        assert_eq!(read(&mut world, cluster), [u8::try_from(cluster).unwrap(); 4096]);
    }
}

#[test]
fn a_recovery_that_fails_keeps_the_journal() {
    let (eio, full) = (IoErrorKind::Io, IoErrorKind::NoSpace);
    let reads = |op: OpKind| matches!(op, OpKind::MetaRead { .. });
    let writes = |op: OpKind| matches!(op, OpKind::MetaWrite { .. });
    let syncs = |op: OpKind| matches!(op, OpKind::Sync);
    fails_once(half(), reads, eio, FailureKind::Adoption(eio));
    fails_once(half(), writes, eio, FailureKind::MetadataWrite);
    fails_once(half(), syncs, eio, FailureKind::Sync);
    // An L2 table is needed, and there is no room for one.
    let empty = ImageSpec { every: 0, ..half() };
    let room = |op: OpKind| {
        matches!(op, OpKind::Extend { .. } | OpKind::ZeroRange { .. } | OpKind::WriteZeros { .. })
    };
    fails_once(empty, room, full, FailureKind::Adoption(full));
}

#[test]
fn no_operation_and_no_answer_overtakes_a_record() {
    let disk = image(half());
    let mut world = World::open(disk, &options()).unwrap();
    world.settle();
    write(&mut world, 0, 1, 7);
    let engine: &mut Engine = &mut world.engine;
    let mut said = Vec::new();
    // The payload completes, and the driver does not look at its journal.
    while let Some(op) = world.in_flight.pop() {
        engine.complete(op.id, Outcome::Done);
        while engine.clone().next_record().is_some() {
            assert!(engine.next_op(0).is_none() && engine.next_reply(0).is_none());
            said.extend(engine.next_record());
        }
        while let Some(op) = engine.next_op(0) {
            world.in_flight.push(op);
        }
    }
    assert!(engine.next_reply(0).is_some());
    let records = said.iter().filter(|event| matches!(event, JournalEvent::Record(_)));
    assert_eq!(records.count(), 1, "{said:?}");
}

#[test]
fn a_journal_of_one_record_is_enough_and_costs_rounds_only() {
    let small = Options { journal: 1, ..options() };
    let mut world = World::open(image(half()), &small).unwrap();
    world.settle();
    for tag in 0..12 {
        write(&mut world, tag, u64::from(tag) * 2 + 1, 9);
    }
    world.settle();
    assert_eq!(world.replies.len(), 12);
    assert!(world.replies.iter().all(|reply| reply.result.is_ok()));
}

#[test]
fn with_a_journal_a_flush_costs_what_it_costs_without() {
    let cost = |journal| {
        let options = Options { journal, ..options() };
        let mut world = World::open(image(half()), &options).unwrap();
        world.settle();
        for cluster in [1, 3, 2, 3, 9] {
            write(&mut world, 0, cluster, 1);
            world.settle();
            world.submit(1, Request::Flush, Vec::new());
            world.settle();
        }
        (world.engine.stats().syncs, world.engine.stats().metadata_writes)
    };
    assert_eq!(cost(0), cost(JOURNAL));
}

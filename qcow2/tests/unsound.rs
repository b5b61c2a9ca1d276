//! Images that contradict themselves, and how the engine ends: without writing where it must not,
//! with a mark in the header, and with reads that go on.

#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::path::Path;
use std::process::Command;

use qcow2::testing::image::ImageSpec;
use qcow2::testing::{Disk, Pool, World};
use qcow2::{FailureKind, Health, IoErrorKind, OpKind, Options, Request};

const BITS: u32 = 12;
const CLUSTER: u64 = 1 << BITS;
const CLUSTERS: u64 = 64;
/// The last byte of incompatible_features, and what "corrupt" is there.
const FEATURES: usize = 79;
const CORRUPT: u8 = 2;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn at(place: u64) -> usize {
    usize::try_from(place).unwrap()
}

fn word(image: &[u8], place: u64) -> u64 {
    u64::from_be_bytes(image[at(place)..at(place) + 8].try_into().unwrap())
}

fn put(image: &mut [u8], place: u64, value: u64) {
    image[at(place)..at(place) + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image of 64 clusters of 4 KiB, all of them data.
fn full(version: u32) -> Vec<u8> {
    let plain = ImageSpec::plain(BITS, CLUSTERS * CLUSTER);
    ImageSpec { version, every: 1, ..plain }.make(&mut Pool::shared().borrow_mut()).bytes
}

/// Where the L2 table is, of an image with one.
fn l2(image: &[u8]) -> u64 {
    word(image, word(image, 40)) & OFFSET
}

/// The host cluster of a guest cluster.
fn host(image: &[u8], guest: u64) -> u64 {
    (word(image, l2(image) + guest * 8) & OFFSET) / CLUSTER
}

/// Where the refcount of a cluster is.
fn refcount_at(image: &[u8], cluster: u64) -> usize {
    at(word(image, word(image, 48)) + cluster * 2)
}

fn set_refcount(image: &mut [u8], cluster: u64, count: u8) {
    let place = refcount_at(image, cluster);
    image[place..place + 2].copy_from_slice(&[0, count]);
}

fn refcount(image: &[u8], cluster: u64) -> u8 {
    image[refcount_at(image, cluster) + 1]
}

fn begin(image: &[u8], options: &Options) -> World {
    let mut disk = Disk::new(image);
    disk.watch();
    let mut world = World::open(disk, options).unwrap();
    world.settle();
    assert!(world.engine.is_ready());
    world.handed = Some(Vec::new());
    world
}

/// The same, of which only the order of writes is judged by the test itself.
fn begin_unwatched(image: &[u8], options: &Options) -> World {
    let mut world = World::open(Disk::new(image), options).unwrap();
    world.settle();
    world
}

/// The answer to a request, once all is done.
fn ask(world: &mut World, request: Request, bytes: u64) -> Result<(), IoErrorKind> {
    world.submit(0, request, vec![0x5a; at(bytes)]);
    world.settle();
    assert_eq!(world.replies.len(), 1, "{}", world.engine.waits());
    world.replies.pop().unwrap().result
}

fn write_to(guest: u64, clusters: u64) -> Request {
    let len = u32::try_from(clusters * CLUSTER).unwrap();
    Request::Write { offset: guest * CLUSTER, len, fua: false }
}

fn read_of(guest: u64) -> Request {
    Request::Read { offset: guest * CLUSTER, len: 512 }
}

fn discard_of(guest: u64, clusters: u64) -> Request {
    let len = u32::try_from(clusters * CLUSTER).unwrap();
    Request::Discard { offset: guest * CLUSTER, len }
}

/// What the disk holds is durable, and the image but for the mark.
fn assert_marked(world: &World, image: &[u8]) {
    let mut marked = image.to_vec();
    marked[FEATURES] |= CORRUPT;
    let found = world.disk.bytes();
    let differs: Vec<_> = (0..found.len()).filter(|&at| found.get(at) != marked.get(at)).collect();
    assert!(differs.is_empty() && found.len() == marked.len(), "{differs:?}");
    assert!(world.disk.changes().is_empty(), "all of it is durable");
    assert_eq!(world.broken, None);
}

/// What `qemu-img` says of the image.
fn qemu_img(name: &str, image: &[u8], command: &[&str]) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("unsound-{name}.qcow2"));
    std::fs::write(&path, image).unwrap();
    let out = Command::new("qemu-img").args(command).arg(&path).output();
    let out = out.expect("qemu-img must be installed");
    String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
}

#[test]
fn a_write_that_would_hit_a_table_marks_the_image_and_ends_writing() {
    let sound = full(3);
    let block = word(&sound, word(&sound, 48));
    for target in [word(&sound, 40), word(&sound, 48), block, l2(&sound)] {
        for alignment in [512, 4096] {
            let mut image = sound.clone();
            let entry = l2(&sound) + 8;
            put(&mut image, entry, target | 1 << 63);
            let mut world = begin(&image, &Options { alignment, ..Options::default() });
            // The first cluster of the two is sound, but was not handed out yet.
            let result = ask(&mut world, write_to(0, 2), 2 * CLUSTER);
            assert_eq!(result, Err(IoErrorKind::Io));
            let Health::Failed(failure) = world.engine.health() else { panic!("it is good") };
            assert_eq!((failure.kind, failure.offset), (FailureKind::Overlap, target));
            assert_marked(&world, &image);
            // Once only, however often it is hit.
            assert_eq!(ask(&mut world, write_to(1, 1), CLUSTER), Err(IoErrorKind::Io));
            assert_eq!(ask(&mut world, Request::Flush, 0), Err(IoErrorKind::Io));
            assert_eq!(ask(&mut world, read_of(5), 512), Ok(()));
            let changes =
                |kind: &&OpKind| !matches!(kind, OpKind::Read { .. } | OpKind::MetaRead { .. });
            let handed = world.handed.take().unwrap();
            let mark = OpKind::MetaWrite { offset: 0, len: alignment };
            let all: Vec<_> = handed.iter().filter(changes).collect();
            assert_eq!(all, [&mark, &OpKind::Sync]);
            let (disk, health) = world.close();
            assert_eq!(health, Health::Failed(failure));
            let told = qemu_img("overlap", &disk.bytes(), &["info", "--output=json"]);
            assert!(told.contains("\"corrupt\": true"), "{told}");
            World::open(disk, &Options::default()).expect_err("it is marked");
        }
    }
}

#[test]
fn closing_waits_for_the_mark() {
    // With two L2 tables.
    let spec = ImageSpec { every: 64, ..ImageSpec::plain(BITS, 1024 * CLUSTER) };
    let mut image = spec.make(&mut Pool::shared().borrow_mut()).bytes;
    let entry = l2(&image);
    put(&mut image, entry, entry | 1 << 63);
    let mut world = begin(&image, &Options { stress: true, ..Options::default() });
    assert_eq!(ask(&mut world, read_of(0), 512), Ok(()));
    // A page that is being read has the only staging buffer.
    world.submit(1, read_of(640), vec![0; 512]);
    world.submit(0, write_to(0, 1), vec![1; at(CLUSTER)]);
    world.engine.close();
    let kinds: Vec<_> = world.in_flight.iter().map(|op| op.kind).collect();
    assert!(matches!(kinds[..], [OpKind::MetaRead { .. }]), "{kinds:?}");
    let mut writes = 0;
    while !world.in_flight.is_empty() {
        assert!(!world.engine.is_closed());
        writes += usize::from(matches!(world.in_flight[0].kind, OpKind::MetaWrite { .. }));
        world.complete(0);
    }
    assert!(world.engine.is_closed());
    assert_eq!(writes, 1);
    assert_marked(&world, &image);
}

#[test]
fn a_mark_that_cannot_be_written_is_reported_and_not_tried_again() {
    for fails_at in [0, 1] {
        let mut image = full(3);
        let entry = l2(&image);
        put(&mut image, entry, entry | 1 << 63);
        let mut world = begin(&image, &Options::default());
        world.submit(0, read_of(3), vec![0; 512]);
        world.settle();
        world.submit(0, write_to(0, 1), vec![1; at(CLUSTER)]);
        for _ in 0..fails_at {
            world.complete(0);
        }
        world.fail(0, IoErrorKind::Io, 0);
        assert!(world.in_flight.is_empty(), "{:?}", world.in_flight);
        let kinds: Vec<_> =
            std::iter::from_fn(|| world.engine.next_incident()).map(|it| it.kind).collect();
        assert_eq!(kinds, [FailureKind::Overlap, FailureKind::NotMarked]);
        world.replies.clear();
        assert_eq!(ask(&mut world, read_of(3), 512), Ok(()));
        assert_eq!(world.broken, None);
    }
}

#[test]
fn version_2_has_no_place_for_the_mark() {
    let mut image = full(2);
    let entry = l2(&image);
    put(&mut image, entry, entry | 1 << 63);
    let mut world = begin(&image, &Options::default());
    assert_eq!(ask(&mut world, write_to(0, 1), CLUSTER), Err(IoErrorKind::Io));
    assert!(world.disk.bytes() == image, "it was changed");
    let (_, health) = world.close();
    assert!(matches!(health, Health::Failed(_)));
}

/// Discards clusters, with FLUSHes until everything has become of them.
fn discard(world: &mut World, guest: u64, clusters: u64) {
    assert_eq!(ask(world, discard_of(guest, clusters), 0), Ok(()));
    for _ in 0..3 {
        assert_eq!(ask(world, Request::Flush, 0), Ok(()));
    }
}

#[test]
fn what_is_counted_twice_is_not_freed_though_its_entry_says_copied() {
    // Clusters of one run: the first, one in the middle, and the last; and a run of one.
    for (first, clusters, twice) in [(8, 8, vec![8, 11, 12, 15]), (8, 1, vec![8])] {
        let mut image = full(3);
        for &guest in &twice {
            let cluster = host(&image, guest);
            set_refcount(&mut image, cluster, 2);
        }
        // The image's reader, who has them too, would find zeros in a hole.
        let mut world = begin_unwatched(&image, &Options::default());
        discard(&mut world, first, clusters);
        let after = world.disk.bytes();
        for guest in first..first + clusters {
            let cluster = host(&image, guest);
            let place = at(cluster * CLUSTER);
            let kept = twice.contains(&guest);
            let bytes = &after[place..place + at(CLUSTER)];
            assert_eq!(refcount(&after, cluster), u8::from(kept), "guest cluster {guest}");
            assert_eq!(bytes == &image[place..place + at(CLUSTER)], kept, "{guest}");
        }
        assert_eq!(world.engine.stats().quarantined, 0);
        let (disk, health) = world.close();
        assert_eq!(health, Health::Good);
        for &guest in &twice {
            let place = at(host(&image, guest) * CLUSTER);
            assert!(disk.bytes()[place..][..512] == image[place..][..512], "it was reused");
        }
    }
}

#[test]
fn what_was_not_counted_ends_writing() {
    let mut image = full(3);
    // One cluster for two of the guest, and counted once.
    let shared = word(&image, l2(&image) + 8 * 8);
    let entry = l2(&image) + 20 * 8;
    put(&mut image, entry, shared);
    let mut world = begin_unwatched(&image, &Options::default());
    discard(&mut world, 8, 1);
    assert_eq!(ask(&mut world, discard_of(20, 1), 0), Ok(()));
    // The first that makes the unlinking durable counts down.
    assert_eq!(ask(&mut world, Request::Flush, 0), Err(IoErrorKind::Io));
    let Health::Failed(failure) = world.engine.health() else { panic!("it is good") };
    assert_eq!(failure.kind, FailureKind::NotCounted);
    assert_eq!(failure.offset, shared & OFFSET);
    let after = world.disk.bytes();
    assert_eq!(after[FEATURES], image[FEATURES] | CORRUPT);
    assert_eq!(refcount(&after, host(&image, 8)), 0, "no underflow");
    assert_eq!(ask(&mut world, read_of(30), 512), Ok(()));
    assert_eq!(ask(&mut world, write_to(30, 1), CLUSTER), Err(IoErrorKind::Io));
    // In one run, where the count of the second is gone already.
    let mut image = full(3);
    let cluster = host(&image, 9);
    set_refcount(&mut image, cluster, 0);
    let mut world = begin_unwatched(&image, &Options::default());
    assert_eq!(ask(&mut world, discard_of(8, 4), 0), Ok(()));
    // It ends before the page of refcounts is there.
    assert_eq!(ask(&mut world, Request::Flush, 0), Ok(()));
    assert!(
        matches!(world.engine.health(), Health::Failed(f) if f.kind == FailureKind::NotCounted)
    );
    let after = world.disk.bytes();
    let place = at(host(&image, 8) * CLUSTER);
    assert!(after[place..][..at(CLUSTER)] == image[place..][..at(CLUSTER)], "it was punched");
    let told = qemu_img("uncounted", &after, &["info", "--output=json"]);
    assert!(told.contains("\"corrupt\": true"), "{told}");
}

#[test]
fn a_table_in_the_place_of_another_does_not_show_the_entries_of_that() {
    // Clusters of 512 bytes: a table is for 64 of them. A snapshot shares most of the tables.
    let guest = 1024 << 9;
    let spec = ImageSpec { every: 2, snapshots: 1, ..ImageSpec::plain(9, guest) };
    let mut image = spec.make(&mut Pool::shared().borrow_mut()).bytes;
    let entries: Vec<u64> =
        (0..16).map(|index| word(&image, word(&image, 40) + index * 8)).collect();
    let shared: Vec<u64> = (0..16).filter(|&index| entries[at(index)] >> 63 == 0).collect();
    assert!(shared.len() == 8, "{entries:x?}");
    // One of them is counted as if it were not.
    let wrong = entries[at(shared[0])] & OFFSET;
    let block = word(&image, word(&image, 48) + (wrong >> 9) / 256 * 8);
    let count = at(block + (wrong >> 9) % 256 * 2);
    assert_eq!(image[count..count + 2], [0, 2]);
    image[count + 1] = 1;
    let options = Options { reservation: 1, l2_cache: Some(1 << 20), ..Options::default() };
    let mut world = begin_unwatched(&image, &options);
    let everything = |world: &mut World| {
        let len = u32::try_from(guest).unwrap();
        assert_eq!(ask(world, Request::Read { offset: 0, len }, guest), Ok(()));
        world.buffers[0].clone()
    };
    let mut model = everything(&mut world);
    for &index in &shared {
        let offset = index << 15;
        let write = Request::Write { offset, len: 512, fua: false };
        assert_eq!(ask(&mut world, write, 512), Ok(()));
        model[at(offset)..][..512].fill(0x5a);
        for _ in 0..4 {
            assert_eq!(ask(&mut world, Request::Flush, 0), Ok(()));
            let now = everything(&mut world);
            let differs = (0..model.len()).find(|&at| model[at] != now[at]);
            assert_eq!(differs, None, "after the write to table {index}");
        }
    }
    let after = world.close().0.bytes();
    let l1 = word(&after, 40);
    let reused = (0..16).any(|index| word(&after, l1 + index * 8) & OFFSET == wrong);
    assert!(reused, "no table took the place of the other");
}

/// On disk the L1 entry leads to the old table until a round has ended, and after that a snapshot
/// does: an entry that leads there, too, must not let the guest write a table of its own making.
#[test]
fn a_table_that_was_copied_is_not_guest_data() {
    let spec = ImageSpec { every: 2, snapshots: 1, ..ImageSpec::plain(9, 1024 << 9) };
    let mut image = spec.make(&mut Pool::shared().borrow_mut()).bytes;
    let l1 = word(&image, 40);
    let entries: Vec<u64> = (0..16).map(|index| word(&image, l1 + index * 8)).collect();
    let shared = (0..16).find(|&index| entries[at(index)] >> 63 == 0).unwrap();
    let own = (0..16).find(|&index| entries[at(index)] >> 63 == 1).unwrap();
    let table = entries[at(shared)] & OFFSET;
    put(&mut image, entries[at(own)] & OFFSET, table | 1 << 63);
    let write = |index: u64| Request::Write { offset: index << 15, len: 512, fua: false };
    for flushes in 0..4 {
        let mut world = begin_unwatched(&image, &Options::default());
        assert_eq!(ask(&mut world, write(shared), 512), Ok(()));
        for _ in 0..flushes {
            assert_eq!(ask(&mut world, Request::Flush, 0), Ok(()));
        }
        assert_eq!(ask(&mut world, write(own), 512), Err(IoErrorKind::Io), "{flushes} flushes");
        let Health::Failed(failure) = world.engine.health() else { panic!("it is good") };
        assert_eq!((failure.kind, failure.offset), (FailureKind::Overlap, table));
        let (old, now) = (&image[at(table)..][..512], &world.disk.bytes()[at(table)..][..512]);
        assert!(old == now, "the table was written");
    }
}

#[test]
fn clusters_that_are_counted_behind_the_end_of_the_file_take_no_room() {
    let sound = full(3);
    let end = sound.len() as u64 / CLUSTER;
    // Up to the end of what the block counts, and less than that.
    for counted in [2048, 1500, end + 1] {
        let mut image = sound.clone();
        for cluster in end..counted {
            set_refcount(&mut image, cluster, 1);
        }
        // A cluster is free for the first write, and none for the second.
        let options = Options { reservation: 16 * CLUSTER, ..Options::default() };
        let mut world = begin_unwatched(&image, &options);
        world.handed = Some(Vec::new());
        discard(&mut world, 8, 1);
        for _ in 0..2 {
            assert_eq!(ask(&mut world, write_to(8, 1), CLUSTER), Ok(()));
            discard(&mut world, 8, 1);
        }
        assert_eq!(ask(&mut world, write_to(8, 1), CLUSTER), Ok(()));
        let mut room = 0;
        for op in world.handed.take().unwrap() {
            let OpKind::Extend { from, to } = op else { continue };
            assert!(from >= counted * CLUSTER, "{from:#x} is counted");
            room += to - from;
        }
        assert!(room != 0 && room <= 64 * CLUSTER, "{room:#x} bytes");
        let (disk, health) = world.close();
        assert_eq!(health, Health::Good);
        let after = disk.bytes();
        for cluster in end..counted {
            assert_eq!(refcount(&after, cluster), 1, "cluster {cluster} is nobody's");
        }
        let entry = word(&after, l2(&after) + 8 * 8) & OFFSET;
        assert!(entry < end * CLUSTER || entry >= counted * CLUSTER, "{entry:#x}");
        assert_eq!(qcow2::check::check(&after[..]).unwrap().corruptions, 0);
    }
}

/// An entry leads to a cluster that is free by its refcount. Guest data on its way there could land
/// on the table that is made of it.
#[test]
fn no_table_is_made_where_guest_data_is_on_its_way() {
    let spec = ImageSpec { every: 2, ..ImageSpec::plain(9, 1024 << 9) };
    let mut image = spec.make(&mut Pool::shared().borrow_mut()).bytes;
    let target = word(&image, l2(&image)) & OFFSET;
    let block = word(&image, word(&image, 48) + (target >> 9) / 256 * 8);
    let count = at(block + (target >> 9) % 256 * 2);
    assert_eq!(image[count..count + 2], [0, 1]);
    image[count + 1] = 0;
    // The last table is gone, so that a write there makes a new one.
    let last = word(&image, 40) + 15 * 8;
    put(&mut image, last, 0);
    let mut world = begin_unwatched(&image, &Options::default());
    let write = |offset| Request::Write { offset, len: 512, fua: false };
    world.submit(0, write(0), vec![1; 512]);
    let goes_there =
        |kind: OpKind| matches!(kind, OpKind::Write { offset, .. } if offset == target);
    while let Some(number) = world.in_flight.iter().position(|op| !goes_there(op.kind)) {
        world.complete(number);
    }
    assert_eq!(world.in_flight.len(), 1);
    world.submit(1, write(15 << 15), vec![2; 512]);
    while let Some(number) = world.in_flight.iter().position(|op| !goes_there(op.kind)) {
        world.complete(number);
    }
    let Health::Failed(failure) = world.engine.health() else { panic!("it is good") };
    assert_eq!((failure.kind, failure.offset), (FailureKind::Overlap, target));
    world.settle();
    assert_eq!(world.broken, None);
    assert_eq!(word(&world.disk.bytes(), last), 0, "a table was made");
}

/// QEMU leaves such entries when it is stopped while it makes or deletes the last snapshot.
#[test]
fn what_has_lost_copied_is_copied_and_nothing_leaks() {
    let sound = full(3);
    let (table, first) = (word(&sound, 40), l2(&sound));
    for places in [&[table][..], &[first + 3 * 8], &[table, first + 3 * 8, first + 9 * 8]] {
        let mut image = sound.clone();
        for &place in places {
            let entry = word(&image, place);
            put(&mut image, place, entry & !(1 << 63));
        }
        let mut world = begin(&image, &Options::default());
        assert_eq!(ask(&mut world, write_to(3, 1), CLUSTER), Ok(()));
        assert_eq!(ask(&mut world, Request::Flush, 0), Ok(()));
        assert_eq!(ask(&mut world, discard_of(9, 1), 0), Ok(()));
        assert_eq!(ask(&mut world, read_of(4), 512), Ok(()));
        let (disk, health) = world.close();
        assert_eq!(health, Health::Good);
        let told = qemu_img("not-copied", &disk.bytes(), &["check"]);
        assert!(told.contains("No errors"), "{places:?}: {told}");
    }
}

#[test]
fn a_reader_needs_no_refcounts() {
    let mut image = full(3);
    let table = word(&image, 48);
    put(&mut image, table, 1 << 40 | 1);
    World::open(Disk::new(&image), &Options::default()).expect_err("not for writing");
    let options = Options { read_only: true, ..Options::default() };
    let mut world = begin_unwatched(&image, &options);
    assert_eq!(ask(&mut world, read_of(5), 512), Ok(()));
}

//! Repairs of broken images: `qemu-img check` finds nothing afterwards that could be repaired, and
//! a crash at any moment of a repair leaves the image no worse than it was.
//!
//! `REPAIR_CASES=n` and `CHECK_SEED=n` in the environment ask for more, or other, broken images.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use qcow2::check::repair::{
    Left, Reclaim, Repair, RepairError, rebuild_if_dirty, reclaim_leaks, repair,
};
use qcow2::check::{
    CheckError, Checker, Finding, FindingKind, Limits, ReadAt, ReadError, check, check_within,
};
use qcow2::testing::fuzz::may_stay;

use crate::crash::{Disk, Event, crash_states, guest};
use crate::damage::{Map, damage, put, u64_at};
use crate::dice::{Dice, from_env};
use crate::images::{Base, base, bases, run, scratch};
use crate::verdict::{compare, qemu_check};

/// Repairs a copy, without a look at the progress.
fn repaired(
    image: &[u8],
    what: Repair,
) -> (Disk, Result<qcow2::check::repair::Repaired, RepairError>) {
    let mut disk = Disk::new(image);
    let result = repair(&mut disk, what, &mut |_, _, _| {});
    (disk, result)
}

/// The damaged image of a seed, and what was done to it.
fn broken(seed: u64, bases: &[&'static Base]) -> (&'static str, Vec<u8>, String) {
    let mut dice = Dice(seed);
    let (name, base) = bases[dice.below(bases.len())];
    let mut image = base.clone();
    let mut told = format!("seed {seed}: {name}");
    for _ in 0..1 + dice.below(4) {
        write!(told, "; {}", damage(&mut dice, &mut image)).unwrap();
    }
    (name, image, told)
}

fn small_bases() -> Vec<&'static Base> {
    bases().1.iter().filter(|base| base.1.len() < 1 << 20).collect()
}

/// One broken image, repaired: the class of the outcome.
fn case(dir: &Path, seed: u64, bases: &[&'static Base]) -> Result<&'static str, String> {
    let (name, image, told) = broken(seed, bases);
    let (disk, result) = repaired(&image, Repair::All);
    let done = match result {
        Err(_) if disk.events.iter().any(|event| matches!(event, Event::Write(..))) => {
            return Err(format!("{told}\n  failed after a write: {result:?}"));
        }
        Err(RepairError::Check(_)) => return Ok("cannot be judged"),
        Err(RepairError::Refused(_)) => return Ok("refused"),
        Err(error) => return Err(format!("{told}\n  {error}")),
        Ok(done) => done,
    };
    let mut checker = Checker::with_findings(usize::MAX);
    let summary = checker.check(&disk.now[..]);
    let findings = checker.findings();
    let fail = |what: &str| {
        let bad = findings.iter().filter(|finding| !may_stay(&disk.now, finding, findings)).take(9);
        let bad: Vec<_> = bad.chain(findings.iter().take(9)).map(Finding::to_string).collect();
        let (left, rebuilt) = (done.left, done.rebuilt);
        Err(format!("{told}\n  {what}: {left:?}, rebuilt: {rebuilt}\n  {}", bad.join("\n  ")))
    };
    match summary {
        Err(_) if done.left.is_some() => return Ok("no refcount table, and no room for one"),
        Err(_) => return fail("cannot be judged any more"),
        Ok(summary) => {
            if (summary.corruptions, summary.leaks) != (done.after.corruptions, done.after.leaks) {
                return fail("another report");
            }
        }
    }
    let left = done.left.is_some();
    if !left && !findings.iter().all(|finding| may_stay(&disk.now, finding, findings)) {
        return fail("not repaired");
    }
    // Once more changes nothing, and neither would QEMU.
    let (again, _) = repaired(&disk.now, Repair::All);
    if !left && again.now != disk.now {
        return fail("a second repair changes something");
    }
    let file = format!("{name}.repaired.{}", seed % 4);
    std::fs::write(dir.join(&file), &disk.now).unwrap();
    let (theirs, text) = qemu_check(dir, &file);
    match compare(&check(&disk.now[..]), theirs.as_ref(), &text) {
        Err(()) => return fail(&text),
        Ok("class 5: cannot get refcounts") if !left => return fail(&text),
        Ok(_) => {}
    }
    Ok(match (done.left, done.before.corruptions, done.after.corruptions, done.rebuilt) {
        (Some(Left::Incomplete), ..) => "left: references are missing",
        (Some(Left::Entangled), ..) => "left: the header is a table",
        (Some(_), ..) => "left: no room",
        (None, 0, 0, _) => "had leaks at the most",
        (None, _, 0, false) => "repaired in place",
        (None, _, 0, true) => "rebuilt",
        (None, _, _, false) => "bad entries left",
        (None, _, _, true) => "rebuilt, bad entries left",
    })
}

/// Runs `one` for each seed, on two threads, and shows what came of it.
fn each_case(cases: u64, one: impl Fn(u64) -> Result<&'static str, String> + Sync) {
    let first = from_env("CHECK_SEED", 0);
    let mut classes = BTreeMap::new();
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        let one = &one;
        let work = |begin: u64| {
            scope.spawn(move || {
                let seeds = (first + begin..first + cases).step_by(2);
                seeds.map(one).collect::<Vec<_>>()
            })
        };
        for worker in [work(0), work(1)] {
            for result in worker.join().unwrap() {
                match result {
                    Ok(class) => *classes.entry(class).or_insert(0) += 1,
                    Err(told) => wrong.push(told),
                }
            }
        }
    });
    println!("{classes:#?}");
    let (count, shown) = (wrong.len(), wrong.iter().take(6).cloned().collect::<Vec<_>>());
    assert!(wrong.is_empty(), "{count} of {cases} are wrong:\n{}", shown.join("\n"));
}

#[test]
fn after_a_repair_qemu_img_finds_only_what_cannot_be_repaired() {
    let (dir, bases) = (bases().0, small_bases());
    each_case(from_env("REPAIR_CASES", 150), |seed| case(dir, seed, &bases));
}

#[test]
fn a_crash_at_any_write_of_a_repair_leaves_nothing_worse() {
    let bases: Vec<_> = small_bases().into_iter().filter(|base| base.1.len() < 300_000).collect();
    each_case(from_env("REPAIR_CASES", 150), |seed| {
        let (_, image, told) = broken(seed, &bases);
        let mut class = "cannot be judged";
        for what in [Repair::All, Repair::Leaks] {
            let (disk, result) = repaired(&image, what);
            if result.is_err() {
                continue;
            }
            let writes = disk.events.iter().any(|event| matches!(event, Event::Write(..)));
            class = if writes { "written" } else { "nothing to do" };
            let states = crash_states(&image, &disk, &mut Dice(seed));
            states.map_err(|wrong| format!("{told}\n  {what:?}: {wrong}"))?;
        }
        Ok(class)
    });
}

#[test]
fn repairing_leaks_leaves_none_and_makes_no_corruption() {
    let bases = small_bases();
    each_case(from_env("REPAIR_CASES", 150), |seed| {
        let (_, image, told) = broken(seed, &bases);
        let (disk, result) = repaired(&image, Repair::Leaks);
        let Ok(done) = result else { return Ok("cannot be judged") };
        crash_states(&image, &disk, &mut Dice(seed))
            .map_err(|wrong| format!("{told}\n  {wrong}"))?;
        match (done.before.leaks, done.after.leaks) {
            (0, 0) => Ok("no leaks"),
            (_, 0) => Ok("none are left"),
            // Those that are counted where nothing can be written, or may be no leaks.
            _ if done.left.is_some() || done.after.corruptions > 0 => Ok("some are left"),
            _ => Err(format!("{told}\n  {done:?}")),
        }
    });
}

#[test]
fn leaks_are_reclaimed_within_a_limit_and_only_from_a_sound_image() {
    let mut image = base("v3-4k");
    let map = Map::of(&image);
    let clusters = image.len() / map.cluster;
    image.resize(image.len() + 3 * map.cluster, 0);
    for cluster in clusters..clusters + 3 {
        map.set_refcount(&mut image, cluster, 2, false);
    }
    let reclaim = |image: &[u8], read| {
        let mut disk = Disk::new(image);
        let limits = Limits { read, memory: 1 << 20 };
        let result = reclaim_leaks(&mut disk, limits, &mut |_, _, _| {}).unwrap();
        (disk, result)
    };
    let (disk, result) = reclaim(&image, 1 << 20);
    assert_eq!(result, Reclaim::Reclaimed { clusters: 3, flags: 0 });
    let report = check(&disk.now[..]).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    assert_eq!(disk.events.last(), Some(&Event::Sync));

    let (disk, result) = reclaim(&image, 5000);
    assert_eq!((result, disk.now == image), (Reclaim::TooMuch, true));

    // And what QEMU leaves that was stopped at the end of deleting a snapshot.
    let l1 = usize::try_from(u64_at(&image, 40)).unwrap();
    let mut flags = image.clone();
    let word = u64_at(&flags, l1);
    put(&mut flags, l1, word & !(1 << 63));
    let (disk, result) = reclaim(&flags, 1 << 20);
    assert_eq!(result, Reclaim::Reclaimed { clusters: 3, flags: 1 });
    let report = check(&disk.now[..]).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));

    map.set_refcount(&mut image, 0, 0, false);
    let (disk, result) = reclaim(&image, 1 << 20);
    assert!(matches!(result, Reclaim::Unsound(report) if report.corruptions == 1));
    assert_eq!(disk.now, image);
    // A clean image is not written to, and costs no sync.
    let (disk, result) = reclaim(&base("v3-4k"), 1 << 20);
    assert_eq!((result, disk.events.len()), (Reclaim::Reclaimed { clusters: 0, flags: 0 }, 0));
}

/// A file that is longer than memory should be, with an image at its beginning.
struct Long<'a>(&'a [u8], u64);

impl ReadAt for Long<'_> {
    fn len(&self) -> u64 {
        self.1
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.0.read_at(offset, buf)
    }
}

#[test]
fn a_check_within_limits_takes_no_memory_for_a_file_that_is_long() {
    let image = base("v3-4k");
    let within = |len, memory| check_within(&Long(&image, len), Limits { read: 1 << 20, memory });
    // 20 bytes for each cluster of 4 KiB, and for one more.
    let sound = within(4096 * 1023, 20 << 10).unwrap().expect("it fits exactly");
    assert_eq!((sound.corruptions, sound.host_clusters), (0, 1023));
    assert_eq!(within(4096 * 1023 + 1, 20 << 10), Ok(None));
    // So many clusters that a check without limits would give up for want of memory.
    assert_eq!(within(i64::MAX as u64, 16 << 20), Ok(None));
    assert_eq!(check(&Long(&image, i64::MAX as u64)), Err(CheckError::TooLarge));
}

#[test]
fn what_forbids_writing_is_told_from_what_only_cannot_be_read() {
    let sound = base("v3-4k");
    let map = Map::of(&sound);
    let entry = *map.l2.iter().find(|&&at| u64_at(&sound, at) != 0).unwrap();
    let word = u64_at(&sound, entry);
    let found = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = sound.clone();
        change(&mut image);
        let report = check(&image[..]).unwrap();
        (report.corruptions, report.forbids_writing.map(|finding| finding.kind))
    };
    let far = 1 << 40 | word >> 63 << 63;
    let l1 = u64_at(&sound, 40) | word >> 63 << 63;
    assert_eq!(found(&|_| {}), (0, None));
    assert_eq!(found(&|image| map.set_refcount(image, 4, 2, false)).1, Some(FindingKind::Copied));
    // Without COPIED a write copies: nothing is lost.
    assert_eq!(found(&|image| put(image, entry, word & !(1 << 63))), (1, None));
    let too_low = found(&|image| map.set_refcount(image, 0, 0, false));
    assert_eq!(too_low.1, Some(FindingKind::RefcountTooLow));
    assert_eq!(found(&|image| put(image, entry, l1)).1, Some(FindingKind::RefcountTooLow));
    assert_eq!(found(&|image| put(image, entry, far)).1, Some(FindingKind::BeyondEnd));
    assert_eq!(found(&|image| put(image, entry, word | 1 << 57)), (1, None));
    // Though it comes behind more findings than a report keeps.
    let late = found(&|image| {
        for &at in map.l2.iter().filter(|&&at| u64_at(&sound, at) == 0) {
            put(image, at, 1 << 57);
        }
        map.set_refcount(image, 0, 0, false);
    });
    assert_eq!((late.0 > 64, late.1), (true, Some(FindingKind::RefcountTooLow)));
}

#[test]
fn a_flag_that_means_nothing_goes_from_the_tables_of_snapshots_too() {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let sound = base("snap-4k");
    let offset_at = |at: usize| usize::try_from(u64_at(&sound, at) & OFFSET).unwrap();
    // What a write after the snapshot has copied is the snapshot's alone.
    let (active, snapshot) = (offset_at(offset_at(40)), offset_at(offset_at(offset_at(64))));
    assert_ne!(active, snapshot);
    let free = (snapshot..snapshot + 4096).step_by(8).find(|&at| u64_at(&sound, at) == 0).unwrap();
    let full = (snapshot..snapshot + 4096).step_by(8).find(|&at| u64_at(&sound, at) != 0).unwrap();
    let mut image = sound.clone();
    put(&mut image, free, 1 << 63);
    // COPIED of a cluster with a place is not judged where nobody writes.
    let word = u64_at(&sound, full) ^ 1 << 63;
    put(&mut image, full, word);
    assert_eq!(check(&image[..]).unwrap().corruptions, 1);
    let (disk, done) = repaired(&image, Repair::All);
    assert_eq!(done.unwrap().after.corruptions, 0);
    assert_eq!((u64_at(&disk.now, free), u64_at(&disk.now, full)), (0, word));
    // A repair of leaks leaves it.
    assert!(repaired(&image, Repair::Leaks).0.now == image);
}

#[test]
fn an_image_without_a_refcount_table_gets_one() {
    let dir = scratch("check-rebuilt");
    for (name, at, word) in [
        ("v3", 48, 0),
        ("snap-4k", 48, 1 << 40),
        ("v3-64k", 48, 12_345),
        ("rc64", 56, 0),
        ("rc1", 56, u64::from(u32::MAX) << 32),
        ("v2", 48, u64::MAX),
        ("many", 48, 1 << 62),
    ] {
        let mut image = base(name);
        let word = if at == 56 { word | u64_at(&image, at) & 0xffff_ffff } else { word };
        put(&mut image, at, word);
        let (disk, result) = repaired(&image, Repair::All);
        let done = result.unwrap();
        assert!(done.rebuilt && done.left.is_none(), "{name}: {done:?}");
        assert_eq!((done.after.corruptions, done.after.leaks), (0, 0), "{name}: {done:?}");
        assert_eq!(guest(&disk.now), guest(&image));
        crash_states(&image, &disk, &mut Dice(1)).unwrap();
        let file = format!("{name}.rebuilt");
        std::fs::write(dir.join(&file), &disk.now).unwrap();
        let (theirs, text) = qemu_check(&dir, &file);
        let theirs = theirs.unwrap_or_else(|| panic!("{name}: {text}"));
        assert_eq!((theirs.corruptions, theirs.leaks), (0, 0), "{name}: {text}");
    }
}

/// A writer with lazy refcounts dies on a block device: there is room, but not behind the end.
#[test]
fn a_file_that_cannot_grow_gets_its_new_refcounts_inside() {
    let dir = scratch("check-fixed");
    for name in ["v3-64k", "lazy", "rc1", "rc64", "ext"] {
        let mut image = base(name);
        let map = Map::of(&image);
        image[79] |= 1;
        put(&mut image, map.refcount_table[0], 0);
        image.resize(image.len().next_multiple_of(map.cluster) + 40 * map.cluster, 0);
        let mut disk = Disk { fixed: true, ..Disk::new(&image) };
        let done = rebuild_if_dirty(&mut disk, &mut |_, _, _| {}).unwrap().unwrap();
        assert!(done.rebuilt && done.left.is_none() && !done.after.dirty, "{name}: {done:?}");
        assert_eq!((done.after.corruptions, done.after.leaks), (0, 0), "{name}: {done:?}");
        assert_eq!((disk.len(), guest(&disk.now)), (image.len() as u64, guest(&image)), "{name}");
        crash_states(&image, &disk, &mut Dice(3)).unwrap();
        let file = format!("{name}.fixed");
        std::fs::write(dir.join(&file), &disk.now).unwrap();
        let (theirs, text) = qemu_check(&dir, &file);
        let theirs = theirs.unwrap_or_else(|| panic!("{name}: {text}"));
        assert_eq!((theirs.corruptions, theirs.leaks), (0, 0), "{name}: {text}");
    }
}

#[test]
fn a_file_that_is_full_and_cannot_grow_is_left_as_it_is() {
    let mut image = base("empty");
    let entry = Map::of(&image).refcount_table[0];
    let word = u64_at(&image, entry) | 1;
    put(&mut image, entry, word);
    let mut disk = Disk { fixed: true, ..Disk::new(&image) };
    let result = repair(&mut disk, Repair::All, &mut |_, _, _| {});
    assert!(matches!(result, Err(RepairError::Grow(_))), "{result:?}");
    assert_eq!(disk.now, image);
}

#[test]
fn what_must_not_be_written_is_refused_by_name() {
    let mut version_1 = base("v3");
    version_1[7] = 1;
    let mut unknown = base("v3");
    unknown[73] = 0x10;
    for (image, expected) in [
        (version_1, RepairError::Check(CheckError::Version(1))),
        (unknown, RepairError::Check(CheckError::UnknownFeature(52))),
        (base("luks"), RepairError::Refused("an encrypted image")),
    ] {
        for what in [Repair::All, Repair::Leaks] {
            let (disk, result) = repaired(&image, what);
            assert_eq!((result, disk.events.len()), (Err(expected), 0));
        }
    }
}

#[test]
fn marks_are_cleared_when_they_are_not_true_any_more() {
    let marked = |image: &mut [u8]| image[79] |= 3;
    // All is well: both go, and nothing else changes.
    let mut image = base("v3");
    marked(&mut image);
    let (disk, result) = repaired(&image, Repair::Leaks);
    assert_eq!((disk.now[79], result.unwrap().after.dirty), (0, false));
    assert_eq!(disk.now[80..], image[80..]);
    // A bad entry stays: the refcounts hold, but the image is corrupt.
    let mut image = base("v3");
    let map = Map::of(&image);
    let entry = map.l2.iter().copied().find(|&at| u64_at(&image, at) != 0).unwrap();
    let word = u64_at(&image, entry);
    put(&mut image, entry, word | 1 << 57);
    marked(&mut image);
    let (disk, result) = repaired(&image, Repair::All);
    assert_eq!((disk.now[79], result.unwrap().after.corrupt), (2, true));
}

#[test]
fn unknown_autoclear_features_are_cleared_before_anything_is_written() {
    let mut image = base("v3");
    put(&mut image, 88, 0x84);
    let (disk, _) = repaired(&image, Repair::All);
    assert!(disk.events.iter().all(|event| *event == Event::Sync), "nothing was to be done");
    Map::of(&image).set_refcount(&mut image, 3, 5, false);
    let (disk, _) = repaired(&image, Repair::All);
    assert_eq!(u64_at(&disk.now, 88), 0);
    assert!(matches!(disk.events[1], Event::Write(0, _)) && disk.events[2] == Event::Sync);
}

/// A writer with lazy refcounts dies: the mappings are there, the refcounts are not.
#[test]
fn an_image_that_a_dead_writer_left_dirty_gets_its_refcounts() {
    let dir = &scratch("check-dirty");
    for (name, options) in [
        ("dirty", "lazy_refcounts=on,cluster_size=64k"),
        ("dirty-512", "lazy_refcounts=on,cluster_size=512,refcount_bits=64"),
        ("dirty-ext", "lazy_refcounts=on,cluster_size=16k,extended_l2=on"),
    ] {
        let (ok, text) =
            run(dir, "qemu-img", &["create", "-f", "qcow2", "-o", options, name, "8M"]);
        assert!(ok, "{text}");
        let commands = ["write -P 1 0 300k", "write -P 2 3M 64k", "write -z 1M 64k", "abort"];
        let args: Vec<_> = commands.iter().flat_map(|command| ["-c", command]).collect();
        let (ok, _) = run(dir, "qemu-io", &[&["-f", "qcow2"], &args[..], &[name]].concat());
        assert!(!ok, "it died");
        let image = std::fs::read(dir.join(name)).unwrap();
        let mut disk = Disk::new(&image);
        let mut progress = |stage, done, total| {
            assert!(done <= total, "{stage:?}: {done} of {total}");
        };
        let done = rebuild_if_dirty(&mut disk, &mut progress).unwrap().unwrap();
        // With small clusters its cache was full before it died, and was written.
        let missing = done.before.corruptions > 5 || name == "dirty-512";
        assert!(done.before.dirty && missing, "{name}: {done:?}");
        assert!(!done.after.dirty && done.left.is_none(), "{name}: {done:?}");
        assert_eq!((done.after.corruptions, done.after.leaks), (0, 0), "{name}: {done:?}");
        crash_states(&image, &disk, &mut Dice(7)).unwrap();
        // What was written is there, to QEMU, too, which finds nothing to repair.
        let file = format!("{name}.done");
        std::fs::write(dir.join(&file), &disk.now).unwrap();
        let (theirs, text) = qemu_check(dir, &file);
        let theirs = theirs.unwrap_or_else(|| panic!("{name}: {text}"));
        assert_eq!((theirs.corruptions, theirs.leaks), (0, 0), "{name}: {text}");
        let reads = ["read -P 1 0 300k", "read -P 2 3M 64k", "read -P 0 1M 64k"];
        let args: Vec<_> = reads.iter().flat_map(|command| ["-c", command]).collect();
        let (ok, text) = run(dir, "qemu-io", &[&["-f", "qcow2"], &args[..], &[&file]].concat());
        assert!(ok && !text.contains("failed"), "{name}: {text}");
        assert_eq!(rebuild_if_dirty(&mut disk, &mut |_, _, _| {}), Ok(None));
    }
}

#[test]
fn a_repair_that_fails_says_so_and_leaves_nothing_worse() {
    let mut image = base("snap-4k");
    let map = Map::of(&image);
    // Both ways of repairing: in place, and with a new table.
    for bad_table in [false, true] {
        map.set_refcount(&mut image, 6, 0, false);
        if bad_table {
            put(&mut image, 48, 1 << 40);
        }
        let (whole, result) = repaired(&image, Repair::All);
        assert_eq!(result.unwrap().rebuilt, bad_table);
        for good in 0..whole.events.len() {
            let mut disk = Disk::new(&image);
            disk.good = good;
            let result = repair(&mut disk, Repair::All, &mut |_, _, _| {});
            let error = result.expect_err("it failed");
            let right = match &whole.events[good] {
                Event::Write(at, _) => error == RepairError::Write(*at),
                // Then they are to lie inside, which fails as well.
                Event::Len(len) => matches!(error, RepairError::Write(at) if at < *len),
                Event::Sync => error == RepairError::Sync,
            };
            assert!(right, "{error:?} at {:?}", whole.events[good]);
            crash_states(&image, &disk, &mut Dice(9)).unwrap();
        }
    }
}

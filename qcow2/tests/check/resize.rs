//! Growing the disk of an image: QEMU reads what it held, and zeros behind that; a crash at any
//! moment leaves the old size or the new one.

use std::path::Path;

use qcow2::check::check;
use qcow2::check::repair::{RepairError, rebuild_if_dirty};
use qcow2::resize::{self, ResizeError, grow};

use crate::crash::{Disk, Event, apply, guest, sectors};
use crate::damage::u64_at;
use crate::dice::Dice;
use crate::images::{Recipe, base, bases, make, run, scratch};
use crate::verdict::qemu_check;

const SIZE_FIELD: usize = 24;

/// Grows a copy.
fn grown(image: &[u8], size: u64, beneath: u64) -> (Disk, Result<(), ResizeError>) {
    let mut disk = Disk::new(image);
    let result = grow(&mut disk, size, beneath);
    (disk, result)
}

/// The disk as QEMU reads it.
fn read(dir: &Path, name: &str, image: &[u8]) -> Vec<u8> {
    let (file, raw) = (format!("{name}.grown"), format!("{name}.raw"));
    std::fs::write(dir.join(&file), image).unwrap();
    let (ok, text) = run(dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &file, &raw]);
    assert!(ok, "{name}: {text}");
    std::fs::read(dir.join(raw)).unwrap()
}

/// Sizes that need no longer table, one in the same clusters, and one at another place.
fn sizes(image: &[u8]) -> [u64; 4] {
    let now = u64_at(image, SIZE_FIELD);
    [now + 512, now + (128 << 10), now * 3 + 512, now + (8 << 20)]
}

/// What grows, and what the header says no to: by name.
fn refusal(name: &str) -> Option<&'static str> {
    match name {
        "luks" => Some("LUKS"),
        "data" => Some("external data file"),
        "snap-v2" => Some("snapshots"),
        "over" => Some("backing file"),
        _ if name.starts_with("bitmap") || name == "many" => Some("bitmaps"),
        _ => None,
    }
}

#[test]
fn what_the_disk_held_is_kept_and_zeros_follow() {
    let (dir, bases) = bases();
    let (mut moved, mut in_place) = (0, 0);
    for (name, image) in bases {
        let before = if refusal(name).is_none() { read(dir, name, image) } else { Vec::new() };
        for size in sizes(image) {
            // The recipe's file beneath is as long as its disk, which is longer than it once was.
            let beneath = if *name == "over" { (1 << 20) + 512 } else { 0 };
            let (disk, result) = grown(image, size, beneath);
            if let Some(why) = refusal(name) {
                let error = result.unwrap_err().to_string();
                assert!(error.contains(why), "{name}: {error}");
                assert_eq!(&disk.now, image, "{name}: refused, and yet changed");
                continue;
            }
            if let Err(ResizeError::Refused(why)) = result {
                assert!(image[7] == 2 && why.contains("L1 table has no room"), "{name}: {why}");
                continue;
            }
            result.unwrap_or_else(|error| panic!("{name} to {size}: {error}"));
            let longer = disk.events.iter().any(|event| matches!(event, Event::Len(_)));
            *if longer { &mut moved } else { &mut in_place } += 1;
            let report = check(&disk.now[..]).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{name} to {size}");
            assert!(!report.dirty, "{name} to {size}");
            let after = read(dir, name, &disk.now);
            assert_eq!(after.len() as u64, size, "{name}");
            assert!(after[..before.len()] == before, "{name} to {size}: something is lost");
            assert!(after[before.len()..].iter().all(|&byte| byte == 0), "{name} to {size}");
            let file = format!("{name}.grown");
            let (verdict, text) = qemu_check(dir, &file);
            assert!(verdict.is_some_and(|v| v.corruptions == 0 && v.leaks == 0), "{name}: {text}");
        }
    }
    assert!(moved > 10 && in_place > 10, "{moved} moved, {in_place} did not");
}

#[test]
fn a_crash_leaves_one_size_or_the_other_and_all_that_was_there() {
    let mut dice = Dice(1);
    let mut states = 0;
    for (name, image) in bases().1.iter().filter(|base| base.1.len() < 1 << 20) {
        let held = guest(image);
        for size in sizes(image) {
            let (disk, result) = grown(image, size, 0);
            if result.is_err() {
                continue;
            }
            let (mut durable, mut pending) = (image.clone(), Vec::new());
            for event in sectors(&disk.events) {
                let sync = event == Event::Sync;
                if !sync {
                    pending.push(event);
                }
                for all in [true, false, false] {
                    let mut state = durable.clone();
                    let kept = pending.iter().filter(|_| all || dice.below(2) == 0);
                    kept.for_each(|event| apply(&mut state, event));
                    judge(&state, &held, [u64_at(image, SIZE_FIELD), size])
                        .unwrap_or_else(|wrong| panic!("{name} to {size}: {wrong}"));
                    states += 1;
                }
                if sync {
                    pending.drain(..).for_each(|event| apply(&mut durable, &event));
                }
            }
        }
    }
    assert!(states > 1000, "{states} states");
}

/// What is wrong with a state that a crash has left.
fn judge(state: &[u8], held: &[(u64, Vec<u8>)], sizes: [u64; 2]) -> Result<(), String> {
    if !sizes.contains(&u64_at(state, SIZE_FIELD)) {
        return Err(format!("the disk has {} bytes", u64_at(state, SIZE_FIELD)));
    }
    // As whoever opens it next does.
    let mut disk = Disk::new(state);
    rebuild_if_dirty(&mut disk, &mut |_, _, _| {}).map_err(|error| error.to_string())?;
    if guest(&disk.now) != held {
        return Err("the guest reads something else".to_string());
    }
    let report = check(&disk.now[..]).map_err(|error| error.to_string())?;
    if report.dirty || report.corruptions != 0 {
        return Err(format!("{} corruptions, dirty: {}", report.corruptions, report.dirty));
    }
    Ok(())
}

#[test]
fn nothing_that_lay_behind_the_end_comes_to_light() {
    const STEPS: &[&str] = &["io write -P 170 0 1M", "img resize --shrink -q FILE 99k"];
    const SHARED: &[&str] = &["io write -P 170 0 1000k", "img snapshot -c one FILE"];
    let dir = scratch("resize-tail");
    for options in ["cluster_size=64k", "cluster_size=16k,extended_l2=on", "compat=0.10"] {
        let recipe: Recipe = ("tail", options, "1M", STEPS);
        let image = make(&dir, recipe);
        let (disk, result) = grown(&image, 200 << 10, 0);
        result.unwrap();
        let read = read(&dir, "tail", &disk.now);
        let (held, new) = read.split_at(99 << 10);
        assert!(held.iter().all(|&byte| byte == 170) && new.iter().all(|&byte| byte == 0));
    }
    // What others read there, too, is not overwritten.
    let image = make(&dir, ("shared", "cluster_size=64k", "1000k", SHARED));
    let (disk, result) = grown(&image, 2 << 20, 0);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("shared with a snapshot"), "{error}");
    assert_eq!(disk.now, image);
}

#[test]
fn what_cannot_be_done_is_said_and_not_begun() {
    let image = base("v3-4k");
    let now = u64_at(&image, SIZE_FIELD);
    let refused = |size, beneath| {
        let (disk, result) = grown(&image, size, beneath);
        assert_eq!(disk.now, image);
        result.unwrap_err().to_string()
    };
    assert!(refused(now - 512, 0).contains("only made larger"));
    assert!(refused(now + 100, 0).contains("512"));
    assert!(refused(now * 2, now + 1).contains("backing file"));
    assert!(refused(1 << 62, 0).contains("l1_size"));
    // The same size is no change.
    let (disk, result) = grown(&image, now, 0);
    result.unwrap();
    assert!(disk.events.iter().all(|event| *event == Event::Sync));
    // Where it cannot grow, as on a block device, it is as it was.
    let mut disk = Disk { fixed: true, ..Disk::new(&image) };
    let error = grow(&mut disk, now + (1 << 30), 0).unwrap_err();
    assert!(matches!(error, ResizeError::Repair(RepairError::Grow(_))), "{error}");
    assert!(!error.is_final());
    assert_eq!(disk.now, image);
    assert!(resize::judge(&disk, now + (1 << 30), 0, true).is_ok());
    let error = resize::judge(&disk, now + (1 << 30), 0, false).unwrap_err();
    assert!(error.to_string().contains("block device"), "{error}");
}

#[test]
fn a_write_that_fails_is_final_once_something_in_use_is_written() {
    let image = base("v3-4k");
    let size = u64_at(&image, SIZE_FIELD) + (1 << 30);
    let whole = grown(&image, size, 0).0.events;
    let header = |event: &Event| matches!(event, Event::Write(0, _));
    let first = whole.iter().position(header).expect("the header is written");
    for (good, event) in whole.iter().enumerate() {
        let mut disk = Disk { good, ..Disk::new(&image) };
        let error = grow(&mut disk, size, 0).unwrap_err();
        let last = good >= first || *event == Event::Sync;
        assert_eq!(error.is_final(), last, "{good}: {error}");
        if !error.is_final() {
            assert_eq!(disk.now[..image.len()], image, "{good}: {error}");
        }
    }
}

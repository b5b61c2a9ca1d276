//! The checker against `qemu-img check`, and against random damage.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use qcow2::check::{CheckError, Checker, ReadAt, ReadError, Report, check};

use crate::damage::{damage, flip, put};
use crate::dice::{Dice, from_env};
use crate::images::{Base, base, bases, make, scratch};
use crate::verdict::{Verdict, compare, qemu_check};

/// A file, read through the slow way that has no bytes in memory.
struct Unmapped<'a>(&'a [u8]);

impl ReadAt for Unmapped<'_> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.0.read_at(offset, buf)
    }
}

/// Both ways to read an image must give the same.
pub(crate) fn ours(image: &[u8]) -> Result<Report, CheckError> {
    let report = check(image);
    assert_eq!(report, check(&Unmapped(image)));
    report
}

#[test]
fn images_that_qemu_made_are_clean_and_counted_alike() {
    let (dir, bases) = bases();
    for (name, image) in bases {
        let (theirs, text) = qemu_check(dir, &format!("{name}.base"));
        let report = ours(image).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mine = Verdict::from(&report);
        assert_eq!(Some(mine), theirs, "{name}: {:?}\n{text}", report.findings);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}: {:?}", report.findings);
    }
}

#[test]
fn fixtures_are_judged_as_qemu_img_does() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let dir = scratch("check-fixtures");
    // What the images name.
    std::fs::write(dir.join("backing.img"), vec![0; 1 << 16]).unwrap();
    std::fs::write(dir.join("data.img"), vec![0; 1 << 16]).unwrap();
    let mut classes = BTreeMap::new();
    let mut wrong = Vec::new();
    for folder in ["images", "corrupt"] {
        for entry in std::fs::read_dir(fixtures.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if path.extension().is_none_or(|extension| extension == "tsv") {
                continue;
            }
            let image = std::fs::read(&path).unwrap();
            std::fs::write(dir.join(&name), &image).unwrap();
            let (theirs, text) = qemu_check(&dir, &name);
            let mine = ours(&image);
            match compare(&mine, theirs.as_ref(), &text) {
                Ok(class) => *classes.entry(class).or_insert(0) += 1,
                Err(()) => wrong.push(format!("{name}: {mine:?}\n{theirs:?}\n{text}")),
            }
        }
    }
    println!("{classes:#?}");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// One broken image: what was done, and how the verdicts compare.
fn case(dir: &Path, bases: &[&Base], seed: u64) -> (Result<&'static str, ()>, String) {
    let mut dice = Dice(seed);
    let (name, base) = bases[dice.below(bases.len())];
    let mut image = base.clone();
    let mut told = format!("seed {seed}: {name}");
    for _ in 0..1 + dice.below(3) / 2 {
        write!(told, "; {}", damage(&mut dice, &mut image)).unwrap();
    }
    let file = format!("{name}.{}", seed % 4);
    std::fs::write(dir.join(&file), &image).unwrap();
    let (theirs, text) = qemu_check(dir, &file);
    let mine = ours(&image);
    let class = compare(&mine, theirs.as_ref(), &text);
    if let Ok(report) = &mine {
        write!(told, "\n  ours: {} {}", report.corruptions, report.leaks).unwrap();
        for finding in &report.findings {
            write!(told, "\n    {finding}").unwrap();
        }
    } else {
        write!(told, "\n  ours: {mine:?}").unwrap();
    }
    write!(told, "\n  theirs: {theirs:?}\n{text}").unwrap();
    (class, told)
}

#[test]
fn broken_images_are_judged_as_qemu_img_does() {
    let (cases, first) = (from_env("CHECK_CASES", 1000), from_env("CHECK_SEED", 0));
    // Small ones, so that what is broken matters.
    let (dir, bases) = bases();
    let bases: Vec<_> = bases.iter().filter(|base| base.1.len() < 1 << 20).collect();
    let mut classes = BTreeMap::new();
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        let work = |begin: u64| {
            let bases = &bases;
            scope.spawn(move || {
                let seeds = (first + begin..first + cases).step_by(2);
                seeds.map(|seed| case(dir, bases, seed)).collect::<Vec<_>>()
            })
        };
        for worker in [work(0), work(1)] {
            for (class, told) in worker.join().unwrap() {
                match class {
                    Ok(class) => *classes.entry(class).or_insert(0) += 1,
                    Err(()) => wrong.push(told),
                }
            }
        }
    });
    println!("{classes:#?}");
    let (count, shown) = (wrong.len(), wrong.iter().take(12).cloned().collect::<Vec<_>>());
    assert!(wrong.is_empty(), "{count} of {cases} differ:\n{}", shown.join("\n"));
}

#[test]
fn no_damage_makes_it_panic() {
    let runs = from_env("CHECK_FLIPS", 100_000);
    let bases: Vec<_> = bases().1.iter().filter(|base| base.1.len() < 100_000).collect();
    assert!(bases.len() > 10);
    let mut checker = Checker::new();
    let mut dice = Dice(from_env("CHECK_SEED", 0));
    let mut judged = 0;
    let mut image = Vec::new();
    for nth in 0..runs {
        // Damage adds up for a while; then a new image.
        if nth % 8 == 0 {
            image.clone_from(&bases[dice.below(bases.len())].1);
        }
        for _ in 0..1 + dice.below(8) {
            let span = if dice.below(64) == 0 { 128 } else { image.len() };
            let (at, bit) = (dice.below(span), dice.below(8));
            flip(&mut image, at, bit);
        }
        if dice.below(16) == 0 {
            damage(&mut dice, &mut image);
        }
        judged += u64::from(checker.check_bytes(&image).is_ok());
    }
    println!("{judged} of {runs} were judged");
    assert!(judged > runs / 4);
}

/// Sixty thousand snapshots of one L1 table, whose entries all name one L2 table, whose entries all
/// name one cluster: half a trillion references in a file of 4 MiB.
#[test]
fn work_follows_from_the_length_of_the_file() {
    const L1: usize = 1 << 20;
    const SNAPSHOTS: usize = 2 << 20;
    let mut image = base("v2");
    image.resize(5 << 20, 0);
    image[60..64].copy_from_slice(&52_000_u32.to_be_bytes());
    put(&mut image, 64, SNAPSHOTS as u64);
    for nth in 0..52_000 {
        put(&mut image, SNAPSHOTS + nth * 40, L1 as u64);
        put(&mut image, SNAPSHOTS + nth * 40 + 8, 131_072 << 32);
    }
    for nth in 0..131_072 {
        put(&mut image, L1 + nth * 8, 0x9_0000);
    }
    for nth in 0..64 {
        put(&mut image, 0x9_0000 + nth * 8, 0xa_0000);
    }
    let start = Instant::now();
    // More references than can be counted, and said so.
    let verdict = Checker::new().check_bytes(&image);
    assert_eq!(verdict, Err(CheckError::Unsupported("2^32 references to one cluster")));
    image[60..64].copy_from_slice(&500_u32.to_be_bytes());
    let summary = Checker::new().check_bytes(&image).unwrap();
    assert!(summary.corruptions > 500 * 131_072);
    assert!(start.elapsed().as_secs() < 10);
}

#[test]
fn a_check_of_a_tiny_image_takes_microseconds() {
    let dir = scratch("check-speed");
    let steps: &[&str] = &["io write 0 28k", "io write 60k 20k"];
    for (name, cluster) in [("speed-512", 512), ("speed-4k", 4096)] {
        let options = format!("cluster_size={cluster}");
        let image = make(&dir, (name, options.leak(), "200k", steps));
        let mut checker = Checker::new();
        // The best of many rounds, since others may be busy on this machine.
        let round = |_| {
            let start = Instant::now();
            for _ in 0..200 {
                let summary = checker.check_bytes(std::hint::black_box(&image)).unwrap();
                assert_eq!((summary.corruptions, summary.leaks), (0, 0));
            }
            start.elapsed().as_nanos() / 200
        };
        let each = (0..100).map(round).min().unwrap();
        println!("{} bytes in clusters of {cluster}: {each} ns per check", image.len());
    }
}

//! The checker against a second implementation: on images of many kinds that `qemu-img` made, and
//! on the same images broken in a thousand ways, `qemu-img check` must count what we count. Then
//! random damage, which must never make it panic, and its speed.
//!
//! `CHECK_CASES=n` and `CHECK_SEED=n` in the environment ask for more, or other, broken images.

#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use qcow2::check::{CheckError, Checker, FindingKind, ReadAt, ReadError, Report, check};

/// A test's own random numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn scratch(name: &str) -> PathBuf {
    // Each test of this file may run in a process of its own, at the same time.
    let mine = format!("{name}-{}", std::process::id());
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(mine);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn run(dir: &Path, program: &str, args: &[&str]) -> (bool, String) {
    let out = Command::new(program).args(args).current_dir(dir).output();
    let out = out.unwrap_or_else(|error| panic!("{program} must be installed: {error}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.success(), text + &String::from_utf8_lossy(&out.stderr))
}

/// What `qemu-img check` printed.
#[derive(Debug, PartialEq)]
struct Verdict {
    corruptions: u64,
    leaks: u64,
    allocated: u64,
    image_end: u64,
    check_errors: u64,
}

fn field(json: &str, name: &str) -> Option<u64> {
    let after = json.split(&format!("\"{name}\": ")).nth(1)?;
    after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The verdict, unless it gave up.
fn qemu_check(dir: &Path, file: &str) -> (Option<Verdict>, String) {
    const SECRET: &str = "secret,id=s,data=open";
    let luks = format!("driver=qcow2,file.filename={file},encrypt.key-secret=s");
    let args: &[&str] = if file.starts_with("luks") {
        &["check", "--output=json", "--object", SECRET, "--image-opts", &luks]
    } else {
        &["check", "--output=json", "-f", "qcow2", file]
    };
    let (_, text) = run(dir, "qemu-img", args);
    let verdict = field(&text, "check-errors").map(|check_errors| Verdict {
        corruptions: field(&text, "corruptions").unwrap_or(0),
        leaks: field(&text, "leaks").unwrap_or(0),
        allocated: field(&text, "allocated-clusters").unwrap_or(0),
        image_end: field(&text, "image-end-offset").unwrap_or(0),
        check_errors,
    });
    (verdict, text)
}

/// One image to begin with: options, size, then what `qemu-io` and `qemu-img` do to it.
type Recipe = (&'static str, &'static str, &'static str, &'static [&'static str]);

const WRITES: &[&str] = &["io write 0 20k", "io write 100k 3k", "io write -z 8k 4k"];
const SPARSE: &[&str] = &["io write 0 70k", "io write 600k 64k", "io discard 64k 64k"];
const SNAPSHOTS: &[&str] = &[
    "io write 0 16k",
    "img snapshot -c one FILE",
    "io write 4k 8k",
    "io write 40k 8k",
    "img snapshot -c two FILE",
    "io write 0 4k",
    "img snapshot -d one FILE",
];
const BITMAPS: &[&str] = &[
    "io write 0 16k",
    "img bitmap --add -g 512 FILE b0",
    "io write 4k 8k",
    "img bitmap --add -g 512 FILE b1",
    "io write 50k 9k",
];
const COMPRESSED: &[&str] = &["io write -c 0 16k", "io write -c 32k 4k", "io write 64k 4k"];

const RECIPES: &[Recipe] = &[
    ("v2", "compat=0.10,cluster_size=512", "200k", WRITES),
    ("v2-4k", "compat=0.10,cluster_size=4k", "1M", SPARSE),
    ("v3", "cluster_size=512", "200k", WRITES),
    ("v3-1k", "cluster_size=1k", "1M", SPARSE),
    ("v3-4k", "cluster_size=4k", "1M", SPARSE),
    ("v3-64k", "cluster_size=64k", "4M", SPARSE),
    ("v3-2m", "cluster_size=2M", "64M", SPARSE),
    ("empty", "cluster_size=512", "64k", &[]),
    ("meta", "cluster_size=512,preallocation=metadata", "200k", WRITES),
    ("full", "cluster_size=4k,preallocation=full", "256k", WRITES),
    ("lazy", "cluster_size=4k,lazy_refcounts=on", "1M", SPARSE),
    ("rc1", "cluster_size=512,refcount_bits=1", "200k", WRITES),
    ("rc2", "cluster_size=512,refcount_bits=2", "200k", SNAPSHOTS),
    ("rc4", "cluster_size=512,refcount_bits=4", "200k", SNAPSHOTS),
    ("rc8", "cluster_size=512,refcount_bits=8", "200k", SNAPSHOTS),
    ("rc32", "cluster_size=512,refcount_bits=32", "200k", SNAPSHOTS),
    ("rc64", "cluster_size=512,refcount_bits=64", "200k", SNAPSHOTS),
    ("snap-v2", "compat=0.10,cluster_size=512", "200k", SNAPSHOTS),
    ("snap", "cluster_size=512", "200k", SNAPSHOTS),
    ("snap-4k", "cluster_size=4k", "1M", SNAPSHOTS),
    ("packed", "cluster_size=512", "200k", COMPRESSED),
    ("packed-4k", "cluster_size=4k", "200k", COMPRESSED),
    ("packed-64k", "cluster_size=64k", "1M", &["io write -c 0 128k", "io write -c 512k 64k"]),
    ("zstd", "cluster_size=4k,compression_type=zstd", "200k", COMPRESSED),
    ("packed-snap", "cluster_size=4k", "200k", &["io write -c 0 16k", "img snapshot -c s FILE"]),
    ("ext", "cluster_size=16k,extended_l2=on", "1M", SPARSE),
    ("ext-snap", "cluster_size=16k,extended_l2=on", "1M", SNAPSHOTS),
    ("ext-packed", "cluster_size=16k,extended_l2=on", "1M", &["io write -c 0 64k"]),
    ("data", "cluster_size=4k,data_file=data.raw", "1M", SPARSE),
    ("bitmap", "cluster_size=512", "200k", BITMAPS),
    ("bitmap-4k", "cluster_size=4k", "200k", BITMAPS),
    ("bitmap-64k", "cluster_size=64k", "1M", BITMAPS),
    ("luks", LUKS, "200k", &[]),
];
const LUKS: &str = "cluster_size=64k,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";

/// Makes the image of a recipe and returns its bytes.
fn make(dir: &Path, (name, options, size, steps): Recipe) -> Vec<u8> {
    let file = format!("{name}.base");
    let secret = "secret,id=s,data=open";
    let args = ["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, &file, size];
    let (ok, text) = run(dir, "qemu-img", &args);
    assert!(ok, "{name}: {text}");
    for step in steps {
        let step = step.replace("FILE", &file);
        let (ok, text) = match step.split_once(' ').unwrap() {
            ("io", command) => run(dir, "qemu-io", &["-f", "qcow2", "-c", command, &file]),
            (_, args) => run(dir, "qemu-img", &args.split(' ').collect::<Vec<_>>()),
        };
        assert!(ok && !text.contains("rror"), "{name}: {step}: {text}");
    }
    std::fs::read(dir.join(file)).unwrap()
}

/// An image, with its name.
type Base = (&'static str, Vec<u8>);

/// The directory of the images, and the images. Made once for all tests.
fn bases() -> (&'static Path, &'static [Base]) {
    static BASES: OnceLock<(PathBuf, Vec<Base>)> = OnceLock::new();
    let (dir, bases) = BASES.get_or_init(|| {
        let dir = scratch("check-images");
        let bases = RECIPES.iter().map(|&recipe| (recipe.0, make(&dir, recipe))).collect();
        (dir, bases)
    });
    (dir, bases)
}

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
fn ours(image: &[u8]) -> Result<Report, CheckError> {
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
        let mine = Verdict {
            corruptions: report.corruptions,
            leaks: report.leaks,
            allocated: report.allocated,
            image_end: report.image_end,
            check_errors: 0,
        };
        assert_eq!(Some(mine), theirs, "{name}: {:?}\n{text}", report.findings);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}: {:?}", report.findings);
    }
}

fn u32_at(image: &[u8], at: usize) -> usize {
    let bytes = image.get(at..at + 4).unwrap_or(&[0; 4]);
    u32::from_be_bytes(bytes.try_into().unwrap()) as usize
}

fn u64_at(image: &[u8], at: usize) -> u64 {
    let bytes = image.get(at..at.saturating_add(8)).unwrap_or(&[0; 8]);
    u64::from_be_bytes(bytes.try_into().unwrap())
}

fn put(image: &mut [u8], at: usize, word: u64) {
    if let Some(bytes) = image.get_mut(at..at.saturating_add(8)) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
}

fn flip(image: &mut [u8], at: usize, bit: usize) {
    if let Some(byte) = image.get_mut(at) {
        *byte ^= 1 << bit;
    }
}

/// Where the tables of an image are, for breaking it.
struct Map {
    cluster: usize,
    order: usize,
    l1: Vec<usize>,
    l2: Vec<usize>,
    refcount_table: Vec<usize>,
}

impl Map {
    fn of(image: &[u8]) -> Self {
        let cluster = 1 << u32_at(image, 20).clamp(9, 21);
        let order = if u32_at(image, 4) == 2 { 4 } else { u32_at(image, 96).min(6) };
        let words = |start: u64, count: usize| -> Vec<usize> {
            let start = usize::try_from(start).unwrap_or(usize::MAX / 2);
            (0..count.min(4096)).map(|nth| start + nth * 8).filter(|&at| at < image.len()).collect()
        };
        let l1 = words(u64_at(image, 40), u32_at(image, 36));
        let tables = l1.iter().map(|&at| u64_at(image, at) & 0x00ff_ffff_ffff_fe00);
        let l2 = tables.filter(|&at| at != 0).flat_map(|at| words(at, cluster / 8)).collect();
        let count = u32_at(image, 56).saturating_mul(cluster / 8);
        Self { cluster, order, l1, l2, refcount_table: words(u64_at(image, 48), count) }
    }

    /// An entry, rather one that is in use.
    fn entry(dice: &mut Dice, image: &[u8], of: &[usize]) -> usize {
        let used: Vec<_> = of.iter().copied().filter(|&at| u64_at(image, at) != 0).collect();
        if used.is_empty() || dice.below(4) == 0 {
            dice.pick(&[of, &[0]].concat())
        } else {
            dice.pick(&used)
        }
    }

    /// The refcount of a cluster becomes `count`, or changes by it if `relative`.
    fn set_refcount(&self, image: &mut [u8], cluster: usize, count: u64, relative: bool) {
        let per_block = (self.cluster * 8) >> self.order;
        let Some(&entry) = self.refcount_table.get(cluster / per_block) else { return };
        let block = usize::try_from(u64_at(image, entry)).unwrap_or(usize::MAX / 2);
        let first = (cluster % per_block) << self.order;
        let at = block + first / 64 * 8;
        let width = 1 << self.order;
        // In a word read from big-endian bytes: whole counts from the top, bits from the bottom.
        let shift = match width {
            1..=4 => 56 - first % 64 / 8 * 8 + first % 8,
            _ => 64 - width - first % 64,
        };
        let mask = if width == 64 { u64::MAX } else { (1 << width) - 1 };
        let word = u64_at(image, at);
        let old = word >> shift & mask;
        let new = if relative { old.wrapping_add(count) } else { count } & mask;
        put(image, at, word & !(mask << shift) | new << shift);
    }
}

/// An entry changes: its place, its alignment, a flag, or all of it.
fn change_entry(dice: &mut Dice, image: &mut [u8], map: &Map, way: usize) -> String {
    let (name, table) = match way {
        2 | 3 => ("L2", &map.l2),
        4 => ("L1", &map.l1),
        _ => ("refcount table", &map.refcount_table),
    };
    let flags = [63, 63, 63, 62, 0, 0, dice.below(64)];
    let at = Map::entry(dice, image, table);
    let old = u64_at(image, at);
    let place = (dice.below(image.len() / map.cluster + 3) * map.cluster) as u64;
    let new = match dice.below(6) {
        0 => 0,
        1 | 2 => old & !0x00ff_ffff_ffff_fe00 | place,
        3 => old ^ (512 << dice.below(12)),
        _ => old ^ (1 << dice.pick(&flags)),
    };
    put(image, at, new);
    format!("{name} entry at {at:#x}: {old:#x} is {new:#x}")
}

/// Breaks an image in one way and says how.
fn damage(dice: &mut Dice, image: &mut Vec<u8>) -> String {
    let map = Map::of(image);
    let clusters = image.len() / map.cluster;
    let way = dice.below(12);
    match way {
        0 | 1 => {
            let (cluster, count) = (dice.below(clusters), dice.pick(&[0, 1, 2, 3, 7, u64::MAX]));
            map.set_refcount(image, cluster, count, false);
            format!("refcount of {cluster} is {count}")
        }
        2..=5 => change_entry(dice, image, &map, way),
        6 => {
            let len = dice.below(image.len() + 1).max(dice.below(image.len()));
            image.truncate(len);
            format!("truncated to {len}")
        }
        7 => {
            // A second reference that the refcount knows of.
            let (from, to) =
                (Map::entry(dice, image, &map.l2), dice.pick(&[&map.l2[..], &[0]].concat()));
            let word = u64_at(image, from) & !(1 << 63);
            let cluster = usize::try_from((word & 0x00ff_ffff_ffff_fe00) / map.cluster as u64);
            put(image, from, word);
            put(image, to, word);
            map.set_refcount(image, cluster.unwrap_or(0), 1, true);
            format!("L2 entry at {from:#x} is at {to:#x}, too: {word:#x}")
        }
        8 => {
            let (at, bit) = (dice.below(112), dice.below(8));
            flip(image, at, bit);
            format!("header byte {at} bit {bit}")
        }
        9 => {
            // A guest cluster lies on a table, and the refcount knows of it.
            let at = Map::entry(dice, image, &map.l2);
            let cluster = dice.below(clusters);
            put(image, at, (cluster * map.cluster) as u64);
            map.set_refcount(image, cluster, 1, true);
            format!("L2 entry at {at:#x} is cluster {cluster}, and its refcount is higher by 1")
        }
        _ => {
            let at = dice.below(image.len()) / 8 * 8;
            let word = u64_at(image, at) ^ 1 << dice.below(64);
            put(image, at, word);
            format!("word at {at:#x} is {word:#x}")
        }
    }
}

/// How a report compares with a verdict; the name of the class of the difference, if allowed.
fn compare(
    mine: &Result<Report, CheckError>,
    theirs: Option<&Verdict>,
    text: &str,
) -> Result<&'static str, ()> {
    if theirs.is_none() && text.contains("' is required for ") {
        return Ok("class 6: wants a data file or key");
    }
    let report = match mine {
        Err(_) if theirs.is_none() => return Ok("neither can open it"),
        Err(_) => return Err(()),
        Ok(report) => report,
    };
    let Some(theirs) = theirs else {
        return if report.corruptions > 0 { Ok("class 4: gives up") } else { Err(()) };
    };
    if (report.corruptions, report.leaks) == (theirs.corruptions, theirs.leaks) {
        return Ok(if report.corruptions + report.leaks == 0 {
            "equal, clean"
        } else {
            "equal, broken"
        });
    }
    if theirs.check_errors > 0 && report.corruptions > 0 && theirs.corruptions > 0 {
        return Ok("class 5: cannot get refcounts");
    }
    let classes = [
        (FindingKind::Overlap, "class 1: hidden overlap"),
        (FindingKind::CopiedWithoutOffset, "class 2: no offset"),
        (FindingKind::ZeroFlag, "class 2: zero flag"),
        (FindingKind::BeginsBeyondEnd, "class 3: begins behind the end"),
    ];
    // Ours must be more by exactly what is of these classes.
    if (report.corruptions - report.extra, report.leaks) != (theirs.corruptions, theirs.leaks) {
        return Err(());
    }
    let named = |class: &&(FindingKind, _)| report.findings.iter().any(|f| f.kind == class.0);
    Ok(classes.iter().find(named).map_or("class 1 to 3, among others", |class| class.1))
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
    let (_, base) = bases().1.iter().find(|base| base.0 == "v2").unwrap();
    let mut image = base.clone();
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

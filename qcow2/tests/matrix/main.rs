//! The matrix: images that QEMU makes, with every feature in combination with every other, go
//! through the engine and back, and QEMU judges them.
//!
//! By default a pairwise cover of the valid combinations is played: every pair of values that can
//! occur together does. `MATRIX=all` plays the whole product, and asks QEMU about every combination
//! that is left out. `ROW=n SEED=n` plays one row again. A line is printed for each:
//!
//! ```text
//! row  ver clus refcount ext backing storage snapshot preallocation
//! ```
//!
//! A row must not take longer than [`MOST`]. Where the machine has much else to do it may: then it
//! is played again when the others are done, up to three times, and of those only the time counts
//! that it had a CPU. The cover has a looser limit, [`MOST_ANYWHERE`], for any machine and a build
//! with all checks; what takes longer than [`MOST`] there is named.
//!
//! The files are in `MATRIX_DIR`; else in `/dev/shm`, where that has room, or among Cargo's. Those
//! of a row that fails are left there.

#![expect(clippy::unwrap_used, reason = "a test may end so")]

mod drive;
mod make;
mod play;
mod row;
mod tool;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use row::{REFUSED, RULES, Row, VALID};

/// How long a row may take.
const MOST: Duration = Duration::from_secs(3);
/// The same where it is not the time that is looked at.
const MOST_ANYWHERE: Duration = Duration::from_secs(10);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// A folder for the files of one test.
fn work(name: &str) -> PathBuf {
    let shm = Path::new("/dev/shm");
    let room = nix::sys::statvfs::statvfs(shm)
        .is_ok_and(|found| found.blocks_available() * found.fragment_size() > 1 << 30);
    let parent = match std::env::var_os("MATRIX_DIR") {
        Some(dir) => PathBuf::from(dir),
        None if room => shm.to_path_buf(),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let dir = parent.join(format!("qcow2-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Does something for each row, in threads, each time in a folder of its own.
fn for_each(work: &Path, rows: &[Row], what: impl Fn(&Path, Row) -> bool + Sync) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get().min(8));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(&row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let dir = work.join(row.number().to_string());
                    std::fs::create_dir_all(&dir).unwrap();
                    if what(&dir, row) {
                        std::fs::remove_dir_all(&dir).unwrap();
                    }
                }
            });
        }
    });
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
}

/// Plays these rows and prints the table. Returns how many fail, and how long each has taken.
fn play(work: &Path, rows: &[Row], seed: u64) -> (usize, Vec<(Duration, Row)>) {
    make::bases(work).unwrap();
    let failed = AtomicUsize::new(0);
    let times = Mutex::new(Vec::new());
    for_each(work, rows, |dir, row| {
        let (began, mut log) = (Instant::now(), Vec::new());
        let result = catch_unwind(AssertUnwindSafe(|| play::play(dir, row, seed, &mut log)));
        let result = result.unwrap_or_else(|panic| Err(format!("panic: {}", message(&*panic))));
        let time = began.elapsed();
        times.lock().unwrap().push((time, row));
        let ms = time.as_millis();
        let Err(text) = result else {
            println!("{row}  ok     {ms:5} ms");
            return true;
        };
        failed.fetch_add(1, Ordering::Relaxed);
        let most = if number("ROW").is_some() { usize::MAX } else { 20 };
        let last = log.len().saturating_sub(most);
        let log = log[last..].join("\n    ");
        let number = row.number();
        println!(
            "{row}  FAILED {ms:5} ms: {text}\n  files: {}\n  the last requests:\n    {log}\n  \
             replay: ROW={number} SEED={seed} cargo nextest run -p qcow2 --features testing \
             --test matrix --no-capture every_feature",
            dir.display()
        );
        false
    });
    (failed.into_inner(), times.into_inner().unwrap())
}

/// CPU time of this process and of the children that have ended.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The name, in parentheses, may hold anything. Behind it, field 3 of proc(5) is the first.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(4).map(|field| field.parse::<u64>().unwrap()).sum();
    // Linux counts them in hundredths of a second, towards user space.
    Duration::from_millis(ticks * 10)
}

/// Names the slowest row, and fails where one takes too long, also by itself.
fn judge_times(work: &Path, times: &[(Duration, Row)], seed: u64, most: Duration) {
    if let Some((time, row)) = times.iter().max() {
        println!("the slowest row took {} ms: {row}", time.as_millis());
    }
    for &(first, row) in times.iter().filter(|(time, _)| *time > MOST) {
        let dir = work.join(format!("{}-again", row.number()));
        let mut again = Duration::MAX;
        for _ in 0..3 {
            if again > MOST {
                std::fs::create_dir_all(&dir).unwrap();
                let (began, cpu) = (Instant::now(), cpu_time());
                play::play(&dir, row, seed, &mut Vec::new()).unwrap();
                again = again.min(began.elapsed()).min(cpu_time() - cpu);
                std::fs::remove_dir_all(&dir).unwrap();
            }
        }
        let (first, again) = (first.as_millis(), again.as_millis());
        println!("row {row} took {first} ms, and by itself {again} ms of CPU time");
        assert!(again <= most.as_millis(), "that is too long; replay it with ROW={}", row.number());
    }
}

/// Asks QEMU about these rows, and prints what it says, once each.
fn ask(work: &Path, rows: &[Row]) {
    let said = Mutex::new(BTreeMap::<(String, String), usize>::new());
    for_each(work, rows, |dir, row| {
        let refusal = make::refusal(dir, row);
        let rules = row.refusals();
        let Some(text) = refusal else {
            assert!(rules.is_empty(), "QEMU makes what we leave out: {row}");
            return true;
        };
        assert!(!rules.is_empty(), "QEMU refuses {row}: {text}");
        let text = text.lines().next().unwrap_or_default().rsplit(": ").next().unwrap_or_default();
        let key = (RULES[rules[0]].0.to_string(), text.to_string());
        *said.lock().unwrap().entry(key).or_default() += 1;
        true
    });
    for ((rule, text), count) in said.into_inner().unwrap() {
        println!("{count:4} refused: {rule}; QEMU says: {text}");
    }
}

#[test]
fn no_combination_vanishes() {
    let mut refused = [0; RULES.len()];
    let mut valid = 0;
    for row in row::all() {
        assert!(Row::new(row.number()) == row);
        match row.refusals().first() {
            Some(&rule) => refused[rule] += 1,
            None => valid += 1,
        }
    }
    assert_eq!((valid, refused), (VALID, REFUSED));
}

#[test]
fn what_is_left_out_is_what_qemu_refuses() {
    let work = work("asked");
    let all = std::env::var("MATRIX").is_ok_and(|what| what == "all");
    let rows = if all { row::all().collect() } else { row::refused_by_one_rule(4) };
    make::bases(&work).unwrap();
    ask(&work, &rows);
    println!("{} combinations were asked for", rows.len());
    std::fs::remove_dir_all(work).unwrap();
}

#[test]
fn every_feature_in_combination() {
    let work = work("matrix");
    let began = Instant::now();
    let all = std::env::var("MATRIX").is_ok_and(|what| what == "all");
    let rows = match number("ROW") {
        Some(number) => vec![Row::new(usize::try_from(number).unwrap())],
        None if all => row::all().filter(|row| row.is_valid()).collect(),
        None => row::pairwise(),
    };
    let seed = number("SEED").unwrap_or(1);
    let (failed, times) = play(&work, &rows, seed);
    for (rule, count) in RULES.iter().zip(REFUSED) {
        println!("{count:4} combinations do not exist: {}", rule.0);
    }
    let (rows, seconds) = (rows.len(), began.elapsed().as_secs());
    println!("{rows} of {VALID} valid rows, {failed} failed, in {seconds} s");
    assert_eq!(failed, 0, "{}", work.display());
    judge_times(&work, &times, seed, if all { MOST } else { MOST_ANYWHERE });
    std::fs::remove_dir_all(work).unwrap();
}

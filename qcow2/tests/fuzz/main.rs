//! A seeded fuzzer: images that are wrong in every way, all that reads them, and requests to them.
//! Bounded in time here; by hand for as long as wanted, or for a number of executions:
//!
//! ```text
//! FUZZ_EXECUTIONS=10000000 cargo test --release -p qcow2 --features testing --test fuzz \
//!     -- --nocapture
//! FUZZ_SECONDS=3600 cargo test …
//! ```
//!
//! `FUZZ_SEED` is for other executions than those of seed 1; with `FUZZ_CASE` it replays one. With
//! `FUZZ_KEEP_GOING=1` it goes on where something is wrong, and at the end tells each kind of
//! failure with how often it came and a case of it.
//! `qcow2/fuzz` is the same for cargo-fuzz.

#![expect(clippy::unwrap_used, reason = "a test that cannot prepare itself has failed")]

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2::testing::Prng;
use qcow2::testing::fuzz::{MOST_MEMORY, Outcome, execute, prepare};

mod found;
mod memory;
mod server;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// No execution may take longer, in time of a processor.
const LIMIT: Duration = Duration::from_secs(1);

/// The bytes of one execution.
fn bytes_of(seed: u64, case: u64) -> Vec<u8> {
    let mut prng = Prng::new(seed ^ case.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let len = 16 + prng.index(400);
    // Many small values, so that choices of 0 (no error, the first) are common.
    (0..len).map(|_| if prng.one_in(3) { 0 } else { prng.any().to_be_bytes()[0] }).collect()
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

#[derive(Default)]
struct Totals {
    executions: AtomicU64,
    served: AtomicU64,
    mended: AtomicU64,
    operations: AtomicU64,
    slowest_us: AtomicU64,
    memory: AtomicU64,
}

/// For how long this thread has had a processor.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// What a panic has said.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}

/// Executes `bytes`, and says what is wrong.
fn one(bytes: &[u8], totals: &Totals) -> Result<Outcome, String> {
    let work = || catch_unwind(AssertUnwindSafe(|| execute(bytes, server::run)));
    let began = Instant::now();
    let (outcome, peak) = memory::peak_of(work);
    let mut took = began.elapsed();
    totals.executions.fetch_add(1, Ordering::Relaxed);
    let outcome = outcome.map_err(|payload| message(&*payload))?;
    if took > LIMIT / 4 {
        // On a busy machine it may only have waited for its turn.
        let began = processor_time();
        let _ = work();
        took = processor_time() - began;
    }
    if took > LIMIT {
        return Err(format!("it took {took:?}"));
    }
    if peak > MOST_MEMORY {
        return Err(format!("it took {peak} bytes of memory"));
    }
    totals.slowest_us.fetch_max(u64::try_from(took.as_micros()).unwrap(), Ordering::Relaxed);
    totals.memory.fetch_max(peak as u64, Ordering::Relaxed);
    totals.mended.fetch_add(outcome.mended.into(), Ordering::Relaxed);
    if let Some(operations) = outcome.served {
        totals.served.fetch_add(1, Ordering::Relaxed);
        totals.operations.fetch_add(operations, Ordering::Relaxed);
    }
    Ok(outcome)
}

/// Failures by what they say, numbers left out: how often, the first case and its message.
#[derive(Default)]
struct Kinds(Mutex<BTreeMap<String, (u64, u64, String)>>);

impl Kinds {
    fn add(&self, case: u64, text: String) {
        let kind: String =
            text.chars().filter(|letter| !letter.is_ascii_digit()).take(100).collect();
        let mut kinds = self.0.lock().unwrap();
        kinds.entry(kind).or_insert((0, case, text)).0 += 1;
    }

    fn print(&self, seed: u64) {
        for (count, case, text) in self.0.lock().unwrap().values() {
            println!("{count} times, FUZZ_SEED={seed} FUZZ_CASE={case}: {text}");
        }
    }
}

fn case(seed: u64, case: u64, totals: &Totals, kinds: Option<&Kinds>) {
    let Err(wrong) = one(&bytes_of(seed, case), totals) else { return };
    let Some(kinds) = kinds else {
        panic!(
            "{wrong}; again: FUZZ_SEED={seed} FUZZ_CASE={case} cargo test --release -p qcow2 \
             --features testing --test fuzz -- --nocapture"
        );
    };
    kinds.add(case, wrong);
}

impl Totals {
    fn print(&self, began: Instant) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        println!(
            "{} executions in {:?}: {} images served, {} repaired, {} operations, the slowest took \
             {} us, memory at most {} KiB",
            of(&self.executions),
            began.elapsed(),
            of(&self.served),
            of(&self.mended),
            of(&self.operations),
            of(&self.slowest_us),
            of(&self.memory) >> 10,
        );
    }
}

#[test]
fn no_image_and_no_request_does_harm() {
    let seed = number("FUZZ_SEED").unwrap_or(1);
    let (totals, began) = (Totals::default(), Instant::now());
    if let Some(number) = number("FUZZ_CASE") {
        prepare();
        case(seed, number, &totals, None);
        return;
    }
    let kinds = number("FUZZ_KEEP_GOING").map(|_| Kinds::default());
    if kinds.is_some() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let most = number("FUZZ_EXECUTIONS").unwrap_or(u64::MAX);
    let limit = number("FUZZ_SECONDS").or_else(|| (most == u64::MAX).then_some(60));
    let end = limit.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().unwrap().get();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                prepare();
                while end.is_none_or(|end| Instant::now() < end) {
                    let first = next.fetch_add(256, Ordering::Relaxed);
                    if first >= most {
                        break;
                    }
                    (first..first + 256)
                        .for_each(|number| case(seed, number, &totals, kinds.as_ref()));
                }
            });
        }
    });
    totals.print(began);
    if let Some(kinds) = kinds {
        let _ = std::panic::take_hook();
        kinds.print(seed);
        assert!(kinds.0.lock().unwrap().is_empty(), "see above");
    }
    let (executions, served) = (totals.executions.into_inner(), totals.served.into_inner());
    assert!(executions >= 1000, "too few to mean anything");
    assert!(served * 10 > executions, "the damage is so great that nothing is served");
    assert!(totals.mended.into_inner() * 10 > executions, "nearly nothing is repaired");
}

#[test]
fn no_fixture_does_harm() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    prepare();
    let (totals, mut count) = (Totals::default(), 0);
    for folder in ["corrupt", "images"] {
        for entry in std::fs::read_dir(fixtures.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            // The last bytes choose what is done: as it is, and in some other ways.
            for seed in 0..64 {
                if let Err(wrong) = one(&bytes, &totals) {
                    panic!("{}, {seed}: {wrong}", path.display());
                }
                let chosen = bytes_of(seed, 0);
                let tail = (bytes.len() / 4).min(256).min(chosen.len());
                let at = bytes.len() - tail;
                bytes[at..].copy_from_slice(&chosen[..tail]);
            }
            count += 1;
        }
    }
    assert!(count > 90, "only {count} fixtures");
    assert!(totals.served.into_inner() > 100, "nearly nothing is served");
}

//! A seeded fuzzer: damaged images of every kind, and requests to them. Bounded in time here; by
//! hand for as long as wanted:
//!
//! ```text
//! FUZZ_SECONDS=3600 cargo test --release -p qcow2 --features testing --test fuzz -- --nocapture
//! ```
//!
//! `FUZZ_SEED` and `FUZZ_CASE` replay one execution. Needs `qemu-img` for the images.

#![expect(clippy::unwrap_used, reason = "a test that cannot prepare itself has failed")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2::testing::Prng;
use qcow2::testing::fuzz::{Verdict, execute};

/// Options for `qemu-img create`, and whether there is a snapshot.
const KINDS: [(&str, bool); 16] = [
    ("cluster_size=512", false),
    ("cluster_size=512,compat=v2", true),
    ("cluster_size=512,refcount_bits=1", false),
    ("cluster_size=512,refcount_bits=64", true),
    ("cluster_size=512,refcount_bits=8,preallocation=metadata", false),
    ("cluster_size=1k,preallocation=full", true),
    ("cluster_size=1k,lazy_refcounts=on", false),
    ("cluster_size=4k", true),
    ("cluster_size=4k,compression_type=zstd", false),
    ("cluster_size=512,backing_file=base.raw,backing_fmt=raw", false),
    ("cluster_size=512,backing_file=base.raw,backing_fmt=raw,compat=v2", true),
    ("cluster_size=4k,data_file=DATA", false),
    ("cluster_size=4k,data_file=DATA,data_file_raw=on", false),
    ("cluster_size=16k,extended_l2=on", false),
    ("cluster_size=16k,extended_l2=on", true),
    ("cluster_size=16k,extended_l2=on,backing_file=base.raw,backing_fmt=raw", true),
];

fn run(folder: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
}

/// Small images with data, zeros, compressed clusters and holes.
fn images() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("base.raw"), vec![7; 5000]).unwrap();
    let mut images = Vec::new();
    for (number, (options, snapshot)) in KINDS.into_iter().enumerate() {
        let name = format!("{number}.qcow2");
        let options = options.replace("DATA", &format!("{number}.data"));
        run(
            folder.path(),
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &options, &name, "48k"],
        );
        // Only where nothing is allocated yet, and in the image itself.
        let plain = ["data_file", "preallocation"].iter().any(|option| options.contains(option));
        let compressed = if plain { "write" } else { "write -c" };
        let compress = format!("{compressed} -P 3 16k 16k");
        let mut commands = vec!["write -P 1 0 6k", compress.as_str(), "write -z 8k 4k", "flush"];
        if options.contains("v2") {
            commands.remove(2);
        }
        let mut arguments = Vec::new();
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(&name);
        run(folder.path(), "qemu-io", &arguments);
        if snapshot {
            run(folder.path(), "qemu-img", &["snapshot", "-c", "one", &name]);
            run(folder.path(), "qemu-io", &["-c", "write -P 2 1k 2k", &name]);
        }
        images.push(std::fs::read(folder.path().join(&name)).unwrap());
    }
    images
}

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
    operations: AtomicU64,
    slowest_us: AtomicU64,
}

fn one(images: &[Vec<u8>], seed: u64, case: u64, totals: &Totals) {
    let image = &images[usize::try_from(case % images.len() as u64).unwrap()];
    let bytes = bytes_of(seed, case);
    let began = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| execute(image, &bytes)));
    let took = began.elapsed();
    let replay = format!(
        "FUZZ_SEED={seed} FUZZ_CASE={case} cargo test --release -p qcow2 --features testing \
         --test fuzz -- --nocapture"
    );
    let Ok(verdict) = result else { panic!("image {case} fails; again: {replay}") };
    assert!(took < Duration::from_secs(1), "it took {took:?}; again: {replay}");
    totals.executions.fetch_add(1, Ordering::Relaxed);
    totals.slowest_us.fetch_max(u64::try_from(took.as_micros()).unwrap(), Ordering::Relaxed);
    if let Verdict::Served(operations) = verdict {
        totals.served.fetch_add(1, Ordering::Relaxed);
        totals.operations.fetch_add(operations, Ordering::Relaxed);
    }
}

/// The most memory that this process ever had, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn no_image_and_no_request_makes_it_panic_or_hang() {
    let images = images();
    let seed = number("FUZZ_SEED").unwrap_or(1);
    let totals = Totals::default();
    if let Some(case) = number("FUZZ_CASE") {
        one(&images, seed, case, &totals);
        return;
    }
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(60));
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().unwrap().get();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while Instant::now() < end {
                    let first = next.fetch_add(256, Ordering::Relaxed);
                    (first..first + 256).for_each(|case| one(&images, seed, case, &totals));
                }
            });
        }
    });
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (executions, served) = (of(&totals.executions), of(&totals.served));
    println!(
        "{executions} executions in {:?}, seed {seed}: {served} images served, {} operations, the \
         slowest took {} us, memory at most {} KiB",
        began.elapsed(),
        of(&totals.operations),
        of(&totals.slowest_us),
        peak_kib()
    );
    assert!(executions >= 1000, "too few to mean anything");
    assert!(served * 10 > executions, "the damage is so great that nothing is served");
    // Each execution has caches of at most 64 KiB, and the whole process this much.
    assert!(peak_kib() < 256 << 10, "memory");
}

//! The loop of a queue, driven by requests that are made in its front.

use super::*;

use std::path::Path;
use std::process::Command;
use std::sync::{Barrier, Mutex};

use qcow2::Options;
use tempfile::TempDir;

use crate::bench;
use crate::generator::{Kind, Outcome, Plan};
use crate::link;
use crate::lock::Policy;
use crate::meter;
use crate::open::{self, Wanted};

fn qemu_img(folder: &Path, arguments: &[&str]) {
    let status = Command::new("qemu-img").args(arguments).current_dir(folder).status().unwrap();
    assert!(status.success(), "qemu-img {arguments:?}");
}

/// A queue in front of this image, and what comes of its requests.
fn queue(path: &Path, kind: Kind, count: u64, options: Options) -> (Queue, Arc<Mutex<Outcome>>) {
    let wanted = Wanted { lock: Policy::Off, ..Wanted::new(path, options) };
    let opened = open::open(&wanted).unwrap();
    opened.prepare().unwrap();
    let outcome = Arc::default();
    let plan = Plan {
        kind,
        bytes: 4096,
        size: opened.engine.virtual_size(),
        count,
        queues: 1,
        flush_after: 40,
        stamps: true,
        seed: 7,
        start: Arc::new(Barrier::new(1)),
        outcome: Arc::clone(&outcome),
    };
    let setup = bench::setup(opened, plan, 32).unwrap();
    let (main, end) = link::link(1).unwrap();
    main.let_go();
    (Queue::new(setup, 0, end).unwrap(), outcome)
}

/// Turns until so many requests of this kind were replied to.
fn until(queue: &mut Queue, kind: meter::Kind, count: u64) {
    while queue.meter.of(kind).requests < count {
        queue.turn().unwrap();
    }
}

/// After a warm-up, on an image in which clusters are allocated and copied to the end.
#[test]
fn a_turn_allocates_nothing() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("base.raw"), vec![1; 40 << 20]).unwrap();
    for (name, options) in [("plain", ""), ("small", "cluster_size=4k"), ("wide", "extended_l2=on")]
    {
        let base = "backing_file=base.raw,backing_fmt=raw";
        let all = format!("{base}{}{options}", if options.is_empty() { "" } else { "," });
        qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-o", &all, name, "256M"]);
        let path = folder.path().join(name);
        let options = Options { depth: 32, l2_cache: Some(64 << 10), ..Options::default() };
        let (mut queue, outcome) = queue(&path, Kind::Randwrite, u64::MAX, options);
        queue.start().unwrap();
        until(&mut queue, meter::Kind::Write, 4000);
        let before = *queue.meter.of(meter::Kind::Write);
        let counted = allocation_counter::measure(|| until(&mut queue, meter::Kind::Write, 8000));
        assert!(queue.meter.of(meter::Kind::Write).requests > before.requests);
        assert_eq!(counted.count_total, 0, "{name}: {counted:?}");
        let outcome = outcome.lock().unwrap();
        assert!(outcome.wrong.is_none(), "{outcome:?}");
    }
}

/// What is written is read back, by another queue on the same image.
#[test]
fn stamps_are_found_where_they_were_written_and_nowhere_else() {
    let folder = TempDir::new().unwrap();
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "image", "8M"]);
    let path = folder.path().join("image");
    let play = |kind, count| {
        let options =
            Options { depth: 32, read_only: kind == Kind::Randread, ..Options::default() };
        let (mut queue, outcome) = queue(&path, kind, count, options);
        queue.serve().unwrap();
        let outcome = outcome.lock().unwrap();
        (outcome.replied, outcome.wrong.clone())
    };
    let (replied, wrong) = play(Kind::Randread, 100);
    assert!(replied < 100 && wrong.unwrap().contains("not what --stamp writes"));
    // 2048 blocks, and a FLUSH after each 40.
    assert_eq!(play(Kind::Write, 2048), (2048 + 51, None));
    assert_eq!(play(Kind::Randread, 10_000), (10_000, None));
    qemu_img(folder.path(), &["check", "-q", "image"]);
}

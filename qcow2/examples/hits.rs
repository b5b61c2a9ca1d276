//! What a 4 KiB request costs in the engine alone, when all it needs is in the cache: handed in, its
//! operation taken and completed, its reply taken. Prints nanoseconds for each; for instructions,
//! which do not depend on what else the machine does, and nothing but those requests:
//!
//! ```text
//! cargo build --release -p qcow2 --example hits
//! valgrind --tool=callgrind --toggle-collect='*measured*' target/release/examples/hits read
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Instant;

use qcow2::{Engine, Extent, Header, Image, OpKind, Options, Outcome, Request};

const SIZE: u64 = 1 << 30;
const DEPTH: u16 = 64;
const BLOCK: u32 = 4096;
/// Operations that complete in a turn.
const BATCH: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let write = match arguments.next().as_deref() {
        Some("read") => false,
        Some("write") => true,
        _ => return Err("usage: hits read|write [REQUESTS]".into()),
    };
    let requests = arguments.next().map_or(Ok(1_000_000), |number| number.parse())?;
    let path = std::env::temp_dir().join(format!("hits-{}.qcow2", std::process::id()));
    let create = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"];
    let made = Command::new("qemu-img").args(create).arg(&path).arg(SIZE.to_string()).status()?;
    let file = File::open(&path)?;
    fs::remove_file(&path)?;
    if !made.success() {
        return Err("qemu-img create failed".into());
    }
    let mut engine = open(&file)?;
    // Once over the whole disk, so that all is in the cache.
    let blocks = SIZE / u64::from(BLOCK);
    for block in (0..blocks).step_by(16) {
        engine.submit(0, 0, request(block, write));
        while engine.next_reply(0).is_none() {
            step(&mut engine, &file)?;
        }
    }
    settle(&mut engine, &file)?;
    let before = engine.stats();
    let began = Instant::now();
    measured(&mut engine, requests, blocks, write);
    let nanoseconds = began.elapsed().as_secs_f64() * 1e9 / requests as f64;
    let after = engine.stats();
    let misses = after.l2_misses - before.l2_misses;
    println!("{nanoseconds:.0} ns for each of {requests} requests, {misses} misses");
    Ok(())
}

fn open(file: &File) -> Result<Engine, Box<dyn Error>> {
    let len = file.metadata()?.len();
    let part = |extent: Extent| -> Result<Vec<u8>, Box<dyn Error>> {
        let mut bytes = vec![0; usize::try_from(extent.len)?];
        file.read_exact_at(&mut bytes, extent.offset)?;
        Ok(bytes)
    };
    let header = Header::parse(&part(Extent { offset: 0, len: 65536 })?, len, false)?;
    let (l1, refcounts) = (part(header.l1_extent())?, part(header.refcount_table_extent())?);
    let image = Image::new(header, &l1, &refcounts, len)?;
    let mut engine = Engine::new(image, &Options { depth: DEPTH, ..Options::default() })?;
    settle(&mut engine, file)?;
    Ok(engine)
}

fn settle(engine: &mut Engine, file: &File) -> Result<(), Box<dyn Error>> {
    while engine.has_something_for(0) {
        step(engine, file)?;
    }
    Ok(())
}

/// Carries out an operation. Only tables are read; nothing is written.
fn step(engine: &mut Engine, file: &File) -> Result<(), Box<dyn Error>> {
    let op = engine.next_op(0).ok_or("the engine waits for nothing")?;
    if let OpKind::MetaRead { offset, len } = op.kind {
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, offset)?;
        engine.fill_staging(op.id, &bytes);
    }
    engine.complete(op.id, Outcome::Done);
    Ok(())
}

fn request(block: u64, write: bool) -> Request {
    let (offset, len) = (block * u64::from(BLOCK), BLOCK);
    if write { Request::Write { offset, len, fua: false } } else { Request::Read { offset, len } }
}

#[inline(never)]
fn measured(engine: &mut Engine, requests: u64, blocks: u64, write: bool) {
    let mut state = 1_u64;
    let mut next = || {
        // Multiplying by an odd number goes through all of 2^64; the upper half is random enough.
        state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        ((state >> 32) * blocks) >> 32
    };
    for tag in 0..DEPTH {
        engine.hand_in(0, tag, request(next(), write));
    }
    let mut left = requests;
    while left > 0 {
        // As a queue does it: what has come in a turn, and then what is to be done.
        engine.go_on();
        let mut count = 0;
        while let Some(reply) = engine.next_reply(0) {
            left = left.saturating_sub(1);
            engine.hand_in(0, black_box(reply).tag, request(next(), write));
            count += 1;
        }
        if count > 0 {
            engine.go_on();
        }
        for _ in 0..BATCH {
            let Some(op) = engine.next_op(0) else { break };
            engine.hand_back(black_box(op).id, Outcome::Done);
        }
    }
}

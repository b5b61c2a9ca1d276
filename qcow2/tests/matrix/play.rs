//! What is done with one row.

use std::path::Path;

use qcow2::testing::{Files, Prng};
use qcow2::{Discards, Health, Options, Request};

use crate::drive::{Drive, difference};
use crate::make::{self, DATA, IMAGE, SNAPSHOT};
use crate::row::{Row, SIZE, Storage};
use crate::tool;

/// Requests of the sequence: few where each copies and inflates a lot.
fn requests(row: Row) -> u64 {
    if row.cluster_bits() == 21 { 160 } else { 300 }
}

fn options(prng: &mut Prng) -> Options {
    Options {
        depth: u16::try_from(4 + prng.below(5)).expect("small"),
        reservation: if prng.one_in(2) { 16 << 10 } else { 4 << 20 },
        discards: if prng.one_in(5) { Discards::Keep } else { Discards::Unmap },
        stress: prng.one_in(4),
        ..Options::default()
    }
}

fn read_only() -> Options {
    Options { read_only: true, depth: 4, ..Options::default() }
}

/// Plays one row in an empty folder. What was asked of the image is in `log`.
///
/// # Errors
/// What is wrong.
pub fn play(dir: &Path, row: Row, seed: u64, log: &mut Vec<String>) -> Result<(), String> {
    let mut prng = Prng::new(seed ^ (row.number() as u64) << 32);
    let path = dir.join(IMAGE);
    let made = make::make(dir, row, &mut prng).map_err(|text| format!("making it: {text}"))?;

    let options = options(&mut prng);
    let mut files = Files::open(&path, &options)?;
    files.plain = prng.one_in(4);
    log.push(format!("{options:?} plain={}", files.plain));
    let mut drive = Drive::new(files, row, made.model, &mut prng, log);
    drive.keep = options.discards == Discards::Keep;
    let model = drive.run(requests(row))?;
    log.push("closed".to_string());
    judge(dir, row, &model).map_err(|text| format!("after our sequence: {text}"))?;

    if let Some(before) = made.snapshot {
        let found = Files::open_snapshot(&path, SNAPSHOT, &options)?.read_all()?;
        difference(&found, &before, 0).map_err(|text| format!("the snapshot: {text}"))?;
        go_back(dir, row, before, &mut prng).map_err(|text| format!("snapshot -a: {text}"))?;
    }
    reverse(dir, row, &mut prng, log).map_err(|text| format!("the reverse: {text}"))
}

/// What QEMU says of the image, and its raw data file is the virtual disk.
fn judge(dir: &Path, row: Row, model: &[u8]) -> Result<(), String> {
    tool::judge(dir, IMAGE, model)?;
    if row.storage() == Storage::DataFileRaw {
        let mut bytes = std::fs::read(dir.join(DATA)).map_err(|error| error.to_string())?;
        bytes.resize(model.len().max(bytes.len()), 0);
        difference(&bytes, model, 0).map_err(|text| format!("the data file: {text}"))?;
    }
    Ok(())
}

/// Writes one cluster to an image that QEMU has just written.
fn write_one(dir: &Path, name: &str, row: Row, place: u64, model: &mut [u8]) -> Result<(), String> {
    let options = Options { depth: 4, ..Options::default() };
    let mut files = Files::open(&dir.join(name), &options)?;
    let len = usize::try_from(row.cluster()).expect("small");
    let offset = place % (SIZE / row.cluster()) * row.cluster();
    let request = Request::Write { offset, len: u32::try_from(len).expect("small"), fua: false };
    files.submit(0, request, vec![0x77; len]);
    files.settle();
    let reply = files.replies.pop().ok_or("the last write is not replied to")?;
    reply.result.map_err(|error| format!("the last write ends with {error:?}"))?;
    match files.close() {
        Health::Good => {}
        Health::Failed(failure) => return Err(format!("the engine has failed: {failure:?}")),
    }
    model[usize::try_from(offset).expect("small")..][..len].fill(0x77);
    tool::judge(dir, name, model).map_err(|text| format!("after the last write: {text}"))
}

/// A copy of the image goes back to its snapshot.
fn go_back(dir: &Path, row: Row, mut before: Vec<u8>, prng: &mut Prng) -> Result<(), String> {
    let copy = "copy.qcow2";
    std::fs::copy(dir.join(IMAGE), dir.join(copy)).map_err(|error| error.to_string())?;
    tool::img(dir, &["snapshot", "-a", SNAPSHOT, copy])?;
    tool::judge(dir, copy, &before)?;
    write_one(dir, copy, row, prng.any(), &mut before)?;
    std::fs::remove_file(dir.join(copy)).map_err(|error| error.to_string())
}

/// QEMU writes, and the engine reads; then it writes once more.
fn reverse(dir: &Path, row: Row, prng: &mut Prng, log: &mut Vec<String>) -> Result<(), String> {
    let cluster = row.cluster();
    let mut commands = make::fill(prng, SIZE, None, 20);
    for _ in 0..6 {
        let start = prng.below(SIZE) & !511;
        let len = (512 + (prng.below(cluster * 3) & !511)).min(SIZE - start);
        commands.push(format!("discard {start} {len}"));
    }
    for index in (1..commands.len()).rev() {
        commands.swap(index, prng.index(index + 1));
    }
    log.extend(commands.iter().cloned());
    tool::io(dir, IMAGE, &commands)?;
    let mut model = tool::content(dir, IMAGE)?;
    let found = Files::open(&dir.join(IMAGE), &read_only())?.read_all()?;
    difference(&found, &model, 0)?;
    write_one(dir, IMAGE, row, prng.any(), &mut model)
}

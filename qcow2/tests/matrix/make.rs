//! The images of the matrix, as QEMU makes and fills them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qcow2::testing::Prng;

use crate::row::{Backing, Row, SIZE, Storage};
use crate::tool;

/// The image's name in its folder, and that of its data file and its snapshot.
pub const IMAGE: &str = "image.qcow2";
pub const DATA: &str = "image.data";
pub const SNAPSHOT: &str = "before";

/// End of the backing file that is shorter: within a cluster, whatever its size but 512.
pub const SHORT: u64 = (9 << 20) + 1536;

/// What was made for a row.
pub struct Made {
    /// What the image holds.
    pub model: Vec<u8>,
    /// What its snapshot holds.
    pub snapshot: Option<Vec<u8>>,
}

/// Bytes that compress to about a third, so that compressed clusters lie at odd places.
fn text(prng: &mut Prng, len: usize) -> Vec<u8> {
    let words: Vec<u64> = (0..64).map(|_| prng.any()).collect();
    let mut bytes = Vec::with_capacity(len + 24);
    while bytes.len() < len {
        bytes.extend_from_slice(&words[prng.index(words.len())].to_be_bytes());
        bytes.extend_from_slice(&[b' '; 8]);
    }
    bytes.truncate(len);
    bytes
}

/// Commands of qemu-io that fill an image with data, zero clusters of both kinds, and holes;
/// clusters are written compressed where `compressed` is their size.
pub fn fill(prng: &mut Prng, size: u64, compressed: Option<u64>, count: u64) -> Vec<String> {
    let (mut first, mut commands, mut taken) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..count {
        let longest = if prng.one_in(3) { 1 << 20 } else { 64 << 10 };
        let mut start = prng.below(size) & !511;
        let mut len = (512 + (prng.below(longest) & !511)).min(size - start);
        let kind = prng.below(8);
        if let Some(cluster) = compressed.filter(|_| kind < 5) {
            start -= start % cluster;
            // Each cluster takes QEMU its time.
            len = len.next_multiple_of(cluster).min((size - start) / cluster * cluster);
            len = len.min(cluster * 256);
            let apart = |&(at, bytes): &(u64, u64)| at >= start + len || at + bytes <= start;
            if len != 0 && taken.iter().all(apart) {
                // QEMU writes nothing compressed where a cluster is allocated.
                taken.push((start, len));
                first.push(format!("write -c -s ../base/text {start} {len}"));
            }
            continue;
        }
        commands.push(match kind {
            0..4 => format!("write -P {} {start} {len}", number + 1),
            4 | 5 => format!("write -s ../base/text {start} {len}"),
            6 => format!("write -z {start} {len}"),
            _ => format!("write -z -u {start} {len}"),
        });
    }
    first.append(&mut commands);
    first
}

/// The files that lie beneath some images, in the folder `base` of `work`; they are only read.
pub fn bases(work: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let dir = work.join("base");
    std::fs::create_dir_all(&dir).map_err(failed)?;
    let mut prng = Prng::new(1);
    std::fs::write(dir.join("text"), text(&mut prng, 3 << 20)).map_err(failed)?;
    // Two thirds data, of sparse files.
    for (name, len) in [("base.raw", SIZE), ("long.raw", 12 << 20)] {
        let file = File::create(dir.join(name)).map_err(failed)?;
        file.set_len(len).map_err(failed)?;
        for piece in (0..len).step_by(192 << 10) {
            let mut bytes = text(&mut prng, 128 << 10);
            bytes.truncate(usize::try_from(len - piece).expect("small"));
            file.write_all_at(&bytes, piece).map_err(failed)?;
        }
    }
    let create = |options: &str, more: &[&str], name: &str, size: u64| {
        let size = size.to_string();
        let args = ["create", "-q", "-f", "qcow2", "-o", options];
        tool::img(&dir, &[&args, more, &[name, &size]].concat())
    };
    create("cluster_size=4k,compression_type=zstd", &[], "base.qcow2", SIZE)?;
    tool::io(&dir, "base.qcow2", &fill(&mut prng, SIZE, Some(4096), 60))?;
    let beneath = ["-b", "long.raw", "-F", "raw"];
    create("extended_l2=on", &beneath, "short.qcow2", SHORT)?;
    tool::io(&dir, "short.qcow2", &fill(&mut prng, SHORT, None, 40))?;
    Ok(())
}

/// Makes the image of a row.
///
/// # Errors
/// What QEMU says where it refuses.
pub fn create(dir: &Path, row: Row) -> Result<(), String> {
    let mut options = format!(
        "compat={},cluster_size={},refcount_bits={},preallocation={}",
        if row.is_v2() { "v2" } else { "v3" },
        row.cluster(),
        row.refcount_bits(),
        row.preallocation(),
    );
    if row.extended() {
        options += ",extended_l2=on";
    }
    match row.storage() {
        Storage::Plain => {}
        Storage::Zlib => options += ",compression_type=zlib",
        Storage::Zstd => options += ",compression_type=zstd",
        Storage::DataFile => options += &format!(",data_file={DATA}"),
        Storage::DataFileRaw => options += &format!(",data_file={DATA},data_file_raw=on"),
    }
    let beneath: &[&str] = match row.backing() {
        Backing::None => &[],
        Backing::Qcow2 => &["-b", "../base/base.qcow2", "-F", "qcow2"],
        Backing::Raw => &["-b", "../base/base.raw", "-F", "raw"],
        Backing::Shorter => &["-b", "../base/short.qcow2", "-F", "qcow2"],
    };
    let size = SIZE.to_string();
    let args = ["create", "-q", "-f", "qcow2", "-o", &options];
    tool::img(dir, &[&args, beneath, &[IMAGE, &size]].concat())?;
    Ok(())
}

/// Cuts off the zeros at the end of a file.
fn shorten(path: &Path) -> std::io::Result<()> {
    let bytes = std::fs::read(path)?;
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    File::options().write(true).open(path)?.set_len(used.next_multiple_of(512) as u64)
}

/// Fills the image of a row, with a snapshot in the middle if the row has one.
///
/// # Errors
/// What QEMU says where it refuses.
pub fn make(dir: &Path, row: Row, prng: &mut Prng) -> Result<Made, String> {
    create(dir, row)?;
    let compressed = row.is_compressed().then_some(row.cluster());
    tool::io(dir, IMAGE, &fill(prng, SIZE, compressed, 24))?;
    if row.storage() == Storage::DataFile && prng.one_in(2) {
        shorten(&dir.join(DATA)).map_err(|error| error.to_string())?;
    }
    let mut model = tool::content(dir, IMAGE)?;
    let mut snapshot = None;
    if row.snapshot() {
        tool::img(dir, &["snapshot", "-c", SNAPSHOT, IMAGE])?;
        tool::io(dir, IMAGE, &fill(prng, SIZE, None, 4))?;
        snapshot = Some(std::mem::replace(&mut model, tool::content(dir, IMAGE)?));
    }
    Ok(Made { model, snapshot })
}

/// Asks QEMU whether a row exists. `Some` is what it says where it refuses.
pub fn refusal(dir: &Path, row: Row) -> Option<String> {
    let ask = || -> Result<(), String> {
        create(dir, row)?;
        let how = if row.is_compressed() { "-c " } else { "" };
        tool::io(dir, IMAGE, &[format!("write {how}0 {}", row.cluster())])?;
        if row.snapshot() {
            tool::img(dir, &["snapshot", "-c", SNAPSHOT, IMAGE])?;
        }
        Ok(())
    };
    ask().err()
}

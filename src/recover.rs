//! What an earlier crash has left in an image, mended before it is served for writing.
//!
//! - **The dirty bit** (lazy refcounts): refcounts cannot be relied on. They are rebuilt, whatever
//!   that takes, and the bit is cleared.
//! - **Leaks:** a server that was killed leaves what it had reserved counted and unused. They are
//!   looked for only where that is cheap, and reported and given back.
//!
//! What a crash does not leave, and what is found on the way all the same, is refused: an image
//! whose refcounts or flags let one cluster be used twice would lose data to the first write.
//!
//! All of it is done by the code of `check --repair`, with the page cache, on a descriptor of its
//! own: the image's locks are held, and nothing serves it yet.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use qcow2::check::repair::{Reclaim, rebuild_if_dirty, reclaim_leaks};
use qcow2::check::{Limits, Report, check_within, memory_for};

use crate::backing::quoted;
use crate::check::counted;
use crate::files::reopen;
use crate::image_file::ImageFile;

/// Leaks and errors are looked for where it takes no more than this. To be read: the L2 tables of
/// 16 GiB in clusters of 64 KiB, which takes a few milliseconds. In memory: 20 bytes per cluster of
/// a file of 52 GiB.
const CHEAP: Limits = Limits { read: 2 << 20, memory: 16 << 20 };

/// Refuses an image that must not be written to as it is, where that is cheap to find out. Writes
/// nothing. What is marked dirty is for [`rebuild`].
pub fn judge(file: &File, path: &Path) -> Result<()> {
    let image = open_again(file, false)?;
    match check_within(&image, CHEAP) {
        Ok(Some(report)) if !report.dirty => refuse_unsound(&report, path),
        Ok(_) => Ok(()),
        Err(error) => Err(image.explain(error.into())).context("checking its tables"),
    }
}

fn refuse_unsound(report: &Report, path: &Path) -> Result<()> {
    let Some(finding) = report.forbids_writing else { return Ok(()) };
    bail!(
        "its metadata is not sound, and writing to it could destroy data ({}, such as {finding}); \
         repair it with 'ublk-qcow2 check -f {} --repair all', or serve it with --read-only",
        counted(report.corruptions, "corruption"),
        quoted(path.as_os_str())
    )
}

/// The most memory that rebuilding refcounts may take when nobody has asked for it. Enough for a
/// file of 1.6 TiB in clusters of 64 KiB; a hostile one may be as long as it likes, and empty.
pub const MOST: u64 = 512 << 20;

/// Rebuilds the refcounts of an image that is marked dirty, if that takes at most so much memory.
/// `tell` hears how far that is.
pub fn rebuild(
    file: &File,
    path: &Path,
    most: Option<u64>,
    tell: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<String> {
    let mut image = open_again(file, true)?;
    let takes = memory_for(&image).map_err(|error| image.explain(error.into()))?;
    if most.is_some_and(|most| takes > most) {
        bail!(
            "it is marked dirty, and rebuilding its refcounts takes {} MiB of memory; 'ublk-qcow2 \
             check -f {} --repair all' does it, and --read-only serves it as it is",
            takes >> 20,
            quoted(path.as_os_str())
        );
    }
    let mut told = Ok(());
    let mut last = u64::MAX;
    let mut progress = |_, done: u64, total: u64| {
        let percent = (done * 100).checked_div(total).unwrap_or(100);
        if percent != last && told.is_ok() {
            last = percent;
            told =
                tell(&format!("rebuilding the refcounts of an image marked dirty ({percent} %)"));
        }
    };
    let result = rebuild_if_dirty(&mut image, &mut progress);
    told?;
    let done = match result {
        Ok(Some(done)) => done,
        Ok(None) => return Ok("it is not dirty any more".to_string()),
        Err(error) => return Err(image.explain(error.into())).context("rebuilding its refcounts"),
    };
    if done.after.dirty {
        bail!(
            "its refcounts cannot be rebuilt: {} corruptions are left; look at it with \
             'ublk-qcow2 check', or serve it with --read-only",
            done.after.corruptions
        );
    }
    refuse_unsound(&done.after, path)?;
    let (fixed, leaks) = (done.corruptions_fixed(), done.leaks_fixed());
    Ok(format!("it was marked dirty; refcounts rebuilt ({fixed} errors and {leaks} leaks mended)"))
}

/// Gives leaked clusters back if finding them is cheap. A note says what was found.
pub fn reclaim(file: &File, path: &Path, cluster_size: u64) -> Result<Option<String>> {
    let mut image = open_again(file, true)?;
    let shown = quoted(path.as_os_str());
    match reclaim_leaks(&mut image, CHEAP, &mut |_, _, _| {}) {
        Ok(Reclaim::Reclaimed { clusters: 0, flags: 0 }) => Ok(None),
        Ok(Reclaim::Reclaimed { clusters: 0, flags }) => {
            Ok(Some(format!("{flags} flags COPIED that a crash had left out were set")))
        }
        Ok(Reclaim::Reclaimed { clusters, flags }) => {
            let kib = (clusters * cluster_size).div_ceil(1024);
            let text = format!("{clusters} clusters leaked by a crash ({kib} KiB) were given back");
            Ok(Some(match flags {
                0 => text,
                _ => format!("{text}, and {flags} flags COPIED set"),
            }))
        }
        Ok(Reclaim::TooMuch) => Ok(Some(format!(
            "leaks and errors were not searched for, which would take long for this image; \
             'ublk-qcow2 check -f {shown}' does"
        ))),
        Ok(Reclaim::Unsound(report)) => {
            refuse_unsound(&report, path)?;
            Ok(Some(format!(
                "parts of it cannot be read ({} and {}); look at it with 'ublk-qcow2 check -f \
                 {shown}'",
                counted(report.corruptions, "corruption"),
                counted(report.leaks, "leak")
            )))
        }
        Err(error) => Err(image.explain(error.into())).context("giving back leaked clusters"),
    }
}

/// The image once more, through the page cache.
fn open_again(file: &File, write: bool) -> Result<ImageFile> {
    ImageFile::over(reopen(file, write).context("opening it once more")?)
}

//! What an earlier crash has left in an image, mended before it is served for writing.
//!
//! - **The dirty bit** (lazy refcounts): refcounts cannot be relied on. They are rebuilt, whatever
//!   that takes, and the bit is cleared.
//! - **Leaks:** a server that was killed leaves what it had reserved counted and unused. They are
//!   looked for only where little has to be read for it, and reported and given back.
//!
//! All of it is done by the code of `check --repair`, with the page cache, on a descriptor of its
//! own: the image's locks are held, and nothing serves it yet.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use qcow2::check::repair::{Reclaim, rebuild_if_dirty, reclaim_leaks};

use crate::image_file::ImageFile;

/// Leaks are looked for where no more metadata than this has to be read, in bytes: the L2 tables of
/// 16 GiB in clusters of 64 KiB. That takes a few milliseconds.
const CHEAP: u64 = 2 << 20;

/// Rebuilds the refcounts of an image that is marked dirty. `tell` hears how far that is.
pub fn rebuild(file: &File, tell: &mut dyn FnMut(&str) -> Result<()>) -> Result<String> {
    let mut image = open_again(file)?;
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
    if done.after.dirty || done.after.corruptions != 0 {
        bail!(
            "its refcounts cannot be rebuilt: {} corruptions are left; look at it with \
             'ublk-qcow2 check', or serve it with --read-only",
            done.after.corruptions
        );
    }
    let (fixed, leaks) = (done.corruptions_fixed(), done.leaks_fixed());
    Ok(format!("it was marked dirty; refcounts rebuilt ({fixed} errors and {leaks} leaks mended)"))
}

/// Gives leaked clusters back if finding them is cheap. A note says what was found.
pub fn reclaim(file: &File, cluster_size: u64) -> Result<Option<String>> {
    let mut image = open_again(file)?;
    match reclaim_leaks(&mut image, CHEAP, &mut |_, _, _| {}) {
        Ok(Reclaim::Reclaimed(0)) => Ok(None),
        Ok(Reclaim::TooMuch) => {
            // Not for the user each time: a crash may never have been.
            tracing::info!("not searched for leaks, which would take long: see check");
            Ok(None)
        }
        Ok(Reclaim::Reclaimed(count)) => {
            let kib = (count * cluster_size).div_ceil(1024);
            Ok(Some(format!("{count} clusters leaked by a crash ({kib} KiB) were given back")))
        }
        Ok(Reclaim::Unsound(report)) => Ok(Some(format!(
            "its metadata is not sound ({} corruptions, {} leaks); look at it with \
             'ublk-qcow2 check'",
            report.corruptions, report.leaks
        ))),
        Err(error) => Err(image.explain(error.into())).context("giving back leaked clusters"),
    }
}

/// The same file, without the flags and the position of `file`.
fn open_again(file: &File) -> Result<ImageFile> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let again = OpenOptions::new().read(true).write(true).open(path);
    ImageFile::over(again.context("opening it once more, to mend it")?)
}

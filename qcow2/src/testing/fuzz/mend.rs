//! What is asked of checks and repairs: that they end, that they agree with each other, and that
//! what a repair leaves is what it says it leaves.

use std::format;
use std::vec::Vec;

use crate::check::repair::{Repair, RepairError, RepairIo, Repaired, WriteError, repair};
use crate::check::{Checker, Finding, FindingKind, ReadAt, ReadError, Report, check};
use crate::testing::format::COPIED;

/// May a repair of everything leave this in an image, among all that is found afterwards?
#[must_use]
pub fn may_stay(image: &[u8], finding: &Finding, all: &[Finding]) -> bool {
    let bits = image.get(23).copied().unwrap_or_default();
    let cluster = |offset: u64| offset >> bits;
    let has = |kinds: &[FindingKind]| all.iter().any(|other| kinds.contains(&other.kind));
    match finding.kind {
        // What begins in a cluster of the file, the last of which may be cut short, and reaches
        // over its end is not counted, but its clusters are kept.
        FindingKind::Leak => all.iter().any(|other| {
            other.kind == FindingKind::BeyondEnd
                && cluster(other.found) <= cluster(finding.at)
                && finding.at < other.expected
        }),
        FindingKind::RefcountTooLow | FindingKind::SharedRefcountBlock => false,
        // An entry that is bad itself, or is in a table that something else uses, too, or that is
        // not where a table can be; or one cluster with more references than can be counted.
        FindingKind::Copied
        | FindingKind::NotCopied
        | FindingKind::CopiedCompressed
        | FindingKind::CopiedWithoutOffset => {
            all.iter().any(|other| other.at == finding.at && other.kind != finding.kind)
                || has(&[FindingKind::Overlap, FindingKind::RefcountOverflow])
                || has(&[FindingKind::Unaligned, FindingKind::BeyondEnd])
        }
        _ => true,
    }
}

/// Nothing is asked of an image with more findings than this: comparing them takes long.
const MOST_FINDINGS: usize = 500;

/// A file in memory that does not grow without end.
struct File {
    bytes: Vec<u8>,
    most: u64,
    changed: bool,
}

impl ReadAt for File {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.bytes.read_at(offset, buf)
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<&[u8]> {
        ReadAt::bytes(&self.bytes[..], offset, len)
    }
}

impl RepairIo for File {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let start = usize::try_from(offset).expect("a repair writes within the file");
        let place = self.bytes.get_mut(start..).and_then(|rest| rest.get_mut(..bytes.len()));
        place.expect("a repair writes within the file").copy_from_slice(bytes);
        self.changed = true;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), WriteError> {
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), WriteError> {
        assert!(len >= ReadAt::len(self), "a repair never cuts anything off");
        let len = usize::try_from(len.min(self.most + 1)).map_err(|_| WriteError)?;
        if len as u64 > self.most {
            return Err(WriteError);
        }
        self.bytes.resize(len, 0);
        self.changed = true;
        Ok(())
    }
}

/// Nothing is wrong with it as far as a check can tell.
pub(super) fn is_sound(image: &[u8]) -> bool {
    check(image).is_ok_and(|report| no_corruption(&report))
}

/// An image that was sound has been served.
pub(super) fn assert_still_sound(image: &[u8]) {
    let mut checker = Checker::new();
    checker.check(image).expect("a sound image is judged afterwards, too");
    let wrong = checker.findings().iter().find(|finding| match finding.kind {
        FindingKind::Leak => false,
        // Two entries of the active tables may share a cluster, if its refcount says so. When one
        // of them goes, the other could be marked, but nobody knows where it is.
        FindingKind::NotCopied => false,
        FindingKind::Copied => finding.found & COPIED != 0,
        _ => true,
    });
    assert!(wrong.is_none(), "a sound image is corrupt now: {wrong:?}");
}

fn no_corruption(report: &Report) -> bool {
    report.corruptions == 0 && !report.dirty && !report.corrupt
}

/// Repairs `image`; false if that could not be.
pub(super) fn mend(image: &mut Vec<u8>, what: Repair, room: usize) -> bool {
    let len = image.len() as u64;
    let most = len.saturating_mul(2).max(room as u64);
    let mut file = File { bytes: core::mem::take(image), most, changed: false };
    let result = repair(&mut file, what, &mut |_, _, _| {});
    let changed = file.changed;
    *image = file.bytes;
    match result {
        Ok(done) => {
            judge(image, &done, what);
            again(image, &done, what);
            true
        }
        Err(RepairError::Grow(_)) => false,
        Err(error) => {
            let text = format!("{error}");
            assert!(!changed, "a repair that wrote has failed: {text}");
            false
        }
    }
}

/// Is the image what the repair says it is?
fn judge(image: &[u8], done: &Repaired, what: Repair) {
    let mut checker = Checker::with_findings(MOST_FINDINGS);
    let found = match checker.check(image) {
        Ok(found) => found,
        Err(_) if done.left.is_some() => return,
        Err(error) => panic!("after its repair an image cannot be judged: {error}"),
    };
    let told = (done.after.corruptions, done.after.leaks);
    assert_eq!((found.corruptions, found.leaks), told, "a repair tells something else: {done:?}");
    // Where there were some already, refcounts may be taken for tables, and change these.
    assert!(
        what == Repair::All || done.before.corruptions != 0 || done.after.corruptions == 0,
        "a repair of leaks has made corruptions: {done:?}"
    );
    let all = checker.findings();
    if what == Repair::All && done.left.is_none() && all.len() < MOST_FINDINGS {
        let wrong = all.iter().find(|finding| !may_stay(image, finding, all));
        assert!(wrong.is_none(), "a repair has left {wrong:?}: {done:?}");
    }
}

/// A second repair has nothing to do.
fn again(image: &[u8], done: &Repaired, what: Repair) {
    if done.left.is_some() {
        return;
    }
    let mut file = File { bytes: image.to_vec(), most: u64::MAX - 1, changed: false };
    let result = repair(&mut file, what, &mut |_, _, _| {});
    assert!(file.bytes == image, "a second repair changes something: {done:?}, {result:?}");
}

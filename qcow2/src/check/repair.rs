//! Repairing an image: its refcounts, the flags COPIED that follow from them, and its marks.
//!
//! What references a cluster is taken as the truth, and the refcounts are made to agree. So this
//! repairs what the [check](super) counts as a leak, a refcount that is too low, a wrong COPIED, a
//! refcount table or block that is of no use. It **leaves** what cannot be put right without a
//! guess at the guest's data, and the check goes on to report it:
//!
//! - entries of L1 and L2 tables with bad offsets or reserved bits, bad entries of snapshots and
//!   bitmaps, clusters with two uses that exclude each other;
//! - more references than a refcount can hold;
//! - the refcounts of a table that the end of the file cuts short, which count as leaks.
//!
//! Of the tables that lead to guest data only COPIED ever changes, and that only in clusters that
//! are nothing but such a table; in those that only snapshots have, only where it means nothing.
//!
//! # The order of the writes
//!
//! A crash leaves the image never worse than it was: no cluster has a refcount that is too low, or
//! a COPIED that lets shared data be overwritten, which was in order before; and the guest reads
//! the same. Each step is durable before the next begins:
//!
//! 1. Nothing: what was read may not be durable yet, so a sync comes first. Then autoclear features
//!    that are not known are cleared, as the format demands of everyone who writes.
//! 2. **Refcounts in place**, where the table and its blocks are usable: each becomes the number of
//!    references found. Any part of these writes will do: those that rise protect more than before,
//!    those that fall free nothing that is referenced.
//!    Or **new refcounts**, where they are not: a complete table with blocks in space that nothing
//!    references, synced, and only then the header switches to it, in one sector.
//! 3. **COPIED**, now that the refcounts it depends on are durable. A crash before leaves a flag
//!    missing on a cluster that had a leak (a write copies it once more than it need), or one set
//!    that was wrong before.
//! 4. The image is checked again. The **marks** go last: corrupt if nothing at all is wrong any
//!    more, dirty as soon as the refcounts hold.
//!
//! New refcounts lie behind the end of the file, unless an entry leads there that must not come
//! true, or the file cannot grow; then in clusters of the file that have neither a reference nor a
//! refcount.
//!
//! # What is refused
//!
//! Encrypted images, and all that cannot be judged ([`CheckError`]): other versions, unknown
//! incompatible features. Where a table of snapshots or bitmaps could not be followed to its end,
//! references are missing: nothing is lowered, no flag set and nothing rebuilt ([`Left`]).

use core::{error, fmt};

use super::header::Head;
use super::{CheckError, Checker, Kind, Limits, ReadAt, Report, State, index};

mod counts;
mod edit;
mod flags;
mod rebuild;

/// A file that can be written, too.
pub trait RepairIo: ReadAt {
    /// Writes `bytes` at `offset`. No sector of 512 bytes is ever torn.
    ///
    /// # Errors
    /// Where the file cannot be written.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError>;

    /// Returns when all that was written before is durable.
    ///
    /// # Errors
    /// Where that is not known; nothing is written after that.
    fn sync(&mut self) -> Result<(), WriteError>;

    /// Changes the length of the file; what it grows by reads as zeros. It never shrinks.
    ///
    /// # Errors
    /// Where the file cannot grow.
    fn set_len(&mut self, len: u64) -> Result<(), WriteError>;
}

/// The file could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteError;

/// How much to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts that are too high, and what follows from them.
    Leaks,
    /// All refcounts, their tables, and the flags COPIED.
    All,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Counting references.
    Checking,
    /// Writing refcounts.
    Refcounts,
    /// Writing flags.
    Flags,
    /// Counting once more.
    CheckingAgain,
}

/// Called now and then with how much of a stage is done: `(stage, done, total)`.
pub type Progress<'a> = dyn FnMut(Stage, u64, u64) + 'a;

/// Why something that could be repaired was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// References are missing.
    Incomplete,
    /// There is no room for new refcounts.
    NoRoom,
    /// The new refcount table would be too large.
    TooLarge,
    /// Something takes the header, or the refcounts, for a table that leads to other clusters.
    Entangled,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Incomplete => {
                "a table of snapshots or bitmaps cannot be followed to its end, so what it \
                 references is not known and nothing was freed or rebuilt"
            }
            Self::NoRoom => {
                "the refcounts were not rebuilt: entries lead behind the end of the file, where \
                 new ones would have to be"
            }
            Self::TooLarge => {
                "the refcounts were not rebuilt: their table would be larger than 8 MiB"
            }
            Self::Entangled => {
                "the refcounts were not rebuilt: an entry takes the header for a table, so that \
                 what is referenced would change with it"
            }
        })
    }
}

/// What [`repair`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// The image before.
    pub before: Report,
    /// The image now.
    pub after: Report,
    /// The refcounts were written anew, to another place.
    pub rebuilt: bool,
    /// Why something was not done.
    pub left: Option<Left>,
}

impl Repaired {
    /// How many corruptions there are less.
    #[must_use]
    pub fn corruptions_fixed(&self) -> u64 {
        self.before.corruptions.saturating_sub(self.after.corruptions)
    }

    /// How many leaks there are less.
    #[must_use]
    pub fn leaks_fixed(&self) -> u64 {
        self.before.leaks.saturating_sub(self.after.leaks)
    }
}

/// Why a repair ended early. The image is then not worse than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairError {
    /// The image cannot be judged.
    Check(CheckError),
    /// An image of this kind is not written to.
    Refused(&'static str),
    /// The file could not be written at this offset.
    Write(u64),
    /// The file could not grow to this length.
    Grow(u64),
    /// The file could not be synced.
    Sync,
}

impl From<CheckError> for RepairError {
    fn from(error: CheckError) -> Self {
        Self::Check(error)
    }
}

impl fmt::Display for RepairError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Check(error) => error.fmt(f),
            Self::Refused(what) => write!(f, "{what} is not repaired"),
            Self::Write(at) => write!(f, "the file cannot be written at {at:#x}"),
            Self::Grow(len) => write!(f, "the file cannot grow to {len} bytes"),
            Self::Sync => f.write_str("the file cannot be synced"),
        }
    }
}

impl error::Error for RepairError {}

/// Checks an image, repairs it, and checks it again. Nothing is written to one without faults.
///
/// Nobody else may have the image open.
///
/// # Errors
/// See [`RepairError`].
pub fn repair<F: RepairIo + ?Sized>(
    file: &mut F,
    what: Repair,
    progress: &mut Progress<'_>,
) -> Result<Repaired, RepairError> {
    let mut work = Work::begin(file, what, progress)?;
    let before = work.state().report();
    let (mut rebuilt, mut left) = (false, None);
    let sound = before.corruptions == 0 && before.leaks == 0;
    if sound && !before.dirty && !before.corrupt {
        return Ok(Repaired { after: before.clone(), before, rebuilt, left });
    }
    work.clear_unknown_autoclear()?;
    if !sound {
        (rebuilt, left) = work.refcounts()?;
        work.flags()?;
    }
    let (after, wrong) = work.finish()?;
    if wrong && what == Repair::All {
        left = left.or(Some(Left::Entangled));
    }
    Ok(Repaired { before, after, rebuilt, left })
}

/// For an image that is marked dirty (lazy refcounts, and a writer that died): makes its refcounts
/// right and clears the mark; nothing, and `None`, for one that is not.
///
/// Every table of the image is read twice. Afterwards the refcounts can be relied on if
/// `after.dirty` is clear; `after.corruptions` tells what else is wrong.
///
/// # Errors
/// See [`RepairError`].
pub fn rebuild_if_dirty<F: RepairIo + ?Sized>(
    file: &mut F,
    progress: &mut Progress<'_>,
) -> Result<Option<Repaired>, RepairError> {
    if !Head::for_repair(file)?.dirty {
        return Ok(None);
    }
    repair(file, Repair::All, progress).map(Some)
}

/// What [`reclaim_leaks`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reclaim {
    /// What was wrong is right.
    Reclaimed {
        /// Clusters that had leaked, and are free (or count right) now.
        clusters: u64,
        /// Entries that had lost COPIED, and have it again.
        flags: u64,
    },
    /// Not tried: finding them takes more than the limits allow.
    TooMuch,
    /// Not tried: something else is wrong, or not known.
    Unsound(Report),
}

/// Frees leaked clusters, and sets COPIED where it is missing, which is what a crash leaves; if
/// finding that takes no more than the limits, and if nothing else is wrong. An image marked dirty
/// is for [`rebuild_if_dirty`].
///
/// # Errors
/// See [`RepairError`].
pub fn reclaim_leaks<F: RepairIo + ?Sized>(
    file: &mut F,
    limits: Limits,
    progress: &mut Progress<'_>,
) -> Result<Reclaim, RepairError> {
    let head = may_write(Head::parse(file)?)?;
    let mut checker = Checker::new();
    let mut checking = |done, total| progress(Stage::Checking, done, total);
    if !checker.walk_within(&*file, head, limits, &mut checking)? {
        return Ok(Reclaim::TooMuch);
    }
    let state = &checker.state;
    let flags = state.not_copied;
    if state.corruptions != flags || state.incomplete || state.dirty || state.corrupt {
        return Ok(Reclaim::Unsound(state.report()));
    }
    let leaks = state.leaks;
    if leaks != 0 || flags != 0 {
        let what = if flags == 0 { Repair::Leaks } else { Repair::All };
        let mut work = Work { file, head, what, checker, progress, changed: false };
        work.sync()?;
        work.clear_unknown_autoclear()?;
        work.refcounts()?;
        work.flags()?;
    }
    Ok(Reclaim::Reclaimed { clusters: leaks, flags })
}

fn may_write(head: Head) -> Result<Head, RepairError> {
    if head.encrypted { Err(RepairError::Refused("an encrypted image")) } else { Ok(head) }
}

/// One repair under way.
struct Work<'a, 'b, F: RepairIo + ?Sized> {
    file: &'a mut F,
    head: Head,
    what: Repair,
    checker: Checker,
    progress: &'a mut Progress<'b>,
    /// The refcount of a cluster that is in use has changed, so that flags may have to.
    changed: bool,
}

impl<'a, 'b, F: RepairIo + ?Sized> Work<'a, 'b, F> {
    /// Makes durable what is there, and checks it.
    fn begin(
        file: &'a mut F,
        what: Repair,
        progress: &'a mut Progress<'b>,
    ) -> Result<Self, RepairError> {
        let head = Self::head(file, what)?;
        let checker = Checker::new();
        let mut work = Self { file, head, what, checker, progress, changed: false };
        work.sync()?;
        work.walk(Stage::Checking)?;
        Ok(work)
    }

    fn head(file: &F, what: Repair) -> Result<Head, RepairError> {
        may_write(match what {
            Repair::Leaks => Head::parse(file)?,
            Repair::All => Head::for_repair(file)?,
        })
    }

    fn walk(&mut self, stage: Stage) -> Result<(), RepairError> {
        let mut progress = |done, total| (self.progress)(stage, done, total);
        Ok(self.checker.walk(&*self.file, self.head, &mut progress)?)
    }

    fn state(&self) -> &State {
        &self.checker.state
    }

    fn sync(&mut self) -> Result<(), RepairError> {
        self.file.sync().map_err(|_| RepairError::Sync)
    }

    fn clear_unknown_autoclear(&mut self) -> Result<(), RepairError> {
        if !self.head.unknown_autoclear {
            return Ok(());
        }
        edit::header(self.file, edit::keep_known_autoclear)?;
        self.sync()
    }

    /// Makes the refcounts agree with the references. Returns whether there are new ones, and what
    /// stood in the way.
    fn refcounts(&mut self) -> Result<(bool, Option<Left>), RepairError> {
        let mut left = self.state().incomplete.then_some(Left::Incomplete);
        if self.what == Repair::All && self.needs_rebuild()? {
            left = self.rebuild()?;
            if left.is_none() {
                return Ok((true, None));
            }
        }
        self.counts_in_place()?;
        Ok((false, left))
    }

    /// Checks again, and clears the marks that are not true any more. Returns also whether there
    /// still are refcounts that are wrong.
    fn finish(&mut self) -> Result<(Report, bool), RepairError> {
        self.head = Self::head(self.file, self.what)?;
        self.walk(Stage::CheckingAgain)?;
        let state = self.state();
        let mut after = state.report();
        let clean = after.corruptions == 0;
        let bad_refcounts = state.low_refcounts || state.bad_blocks;
        let used = &state.slots[..state.used_slots];
        let leaks = used.iter().any(|s| s.count > s.refs && s.kinds & Kind::CUT_SHORT == 0);
        let refcounts_hold = !bad_refcounts && !state.overflows && !state.incomplete;
        let dirty = after.dirty && !(clean || refcounts_hold && self.what == Repair::All);
        let corrupt = after.corrupt && !clean;
        if (dirty, corrupt) != (after.dirty, after.corrupt) {
            edit::header(self.file, |sector| edit::set_marks(sector, dirty, corrupt))?;
            self.sync()?;
            (after.dirty, after.corrupt) = (dirty, corrupt);
        }
        Ok((after, bad_refcounts || leaks))
    }

    /// Whether a cluster is of this one use, and referenced once.
    fn is_only(&self, cluster: u64, kind: u16) -> bool {
        let slot = self.state().slots.get(index(cluster));
        slot.is_some_and(|slot| slot.kinds & !Kind::LOWERED == kind && slot.refs == 1)
    }
}

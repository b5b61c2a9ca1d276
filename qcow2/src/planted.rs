//! Bugs to be planted on purpose: the explorer has to find each of them.
//!
//! Each [`Bug`] removes one edge or one step of the order on disk. Where the engine takes that
//! step, it asks [`is`]; without the feature `planted-bugs` the answer is the constant `false`.

macro_rules! bugs {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// A bug to be planted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Bug { $($(#[$doc])+ $name,)+ }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }
    };
}

bugs! {
    /// An epoch is cut when its sync completes, not when it is submitted.
    EpochCutAtCompletion,
    /// A FLUSH is answered by a sync that was under way when it came.
    FlushJoinsRunningSync,
    /// A writable open does not begin with a sync.
    OpenWithoutSync,
    /// Free space that was found at open counts as zeros.
    FreeAtOpenIsZero,
    /// A punched cluster counts as zeros before the punch is durable.
    PunchNotDurable,
    /// The cluster of a failed write counts as zeros again.
    FailedWriteStillZero,
    /// A cluster is freed while operations on it are in flight.
    PinIgnored,
    /// A refcount that fell and rises again counts as durable.
    ReraisedRefcountNotDurable,
    /// COPIED is set although the refcount is 2, or the refcount raised under it.
    CopiedWithRefcountTwo,
    /// An entry points to where the file may not reach.
    EntryAtEndOfFile,
    /// The header names the new refcount table before that is durable.
    HeaderBeforeTable,
    /// The image is read while writes of a dead process may still land.
    LateWriteAfterDeath,
    /// An entry of the overlay is dropped when its page is evicted or folded.
    OverlayEntryLost,
    /// No sync between L2 and L1.
    NoSyncBeforeL1,
    /// The refcount falls before the unlinking is durable.
    DecrementBeforeUnlink,
    /// A cluster is reused before its punch has completed.
    ReuseBeforePunch,
    /// A page counts as clean when its write is submitted.
    CleanBeforeWritten,
    /// A dirty page that is evicted is not looked for where its write is in flight.
    EvictedPageForgotten,
    /// A mapping in stale space does not wait for its data.
    MappingBeforeData,
    /// What is replaced is released before the replacement is secured.
    ReleaseBeforeSecured,
    /// A FLUSH skips its sync though something has completed.
    FlushSkipped,
    /// Refcounts are not synced before L2 is written.
    NoSyncBeforeL2,
    /// A refcount block is linked before it is durable.
    BlockBeforeDurable,
    /// A cluster is punched before its decrement is durable.
    PunchBeforeDecrement,
    /// A freed cluster is free before its decrement is durable.
    FreeBeforeDecrement,
    /// The file is extended, but the size is not made durable before it is used.
    SizeNotDurable,
    /// A failed sync is tried again and believed.
    SyncRetried,
    /// Writes go on after a failure.
    LatchIgnored,
    /// A short write counts as whole.
    ShortIsWhole,
    /// Copy-on-write does not copy what lies behind the payload.
    CopyWithoutTail,
    /// Two writes fill one guest cluster at the same time.
    NoClusterLock,
    /// A FUA write is answered before its mapping is durable.
    FuaBeforeMapping,
    /// The zero flag is written into a version 2 image.
    ZeroFlagInVersion2,
    /// Zeros over what lies beneath: a discarded cluster shows it again.
    DiscardShowsBeneath,
    /// A new L2 table in stale space is not zeroed.
    StaleTable,
    /// Closing cuts the file off below clusters in use.
    TruncateTooShort,
    /// The copy of an L2 table that a snapshot shares is linked before it is durable.
    TableCopyLinkedEarly,
    /// A compressed cluster gives one of its host clusters back twice.
    CompressedReleasedTwice,
    /// A subcluster's bit is set before its data is durable.
    SubclusterBeforeData,
    /// A host cluster that is still counted is punched.
    SharedClusterPunched,
    /// A FLUSH syncs the image and not its external data file.
    DataFileNotSynced,
    /// A new subcluster does not get what lies around the payload.
    SubclusterNotFilled,
    /// A mapping that waits for its data is not recorded in the journal.
    CopyNotRecorded,
    /// Zeroes and discards are not recorded.
    ZeroNotRecorded,
    /// The driver lets operations and answers overtake the records.
    RecordsOvertaken,
    /// The journal is retired when a round begins, not at its end.
    RetiredEarly,
    /// A successor serves before what it has adopted is durable, and clears the journal.
    AdoptedEarly,
    /// Of several records for one guest cluster the first counts.
    FirstRecordCounts,
    /// The short way of hits does not look into the overlay.
    HitPastOverlay,
    /// The short way writes into a cluster that a snapshot has, too.
    HitInSharedCluster,
    /// A write on the short way is nothing that a FLUSH must sync.
    HitNotCounted,
    /// A FUA write on the short way is answered without a sync.
    HitAnsweredBeforeSync,
}

impl Bug {
    /// Is it in what only a killed process and its successor come by?
    #[must_use]
    pub fn is_of_recovery(self) -> bool {
        matches!(
            self,
            Self::CopyNotRecorded
                | Self::ZeroNotRecorded
                | Self::RecordsOvertaken
                | Self::RetiredEarly
                | Self::AdoptedEarly
                | Self::FirstRecordCounts
        )
    }
}

#[cfg(feature = "planted-bugs")]
mod selected {
    extern crate std;

    use super::Bug;
    use core::cell::Cell;

    std::thread_local! {
        static CURRENT: Cell<Option<Bug>> = const { Cell::new(None) };
        static ASKED: Cell<u64> = const { Cell::new(0) };
    }

    /// Plants a bug in the engines of this thread, or none.
    pub fn plant(bug: Option<Bug>) {
        CURRENT.set(bug);
        ASKED.set(0);
    }

    /// Is this bug planted?
    #[must_use]
    pub fn is(bug: Bug) -> bool {
        let planted = CURRENT.get() == Some(bug);
        if planted {
            ASKED.set(ASKED.get() + 1);
        }
        planted
    }

    /// The bug that is planted in the engines of this thread.
    #[must_use]
    pub fn planted() -> Option<Bug> {
        CURRENT.get()
    }

    /// How often the engines of this thread have come by the planted bug.
    #[must_use]
    pub fn asked() -> u64 {
        ASKED.get()
    }
}

#[cfg(feature = "planted-bugs")]
pub use selected::{asked, is, plant, planted};

/// Is this bug planted? Not without the feature.
#[cfg(not(feature = "planted-bugs"))]
#[must_use]
#[inline]
pub const fn is(_: Bug) -> bool {
    false
}

/// Plants nothing without the feature.
#[cfg(not(feature = "planted-bugs"))]
pub fn plant(_: Option<Bug>) {}

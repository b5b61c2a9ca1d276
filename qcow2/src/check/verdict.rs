//! What a check says: findings, totals, and why it could not judge.

use alloc::vec::Vec;
use core::{error, fmt};

/// The file could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadError;

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the file could not be read")
    }
}

impl error::Error for ReadError {}

/// Why an image was not judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckError {
    /// It does not begin with the magic number of the format.
    NotQcow2,
    /// It is of this version, which is neither 2 nor 3.
    Version(u32),
    /// It has this incompatible feature, which the checker does not know.
    UnknownFeature(u32),
    /// The file could not be read at this offset.
    Unreadable(u64),
    /// This header field is outside its bounds, so that nothing could open the image.
    Header(&'static str),
    /// It has something that the checker does not know.
    Unsupported(&'static str),
    /// The file has too many clusters, or there is too little memory for them.
    TooLarge,
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotQcow2 => f.write_str("not a qcow2 image"),
            Self::Version(version) => write!(f, "version {version} is not known; 2 and 3 are"),
            Self::UnknownFeature(bit) => write!(
                f,
                "bit {bit} of header field incompatible_features is a feature that is not known"
            ),
            Self::Unreadable(offset) => write!(f, "the file cannot be read at {offset:#x}"),
            Self::Header(field) => write!(f, "bad header: {field}"),
            Self::Unsupported(what) => write!(f, "cannot judge {what}"),
            Self::TooLarge => f.write_str("too many clusters to count"),
        }
    }
}

impl error::Error for CheckError {}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// A refcount is higher than the number of references. `at` is the cluster.
    Leak,
    /// A refcount is lower than the number of references. `at` is the cluster.
    RefcountTooLow,
    /// More references than the refcount width can count. `at` is the cluster.
    RefcountOverflow,
    /// A cluster has uses that exclude each other. `at` is the cluster.
    Overlap,
    /// A refcount block is referenced otherwise, too.
    SharedRefcountBlock,
    /// COPIED is set where the refcount (`expected`) is not one, or is clear in an entry for an
    /// external data file.
    Copied,
    /// COPIED is clear, though the refcount (`expected`) is 1.
    NotCopied,
    /// COPIED is set and there is no offset.
    CopiedWithoutOffset,
    /// COPIED is set for a compressed cluster.
    CopiedCompressed,
    /// The zero flag where the format has none.
    ZeroFlag,
    /// Reserved bits are set.
    ReservedBits,
    /// An offset is not a multiple of the cluster size.
    Unaligned,
    /// Something (at `found`) reaches a cluster or more over the end of the file (`expected`).
    BeyondEnd,
    /// Something (at `found`) begins behind the end of the file (`expected`).
    BeginsBeyondEnd,
    /// A bitmap of subclusters (`expected`) does not fit the entry.
    SubclusterBitmap,
    /// A compressed cluster though there is an external data file.
    CompressedInDataFile,
    /// Snapshots though there is an external data file.
    SnapshotInDataFile,
    /// An entry of the snapshot table.
    SnapshotTable,
    /// An entry of the bitmap directory.
    BitmapDirectory,
}

impl FindingKind {
    /// Whether `qemu-img check` does not count it; see the [module](super) for the reasons.
    #[must_use]
    pub fn is_extra(self) -> bool {
        matches!(
            self,
            Self::Overlap | Self::CopiedWithoutOffset | Self::ZeroFlag | Self::BeginsBeyondEnd
        )
    }

    /// Whether the image must not be written to as it is: an allocation, or a write in place, could
    /// land on something else that is in use. What only makes a read fail is none of these, nor is
    /// a leak.
    #[must_use]
    pub fn forbids_writing(self) -> bool {
        match self {
            Self::RefcountTooLow
            | Self::RefcountOverflow
            | Self::Overlap
            | Self::SharedRefcountBlock
            | Self::Copied
            | Self::CopiedWithoutOffset
            | Self::CopiedCompressed => true,
            // No refcount protects a cluster behind the end, until the file grows and it is free.
            Self::BeyondEnd | Self::BeginsBeyondEnd => true,
            // A write copies what it could have overwritten: nothing is lost.
            Self::Leak
            | Self::NotCopied
            | Self::ZeroFlag
            | Self::ReservedBits
            | Self::Unaligned
            | Self::SubclusterBitmap
            | Self::CompressedInDataFile
            | Self::SnapshotInDataFile
            | Self::SnapshotTable
            | Self::BitmapDirectory => false,
        }
    }

    /// What it is, in words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Leak => "a leaked cluster, its refcount higher than its references",
            Self::RefcountTooLow => "a cluster with fewer refcounts than references",
            Self::RefcountOverflow => "a cluster with more references than a refcount can hold",
            Self::Overlap => "a cluster with two uses that exclude each other",
            Self::SharedRefcountBlock => "a refcount block that is something else, too",
            Self::Copied => "an entry whose flag COPIED does not fit the refcount",
            Self::NotCopied => "an entry without COPIED, though its refcount is one",
            Self::CopiedWithoutOffset => "an entry with COPIED and without an offset",
            Self::CopiedCompressed => "a compressed cluster with COPIED",
            Self::ZeroFlag => "an entry with a zero flag, which there is none of here",
            Self::ReservedBits => "an entry with reserved bits",
            Self::Unaligned => "an offset that is not a multiple of the cluster size",
            Self::BeyondEnd => "something that reaches over the end of the file",
            Self::BeginsBeyondEnd => "something that begins behind the end of the file",
            Self::SubclusterBitmap => "a bitmap of subclusters that does not fit its entry",
            Self::CompressedInDataFile => "a compressed cluster beside an external data file",
            Self::SnapshotInDataFile => "snapshots beside an external data file",
            Self::SnapshotTable => "a bad entry of the snapshot table",
            Self::BitmapDirectory => "a bad entry of the bitmap directory",
        }
    }
}

/// One thing that is wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// The place in the file: that of the entry, where the kind does not say otherwise.
    pub at: u64,
    /// What is there: the entry, or the refcount.
    pub found: u64,
    /// What should be: the number of references, or the refcount.
    pub expected: u64,
    /// How often it counts: an entry of a table counts once for each reference to the table.
    pub times: u32,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, at, found, expected, times } = self;
        write!(f, "{} at {at:#x}: found {found:#x}, expected {expected:#x}", kind.words())?;
        if *times != 1 { write!(f, ", {times} times") } else { Ok(()) }
    }
}

/// The outcome of [`check`](super::check).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Things that lose data, or will.
    pub corruptions: u64,
    /// How many of these `qemu-img check` does not count ([`FindingKind::is_extra`]).
    pub extra: u64,
    /// Clusters that are never used again.
    pub leaks: u64,
    /// The first 64 things found.
    pub findings: Vec<Finding>,
    /// The first of all that were found for which the image must not be written to
    /// ([`FindingKind::forbids_writing`]).
    pub forbids_writing: Option<Finding>,
    /// Guest clusters of the active tables that have a place in the file.
    pub allocated: u64,
    /// How many of these do not follow the one before them, or are compressed.
    pub fragmented: u64,
    /// How many of these are compressed.
    pub compressed: u64,
    /// Clusters of the virtual disk.
    pub guest_clusters: u64,
    /// Clusters of the file.
    pub host_clusters: u64,
    /// The end of the last cluster that is in use, in bytes.
    pub image_end: u64,
    /// The image is marked dirty.
    pub dirty: bool,
    /// The image is marked corrupt.
    pub corrupt: bool,
}

/// The outcome of [`Checker::check`](super::Checker::check), in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Things that lose data, or will.
    pub corruptions: u64,
    /// Clusters that are never used again.
    pub leaks: u64,
    /// The first thing found.
    pub first: Option<Finding>,
}

//! Errors: one type per phase. [`OpenError`] says why an image is not served, [`IoErrorKind`] is
//! what a guest request can end with.

use core::fmt;

/// What can go wrong with an operation or a guest request. Nothing else goes up to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoErrorKind {
    /// EIO.
    Io,
    /// ENOSPC.
    NoSpace,
    /// EOPNOTSUPP.
    Unsupported,
    /// EINVAL.
    Invalid,
}

/// Why an image was refused at open. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenError(OpenErrorInner);

/// The kinds of [`OpenError`] that a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenErrorKind {
    /// Not a qcow2 image at all.
    NotQcow2,
    /// The header or a table contradicts the specification, or the file ends too early.
    Malformed,
    /// A valid feature that is not served.
    Unsupported,
    /// The options do not fit the image.
    Options,
    /// The journal of a dead process does not belong to the image.
    Journal,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OpenErrorInner {
    Magic,
    Truncated { what: &'static str, need: u64, have: u64 },
    Version(u32),
    Bounds { field: &'static str, value: u64, expected: &'static str },
    Outside { what: &'static str, offset: u64, end: u64, file_len: u64 },
    Unaligned { what: &'static str, offset: u64 },
    L1TooSmall { entries: u64, need: u64 },
    BadEntry { table: &'static str, index: u64, value: u64, why: &'static str },
    Feature { name: &'static str, field: &'static str, value: u64, next: &'static str },
    UnknownFeature { field: &'static str, bit: u32, name: FeatureName },
    Option { what: &'static str, value: u64, expected: &'static str },
    Journal { guest: u64, value: u64, why: &'static str },
}

/// The name that the image itself gives a feature bit (header extension "feature name table").
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FeatureName(pub(crate) [u8; 46]);

impl fmt::Debug for FeatureName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for FeatureName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name comes from the image: only plain characters reach a terminal.
        for &byte in self.0.iter().take_while(|&&byte| byte != 0) {
            let shown = if byte.is_ascii_graphic() || byte == b' ' { byte as char } else { '?' };
            write!(f, "{shown}")?;
        }
        Ok(())
    }
}

impl From<OpenErrorInner> for OpenError {
    fn from(inner: OpenErrorInner) -> Self {
        Self(inner)
    }
}

impl OpenError {
    /// The kind of this error.
    #[must_use]
    pub fn kind(&self) -> OpenErrorKind {
        match self.0 {
            OpenErrorInner::Magic => OpenErrorKind::NotQcow2,
            OpenErrorInner::Version(_)
            | OpenErrorInner::Feature { .. }
            | OpenErrorInner::UnknownFeature { .. } => OpenErrorKind::Unsupported,
            OpenErrorInner::Option { .. } => OpenErrorKind::Options,
            OpenErrorInner::Journal { .. } => OpenErrorKind::Journal,
            OpenErrorInner::Truncated { .. }
            | OpenErrorInner::Bounds { .. }
            | OpenErrorInner::Outside { .. }
            | OpenErrorInner::Unaligned { .. }
            | OpenErrorInner::L1TooSmall { .. }
            | OpenErrorInner::BadEntry { .. } => OpenErrorKind::Malformed,
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            OpenErrorInner::Magic => {
                write!(f, "not a qcow2 image (the header does not begin with the magic QFI\\xfb)")
            }
            OpenErrorInner::Truncated { what, need, have } => {
                write!(f, "{what} is truncated: {need} bytes are needed, the file has {have}")
            }
            OpenErrorInner::Version(version) => write!(
                f,
                "qcow2 version {version} is not served (header field version; 2 and 3 are)"
            ),
            OpenErrorInner::Bounds { field, value, expected } => {
                write!(f, "header field {field} is {value}, expected {expected}")
            }
            OpenErrorInner::Outside { what, offset, end, file_len } => write!(
                f,
                "the {what} (bytes {offset} to {end}) lies outside the file of {file_len} bytes"
            ),
            OpenErrorInner::Unaligned { what, offset } => {
                write!(f, "{what} is {offset}, which is not a multiple of the cluster size")
            }
            OpenErrorInner::L1TooSmall { entries, need } => write!(
                f,
                "header field l1_size is {entries}, but the virtual size needs {need} entries"
            ),
            OpenErrorInner::BadEntry { table, index, value, why } => {
                write!(f, "{table} entry {index} is {value:#018x}: {why}")
            }
            OpenErrorInner::Feature { name, field, value, next } => {
                write!(f, "{name} is not served (header field {field} is {value}); {next}")
            }
            OpenErrorInner::UnknownFeature { field, bit, name } => {
                write!(f, "unknown feature in header field {field}: bit {bit}")?;
                if name.0[0] != 0 {
                    write!(f, " (the image calls it \"{name}\")")?;
                }
                Ok(())
            }
            OpenErrorInner::Option { what, value, expected } => {
                write!(f, "{what} is {value}, expected {expected}")
            }
            OpenErrorInner::Journal { guest, value, why } => write!(
                f,
                "the journal does not belong to this image: it maps guest cluster {guest} by \
                 {value:#018x}: {why}"
            ),
        }
    }
}

impl core::error::Error for OpenError {}

/// Something that went wrong while the image was served, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What.
    pub kind: FailureKind,
    /// Byte offset in the image file that it is about; 0 where that means nothing.
    pub offset: u64,
}

/// The kinds of [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// A metadata write failed. Final.
    MetadataWrite,
    /// An fdatasync failed. Final.
    Sync,
    /// A write would have hit metadata: the image contradicts itself. Final.
    Overlap,
    /// Something that was in use is not counted: the image contradicts itself. Final.
    NotCounted,
    /// The image contradicts itself, and that could not be written into its header.
    NotMarked,
    /// A page of a table could not be read.
    MetadataRead,
    /// The same in the file so many steps beneath the image's own backing file.
    MetadataReadBeneath(u8),
    /// A table entry contradicts the specification.
    BadEntry,
    /// The same in the file so many steps beneath the image's own backing file.
    BadEntryBeneath(u8),
    /// The journal of a dead process does not belong to the image; nothing was written. The offset
    /// is that of a guest cluster on the virtual disk. Final.
    Journal,
    /// What is in the journal could not be brought into the image; it stays there. The offset is as
    /// with `Journal`. Final.
    Adoption(IoErrorKind),
}

impl Failure {
    /// Is it that the journal of a dead process could not be brought in? It can be tried again.
    #[must_use]
    pub fn is_of_journal(self) -> bool {
        matches!(self.kind, FailureKind::Journal | FailureKind::Adoption(_))
    }

    /// Does it end writing to the image for good?
    #[must_use]
    pub fn is_final(self) -> bool {
        let other = matches!(
            self.kind,
            FailureKind::MetadataWrite
                | FailureKind::Sync
                | FailureKind::Journal
                | FailureKind::Adoption(_)
        );
        other || self.is_corruption()
    }

    /// Does the image contradict itself, so that its header is to say so?
    #[must_use]
    pub fn is_corruption(self) -> bool {
        matches!(self.kind, FailureKind::Overlap | FailureKind::NotCounted)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let offset = self.offset;
        match self.kind {
            FailureKind::MetadataWrite => write!(f, "a metadata write at byte {offset} failed")?,
            FailureKind::Sync => write!(f, "an fdatasync of the image failed")?,
            FailureKind::Overlap => {
                write!(f, "a write to byte {offset} would have hit metadata (image corrupt)")?;
            }
            FailureKind::NotCounted => {
                write!(
                    f,
                    "the cluster at byte {offset} was in use with refcount 0 (image corrupt)"
                )?;
            }
            FailureKind::NotMarked => {
                write!(f, "the image is corrupt, but its header could not be marked so")?;
            }
            FailureKind::MetadataRead => write!(f, "a table at byte {offset} cannot be read")?,
            FailureKind::Journal => write!(
                f,
                "the journal does not belong to this image: what it says of byte {offset} of the \
                 disk contradicts the image"
            )?,
            FailureKind::Adoption(kind) => write!(
                f,
                "a mapping from the journal, of byte {offset} of the disk, cannot be brought into \
                 the image: {kind}; the journal is kept: recover again when that is remedied"
            )?,
            FailureKind::BadEntry => {
                write!(f, "a bad table entry was found in the page at byte {offset}")?;
            }
            FailureKind::MetadataReadBeneath(layer) => {
                let layer = layer + 1;
                write!(f, "a table at byte {offset} of backing file {layer} cannot be read")?;
            }
            FailureKind::BadEntryBeneath(layer) => {
                let layer = layer + 1;
                write!(
                    f,
                    "a bad entry was found in the page at byte {offset} of backing file {layer}"
                )?;
            }
        }
        if matches!(self.kind, FailureKind::Journal | FailureKind::Adoption(_)) {
            // There was no service that could go on.
            return Ok(());
        }
        if self.is_final() {
            write!(f, "; writes have stopped, reads go on")?;
        }
        if self.is_corruption() || self.kind == FailureKind::NotMarked {
            write!(f, "; look at it with 'ublk-qcow2 check'")?;
        }
        Ok(())
    }
}

impl fmt::Display for IoErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O error",
            Self::NoSpace => "no space left",
            Self::Unsupported => "not supported",
            Self::Invalid => "invalid request",
        })
    }
}

//! Why an image tells nothing of itself.

use core::{error, fmt};

/// Why an image tells nothing of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InfoError {
    /// It does not begin with the magic number of the format.
    NotQcow2,
    /// It is of this version, which is neither 2 nor 3.
    Version(u32),
    /// The file ends within the header.
    Truncated {
        /// The bytes of a header.
        need: u64,
        /// The bytes of the file.
        have: u64,
    },
    /// The file could not be read at this offset.
    Unreadable(u64),
    /// A field has a value that cannot be.
    Field {
        /// Its name.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What it could be.
        expected: &'static str,
    },
    /// The entry at this place of the file does not fit into its directory, or into the file.
    Entry {
        /// The directory.
        of: &'static str,
        /// The place.
        at: u64,
    },
    /// There is too little memory for the first cluster.
    Memory,
}

impl fmt::Display for InfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotQcow2 => f.write_str("not a qcow2 image (the magic number is missing)"),
            Self::Version(version) => write!(f, "version {version} is not known; 2 and 3 are"),
            Self::Truncated { need, have } => {
                write!(f, "the header is truncated: it needs {need} bytes, the file has {have}")
            }
            Self::Unreadable(offset) => write!(f, "the file cannot be read at {offset:#x}"),
            Self::Field { field, value, expected } => {
                write!(f, "header field {field} is {value}; expected {expected}")
            }
            Self::Entry { of, at } => {
                write!(f, "the {of} is bad: its entry at {at:#x} does not fit in")
            }
            Self::Memory => f.write_str("too little memory"),
        }
    }
}

impl error::Error for InfoError {}

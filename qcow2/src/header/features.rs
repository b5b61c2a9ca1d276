//! Feature bits and the fields that go with them: what is served, and what is refused by name.

use byteorder::{BigEndian, ByteOrder};

use super::extensions::FeatureNames;
use super::{DECRYPT, INCOMPATIBLE_FIELD, V3_LENGTH, bounds};
use crate::error::{OpenError, OpenErrorInner};
use crate::op::Compression;

/// What the feature bits say, of an image that may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Features {
    /// The field incompatible_features.
    incompatible: u64,
    pub(super) dirty: bool,
    pub(super) corrupt: bool,
    pub(super) data_file: bool,
    pub(super) data_file_raw: bool,
    pub(super) extended_l2: bool,
    /// The bitmaps extension is up to date.
    pub(super) bitmaps: bool,
    /// Bits of autoclear_features that whoever writes to the image has to clear.
    pub(super) unknown_autoclear: u64,
    pub(super) compression: Compression,
    pub(super) refcount_order: u32,
}

/// Incompatible features, by their bits.
const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Autoclear features.
const BITMAPS: u64 = 1;
const RAW: u64 = 1 << 1;

impl Features {
    /// Specification: "Header", "Feature bits".
    pub(super) fn parse(
        bytes: &[u8],
        version: u32,
        names: &FeatureNames,
    ) -> Result<Self, OpenError> {
        let refuse = |name, field, value: u64, next| {
            Err(OpenErrorInner::Feature { name, field, value, next }.into())
        };
        let crypt = BigEndian::read_u32(&bytes[32..]);
        match crypt {
            0 => {}
            1 => return refuse("encryption (AES)", "crypt_method", 1, DECRYPT),
            2 => return refuse("encryption (LUKS)", "crypt_method", 2, DECRYPT),
            _ => return Err(bounds("crypt_method", crypt, "0, 1 or 2")),
        }
        if version < 3 {
            return Ok(Self::of_bits(0, 0, Compression::Zlib, 4));
        }
        let incompatible = BigEndian::read_u64(&bytes[INCOMPATIBLE_FIELD..]);
        let unknown = incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            let (field, bit) = ("incompatible_features", unknown.trailing_zeros());
            let name = names.find(0, bit);
            return Err(OpenErrorInner::UnknownFeature { field, bit, name }.into());
        }
        let order = BigEndian::read_u32(&bytes[96..]);
        if order > 6 {
            return Err(bounds("refcount_order", order, "at most 6"));
        }
        let compression = Self::compression(bytes, incompatible & COMPRESSION != 0)?;
        let autoclear = BigEndian::read_u64(&bytes[88..]);
        Ok(Self::of_bits(incompatible, autoclear, compression, order))
    }

    /// Refuses what somebody has marked as not fit to be written to.
    pub(super) fn may_write(&self) -> Result<(), OpenError> {
        let (name, next) = match (self.corrupt, self.dirty) {
            (false, false) => return Ok(()),
            (true, _) => (
                "writing to an image marked corrupt",
                "look at it with 'ublk-qcow2 check', repair or restore it, or serve it with \
                 --read-only",
            ),
            (false, true) => (
                "writing to an image marked dirty",
                "rebuild its refcounts with 'ublk-qcow2 check --repair all' first",
            ),
        };
        let (field, value) = ("incompatible_features", self.incompatible);
        Err(OpenErrorInner::Feature { name, field, value, next }.into())
    }

    fn of_bits(incompatible: u64, autoclear: u64, compression: Compression, order: u32) -> Self {
        Self {
            incompatible,
            dirty: incompatible & DIRTY != 0,
            corrupt: incompatible & CORRUPT != 0,
            data_file: incompatible & DATA_FILE != 0,
            data_file_raw: incompatible & DATA_FILE != 0 && autoclear & RAW != 0,
            extended_l2: incompatible & EXTENDED_L2 != 0,
            bitmaps: autoclear & BITMAPS != 0,
            unknown_autoclear: autoclear & !(BITMAPS | RAW),
            compression,
            refcount_order: order,
        }
    }

    /// The field compression_type, which only a longer header has.
    fn compression(bytes: &[u8], bit: bool) -> Result<Compression, OpenError> {
        let long = BigEndian::read_u32(&bytes[100..]) as usize > V3_LENGTH;
        let field = if long { bytes.get(V3_LENGTH).copied().unwrap_or(0) } else { 0 };
        match (field, bit) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (0, true) => {
                Err(bounds("compression_type", field, "1, as its incompatible bit is set"))
            }
            (_, false) => Err(bounds("compression_type", field, "0 without its incompatible bit")),
            (_, true) => Err(bounds("compression_type", field, "0 (zlib) or 1 (zstd)")),
        }
    }
}

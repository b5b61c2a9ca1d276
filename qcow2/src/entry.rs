//! On-disk table words and what they mean.
//!
//! A word becomes a [`Mapping`] exactly once, here, with all its reserved bits checked; everything
//! above matches on the meaning.

use crate::geometry::Geometry;
use crate::units::{HostCluster, HostOffset};

/// Bit 63 of L1 and L2 entries: the refcount of what the entry points to is exactly one
/// (specification: "L1 table entry", "L2 table entry").
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of the standard cluster descriptor: the cluster reads as zeros. Version 3 only.
const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where a table, or a cluster of guest data, lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub(crate) at: HostCluster,
    pub(crate) copied: bool,
}

/// Why a table word is not acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadWord {
    Reserved,
    Unaligned,
    Header,
    BeyondEnd,
    ZeroFlagInVersion2,
    CopiedWithoutOffset,
}

impl BadWord {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Reserved => "reserved bits are set",
            Self::Unaligned => "the offset is not a multiple of the cluster size",
            Self::Header => "the offset is that of the header",
            Self::BeyondEnd => "the offset lies outside the file",
            Self::ZeroFlagInVersion2 => "the zero flag is set in a version 2 image",
            Self::CopiedWithoutOffset => "the COPIED flag is set without an offset",
        }
    }
}

/// What an L2 entry says of one guest cluster (specification: "Standard Cluster Descriptor").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Reads as what lies beneath: zeros, as long as there is no backing file.
    Unallocated,
    /// Reads as zeros, whatever lies beneath; may keep a host cluster for later.
    Zero { keeps: Option<Pointer> },
    /// A host cluster holds the bytes.
    Data(Pointer),
    /// Compressed bytes somewhere in the file.
    Compressed,
}

/// What an image needs to be known for to read its words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoder {
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
}

impl Decoder {
    fn pointer(self, word: u64, file_len: u64) -> Result<Option<Pointer>, BadWord> {
        let offset = word & OFFSET;
        let copied = word & COPIED != 0;
        if offset == 0 {
            return if copied { Err(BadWord::CopiedWithoutOffset) } else { Ok(None) };
        }
        let at = self.cluster_at(offset)?;
        if offset >= file_len {
            return Err(BadWord::BeyondEnd);
        }
        Ok(Some(Pointer { at, copied }))
    }

    fn cluster_at(self, offset: u64) -> Result<HostCluster, BadWord> {
        if offset & (self.geometry.cluster_size() - 1) != 0 {
            return Err(BadWord::Unaligned);
        }
        HostCluster::new(offset >> self.geometry.cluster_bits()).ok_or(BadWord::Header)
    }

    /// The L2 table that an L1 entry names.
    pub(crate) fn l1(self, word: u64, file_len: u64) -> Result<Option<Pointer>, BadWord> {
        if word & !(OFFSET | COPIED) != 0 {
            return Err(BadWord::Reserved);
        }
        self.pointer(word, file_len)
    }

    /// The refcount block that a refcount table entry names.
    pub(crate) fn refcount_table(
        self,
        word: u64,
        file_len: u64,
    ) -> Result<Option<HostCluster>, BadWord> {
        // Bits 9 to 63 are the offset here, but no file is longer than 2^63 bytes, and L1 and L2
        // could not point behind 2^56 anyway.
        if word & !OFFSET != 0 {
            return Err(BadWord::Reserved);
        }
        Ok(self.pointer(word, file_len)?.map(|pointer| pointer.at))
    }

    /// The mapping that an L2 entry stands for.
    pub(crate) fn l2(self, word: u64, file_len: u64) -> Result<Mapping, BadWord> {
        if word == 0 {
            return Ok(Mapping::Unallocated);
        }
        if word & COMPRESSED != 0 {
            return if word & COPIED != 0 {
                Err(BadWord::Reserved)
            } else {
                Ok(Mapping::Compressed)
            };
        }
        if word & !(OFFSET | COPIED | ZERO) != 0 {
            return Err(BadWord::Reserved);
        }
        if word & ZERO != 0 && self.version < 3 {
            return Err(BadWord::ZeroFlagInVersion2);
        }
        let pointer = self.pointer(word, file_len)?;
        Ok(match pointer {
            keeps if word & ZERO != 0 => Mapping::Zero { keeps },
            Some(pointer) => Mapping::Data(pointer),
            None => Mapping::Unallocated,
        })
    }
}

/// The word for a table or data cluster whose refcount is one.
pub(crate) fn copied_word(at: HostOffset) -> u64 {
    debug_assert_eq!(at.0 & !OFFSET, 0, "host offsets are below 2^56 and cluster aligned");
    at.0 | COPIED
}

/// The same word (or none) for a cluster that reads as zeros. Version 3 only.
pub(crate) fn zero_word(word: u64) -> u64 {
    word | ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 1 << 30;

    fn decoder(version: u32) -> Decoder {
        Decoder { geometry: Geometry::new(16, 4), version }
    }

    fn at(index: u64, copied: bool) -> Pointer {
        Pointer { at: HostCluster::new(index).unwrap(), copied }
    }

    #[test]
    fn l2_words_mean_what_the_specification_says() {
        let l2 = |word| decoder(3).l2(word, FILE);
        assert_eq!(l2(0), Ok(Mapping::Unallocated));
        assert_eq!(l2(1), Ok(Mapping::Zero { keeps: None }));
        assert_eq!(l2(0x5_0000 | COPIED), Ok(Mapping::Data(at(5, true))));
        assert_eq!(l2(0x5_0000), Ok(Mapping::Data(at(5, false))));
        assert_eq!(l2(0x5_0001 | COPIED), Ok(Mapping::Zero { keeps: Some(at(5, true)) }));
        assert_eq!(l2(COMPRESSED | 0x1234), Ok(Mapping::Compressed));
    }

    #[test]
    fn bad_l2_words_are_refused() {
        let l2 = |word| decoder(3).l2(word, FILE);
        assert_eq!(l2(2), Err(BadWord::Reserved));
        assert_eq!(l2(1 << 56), Err(BadWord::Reserved));
        assert_eq!(l2(0x5_0200), Err(BadWord::Unaligned));
        assert_eq!(l2(FILE), Err(BadWord::BeyondEnd));
        assert_eq!(l2(COPIED), Err(BadWord::CopiedWithoutOffset));
        assert_eq!(l2(COPIED | COMPRESSED), Err(BadWord::Reserved));
        assert_eq!(decoder(2).l2(1, FILE), Err(BadWord::ZeroFlagInVersion2));
    }

    #[test]
    fn bad_table_words_are_refused() {
        assert_eq!(decoder(3).l1(1, FILE), Err(BadWord::Reserved));
        assert_eq!(decoder(3).l1(COMPRESSED, FILE), Err(BadWord::Reserved));
        assert_eq!(decoder(3).l1(FILE, FILE), Err(BadWord::BeyondEnd));
        assert_eq!(decoder(3).refcount_table(COPIED | 0x5_0000, FILE), Err(BadWord::Reserved));
        assert_eq!(decoder(3).refcount_table(0x5_0200, FILE), Err(BadWord::Unaligned));
    }
}

//! On-disk table words and what they mean.
//!
//! A word becomes a [`Mapping`] exactly once, here, with all its reserved bits checked; everything
//! above matches on the meaning.

use crate::geometry::Geometry;
use crate::header::Header;
use crate::op::{Compressed, Compression};
use crate::units::{GuestCluster, HostCluster, HostOffset};

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
    NotCopied,
    Elsewhere,
    BothBits,
    AllocatedNowhere,
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
            Self::NotCopied => "the COPIED flag is clear for the external data file",
            Self::Elsewhere => "the offset in the external data file is not that of the guest",
            Self::BothBits => "a subcluster is allocated and reads as zeros",
            Self::AllocatedNowhere => "a subcluster is allocated without an offset",
        }
    }
}

/// What an L2 entry says of one unit: a guest cluster, or a subcluster (specification: "Standard
/// Cluster Descriptor", "Extended L2 Entries").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Reads as what lies beneath. A cluster of which other subclusters are allocated has a place
    /// for this one, too.
    Unallocated { keeps: Option<Pointer> },
    /// Reads as zeros, whatever lies beneath; may keep a host cluster for later.
    Zero { keeps: Option<Pointer> },
    /// A host cluster holds the bytes, at the same place within the cluster.
    Data(Pointer),
    /// Compressed bytes somewhere in the file.
    Compressed(Compressed),
}

impl Mapping {
    pub(crate) const NOTHING: Self = Self::Unallocated { keeps: None };
}

/// An L2 entry as it is on disk: one word, and with extended entries a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry {
    pub(crate) word: u64,
    /// Bits 0 to 31: this subcluster is allocated; 32 to 63: it reads as zeros.
    pub(crate) bitmap: u64,
}

/// What an entry counts in the refcounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reference {
    Nothing,
    Cluster(Pointer),
    /// Each of `count` host clusters once. They may be counted by others as well.
    Compressed {
        first: u64,
        count: u64,
    },
}

/// What an image needs to be known for to read its words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoder {
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
    pub(crate) compression: Compression,
    /// Guest data lies in a file of its own, where cluster `n` of the guest is cluster `n`.
    pub(crate) data_file: bool,
}

impl Decoder {
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            geometry: header.geometry(),
            version: header.version(),
            compression: header.compression(),
            data_file: header.data_file().is_some(),
        }
    }

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

    /// The cluster of the external data file that holds guest cluster `guest`. Numbers are one
    /// more than they are in that file, whose cluster 0 holds data like any other.
    pub(crate) fn data_cluster(guest: GuestCluster) -> HostCluster {
        HostCluster::new(guest.0 + 1).expect("not zero")
    }

    /// Where in its file a cluster of guest data begins.
    pub(crate) fn data_start(self, at: HostCluster) -> HostOffset {
        HostOffset((at.index() - u64::from(self.data_file)) << self.geometry.cluster_bits())
    }

    /// The word for a cluster of guest data whose refcount is one.
    pub(crate) fn data_word(self, at: HostCluster) -> u64 {
        copied_word(self.data_start(at))
    }

    fn data_pointer(
        self,
        word: u64,
        guest: GuestCluster,
        file_len: u64,
    ) -> Result<Option<Pointer>, BadWord> {
        if !self.data_file {
            return self.pointer(word, file_len);
        }
        // The flag alone says that there is something: offset 0 is as good as any other.
        if word & COPIED == 0 {
            return if word & OFFSET == 0 { Ok(None) } else { Err(BadWord::NotCopied) };
        }
        if word & OFFSET != guest.0 << self.geometry.cluster_bits() {
            return Err(BadWord::Elsewhere);
        }
        Ok(Some(Pointer { at: Self::data_cluster(guest), copied: true }))
    }

    /// The mapping that an L2 entry stands for, of its unit number `unit`.
    pub(crate) fn l2(
        self,
        entry: L2Entry,
        guest: GuestCluster,
        unit: u32,
        file_len: u64,
    ) -> Result<Mapping, BadWord> {
        let L2Entry { word, bitmap } = entry;
        if word | bitmap == 0 {
            return Ok(Mapping::NOTHING);
        }
        if word & COMPRESSED != 0 {
            return self.compressed(entry, file_len).map(Mapping::Compressed);
        }
        if word & !(OFFSET | COPIED | ZERO) != 0 {
            return Err(BadWord::Reserved);
        }
        let extended = self.geometry.has_extended_l2();
        if word & ZERO != 0 && (self.version < 3 || extended) {
            return Err(if extended { BadWord::Reserved } else { BadWord::ZeroFlagInVersion2 });
        }
        let pointer = self.data_pointer(word, guest, file_len)?;
        if !extended {
            return Ok(match pointer {
                keeps if word & ZERO != 0 => Mapping::Zero { keeps },
                Some(pointer) => Mapping::Data(pointer),
                None => Mapping::NOTHING,
            });
        }
        let (allocated, zero) = (bitmap >> unit & 1 != 0, bitmap >> (32 + unit) & 1 != 0);
        match pointer {
            _ if allocated && zero => Err(BadWord::BothBits),
            None if allocated => Err(BadWord::AllocatedNowhere),
            Some(pointer) if allocated => Ok(Mapping::Data(pointer)),
            keeps if zero => Ok(Mapping::Zero { keeps }),
            keeps => Ok(Mapping::Unallocated { keeps }),
        }
    }

    /// Specification: "Compressed Clusters Descriptor". With x = 62 - (cluster_bits - 8), bits 0
    /// to x-1 are the offset in bytes, bits x to 61 how many sectors follow the first.
    fn compressed(self, entry: L2Entry, file_len: u64) -> Result<Compressed, BadWord> {
        let bits = self.geometry.cluster_bits();
        let x = 62 - (bits - 8);
        if entry.word & COPIED != 0 || entry.bitmap != 0 || self.data_file {
            return Err(BadWord::Reserved);
        }
        let offset = entry.word & ((1 << x) - 1);
        let sectors = ((entry.word & !COMPRESSED) >> x) + 1;
        if offset < self.geometry.cluster_size() {
            return Err(BadWord::Header);
        }
        if offset >= file_len {
            return Err(BadWord::BeyondEnd);
        }
        // At most 2^(21-8) sectors, 4 MiB.
        let len = u32::try_from(sectors * 512 - offset % 512).expect("at most 4 MiB");
        Ok(Compressed { offset, len, method: self.compression, cluster_bits: bits })
    }

    /// What an entry that was read before, without an error, counts in the refcounts.
    pub(crate) fn reference(self, entry: L2Entry, guest: GuestCluster) -> Reference {
        if self.data_file {
            return Reference::Nothing;
        }
        if entry.word & COMPRESSED != 0 {
            let Ok(found) = self.compressed(entry, u64::MAX) else { return Reference::Nothing };
            let bits = self.geometry.cluster_bits();
            let (first, end) = (found.offset >> bits, found.offset + u64::from(found.len));
            return Reference::Compressed { first, count: end.div_ceil(1 << bits) - first };
        }
        match self.data_pointer(entry.word, guest, u64::MAX) {
            Ok(Some(pointer)) => Reference::Cluster(pointer),
            _ => Reference::Nothing,
        }
    }

    /// `entry` with data in these units of host cluster `at`. What it had at another place is gone.
    pub(crate) fn with_data(self, entry: L2Entry, at: HostCluster, units: u32) -> L2Entry {
        let word = self.data_word(at);
        if !self.geometry.has_extended_l2() {
            return L2Entry { word, bitmap: 0 };
        }
        let units = u64::from(units);
        let same = entry.word == word;
        let before = if same { entry.bitmap } else { entry.bitmap & ZEROS_OF_UNITS };
        let before = if entry.word & COMPRESSED != 0 { 0 } else { before };
        L2Entry { word, bitmap: (before & !(units << 32)) | units }
    }

    /// An entry whose units all read as zeros, whatever lies beneath, and that keeps `word`'s host
    /// cluster if there is one. Version 3 only.
    pub(crate) fn zero_entry(self, word: u64) -> L2Entry {
        if self.geometry.has_extended_l2() {
            return L2Entry { word, bitmap: ZEROS_OF_UNITS };
        }
        L2Entry { word: word | ZERO, bitmap: 0 }
    }
}

/// The place in a plain word.
pub(crate) const PLAIN_OFFSET: u64 = OFFSET;

/// Does a word say that there is something at a place in the image, and nothing else but whether it
/// is shared?
pub(crate) fn is_plain(word: u64) -> bool {
    word & !(OFFSET | COPIED) == 0 && word & OFFSET != 0
}

/// The upper half of the bitmap of an extended entry.
const ZEROS_OF_UNITS: u64 = 0xffff_ffff << 32;

/// The word for a table or cluster whose refcount is one.
pub(crate) fn copied_word(at: HostOffset) -> u64 {
    debug_assert_eq!(at.0 & !OFFSET, 0, "host offsets are below 2^56 and cluster aligned");
    at.0 | COPIED
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 1 << 30;

    fn decoder(version: u32) -> Decoder {
        let (geometry, compression) = (Geometry::new(16, 4), Compression::Zlib);
        Decoder { geometry, version, compression, data_file: false }
    }

    fn at(index: u64, copied: bool) -> Pointer {
        Pointer { at: HostCluster::new(index).unwrap(), copied }
    }

    fn standard(version: u32, word: u64) -> Result<Mapping, BadWord> {
        decoder(version).l2(L2Entry { word, bitmap: 0 }, GuestCluster(0), 0, FILE)
    }

    #[test]
    fn l2_words_mean_what_the_specification_says() {
        let l2 = |word| standard(3, word);
        assert_eq!(l2(0), Ok(Mapping::NOTHING));
        assert_eq!(l2(1), Ok(Mapping::Zero { keeps: None }));
        assert_eq!(l2(0x5_0000 | COPIED), Ok(Mapping::Data(at(5, true))));
        assert_eq!(l2(0x5_0000), Ok(Mapping::Data(at(5, false))));
        assert_eq!(l2(0x5_0001 | COPIED), Ok(Mapping::Zero { keeps: Some(at(5, true)) }));
    }

    #[test]
    fn compressed_words_mean_what_the_specification_says() {
        // 64 KiB clusters: x = 62 - (16 - 8) = 54.
        let word = COMPRESSED | 3 << 54 | 0x5_0234;
        let expected = Compressed {
            offset: 0x5_0234,
            len: 4 * 512 - 0x34,
            method: Compression::Zlib,
            cluster_bits: 16,
        };
        assert_eq!(standard(3, word), Ok(Mapping::Compressed(expected)));
        let reference = |word| decoder(3).reference(L2Entry { word, bitmap: 0 }, GuestCluster(0));
        assert_eq!(reference(word), Reference::Compressed { first: 5, count: 1 });
        let word = COMPRESSED | 3 << 54 | 0x5_fa00;
        assert_eq!(reference(word), Reference::Compressed { first: 5, count: 2 });
        assert_eq!(standard(3, COMPRESSED | 0x1234), Err(BadWord::Header));
        assert_eq!(standard(3, COMPRESSED | FILE), Err(BadWord::BeyondEnd));
    }

    #[test]
    fn bad_l2_words_are_refused() {
        let l2 = |word| standard(3, word);
        assert_eq!(l2(2), Err(BadWord::Reserved));
        assert_eq!(l2(1 << 56), Err(BadWord::Reserved));
        assert_eq!(l2(0x5_0200), Err(BadWord::Unaligned));
        assert_eq!(l2(FILE), Err(BadWord::BeyondEnd));
        assert_eq!(l2(COPIED), Err(BadWord::CopiedWithoutOffset));
        assert_eq!(l2(COPIED | COMPRESSED | 0x5_0000), Err(BadWord::Reserved));
        assert_eq!(standard(2, 1), Err(BadWord::ZeroFlagInVersion2));
    }

    #[test]
    fn extended_entries_mean_what_the_specification_says() {
        let extended = Decoder { geometry: Geometry::new(16, 4).with_extended_l2(), ..decoder(3) };
        let l2 =
            |word, bitmap, unit| extended.l2(L2Entry { word, bitmap }, GuestCluster(0), unit, FILE);
        let (five, word) = (at(5, true), 0x5_0000 | COPIED);
        assert_eq!(l2(word, 0b10 | 0b100 << 32, 1), Ok(Mapping::Data(five)));
        assert_eq!(l2(word, 0b10 | 0b100 << 32, 2), Ok(Mapping::Zero { keeps: Some(five) }));
        assert_eq!(l2(word, 0b10, 3), Ok(Mapping::Unallocated { keeps: Some(five) }));
        assert_eq!(l2(0, 1 << 63, 31), Ok(Mapping::Zero { keeps: None }));
        assert_eq!(l2(0, 1, 0), Err(BadWord::AllocatedNowhere));
        assert_eq!(l2(word, 1 | 1 << 32, 0), Err(BadWord::BothBits));
        assert_eq!(l2(word | 1, 1, 0), Err(BadWord::Reserved));
        let entry = extended.with_data(L2Entry { word, bitmap: 3 << 32 | 0x30 }, five.at, 1);
        assert_eq!(entry, L2Entry { word, bitmap: 2 << 32 | 0x31 });
        let moved = extended.with_data(entry, at(6, true).at, 4);
        assert_eq!(moved, L2Entry { word: 0x6_0000 | COPIED, bitmap: 2 << 32 | 4 });
    }

    #[test]
    fn in_a_data_file_a_cluster_is_where_the_guest_has_it() {
        let external = Decoder { data_file: true, ..decoder(3) };
        let l2 = |word, guest| external.l2(L2Entry { word, bitmap: 0 }, GuestCluster(guest), 0, 0);
        let place =
            |guest| Pointer { at: Decoder::data_cluster(GuestCluster(guest)), copied: true };
        assert_eq!(l2(COPIED, 0), Ok(Mapping::Data(place(0))));
        assert_eq!(l2(COPIED | 0x5_0000, 5), Ok(Mapping::Data(place(5))));
        assert_eq!(l2(COPIED | 0x5_0000, 4), Err(BadWord::Elsewhere));
        assert_eq!(l2(0x5_0000, 5), Err(BadWord::NotCopied));
        assert_eq!(external.data_word(place(5).at), COPIED | 0x5_0000);
        assert_eq!(external.data_start(place(0).at), HostOffset(0));
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

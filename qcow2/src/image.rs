//! An open image: the header and the two top-level tables, with every word of them checked.

use alloc::vec::Vec;

use crate::entry::Decoder;
use crate::error::{OpenError, OpenErrorInner};
use crate::header::{Extent, Header};
use crate::layer::{Layer, MAX_LAYERS};
use crate::metaset::{Fixed, MetaSet};
use crate::table::Table;

/// An image that may be served. Made from the bytes of its header and top-level tables; all of
/// their entries were checked, so work and memory have followed the file's size, not its claims.
#[derive(Clone, Debug)]
pub struct Image {
    pub(crate) header: Header,
    pub(crate) decoder: Decoder,
    pub(crate) l1: Table,
    pub(crate) refcounts: Table,
    pub(crate) metadata: MetaSet,
    pub(crate) file_len: u64,
    /// Bytes of the external data file.
    pub(crate) data_len: Option<u64>,
    /// What lies beneath, from the top.
    pub(crate) layers: Vec<Layer>,
}

pub(crate) const NO_DATA_FILE: OpenErrorInner = OpenErrorInner::Feature {
    name: "an external data file that nobody opened",
    field: "incompatible_features",
    value: 4,
    next: "see Image::with_data_file",
};

impl Image {
    /// Checks the tables: `l1` and `refcount_table` are the bytes at the header's
    /// [`l1_extent`](Header::l1_extent) and
    /// [`refcount_table_extent`](Header::refcount_table_extent).
    ///
    /// # Errors
    /// An entry with reserved bits set, unaligned, outside the file, or pointing to where other
    /// metadata lies.
    pub fn new(
        header: Header,
        l1: &[u8],
        refcount_table: &[u8],
        file_len: u64,
    ) -> Result<Self, OpenError> {
        Self::build(header, l1, Some(refcount_table), file_len)
    }

    /// The same of an image that is only read: what its refcount table says is of no account.
    ///
    /// # Errors
    /// As of [`new`](Self::new), for the L1 table.
    pub fn for_reading(header: Header, l1: &[u8], file_len: u64) -> Result<Self, OpenError> {
        Self::build(header, l1, None, file_len)
    }

    fn build(
        header: Header,
        l1: &[u8],
        refcount_table: Option<&[u8]>,
        file_len: u64,
    ) -> Result<Self, OpenError> {
        let decoder = Decoder::of(&header);
        let geometry = decoder.geometry;
        let page_bits = geometry.page_bits();
        let l1 = Table::parse(l1, header.l1_extent(), page_bits);
        let refcounts = match refcount_table {
            Some(bytes) => Table::parse(bytes, header.refcount_table_extent(), page_bits),
            None => Table::parse(&[], Extent { offset: 0, len: 0 }, page_bits),
        };
        let used = |words: &[u64]| words.iter().filter(|&&word| word != 0).count();
        let now = used(l1.words()) + used(refcounts.words());
        let mut metadata = MetaSet::new(now.max(expected_tables(&header, l1.len())));
        let tables =
            [(Fixed::L1, "L1 table", &l1), (Fixed::RefcountTable, "refcount table", &refcounts)];
        for (which, what, table) in tables {
            if !metadata.set_range(which, table.extent(), geometry) {
                let (index, value) = (0, table.extent().offset);
                return Err(overlap(what, index, value));
            }
        }
        let (data_len, layers) = (None, Vec::new());
        let mut image =
            Self { header, decoder, l1, refcounts, metadata, file_len, data_len, layers };
        image.check_l1()?;
        image.check_refcounts()?;
        Ok(image)
    }

    /// The same with its external data file, of `len` bytes.
    #[must_use]
    pub fn with_data_file(self, len: u64) -> Self {
        Self { data_len: Some(len), ..self }
    }

    /// The same above these files, the image's own backing file first.
    ///
    /// # Errors
    /// More than 16.
    pub fn with_layers(self, layers: Vec<Layer>) -> Result<Self, OpenError> {
        if layers.len() > MAX_LAYERS {
            let (what, expected) = ("the number of backing files", "at most 16");
            let value = layers.len() as u64;
            return Err(OpenErrorInner::Option { what, value, expected }.into());
        }
        Ok(Self { layers, ..self })
    }

    /// Guest data must never be written here: snapshots, bitmaps, and what they refer to. False:
    /// it overlaps what is known, or lies so that finding it would take unreasonably long. Whoever
    /// asks for no more after that has done work that follows the length of the file.
    pub fn protect(&mut self, extent: Extent) -> bool {
        let geometry = self.decoder.geometry;
        let start = extent.offset >> geometry.cluster_bits();
        let end = geometry.clusters_for(extent.end().min(self.file_len));
        (start..end).all(|cluster| self.metadata.insert(cluster) && !self.metadata.is_crowded())
    }

    /// Is everything there that the header speaks of?
    pub(crate) fn check_files(&self) -> Result<(), OpenError> {
        if self.header.data_file().is_some() && self.data_len.is_none() {
            return Err(NO_DATA_FILE.into());
        }
        let names = |layer: &Layer| layer.has_backing();
        let named = core::iter::once(self.header.backing().is_some());
        let mut named = named.chain(self.layers.iter().map(names)).enumerate();
        if named.any(|(number, named)| named && number >= self.layers.len()) {
            let (name, field) = ("a backing file that nobody opened", "backing_file_offset");
            let next = "see Image::with_layers";
            return Err(OpenErrorInner::Feature { name, field, value: 0, next }.into());
        }
        Ok(())
    }

    fn check_l1(&mut self) -> Result<(), OpenError> {
        let table = "L1 table";
        for (index, &value) in (0..).zip(self.l1.words()) {
            let bad = |why| OpenErrorInner::BadEntry { table, index, value, why };
            let found = self.decoder.l1(value, self.file_len).map_err(|word| bad(word.text()))?;
            let Some(pointer) = found else { continue };
            // A table without COPIED is copied before it is changed; until then it is somebody
            // else's. (Without snapshots it has lost the flag: QEMU was stopped while it made or
            // deleted the last one. The copy is all that costs.)
            if !self.metadata.insert(pointer.at.index()) {
                return Err(overlap(table, index, value));
            }
            if self.metadata.is_crowded() {
                return Err(bad(CROWDED).into());
            }
        }
        Ok(())
    }

    fn check_refcounts(&mut self) -> Result<(), OpenError> {
        let table = "refcount table";
        for (index, &value) in (0..).zip(self.refcounts.words()) {
            let found = self.decoder.refcount_table(value, self.file_len);
            let bad = |why| OpenErrorInner::BadEntry { table, index, value, why };
            let Some(at) = found.map_err(|word| bad(word.text()))? else { continue };
            if !self.metadata.insert(at.index()) {
                return Err(overlap(table, index, value));
            }
            if self.metadata.is_crowded() {
                return Err(bad(CROWDED).into());
            }
        }
        Ok(())
    }

    /// Size of the virtual disk in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.header.virtual_size()
    }

    /// Bytes of L2 tables that an image of this virtual size has when all of it is allocated.
    pub(crate) fn all_l2_bytes(&self) -> u64 {
        let geometry = self.header.geometry();
        geometry.l1_entries_for(self.virtual_size()) << geometry.cluster_bits()
    }
}

/// Tables and refcount blocks of the image when all of it is written, so that the set of them need
/// not grow while it is served; up to a limit, since a header may claim any size.
fn expected_tables(header: &Header, tables: u64) -> usize {
    const MOST: u64 = 1 << 15;
    let geometry = header.geometry();
    let clusters = (header.virtual_size() >> geometry.cluster_bits()).saturating_add(tables);
    // Twice the blocks: the file has free clusters, too.
    let blocks = clusters / geometry.refcounts_per_block() * 2 + 2;
    let most = tables.saturating_add(blocks).min(MOST);
    usize::try_from(most).unwrap_or_default()
}

const CROWDED: &str = "the tables lie so that finding them would take unreasonably long";

fn overlap(table: &'static str, index: u64, value: u64) -> OpenError {
    let why = "it overlaps other metadata";
    OpenErrorInner::BadEntry { table, index, value, why }.into()
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use byteorder::{BigEndian, ByteOrder};

    use super::*;
    use crate::{Engine, Options};

    const LEN: u64 = 16 << 16;

    /// The refcount table in cluster 1, the L1 table in cluster 3, of a file of 16.
    fn header() -> Header {
        let mut bytes = vec![0; 1 << 16];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        for (at, value) in [(4, 3), (20, 16), (36, 1), (56, 1), (96, 4), (100, 104)] {
            BigEndian::write_u32(&mut bytes[at..], value);
        }
        for (at, value) in [(24, 1 << 20), (40, 3 << 16), (48, 1 << 16)] {
            BigEndian::write_u64(&mut bytes[at..], value);
        }
        Header::parse(&bytes, LEN, false).unwrap()
    }

    fn image() -> Image {
        Image::new(header(), &[0; 8], &[0; 1 << 16], LEN).unwrap()
    }

    #[test]
    fn the_l1_tables_of_layers_count_as_memory() {
        let layer = || Layer::qcow2(&header(), &[0; 8], LEN, None).unwrap();
        let memory = |layers| {
            let image = image().with_layers(layers).unwrap();
            Engine::new(image, &Options::default()).unwrap().memory().tables
        };
        let alone = memory(vec![Layer::raw(1 << 20)]);
        assert_eq!(memory(vec![layer(), layer(), Layer::raw(1 << 20)]), alone + 16);
    }

    #[test]
    fn what_is_protected_twice_or_lies_on_a_table_is_reported() {
        let mut image = image();
        let extent = |cluster: u64, len| Extent { offset: cluster << 16, len };
        assert!(image.protect(extent(5, 1)) && image.protect(extent(7, 2 << 16)));
        for (cluster, len) in [(5, 1), (4, 2 << 16), (8, 1), (3, 1), (1, 1), (0, 1)] {
            assert!(!image.protect(extent(cluster, len)), "{cluster}");
        }
        // Nothing lies behind the end of the file.
        assert!(image.protect(extent(15, 1 << 62)) && image.protect(extent(99, 1)));
    }
}

//! An open image: the header and the two top-level tables, with every word of them checked.

use crate::entry::Decoder;
use crate::error::{OpenError, OpenErrorInner};
use crate::header::Header;
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
    /// Bytes of the file beneath, if there is one.
    pub(crate) backing_len: Option<u64>,
}

impl Image {
    /// Checks the tables: `l1` and `refcount_table` are the bytes at the header's
    /// [`l1_extent`](Header::l1_extent) and
    /// [`refcount_table_extent`](Header::refcount_table_extent).
    ///
    /// # Errors
    /// An entry with reserved bits set, unaligned, outside the file, or pointing to where other
    /// metadata lies; an L1 entry without COPIED (there are no snapshots, so its refcount is
    /// wrong).
    pub fn new(
        header: Header,
        l1: &[u8],
        refcount_table: &[u8],
        file_len: u64,
    ) -> Result<Self, OpenError> {
        if header.backing().is_some() {
            let (name, field) = ("a backing file that nobody opened", "backing_file_offset");
            let next = "see Image::with_backing";
            return Err(OpenErrorInner::Feature { name, field, value: 0, next }.into());
        }
        Self::check(header, l1, refcount_table, file_len)
    }

    fn check(
        header: Header,
        l1: &[u8],
        refcount_table: &[u8],
        file_len: u64,
    ) -> Result<Self, OpenError> {
        let geometry = header.geometry();
        let decoder = Decoder { geometry, version: header.version() };
        let page_bits = geometry.page_bits();
        let l1 = Table::parse(l1, header.l1_extent(), page_bits);
        let refcounts = Table::parse(refcount_table, header.refcount_table_extent(), page_bits);
        let used = |words: &[u64]| words.iter().filter(|&&word| word != 0).count();
        let mut metadata = MetaSet::new(used(l1.words()) + used(refcounts.words()));
        let tables =
            [(Fixed::L1, "L1 table", &l1), (Fixed::RefcountTable, "refcount table", &refcounts)];
        for (which, what, table) in tables {
            if !metadata.set_range(which, table.extent(), geometry) {
                let (index, value) = (0, table.extent().offset);
                return Err(overlap(what, index, value));
            }
        }
        let backing_len = None;
        let mut image = Self { header, decoder, l1, refcounts, metadata, file_len, backing_len };
        image.check_l1()?;
        image.check_refcounts()?;
        Ok(image)
    }

    /// The same for an image with a backing file of `backing_len` bytes: byte `n` of that is what
    /// an unallocated byte `n` of the virtual disk reads as.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn with_backing(
        header: Header,
        l1: &[u8],
        refcount_table: &[u8],
        file_len: u64,
        backing_len: u64,
    ) -> Result<Self, OpenError> {
        let image = Self::check(header, l1, refcount_table, file_len)?;
        Ok(Self { backing_len: Some(backing_len), ..image })
    }

    fn check_l1(&mut self) -> Result<(), OpenError> {
        let table = "L1 table";
        for (index, &value) in (0..).zip(self.l1.words()) {
            let bad = |why| OpenErrorInner::BadEntry { table, index, value, why };
            let found = self.decoder.l1(value, self.file_len).map_err(|word| bad(word.text()))?;
            let Some(pointer) = found else { continue };
            if !pointer.copied {
                let why = "its COPIED flag is clear without snapshots: see 'qemu-img check -r all'";
                return Err(bad(why).into());
            }
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

const CROWDED: &str = "the tables lie so that finding them would take unreasonably long";

fn overlap(table: &'static str, index: u64, value: u64) -> OpenError {
    let why = "it overlaps other metadata";
    OpenErrorInner::BadEntry { table, index, value, why }.into()
}

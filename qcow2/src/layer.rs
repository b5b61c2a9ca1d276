//! What lies beneath: the chain of backing files, each of which is only read.
//!
//! A layer is a raw file or a qcow2 image. Where one has nothing, the next one is asked; behind the
//! end of a layer there are zeros, whatever the layers below it hold.

use alloc::boxed::Box;

use crate::entry::Decoder;
use crate::error::{OpenError, OpenErrorInner};
use crate::header::Header;
use crate::op::FileId;
use crate::table::Table;

/// Layers beneath an image, at the most.
pub(crate) const MAX_LAYERS: usize = 16;

/// One file of the chain, with its external data file if it has one.
#[derive(Clone, Debug)]
pub struct Layer(pub(crate) Kind);

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// Byte `n` of the file is byte `n` of the virtual disk.
    Raw {
        len: u64,
    },
    Qcow2(Box<Qcow2>),
}

/// A qcow2 image that is only read.
#[derive(Clone, Debug)]
pub(crate) struct Qcow2 {
    pub(crate) decoder: Decoder,
    pub(crate) l1: Table,
    pub(crate) virtual_size: u64,
    pub(crate) file_len: u64,
    /// Bytes of the external data file.
    pub(crate) data_len: u64,
    /// Wants a layer beneath it.
    has_backing: bool,
}

impl Layer {
    /// A raw file of `len` bytes.
    #[must_use]
    pub fn raw(len: u64) -> Self {
        Self(Kind::Raw { len })
    }

    /// A qcow2 image of `file_len` bytes: `l1` are the bytes at the header's
    /// [`l1_extent`](Header::l1_extent), `data_len` is the length of its external data file.
    ///
    /// # Errors
    /// An entry of the L1 table with reserved bits set, unaligned, or outside the file.
    pub fn qcow2(
        header: &Header,
        l1: &[u8],
        file_len: u64,
        data_len: Option<u64>,
    ) -> Result<Self, OpenError> {
        if header.data_file().is_some() && data_len.is_none() {
            return Err(crate::image::NO_DATA_FILE.into());
        }
        let decoder = Decoder::of(header);
        let l1 = Table::parse(l1, header.l1_extent(), decoder.geometry.page_bits());
        for (index, &value) in (0..).zip(l1.words()) {
            if let Err(bad) = decoder.l1(value, file_len) {
                let (table, why) = ("L1 table", bad.text());
                return Err(OpenErrorInner::BadEntry { table, index, value, why }.into());
            }
        }
        let (virtual_size, has_backing) = (header.virtual_size(), header.backing().is_some());
        let data_len = data_len.unwrap_or(0);
        let layer = Qcow2 { decoder, l1, virtual_size, file_len, data_len, has_backing };
        Ok(Self(Kind::Qcow2(Box::new(layer))))
    }

    /// Bytes of the virtual disk that it describes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        match &self.0 {
            Kind::Raw { len } => *len,
            Kind::Qcow2(image) => image.virtual_size,
        }
    }

    /// Entries of its L1 table, which is kept in memory.
    pub(crate) fn l1_entries(&self) -> u64 {
        match &self.0 {
            Kind::Raw { .. } => 0,
            Kind::Qcow2(image) => image.l1.len(),
        }
    }

    /// Must another layer follow it?
    #[must_use]
    pub fn has_backing(&self) -> bool {
        matches!(&self.0, Kind::Qcow2(image) if image.has_backing)
    }

    /// Bytes of the file that `file` names, which is one of this layer's.
    pub(crate) fn len_of(&self, file: FileId) -> u64 {
        match (&self.0, file) {
            (Kind::Raw { len }, _) => *len,
            (Kind::Qcow2(image), FileId::BackingData(_)) => image.data_len,
            (Kind::Qcow2(image), _) => image.file_len,
        }
    }
}

//! Opening an image from any bytes: the one place in the tests that knows how much of an image is
//! read, in which order, and what is kept from guest data. It follows the server, and takes images
//! that are wrong in any way.

use std::vec::Vec;

use crate::bitmaps::Bitmap;
use crate::error::{OpenError, OpenErrorInner};
use crate::header::{Bitmaps, Directory, Extent, Header};
use crate::image::Image;
use crate::layer::Layer;
use crate::snapshot::Snapshot;
use crate::testing::size;

/// A file: as much as there is of so many bytes at a place of it, and its length.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) read: &'a dyn Fn(u64, usize) -> Vec<u8>,
    pub(crate) len: u64,
}

/// An image, and what a writer has to know.
pub(crate) struct Opened {
    pub(crate) image: Image,
    /// What is kept from guest data, besides the active tables.
    pub(crate) protected: Vec<Extent>,
    /// What is to be written before anything else: bitmaps are in use.
    pub(crate) marks: Option<(u64, Vec<u8>)>,
}

/// What lies on other things is not served.
const OVERLAPS: &str = "it overlaps other metadata";

/// Tables of all snapshots, and of all bitmaps, have at most so many bytes.
const MAX_TABLES: u64 = 16 << 20;

fn bad(table: &'static str, index: usize, value: u64, why: &'static str) -> OpenError {
    OpenErrorInner::BadEntry { table, index: index as u64, value, why }.into()
}

impl Source<'_> {
    fn extent(self, extent: Extent) -> Vec<u8> {
        (self.read)(extent.offset, size(extent.len))
    }

    /// The header.
    pub(crate) fn header(self, read_only: bool) -> Result<Header, OpenError> {
        let needed = Header::needed(&(self.read)(0, 512))?;
        Header::parse(&(self.read)(0, needed), self.len, read_only)
    }

    /// The image as one that is only read.
    pub(crate) fn layer(self, header: &Header, data_len: Option<u64>) -> Result<Layer, OpenError> {
        Layer::qcow2(header, &self.extent(header.l1_extent()), self.len, data_len)
    }

    /// The snapshots, and where their table lies.
    pub(crate) fn snapshots(self, table: Directory) -> Result<(Vec<Snapshot>, Extent), OpenError> {
        let mut want = 512;
        loop {
            let bytes = (self.read)(table.offset, want);
            if let Some(found) = table.snapshots(&bytes)? {
                return Ok((found, table.extent(&bytes)));
            }
            if bytes.len() < want {
                return Err(bad("snapshot table", 0, table.offset, "it is cut off"));
            }
            want *= 4;
        }
    }

    /// The image above these layers, and with a data file of this length.
    pub(crate) fn image(
        self,
        header: Header,
        layers: Vec<Layer>,
        data_len: Option<u64>,
        read_only: bool,
    ) -> Result<Opened, OpenError> {
        let l1 = self.extent(header.l1_extent());
        let refcounts = self.extent(header.refcount_table_extent());
        let (snapshots, bitmaps) = (header.snapshots(), header.bitmaps());
        let image = match read_only {
            true => Image::for_reading(header, &l1, self.len)?,
            false => Image::new(header, &l1, &refcounts, self.len)?,
        };
        let image = image.with_layers(layers)?;
        let image = match data_len {
            Some(len) => image.with_data_file(len),
            None => image,
        };
        let mut opened = Opened { image, protected: Vec::new(), marks: None };
        if !read_only {
            snapshots.map_or(Ok(()), |table| self.protect_snapshots(&mut opened, table))?;
            bitmaps.map_or(Ok(()), |bitmaps| self.protect_bitmaps(&mut opened, bitmaps))?;
        }
        Ok(opened)
    }

    fn protect_snapshots(self, opened: &mut Opened, table: Directory) -> Result<(), OpenError> {
        let what = "snapshot table";
        let (all, place) = self.snapshots(table)?;
        opened.protect(place, what, 0)?;
        let mut total = 0;
        for (index, Snapshot { l1, .. }) in all.iter().enumerate() {
            total += l1.len;
            if l1.end() > self.len || total > MAX_TABLES {
                return Err(bad(what, index, l1.offset, "its L1 table is outside the file"));
            }
            if l1.len != 0 {
                opened.protect(*l1, what, index)?;
            }
        }
        Ok(())
    }

    fn protect_bitmaps(self, opened: &mut Opened, bitmaps: Bitmaps) -> Result<(), OpenError> {
        let geometry = opened.image.decoder.geometry;
        bitmaps.check(geometry, self.len)?;
        let mut directory = self.extent(bitmaps.directory);
        let found = bitmaps.entries(&directory, geometry, self.len)?;
        opened.protect(bitmaps.directory, "bitmap directory", 0)?;
        let mut changed = false;
        for (index, bitmap) in found.iter().enumerate() {
            if bitmap.table.len > MAX_TABLES {
                return Err(bad("bitmap directory", index, bitmap.table.len, "it is too long"));
            }
            opened.protect(bitmap.table, "bitmap table", index)?;
            for cluster in Bitmap::clusters(&self.extent(bitmap.table), geometry, self.len) {
                opened.protect(cluster?, "bitmap data", index)?;
            }
            changed |= bitmap.mark_in_use(&mut directory);
        }
        opened.marks = changed.then_some((bitmaps.directory.offset, directory));
        Ok(())
    }
}

impl Opened {
    fn protect(
        &mut self,
        extent: Extent,
        what: &'static str,
        index: usize,
    ) -> Result<(), OpenError> {
        if !self.image.protect(extent) {
            return Err(bad(what, index, extent.offset, OVERLAPS));
        }
        self.protected.push(extent);
        Ok(())
    }
}

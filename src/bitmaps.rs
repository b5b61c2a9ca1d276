//! What a writer owes to persistent bitmaps: to mark them as in use before its first write, so that
//! nobody takes them for up to date, and to write nowhere where they lie.

use anyhow::{Context, Result, bail};
use qcow2::{Bitmap, Bitmaps, Extent, Geometry, Image};

use crate::files::Source;

/// All bitmap tables together have at most so many bytes: 128 GiB of bits in 64 KiB clusters.
const MAX_TABLES: u64 = 16 << 20;

/// Bytes of a table that are read at a time.
const PART: u64 = 1 << 20;

/// The bytes of the bitmap directory with all bitmaps marked.
pub struct Marks {
    offset: u64,
    bytes: Vec<u8>,
}

impl Marks {
    /// Writes them, durably.
    pub fn write(&self, file: &Source) -> Result<()> {
        file.write(self.offset, &self.bytes)
            .and_then(|()| file.file.sync_data())
            .context("marking the image's bitmaps as in use")
    }
}

/// Keeps guest data away from the bitmaps, and returns the marks that are not there yet.
pub fn protect(
    image: &mut Image,
    bitmaps: Bitmaps,
    file: &Source,
    geometry: Geometry,
) -> Result<Option<Marks>> {
    let len = file.len()?;
    bitmaps.check(geometry, len)?;
    let mut directory = file.extent(bitmaps.directory).context("reading the bitmap directory")?;
    let found = bitmaps.entries(&directory, geometry, len)?;
    let tables: u64 = found.iter().map(|bitmap| bitmap.table.len).sum();
    if tables > MAX_TABLES {
        bail!("its bitmap tables have {tables} bytes, at most 16 MiB are served; {NEXT}");
    }
    claim(image, bitmaps.directory, "bitmap directory")?;
    for Bitmap { table, .. } in &found {
        claim(image, *table, "bitmap table")?;
        let mut at = table.offset;
        while at < table.end() {
            let part = Extent { offset: at, len: PART.min(table.end() - at) };
            let bytes = file.extent(part).context("reading a bitmap table")?;
            for cluster in Bitmap::clusters(&bytes, geometry, len) {
                claim(image, cluster?, "bitmap data")?;
            }
            at = part.end();
        }
    }
    let mut changed = false;
    for bitmap in &found {
        changed |= bitmap.mark_in_use(&mut directory);
    }
    let marks = Marks { offset: bitmaps.directory.offset, bytes: directory };
    Ok(changed.then_some(marks))
}

const NEXT: &str = "remove them with 'qemu-img bitmap --remove', or serve it with --read-only";

fn claim(image: &mut Image, extent: Extent, what: &str) -> Result<()> {
    if !image.protect(extent) {
        bail!("the {what} at byte {} overlaps other metadata; {NEXT}", extent.offset);
    }
    Ok(())
}

//! What follows the fields of a header: extensions, and the name of the file beneath.

use byteorder::{BigEndian, ByteOrder};

use super::{DECRYPT, bounds};
use crate::error::{FeatureName, OpenError, OpenErrorInner};

/// The entries of the feature name table of an image: 48 bytes each.
pub(super) struct FeatureNames<'a>(pub(super) &'a [u8]);

impl FeatureNames<'_> {
    /// The image's own name for bit `bit` of bitmap `kind` (0 incompatible, 2 autoclear).
    pub(super) fn find(&self, kind: u8, bit: u32) -> FeatureName {
        let mut name = [0; 46];
        let entry = self.0.chunks_exact(48).find(|e| e[0] == kind && u32::from(e[1]) == bit);
        if let Some(entry) = entry {
            name.copy_from_slice(&entry[2..]);
        }
        FeatureName(name)
    }
}

/// The name of the file beneath, within the first cluster.
pub(super) struct BackingName<'a> {
    pub(super) start: usize,
    pub(super) name: &'a [u8],
}

impl<'a> BackingName<'a> {
    pub(super) fn parse(
        bytes: &'a [u8],
        header: usize,
        bits: u32,
    ) -> Result<Option<Self>, OpenError> {
        let offset = BigEndian::read_u64(&bytes[8..]);
        if offset == 0 {
            return Ok(None);
        }
        let len = BigEndian::read_u32(&bytes[16..]);
        if len == 0 || len > 1023 {
            return Err(bounds("backing_file_size", len, "1 to 1023 bytes"));
        }
        let area = &bytes[..bytes.len().min(1 << bits)];
        let start = usize::try_from(offset).ok().filter(|&start| start >= header);
        let name = start.and_then(|start| area.get(start..)?.get(..len as usize));
        let (Some(start), Some(name)) = (start, name) else {
            let expected = "a place in the first cluster, behind the header";
            return Err(bounds("backing_file_offset", offset, expected));
        };
        Ok(Some(Self { start, name }))
    }
}

/// What is of interest in the header extensions.
pub(super) struct Extensions<'a> {
    pub(super) names: FeatureNames<'a>,
    pub(super) backing_format: Option<&'a [u8]>,
    pub(super) data_file: Option<&'a [u8]>,
    pub(super) bitmaps: Option<&'a [u8]>,
    /// There are others.
    pub(super) unknown: bool,
}

/// Walks the header extensions (specification: "Header extensions"), which end before `end`.
pub(super) fn extensions(
    bytes: &[u8],
    start: usize,
    end: usize,
) -> Result<Extensions<'_>, OpenError> {
    const END: u32 = 0;
    const FEATURE_NAMES: u32 = 0x6803_f857;
    const BITMAPS: u32 = 0x2385_2875;
    const ENCRYPTION: u32 = 0x0537_be77;
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    const DATA_FILE: u32 = 0x4441_5441;
    let mut found = Extensions {
        names: FeatureNames(&[]),
        backing_format: None,
        data_file: None,
        bitmaps: None,
        unknown: false,
    };
    // The area ends with an END extension, at the backing file name, or with the cluster.
    let area = &bytes[..bytes.len().min(end)];
    let mut at = start;
    while let Some(head) = area.get(at..at + 8) {
        let kind = BigEndian::read_u32(head);
        let len = BigEndian::read_u32(&head[4..]) as usize;
        if kind == END {
            break;
        }
        let Some(data) = area.get(at + 8..).and_then(|rest| rest.get(..len)) else {
            let expected = "a length that ends within the first cluster";
            return Err(bounds("extension length", len as u64, expected));
        };
        let refuse = |name, next| {
            let field = "header extension type";
            Err(OpenErrorInner::Feature { name, field, value: kind.into(), next }.into())
        };
        match kind {
            FEATURE_NAMES => found.names = FeatureNames(data),
            BACKING_FORMAT => found.backing_format = Some(data),
            DATA_FILE => found.data_file = Some(data),
            BITMAPS => found.bitmaps = Some(data),
            ENCRYPTION => return refuse("encryption (LUKS)", DECRYPT),
            _ => found.unknown = true,
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}

//! The images that the fuzzer begins with: one of each kind, small, and sound.

use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::testing::image::{DataFile, ImageSpec, Limit};
use crate::testing::pool::Pool;
use crate::testing::world::Beneath;

/// An image with all the files that it names.
#[derive(Clone, Debug)]
pub(super) struct Skeleton {
    pub(super) image: Rc<[u8]>,
    pub(super) data: Option<Rc<[u8]>>,
    pub(super) beneath: Vec<Beneath>,
}

/// What the images made in code lack: zstd, bitmaps, zero clusters, extensions, QEMU's own layout.
const FIXTURES: [&[u8]; 5] = [
    include_bytes!("../../../../fixtures/images/bitmap.qcow2"),
    include_bytes!("../../../../fixtures/images/compressed-zlib.qcow2"),
    include_bytes!("../../../../fixtures/images/compressed-zstd.qcow2"),
    include_bytes!("../../../../fixtures/images/v3-512-lazy.qcow2"),
    include_bytes!("../../../../fixtures/images/snapshot.qcow2"),
];

fn specs() -> Vec<ImageSpec> {
    let plain = ImageSpec::plain;
    let two = |bits| ImageSpec { every: 2, ..plain(bits, 24 << 10) };
    vec![
        two(9),
        ImageSpec { version: 2, snapshots: 1, ..two(9) },
        ImageSpec { refcount_order: 0, ..two(9) },
        ImageSpec { refcount_order: 6, snapshots: 2, ..two(9) },
        ImageSpec { refcount_order: 3, compressed: 2, every: 1, ..two(9) },
        ImageSpec { snapshots: 1, compressed: 3, ..two(10) },
        ImageSpec { backing: 20 << 10, every: 5, ..two(10) },
        ImageSpec { backing: (9 << 10) + 200, chain: Some((10, 12 << 10)), ..two(9) },
        ImageSpec { version: 2, backing: 30 << 10, snapshots: 1, ..two(9) },
        ImageSpec { data_file: Some(DataFile::Own(20 << 10)), ..two(9) },
        ImageSpec { data_file: Some(DataFile::Raw), ..two(12) },
        ImageSpec { near: Some(Limit::Block(3)), refcount_order: 6, ..two(9) },
        ImageSpec { device: 48 << 10, ..two(9) },
        plain(12, 64 << 10),
        ImageSpec { extended: true, ..plain(14, 48 << 10) },
        ImageSpec { extended: true, snapshots: 1, backing: 20 << 10, every: 2, ..two(14) },
    ]
}

/// All of them.
pub(super) fn all() -> Vec<Skeleton> {
    let mut pool = Pool::new();
    let made = specs().into_iter().map(|spec| {
        let made = spec.make(&mut pool);
        Skeleton {
            image: Rc::from(made.bytes),
            data: made.data.map(Rc::from),
            beneath: made.setting.files,
        }
    });
    let fixtures = FIXTURES.into_iter();
    let fixtures =
        fixtures.map(|bytes| Skeleton { image: Rc::from(bytes), data: None, beneath: Vec::new() });
    made.chain(fixtures).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::check;

    #[test]
    fn every_skeleton_is_sound_and_small() {
        for (number, skeleton) in all().iter().enumerate() {
            let report = check(&skeleton.image[..]).expect("it can be judged");
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{number}: {report:?}");
            assert!(skeleton.image.len() <= 256 << 10, "{number}: {}", skeleton.image.len());
        }
    }
}

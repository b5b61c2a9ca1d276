//! Workloads for each feature that a plain image does not have.

use std::vec;
use std::vec::Vec;

use super::{Workload, base, normal, plain, slow, stress};
use crate::options::{Discards, Options};
use crate::testing::image::{DataFile, ImageSpec, Limit};

/// Half of 48 KiB in clusters of 512 bytes is in use: two L2 tables.
fn half() -> ImageSpec {
    ImageSpec { every: 2, ..plain(9, 48 << 10) }
}

/// Most of it is compressed: several clusters within one, and some across a border.
fn packed() -> ImageSpec {
    ImageSpec { every: 1, compressed: 2, refcount_order: 3, ..plain(11, 40 << 10) }
}

/// With subclusters of one sector.
fn extended(name: &'static str, image: ImageSpec) -> Workload {
    let image =
        ImageSpec { extended: true, every: if image.backing == 0 { 1 } else { 2 }, ..image };
    Workload { longest: 40, ..base(name, image) }
}

/// Where transfers of payload fail now and then.
fn flaky(workload: Workload) -> Workload {
    Workload { errors: 12, ..workload }
}

/// On a block device.
fn device(name: &'static str, image: ImageSpec) -> Workload {
    let options = Options { fixed_size: true, ..normal() };
    Workload { options, ..base(name, image) }
}

/// Refcount widths, subclusters, compressed clusters, snapshots, and a chain.
pub(super) fn formats() -> Vec<Workload> {
    vec![
        Workload { longest: 6, ..base("refcounts-1", ImageSpec { refcount_order: 0, ..half() }) },
        Workload {
            options: stress(),
            ..base(
                "refcounts-64",
                ImageSpec { refcount_order: 6, near: Some(Limit::Block(6)), ..plain(9, 32 << 10) },
            )
        },
        extended("extended", plain(14, 64 << 10)),
        extended(
            "extended-beneath",
            ImageSpec { backing: (50 << 10) + 200, ..plain(14, 64 << 10) },
        ),
        extended(
            "extended-snapshot",
            ImageSpec { snapshots: 2, compressed: 3, ..plain(14, 96 << 10) },
        ),
        Workload { longest: 12, ..base("compressed", packed()) },
        slow(Workload {
            longest: 4,
            ..base("slow-compressed", ImageSpec { guest: 16 << 10, ..packed() })
        }),
        Workload {
            longest: 12,
            options: stress(),
            ..base("compressed-snapshot", ImageSpec { snapshots: 1, refcount_order: 6, ..packed() })
        },
        base("snapshot", ImageSpec { snapshots: 1, refcount_order: 1, ..half() }),
        Workload {
            options: stress(),
            ..base(
                "snapshot-beneath",
                ImageSpec { snapshots: 2, backing: 40 << 10, refcount_order: 2, ..half() },
            )
        },
        Workload {
            longest: 6,
            ..base(
                "chain",
                ImageSpec {
                    backing: 40 << 10,
                    chain: Some((11, 24 << 10)),
                    refcount_order: 5,
                    every: 5,
                    ..plain(10, 32 << 10)
                },
            )
        },
    ]
}

/// Data files, errors, and other discards.
pub(super) fn files() -> Vec<Workload> {
    vec![
        base("data-file", ImageSpec { data_file: Some(DataFile::Own(16 << 10)), ..half() }),
        Workload {
            longest: 12,
            steps: 80,
            ..base(
                "data-file-beneath",
                ImageSpec {
                    backing: 32 << 10,
                    data_file: Some(DataFile::Own(2 << 10)),
                    every: 3,
                    ..plain(11, 32 << 10)
                },
            )
        },
        Workload {
            punch: false,
            ..base(
                "data-file-raw",
                ImageSpec { data_file: Some(DataFile::Raw), every: 1, ..half() },
            )
        },
        flaky(extended(
            "flaky-extended",
            ImageSpec { backing: 40 << 10, snapshots: 1, ..plain(14, 64 << 10) },
        )),
        flaky(base(
            "flaky-compressed",
            ImageSpec { snapshots: 1, refcount_order: 4, guest: 24 << 10, ..packed() },
        )),
        flaky(base(
            "flaky-data-file",
            ImageSpec {
                backing: 8 << 10,
                data_file: Some(DataFile::Own(4 << 10)),
                every: 3,
                ..plain(10, 16 << 10)
            },
        )),
        Workload {
            options: Options { discards: Discards::Keep, ..stress() },
            ..extended("extended-keep", ImageSpec { snapshots: 1, ..plain(14, 64 << 10) })
        },
        Workload {
            options: Options { discards: Discards::Keep, ..normal() },
            ..base("keep", ImageSpec { backing: 12 << 10, snapshots: 1, ..half() })
        },
        Workload {
            options: Options { discards: Discards::Keep, ..normal() },
            ..base(
                "data-file-keep",
                ImageSpec { data_file: Some(DataFile::Own(16 << 10)), backing: 8 << 10, ..half() },
            )
        },
        Workload {
            options: Options { discards: Discards::Keep, ..normal() },
            ..base(
                "data-file-raw-keep",
                ImageSpec { data_file: Some(DataFile::Raw), every: 1, ..half() },
            )
        },
    ]
}

/// Subclusters in data files, bitmaps, and a device that runs full: explored by their names.
pub(super) fn named() -> Vec<Workload> {
    vec![
        extended(
            "data-file-extended",
            ImageSpec { data_file: Some(DataFile::Own(64 << 10)), ..plain(14, 64 << 10) },
        ),
        extended(
            "data-file-extended-beneath",
            ImageSpec {
                data_file: Some(DataFile::Own(32 << 10)),
                backing: 40 << 10,
                ..plain(14, 64 << 10)
            },
        ),
        base("bitmap", ImageSpec { bitmap: true, snapshots: 1, ..half() }),
        Workload {
            longest: 12,
            options: stress(),
            ..base(
                "bitmap-2k",
                ImageSpec { bitmap: true, backing: 40 << 10, every: 3, ..plain(11, 48 << 10) },
            )
        },
        // It runs full.
        device(
            "device-full",
            ImageSpec { device: 40 << 10, refcount_order: 4, every: 4, ..half() },
        ),
    ]
}

/// On block devices.
pub(super) fn devices() -> Vec<Workload> {
    vec![
        device("device", ImageSpec { device: 192 << 10, refcount_order: 5, ..half() }),
        Workload {
            punch: false,
            ..device("device-plain", ImageSpec { device: 192 << 10, refcount_order: 6, ..half() })
        },
    ]
}

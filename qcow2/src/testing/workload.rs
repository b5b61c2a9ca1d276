//! Workloads: an image, options and a mix of requests.

use std::string::String;
use std::vec;
use std::vec::Vec;

use crate::options::Options;
use crate::testing::image::{ImageSpec, Limit};

mod features;

/// How often each kind of request comes, relative to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mix {
    /// Reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Writes with FUA.
    pub fua: u64,
    /// FLUSHes.
    pub flush: u64,
    /// Write zeroes; half of them may unmap.
    pub zero: u64,
    /// Discards.
    pub discard: u64,
}

impl Mix {
    /// The sum.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.read + self.write + self.fua + self.flush + self.zero + self.discard
    }
}

/// A mix of requests on an image. With a seed it is one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// The image.
    pub image: ImageSpec,
    /// How it is served.
    pub options: Options,
    /// The requests.
    pub mix: Mix,
    /// The longest request, in sectors.
    pub longest: u64,
    /// Events of one run.
    pub steps: u64,
    /// One event in so many is a death of the process; 0 for never.
    pub deaths: u64,
    /// One event in so many closes the image and opens it again; 0 for never.
    pub closes: u64,
    /// One transfer of payload in so many fails; 0 for none.
    pub errors: u64,
    /// Does the host punch holes, and zero ranges?
    pub punch: bool,
    /// Transfers of payload end last: one in so many ends when it is its turn; 0 for all.
    pub slow: u64,
}

fn plain(cluster_bits: u32, guest: u64) -> ImageSpec {
    ImageSpec::plain(cluster_bits, guest)
}

const ALL: Mix = Mix { read: 3, write: 8, fua: 1, flush: 2, zero: 3, discard: 2 };

fn normal() -> Options {
    Options { depth: 6, reservation: 4096, refcount_cache: 1 << 14, ..Options::default() }
}

fn stress() -> Options {
    Options { stress: true, ..normal() }
}

fn base(name: &'static str, image: ImageSpec) -> Workload {
    Workload {
        name,
        image,
        options: normal(),
        mix: ALL,
        longest: 4,
        steps: 400,
        deaths: 150,
        closes: 150,
        errors: 0,
        punch: true,
        slow: 0,
    }
}

/// What is unmapped is still being read and written while rounds come and go.
fn slow(workload: Workload) -> Workload {
    let mix = Mix { read: 6, write: 4, flush: 8, zero: 4, discard: 6, fua: 0 };
    Workload { slow: 40, mix, deaths: 0, closes: 400, ..workload }
}

/// All workloads: those of plain images, and between them those of other features.
#[must_use]
pub fn all() -> Vec<Workload> {
    let (mut plain, mut others) = (sizes(), features::formats());
    plain.extend(requests());
    others.extend(features::files());
    others.extend(features::devices());
    let mut others = others.into_iter();
    let mut all: Vec<_> =
        plain.into_iter().flat_map(|one| [Some(one), others.next()]).flatten().collect();
    all.extend(others);
    all
}

/// Cluster sizes, and what is there at first.
fn sizes() -> Vec<Workload> {
    vec![
        base("c512", plain(9, 64 << 10)),
        Workload { options: stress(), ..base("c512-stress", plain(9, 128 << 10)) },
        Workload { longest: 6, ..base("c1k", plain(10, 32 << 10)) },
        Workload { longest: 8, ..base("c2k", plain(11, 32 << 10)) },
        Workload { longest: 12, ..base("c4k", plain(12, 64 << 10)) },
        Workload { longest: 12, options: stress(), ..base("c4k-stress", plain(12, 64 << 10)) },
        base("half", ImageSpec { every: 2, ..plain(9, 32 << 10) }),
        Workload {
            longest: 6,
            options: stress(),
            ..base("full-1k", ImageSpec { every: 1, ..plain(10, 32 << 10) })
        },
        base("v2", ImageSpec { version: 2, every: 3, ..plain(9, 32 << 10) }),
        Workload { punch: false, ..base("no-punch", plain(9, 32 << 10)) },
        base("beneath", ImageSpec { backing: 20 << 10, ..plain(10, 32 << 10) }),
        Workload {
            options: stress(),
            ..base("beneath-512", ImageSpec { backing: 32 << 10, every: 5, ..plain(9, 32 << 10) })
        },
        Workload {
            punch: false,
            ..base(
                "beneath-v2",
                ImageSpec { version: 2, backing: (9 << 10) + 200, ..plain(10, 16 << 10) },
            )
        },
    ]
}

/// Mixes of requests, errors, and where the refcounts have to grow.
fn requests() -> Vec<Workload> {
    vec![
        Workload {
            mix: Mix { write: 6, flush: 1, ..Mix::default() },
            deaths: 0,
            closes: 0,
            ..base("writes", plain(9, 64 << 10))
        },
        slow(base("slow", ImageSpec { every: 1, ..plain(9, 8 << 10) })),
        Workload {
            mix: Mix { write: 6, zero: 6, discard: 6, flush: 2, ..Mix::default() },
            ..base("holes", ImageSpec { every: 1, ..plain(9, 16 << 10) })
        },
        Workload {
            deaths: 0,
            closes: 300,
            steps: 150,
            ..base("growth", ImageSpec { near: Some(Limit::Table(12)), ..plain(9, 32 << 10) })
        },
        // A block counts 64 clusters here: the reservation goes past blocks that are not linked.
        Workload {
            options: Options { reservation: 64 << 10, ..normal() },
            deaths: 0,
            closes: 300,
            steps: 150,
            ..base(
                "growth-64",
                ImageSpec { near: Some(Limit::Table(70)), refcount_order: 6, ..plain(9, 64 << 10) },
            )
        },
        // The same few clusters, mapped and unmapped while rounds go on.
        Workload {
            mix: Mix { write: 5, flush: 3, zero: 3, discard: 3, fua: 1, read: 0 },
            deaths: 0,
            closes: 0,
            steps: 200,
            ..base("replaced", ImageSpec { backing: 4 << 10, ..plain(10, 4 << 10) })
        },
        Workload { errors: 12, ..base("flaky", plain(9, 16 << 10)) },
        Workload {
            errors: 12,
            options: stress(),
            ..base("flaky-beneath", ImageSpec { backing: 12 << 10, ..plain(10, 16 << 10) })
        },
        base("block", ImageSpec { near: Some(Limit::Block(8)), ..plain(9, 32 << 10) }),
        Workload {
            options: stress(),
            deaths: 60,
            ..base("block-stress", ImageSpec { near: Some(Limit::Block(3)), ..plain(9, 24 << 10) })
        },
    ]
}

/// All of them with a journal: the process is killed often, and each time recovered.
#[must_use]
pub fn recovering() -> Vec<Workload> {
    recovered(all())
}

fn recovered(all: Vec<Workload>) -> Vec<Workload> {
    // Where there is hardly any room, and where there is plenty.
    let sizes = [3, 10, 64].into_iter().cycle();
    all.into_iter().zip(sizes).map(|(workload, size)| workload.recovering(size)).collect()
}

/// What the name of a workload ends with that is recovered.
const RECOVERING: &str = "+kill";

/// Workloads that are not among all: what planted bugs may cost is measured without them.
#[must_use]
pub fn named() -> Vec<Workload> {
    features::named()
}

/// The workload of this name.
#[must_use]
pub fn find(name: &str) -> Option<Workload> {
    let mut all = all();
    all.extend(named());
    let all = if name.ends_with(RECOVERING) { recovered(all) } else { all };
    all.into_iter().find(|workload| workload.label() == name)
}

impl Workload {
    fn recovering(self, journal: u32) -> Self {
        let options = Options { journal, ..self.options };
        Self { options, deaths: 40, ..self }
    }

    /// Its name on the command line, also of one that is recovered.
    #[must_use]
    pub fn label(&self) -> String {
        let end = if self.options.journal == 0 { "" } else { RECOVERING };
        [self.name, end].concat()
    }
}

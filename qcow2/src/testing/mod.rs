//! A simulated disk, a world to drive the engine in, and the explorer of its crashes, for tests.
//!
//! The engine meets the same events here as in the server, in an order that a seed chooses. Unlike
//! the rest of the crate this uses `std`, for hash maps, threads and `qemu-img`; it is compiled
//! only with the feature `testing`.
//!
//! ```text
//!   workload ──seed──► run ──requests──► engine ──operations──► disk ── rules (refuse)
//!                       │                                         │
//!                     guest (what each sector may hold)         cuts (what a crash may leave)
//!                       └────────────── judge ◄─────────────────┘
//! ```
//!
//! | room | what it is for |
//! | --- | --- |
//! | [`pool`], [`prng`] | contents of sectors by number; random numbers |
//! | [`disk`], [`rules`] | what is durable and what may be lost; the rules of order, from outside |
//! | [`world`], [`image`] | an engine and its disk; images made in code |
//! | [`kept`] | the journal of recovery, which survives a death |
//! | [`open`] | how much of an image is read to open it, and what is kept from guest data |
//! | [`files`] | an engine on real files, with all that an image names |
//! | [`guest`] | what each guest sector may hold, now and after a crash |
//! | [`cuts`], [`judge`] | the states a crash may leave, and whether one is right |
//! | [`format`] | what headers and table words say, for judge and rules |
//! | [`workload`], [`run`] | mixes of requests, and one seeded run of one |
//! | [`explore`], [`seen`] | many runs, all their crashes; which states were judged before |
//! | [`fuzz`] | damaged images and requests, as a fuzzer chooses them |
//! | [`faults`], [`scope`] | every fault at every place; every order of a few requests |
//! | [`qemu`] | `qemu-img` as the second judge |

pub mod cuts;
pub mod disk;
pub mod explore;
pub mod faults;
pub mod files;
pub(crate) mod format;
pub mod fuzz;
pub mod guest;
pub mod image;
pub mod judge;
pub mod kept;
pub(crate) mod open;
pub mod pool;
pub mod prng;
pub mod qemu;
pub mod rules;
pub mod run;
pub mod scope;
pub mod seen;
pub mod workload;
pub mod world;

pub use disk::Disk;
pub use files::Files;
pub use pool::{Pool, SECTOR, SectorId, SharedPool};
pub use prng::Prng;
pub use world::World;

/// A length or place in memory: tests use small files.
pub(crate) fn size(value: u64) -> usize {
    usize::try_from(value).expect("tests use small files")
}

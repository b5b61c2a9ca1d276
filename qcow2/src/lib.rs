//! A sans-I/O engine for the qcow2 image format.
//!
//! The engine is one plain value, [`Engine`]. Requests and completions go in, operations and
//! replies come out; the bytes of guest data never do. The server moves bytes with io_uring, the
//! tests play the disk, and both drive the very same code, so every order of completions and every
//! crash can be tried without a kernel.
//!
//! # The life of a request
//!
//! ```text
//!   submit(queue, tag, request)                      complete(op, outcome)
//!            │                                                │
//!            ▼                                                ▼
//!       ┌─────────┐   step    ┌────────────┐  all done   ┌─────────┐
//!       │  ready  │──────────►│ operations │────────────►│ commit  │──► next_reply(queue)
//!       └─────────┘           └────────────┘  (new       └─────────┘
//!         ▲    │ something is    next_op(queue) clusters)  mapping goes into the L2 page
//!    wake │    ▼ missing
//!       ┌─────────┐
//!       │ waiting │  for a page, a slot, an extended file, the end of a round, …
//!       └─────────┘
//! ```
//!
//! [`Engine::submit`] is two calls, so that all events of a turn are worked on at once:
//! [`Engine::hand_in`] and [`Engine::go_on`]; and likewise `complete`. A request that finds all it
//! needs in the caches takes a short way past the steps ([`hit`]).
//!
//! A step looks up all it needs and changes nothing before it has it; a request that misses
//! something notes what, is woken when that may be there, and looks again. See [`engine`].
//!
//! # The order on disk
//!
//! Metadata changes in memory and reaches the disk in rounds, in an order that leaves an image
//! with leaked clusters at the worst, whatever a power cut or a killed process keeps (soft
//! updates). Preparing things early makes most of that order free: a FLUSH costs one fdatasync,
//! or two. The argument is at the head of [`flush`].
//!
//! # What is mapped, and where bytes come from
//!
//! A **unit** is what has a mapping of its own: a cluster, or with extended L2 entries a subcluster
//! ([`units::GuestUnit`]). The on-disk words become an exhaustive [`entry::Mapping`] once, and
//! [`read`] cuts it into runs. Readers and copy-on-write ask the same question,
//! `Engine::locate`: it goes through overlay, L2 page and the layers beneath, and answers with
//! zeros, a place in a file, or a compressed cluster. So a write that replaces a cluster
//! (compressed, or shared with a snapshot) copies what the guest finds there, wherever that is.
//!
//! # What always holds
//!
//! - **This crate knows no file descriptor, clock, thread or randomness**; it is `no_std` and has
//!   no unsafe code. Everything it does follows from the order of the events.
//! - **Only `flush` and `grow` write metadata or sync.**
//! - **A reply to FLUSH comes after an fdatasync that was submitted when all it covers had
//!   completed.** A failed one is final ([`Health::Failed`]): it is never tried again and believed.
//! - **Guest data is never written where a table lies**, whatever the image says ([`metaset`]).
//! - **Requests, operations, pages and staging are bounded** by queue depth and cache budget, and
//!   are set aside at open. The top-level tables grow with the image ([`table`]).
//!
//! # Map
//!
//! | room | what it is for |
//! | --- | --- |
//! | [`units`], [`geometry`] | offsets and clusters as types; the constants of an image |
//! | [`header`], [`entry`] | on-disk words and what they mean; what is refused, by name |
//! | [`image`], [`layer`], [`snapshot`] | a checked image, what lies beneath it, its snapshots |
//! | [`bitmaps`] | persistent bitmaps: found, marked as in use, and left alone |
//! | [`table`], [`cache`], [`metaset`] | L1 and refcount table; L2 and refcount pages; overlaps |
//! | [`engine`], [`waiting`] | events and actions; what requests wait for |
//! | [`life`], [`report`] | failure, closing; counters |
//! | [`progress`], [`pages`] | operations and their completion; reading pages of tables |
//! | [`request`], [`optable`], [`op`] | requests, operations under way, what crosses the border |
//! | [`hit`] | the short way of reads and writes that find all they need in the caches |
//! | [`read`], [`write`], [`zero`], [`copy`] | the steps of each kind of request; copy-on-write |
//! | [`allocator`], [`refblock`] | the reservation of free clusters; new refcount blocks |
//! | [`extend`] | making the file longer |
//! | [`quarantine`] | from the last reference to being free |
//! | [`epoch`], [`overlay`] | what an fdatasync covers; mappings whose data it does not yet |
//! | [`flush`], [`grow`] | rounds, and moving the refcount table |
//! | [`journal`], [`record`], [`adopt`] | mappings that a killed process leaves to the next one |
//! | [`options`], [`error`] | options from the command line; what goes wrong |
//! | [`check`] | a consistency checker that shares nothing with the engine, and its repairs |
//! | [`info`] | what any image says of itself |
//! | [`resize`] | growing the virtual disk, while nobody serves it |
//! | `testing` | a simulated disk and what drives it (feature `testing`) |

#![no_std]
#![forbid(unsafe_code)]
#![expect(rustdoc::private_intra_doc_links, reason = "the tour is for those who build it, too")]

extern crate alloc;
#[cfg(feature = "testing")]
extern crate std;

mod adopt;
mod allocator;
mod bitmaps;
mod cache;
pub mod check;
mod copy;
mod engine;
mod entry;
mod epoch;
mod error;
mod extend;
mod flush;
mod geometry;
mod grow;
mod header;
mod hit;
mod image;
pub mod info;
pub mod journal;
mod layer;
mod life;
pub mod marks;
mod metaset;
mod op;
mod optable;
mod options;
mod overlay;
mod pages;
pub mod planted;
mod progress;
mod quarantine;
mod read;
mod record;
mod refblock;
mod report;
mod request;
pub mod resize;
mod snapshot;
mod table;
#[cfg(feature = "testing")]
pub mod testing;
mod units;
mod waiting;
mod write;
mod zero;

pub use bitmaps::Bitmap;
pub use engine::Engine;
pub use error::{Failure, FailureKind, IoErrorKind, OpenError, OpenErrorKind};
pub use geometry::Geometry;
pub use header::{Backing, Bitmaps, DataFile, Directory, Extent, Header};
pub use image::Image;
pub use journal::{JournalError, JournalEvent, Log, Record};
pub use layer::Layer;
pub use op::{
    COPY_BUFFER, Compressed, Compression, FileId, Op, OpId, OpKind, Outcome, Reply, Request,
};
pub use options::{Discards, Options};
pub use report::{Health, Memory, Stats};
pub use snapshot::Snapshot;
pub use units::{ClusterCount, GuestCluster, GuestOffset, HostCluster, HostOffset};

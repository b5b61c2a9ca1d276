//! One execution of the fuzzers: an image that is wrong, everything that reads images, and requests
//! to it on the simulated disk.
//!
//! The bytes of a fuzzer choose one of the [skeletons](skeleton), which words of which tables are
//! changed and to what, whether it is repaired, how it is opened, which requests come, and in which
//! order and how the operations of the engine end. Bytes that begin as a qcow2 image are that image
//! themselves, and the last of them choose the rest.
//!
//! What is asked: nothing panics, every request is answered within bounded work, no byte is
//! written that must not be ([`Fence`]), a check after a repair finds what the repair has said, and
//! an image that was sound still is so. Whether reads return what they should is for other tests;
//! here the image is wrong. Time and memory are measured by who calls this.
//!
//! Two callers: `qcow2/tests/fuzz`, seeded and bounded, and cargo-fuzz in `qcow2/fuzz`.

use std::rc::Rc;
use std::string::ToString;
use std::vec;
use std::vec::Vec;

use crate::check::repair::Repair;
use crate::info::info;
use crate::op::Compression;
use crate::testing::world::{Beneath, Inflate};

mod bench;
mod choices;
mod damage;
mod fence;
mod mend;
mod skeleton;

use choices::Choices;
pub use fence::Fence;
pub use mend::may_stay;
use skeleton::Skeleton;

/// No host has room for files longer than this, in bytes.
const ROOM: usize = 8 << 20;

/// The memory that an execution may take, in bytes: the caches and 64 MiB.
pub const MOST_MEMORY: usize = (64 << 20) + (80 << 10);
const _: () = assert!(bench::L2_CACHE + bench::REFCOUNT_CACHE == 80 << 10);

/// How far an execution came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The operations with which the image was served; `None`: it was refused.
    pub served: Option<u64>,
    /// It was repaired, or found to need no repair.
    pub mended: bool,
}

/// What the bytes of a fuzzer mean.
struct Input<'a> {
    image: Vec<u8>,
    data: Option<Rc<[u8]>>,
    beneath: Vec<Beneath>,
    choices: Choices<'a>,
}

std::thread_local! {
    static SKELETONS: Vec<Skeleton> = skeleton::all();
}

/// Prepares what all executions of a thread share, so that none is charged for it.
pub fn prepare() {
    SKELETONS.with(|all| assert!(!all.is_empty()));
}

impl<'a> Input<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        if bytes.starts_with(b"QFI\xfb") {
            let tail = (bytes.len() / 4).min(256);
            let choices = Choices::new(&bytes[bytes.len() - tail..]);
            return Self { image: bytes.to_vec(), data: None, beneath: Vec::new(), choices };
        }
        let mut choices = Choices::new(bytes);
        let number = usize::from(choices.byte());
        let Skeleton { image, data, mut beneath } =
            SKELETONS.with(|all| all[number % all.len()].clone());
        let mut image = image.to_vec();
        for _ in 0..choices.below(6) {
            damage::damage(&mut image, &mut choices);
        }
        for file in beneath.iter_mut().filter(|file| file.qcow2) {
            let mut bytes = file.bytes.to_vec();
            for _ in 0..choices.below(3) {
                damage::damage(&mut bytes, &mut choices);
            }
            file.bytes = Rc::from(bytes);
        }
        Self { image, data, beneath, choices }
    }
}

/// Does with `bytes` all that can be done; `inflate` is the server's.
///
/// # Panics
/// Where anything does that reads images, and where something is not as it should be.
#[must_use]
pub fn execute(bytes: &[u8], inflate: Inflate) -> Outcome {
    let mut input = Input::of(bytes);
    let mut outcome = Outcome::default();
    if let Err(error) = info(&input.image[..]) {
        assert!(!error.to_string().is_empty());
    }
    let choice = input.choices.byte();
    let what = match choice & 7 {
        5 | 6 => Some(Repair::All),
        7 => Some(Repair::Leaks),
        _ => None,
    };
    if let Some(what) = what {
        outcome.mended = mend::mend(&mut input.image, what, ROOM);
    } else if let Err(error) = crate::check::check(&input.image[..]) {
        assert!(!error.to_string().is_empty());
    }
    if choice & 0x38 == 0x38 {
        decode(input.choices.rest(), inflate);
    }
    match bench::serve(input, inflate) {
        Ok(operations) => outcome.served = Some(operations),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    outcome
}

/// Takes `bytes` for the compressed bytes of a cluster.
pub fn decode(bytes: &[u8], inflate: Inflate) {
    let mut choices = Choices::new(bytes);
    let mut cluster = vec![0; 1 << (9 + choices.below(8))];
    for method in [Compression::Zlib, Compression::Zstd] {
        // Whether it is good or bad is for the decoder's own tests.
        let _ = inflate(method, choices.rest(), &mut cluster);
    }
}

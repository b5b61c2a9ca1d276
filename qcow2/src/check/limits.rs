//! A check that gives up where it would take too much.

use core::cell::Cell;

use super::header::Head;
use super::{CheckError, Checker, ReadAt, ReadError, Report, Slot};

/// How much a check may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of metadata to be read.
    pub read: u64,
    /// Bytes of memory for what is counted per cluster of the file.
    pub memory: u64,
}

/// Checks an image if that takes no more than the limits; `None` where it would.
///
/// # Errors
/// Where it cannot be judged; see [`CheckError`].
pub fn check_within<R: ReadAt + ?Sized>(
    image: &R,
    limits: Limits,
) -> Result<Option<Report>, CheckError> {
    let mut checker = Checker::new();
    let done = checker.walk_within(image, Head::parse(image)?, limits, &mut |_, _| {})?;
    Ok(done.then(|| checker.state.report()))
}

/// Bytes of memory that a check or a repair of this file takes for what it counts per cluster.
///
/// # Errors
/// Where it cannot be judged; see [`CheckError`].
pub fn memory_for<R: ReadAt + ?Sized>(image: &R) -> Result<u64, CheckError> {
    Ok(memory(image.len(), &Head::parse(image)?))
}

fn memory(len: u64, head: &Head) -> u64 {
    let clusters = len.div_ceil(head.cluster_size()).saturating_add(1);
    clusters.saturating_mul(size_of::<Slot>() as u64)
}

impl Checker {
    /// Counts what an image references; `false` where that would take more than the limits.
    pub(super) fn walk_within<R: ReadAt + ?Sized>(
        &mut self,
        image: &R,
        head: Head,
        limits: Limits,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<bool, CheckError> {
        // A file may be long and have next to nothing in it, so this is known before all else.
        if memory(image.len(), &head) > limits.memory {
            return Ok(false);
        }
        let metered = Metered { file: image, left: Cell::new(limits.read) };
        let walked = self.walk(&metered, head, progress);
        if metered.left.get() == 0 {
            return Ok(false);
        }
        walked.map(|()| true)
    }
}

/// A file of which no more than so many bytes can be read.
struct Metered<'a, R: ReadAt + ?Sized> {
    file: &'a R,
    left: Cell<u64>,
}

impl<R: ReadAt + ?Sized> ReadAt for Metered<'_, R> {
    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.left.set(self.left.get().saturating_sub(buf.len() as u64));
        if self.left.get() == 0 { Err(ReadError) } else { self.file.read_at(offset, buf) }
    }
}

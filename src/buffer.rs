//! Memory that the kernel reads and writes on our behalf: page-aligned, mapped once, never given
//! back.
//!
//! An io_uring operation may still touch its buffer after everything that names it in this process
//! is gone (a ring is torn down asynchronously), so an [`Area`] lives as long as the process. There
//! is a handful of them per device, all made at start.
//!
//! **Invariant:** no reference into an area is ever handed out, since the kernel writes there at
//! any moment; bytes are copied in and out. (One of the four files with `unsafe`.)

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering};

use bytemuck::Pod;

/// The page size that everything here is aligned to.
pub const PAGE: usize = 4096;

/// A mapped range of memory that stays mapped until the process ends.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    start: *mut u8,
    len: usize,
    writable: bool,
}

// SAFETY: the memory is never unmapped, and all access from here is by copying through raw
// pointers; two threads that race on the same bytes would be a bug, so each area has one owner
// (a queue thread, or the control plane). The one that queue threads share is that of the buffers
// of copies: of each buffer one operation at a time is under way, and the lock around the engine
// lies between one and the next.
unsafe impl Send for Area {}

/// A checked range of an [`Area`], as an operation names it.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    start: *mut u8,
    len: u32,
}

impl Piece {
    /// Where it begins, for the kernel.
    pub fn address(self) -> *mut u8 {
        self.start
    }

    /// Its length in bytes.
    pub fn len(self) -> u32 {
        self.len
    }
}

impl Area {
    /// Zero-filled memory of `len` bytes, rounded up to pages. Pages are committed by use.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping at an address the kernel chooses aliases nothing.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        Self::mapped(start, len, true)
    }

    /// The first `len` bytes of `file` from `offset` on, shared with the kernel and read-only here.
    pub fn map_shared(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let len = len.next_multiple_of(PAGE);
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address the kernel chooses; it is only read, through
        // volatile copies, so that a change by the kernel cannot break an assumption of ours.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len, libc::PROT_READ, flags, file.as_raw_fd(), offset)
        };
        Self::mapped(start, len, false)
    }

    fn mapped(start: *mut libc::c_void, len: usize, writable: bool) -> io::Result<Self> {
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len, writable })
    }

    /// The range of `len` bytes at `at`, which must lie inside.
    pub fn piece(&self, at: usize, len: u32) -> Piece {
        assert!(self.writable, "the kernel is never asked to write to a read-only mapping");
        Piece { start: self.pointer(at, len as usize), len }
    }

    /// Copies bytes from `at` on into `to`.
    pub fn copy_out(&self, at: usize, to: &mut [u8]) {
        let from = self.pointer(at, to.len());
        // SAFETY: `from` is valid for `to.len()` bytes, and `to`, being a Rust slice, cannot
        // overlap an area (no reference into one exists).
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies `from` to the bytes from `at` on.
    pub fn copy_in(&self, at: usize, from: &[u8]) {
        assert!(self.writable, "a read-only mapping is not written to");
        let to = self.pointer(at, from.len());
        // SAFETY: as in `copy_out`, and the mapping is writable.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Reads up to `len` bytes at `offset` of a file to `at`: how many, at least one.
    pub fn read_from(&self, file: &File, offset: u64, at: usize, len: usize) -> io::Result<u32> {
        assert!(self.writable, "a read-only mapping is not written to");
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let to = self.pointer(at, len).cast();
        // SAFETY: the range was checked, and the mapping is writable.
        moved(|| unsafe { libc::pread(file.as_raw_fd(), to, len, offset) })
    }

    /// Writes up to `len` bytes from `at` on to `offset` of a file: how many, at least one.
    pub fn write_to(&self, file: &File, offset: u64, at: usize, len: usize) -> io::Result<u32> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let from = self.pointer(at, len).cast();
        // SAFETY: the range was checked.
        moved(|| unsafe { libc::pwrite(file.as_raw_fd(), from, len, offset) })
    }

    /// Makes the `len` bytes from `at` on zero.
    pub fn zero(&self, at: usize, len: usize) {
        assert!(self.writable, "a read-only mapping is not written to");
        // SAFETY: the range was checked, the mapping is writable.
        unsafe { ptr::write_bytes(self.pointer(at, len), 0, len) }
    }

    /// The plain value at byte `at`, read once.
    pub fn read<T: Pod>(&self, at: usize) -> T {
        let from = self.pointer(at, size_of::<T>()).cast::<T>();
        assert!(from.is_aligned(), "a value in a mapping is aligned as its type");
        // SAFETY: in bounds and aligned; any bytes are a valid `Pod`; volatile, since the other
        // side of a shared mapping is the kernel.
        unsafe { from.read_volatile() }
    }

    /// Writes a number at byte `at`, after all that was copied in before: for the kernel, which
    /// looks at it first.
    pub fn publish(&self, at: usize, value: u16) {
        assert!(self.writable, "a read-only mapping is not written to");
        let to = self.pointer(at, size_of::<u16>()).cast::<u16>();
        assert!(to.is_aligned(), "a value in a mapping is aligned as its type");
        // SAFETY: in bounds and aligned; nothing else in this process writes there at the same
        // time, since an area has one owner.
        unsafe { AtomicU16::from_ptr(to) }.store(value, Ordering::Release);
    }

    fn pointer(&self, at: usize, len: usize) -> *mut u8 {
        let end = at.checked_add(len).expect("a range of a buffer does not wrap around");
        assert!(end <= self.len, "bytes {at}..{end} lie outside a buffer of {}", self.len);
        self.start.wrapping_add(at)
    }
}

/// The count that a system call returns, tried again when it was interrupted.
fn moved(call: impl Fn() -> isize) -> io::Result<u32> {
    loop {
        match u32::try_from(call()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_in_comes_out_and_the_rest_is_zero() {
        let area = Area::new(5000).unwrap();
        area.copy_in(4094, b"qcow2");
        let mut bytes = [1; 7];
        area.copy_out(4093, &mut bytes);
        assert_eq!(&bytes, b"\0qcow2\0");
        area.zero(4094, 5);
        assert_eq!(area.read::<u32>(4096), 0);
    }

    #[test]
    fn what_is_written_to_a_file_is_read_from_it() {
        let file = tempfile::tempfile().unwrap();
        let area = Area::new(100).unwrap();
        area.copy_in(10, b"qcow2");
        assert_eq!(area.write_to(&file, 3, 10, 5).unwrap(), 5);
        assert_eq!(area.read_from(&file, 4, 20, 50).unwrap(), 4);
        let mut bytes = [1; 5];
        area.copy_out(20, &mut bytes);
        assert_eq!(&bytes, b"cow2\0");
        assert!(area.read_from(&file, 8, 20, 50).is_err(), "nothing is not a success");
    }

    #[test]
    fn areas_begin_at_a_page() {
        let area = Area::new(1).unwrap();
        assert_eq!(area.piece(0, 4096).address() as usize % PAGE, 0);
    }
}

//! Where the ublk driver leaves the tags of requests that it delivers in batches: buffers that a
//! ring offers the kernel (a ring of buffers, `io_uring_register(2)`), and that go back to it as
//! soon as the tags are copied out.

use std::io;

use crate::buffer::{Area, PAGE};

/// Buffers on offer. One is used per delivery, and all are given back in every turn of the ring's
/// owner; should it run out of them, the driver ends the command, and the owner sends it again.
pub const BUFFERS: u16 = 16;

/// Bytes of each: the driver delivers at most 128 tags at a time.
const BYTES: u32 = 128 * TAG;
/// Bytes of a tag.
const TAG: u32 = 2;

/// Bytes of an entry of the ring of buffers: address, length, number (`struct io_uring_buf`).
const ENTRY: usize = 16;
/// Where the ring's tail is: in the last bytes of its first entry, which that does not use.
const TAIL: usize = 14;

/// The buffers, and the tags that have come in them.
pub struct Inbox {
    ring: Area,
    bytes: Area,
    tail: u16,
    tags: Vec<u16>,
    /// How the command ended that brings them.
    ended: Option<i32>,
}

impl Inbox {
    /// For requests of `depth` tags.
    pub fn new(depth: u16) -> io::Result<Self> {
        let mut inbox = Self {
            ring: Area::new(PAGE)?,
            bytes: Area::new(usize::from(BUFFERS) * BYTES as usize)?,
            tail: 0,
            tags: Vec::with_capacity(depth.into()),
            ended: None,
        };
        for number in 0..BUFFERS {
            inbox.offer(number);
        }
        Ok(inbox)
    }

    /// Where the ring of buffers begins, for the kernel.
    pub fn address(&self) -> u64 {
        self.ring.piece(0, 0).address() as u64
    }

    /// A completion: so many bytes in the buffer of this number, and whether more will follow.
    pub fn take(&mut self, result: i32, buffer: Option<u16>, more: bool) {
        if let Some(number) = buffer {
            let at = start(number);
            for index in 0..usize::try_from(result).unwrap_or(0) / TAG as usize {
                self.tags.push(self.bytes.read(at + index * TAG as usize));
            }
            self.offer(number);
        }
        if !more {
            self.ended = Some(result);
        }
    }

    /// The tags that have come.
    pub fn tags(&mut self) -> impl Iterator<Item = u16> {
        self.tags.drain(..)
    }

    /// How the command has ended, once.
    pub fn ended(&mut self) -> Option<i32> {
        self.ended.take()
    }

    /// Gives a buffer (back) to the kernel.
    fn offer(&mut self, number: u16) {
        let entry = usize::from(self.tail % BUFFERS) * ENTRY;
        let piece = self.bytes.piece(start(number), BYTES);
        self.ring.copy_in(entry, bytemuck::bytes_of(&(piece.address() as u64)));
        self.ring.copy_in(entry + 8, bytemuck::bytes_of(&BYTES));
        self.ring.copy_in(entry + 12, bytemuck::bytes_of(&number));
        self.tail = self.tail.wrapping_add(1);
        self.ring.publish(TAIL, self.tail);
    }
}

fn start(number: u16) -> usize {
    assert!(number < BUFFERS, "the kernel uses the buffers that it was offered");
    usize::from(number) * BYTES as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_taken_out_and_their_buffer_goes_back() {
        let mut inbox = Inbox::new(128).unwrap();
        assert_eq!((inbox.tail, inbox.ring.read::<u16>(TAIL)), (BUFFERS, BUFFERS));
        inbox.bytes.copy_in(start(3), bytemuck::bytes_of(&[7u16, 127, 0]));
        inbox.take(6, Some(3), true);
        inbox.take(0, Some(4), true);
        assert_eq!(inbox.tags().collect::<Vec<_>>(), [7, 127, 0]);
        assert_eq!(inbox.ended(), None);
        assert_eq!(inbox.ring.read::<u16>(TAIL), BUFFERS + 2);
        // The two are at the places that the kernel looks at next: 0 and 1.
        assert_eq!((inbox.ring.read::<u16>(12), inbox.ring.read::<u16>(ENTRY + 12)), (3, 4));
        let address = inbox.bytes.piece(start(3), BYTES).address() as u64;
        assert_eq!((inbox.ring.read::<u64>(0), inbox.ring.read::<u32>(8)), (address, BYTES));
        inbox.take(-libc::ENOBUFS, None, false);
        assert_eq!((inbox.ended(), inbox.ended()), (Some(-libc::ENOBUFS), None));
        assert_eq!(inbox.tags().count(), 0);
    }
}

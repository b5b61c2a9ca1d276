//! Sectors by number: every content that a simulated disk or guest has seen is kept once.
//!
//! A disk image is then a short list of numbers: to copy one, to change a sector of one and to ask
//! whether a sector holds what it may are single loads and stores, which is what makes 10^8 crash
//! states a matter of an hour.

use core::fmt;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::vec::Vec;

/// What a disk writes in one piece, in bytes.
pub const SECTOR: usize = 512;
/// Words of a sector; table entries are big-endian words.
pub const WORDS: usize = SECTOR / 8;

/// The content of a sector. Number 0 is all zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorId(u32);

impl SectorId {
    /// All zeros.
    pub const ZERO: Self = Self(0);
}

/// One content.
#[derive(Clone)]
struct Entry {
    words: [u64; WORDS],
    hash: u64,
}

/// All contents so far.
#[derive(Clone)]
pub struct Pool {
    entries: Vec<Entry>,
    index: HashMap<u64, u32>,
}

/// A pool that disks, guests and judges of one thread share.
pub type SharedPool = Rc<RefCell<Pool>>;

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} sectors)", self.entries.len())
    }
}

/// The high and low half of a product, folded: the mixing step of all hashes here.
#[must_use]
pub fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    let low = product & u128::from(u64::MAX);
    u64::try_from(low ^ (product >> 64)).expect("both halves are 64 bits")
}

/// A hash of two words.
#[must_use]
pub fn mix(a: u64, b: u64) -> u64 {
    fold(a ^ 0x9e37_79b9_7f4a_7c15, b ^ 0xd1b5_4a32_d192_ed03) ^ fold(b ^ 0x2545_f491_4f6c_dd1d, !a)
}

fn hash(words: &[u64; WORDS]) -> u64 {
    if words.iter().all(|&word| word == 0) {
        return 0;
    }
    let mut state = 0x1234_5678_9abc_def1;
    for pair in words.chunks_exact(2) {
        state = mix(state ^ pair[0], pair[1]);
    }
    state.max(1)
}

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

impl Pool {
    /// A pool that knows the sector of zeros.
    #[must_use]
    pub fn new() -> Self {
        let zero = Entry { words: [0; WORDS], hash: 0 };
        let mut index = HashMap::new();
        index.insert(0, 0);
        Self { entries: std::vec![zero], index }
    }

    /// A new one to share.
    #[must_use]
    pub fn shared() -> SharedPool {
        Rc::new(RefCell::new(Self::new()))
    }

    /// The number of a content given as words.
    ///
    /// # Panics
    /// If two contents have the same 64-bit hash.
    pub fn intern_words(&mut self, words: &[u64; WORDS]) -> SectorId {
        let hash = hash(words);
        if let Some(&found) = self.index.get(&hash) {
            assert!(self.entries[found as usize].words == *words, "two sectors, one hash");
            return SectorId(found);
        }
        let id = u32::try_from(self.entries.len()).expect("fewer than 2^32 sectors");
        self.entries.push(Entry { words: *words, hash });
        self.index.insert(hash, id);
        SectorId(id)
    }

    /// The number of a content; short bytes are filled up with zeros.
    pub fn intern(&mut self, bytes: &[u8]) -> SectorId {
        let mut words = [0; WORDS];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_be_bytes(whole);
        }
        self.intern_words(&words)
    }

    /// The content as big-endian words.
    #[must_use]
    pub fn words(&self, id: SectorId) -> &[u64; WORDS] {
        &self.entries[id.0 as usize].words
    }

    /// A hash of the content that is the same in every pool; 0 for zeros.
    #[must_use]
    pub fn hash(&self, id: SectorId) -> u64 {
        self.entries[id.0 as usize].hash
    }

    /// The content as bytes.
    #[must_use]
    pub fn bytes(&self, id: SectorId) -> [u8; SECTOR] {
        let mut out = [0; SECTOR];
        for (chunk, word) in out.chunks_exact_mut(8).zip(self.words(id)) {
            chunk.copy_from_slice(&word.to_be_bytes());
        }
        out
    }

    /// What a sector at `place` adds to the hash of an image; nothing if it is zeros.
    #[must_use]
    pub fn hash_at(&self, place: usize, id: SectorId) -> u64 {
        if id == SectorId::ZERO { 0 } else { mix(place as u64, self.hash(id)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_have_the_same_number() {
        let mut pool = Pool::new();
        assert_eq!(pool.intern(&[0; SECTOR]), SectorId::ZERO);
        let one = pool.intern(&[1; SECTOR]);
        assert_eq!(pool.intern(&[1; SECTOR]), one);
        assert_eq!(pool.bytes(one), [1; SECTOR]);
        let short = pool.intern(&[7; 9]);
        assert_eq!(pool.words(short)[..3], [0x0707_0707_0707_0707, 0x07 << 56, 0]);
    }
}

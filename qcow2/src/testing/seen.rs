//! Which states were judged before: a set of 64-bit hashes that threads share.
//!
//! At 10^8 states the chance that any two hashes meet is below 10^-3; then one state is skipped.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Mutex;
use std::vec::Vec;

const SHARDS: u64 = 64;

/// The keys are hashes already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are words");
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}

type Shard = HashSet<u64, BuildHasherDefault<Identity>>;

/// The set.
pub struct Seen {
    shards: Vec<Mutex<Shard>>,
}

impl Default for Seen {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect() }
    }
}

impl Seen {
    /// Adds a key; true if it is new.
    ///
    /// # Panics
    /// If another thread has panicked.
    pub fn insert(&self, key: u64) -> bool {
        let shard = crate::testing::size((key >> 32) % SHARDS);
        self.shards[shard].lock().expect("no thread has panicked").insert(key)
    }
}

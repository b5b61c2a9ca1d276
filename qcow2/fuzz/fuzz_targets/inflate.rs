//! The server's decoders of compressed clusters.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2::testing::fuzz::{MOST_MEMORY, decode};

#[path = "../../tests/fuzz/memory.rs"]
mod memory;
#[path = "../../tests/fuzz/server.rs"]
mod server;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

fuzz_target!(|bytes: &[u8]| {
    let ((), peak) = memory::peak_of(|| decode(bytes, server::run));
    assert!(peak < MOST_MEMORY, "it took {peak} bytes of memory");
});

//! An image that is wrong, all that reads images, and requests to it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2::testing::fuzz::{MOST_MEMORY, execute, prepare};

#[path = "../../tests/fuzz/memory.rs"]
mod memory;
#[path = "../../tests/fuzz/server.rs"]
mod server;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

fuzz_target!(init: prepare(), |bytes: &[u8]| {
    let (_, peak) = memory::peak_of(|| execute(bytes, server::run));
    assert!(peak < MOST_MEMORY, "it took {peak} bytes of memory");
});

//! The server's own decoders, for the fuzzers: the file is the server's, since it is what meets the
//! images of others.

use std::cell::RefCell;

use qcow2::Compression;

#[path = "../../../src/inflate.rs"]
mod inflate;

std::thread_local! {
    static DECODERS: RefCell<inflate::Inflate> = RefCell::new(inflate::Inflate::new());
}

/// Fills `cluster` from compressed bytes, if they are good.
pub fn run(how: Compression, bytes: &[u8], cluster: &mut [u8]) -> bool {
    DECODERS.with(|decoders| match decoders.borrow_mut().run(how, bytes, cluster) {
        Ok(()) => true,
        Err(bad) => {
            assert!(!bad.to_string().is_empty());
            false
        }
    })
}

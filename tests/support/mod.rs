//! What the tests of this folder share.

use std::fs::OpenOptions;
use std::io::Write;

/// Says that a test does nothing here, and why; `tests/all` counts it as skipped.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    if let Ok(path) = std::env::var("TESTS_SKIPPED") {
        let file = OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.expect("the file for skipped tests"), "{why}").expect("writing to it");
    }
}

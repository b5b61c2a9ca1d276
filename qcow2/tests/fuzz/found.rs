//! What the fuzzers have found, each as small as it can be told.

use std::path::Path;

use qcow2::testing::{Disk, World};
use qcow2::{FailureKind, Health, OpKind, Options, Request};

fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/corrupt");
    std::fs::read(folder.join(name)).unwrap()
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// An entry that led to a table, compressed or without COPIED, was replaced by another: what it had
/// led to was counted down, and punched.
#[test]
fn a_table_is_not_given_up_because_an_entry_leads_to_it() {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    for table in ["l1", "l2", "refcount-table", "refcount-block"] {
        for flags in [0, 1 << 62] {
            let mut bytes = fixture(&format!("l2-entry-in-{table}.qcow2"));
            let l2 = word(&bytes, word(&bytes, 40)) & OFFSET;
            let target = word(&bytes, l2) & OFFSET;
            let at = usize::try_from(l2).unwrap();
            bytes[at..at + 8].copy_from_slice(&(target | flags).to_be_bytes());
            // No more than fits the refcount table, so that it stays where it is.
            let options = Options { reservation: 4096, ..Options::default() };
            let mut world = World::open(Disk::new(&bytes), &options).unwrap();
            world.handed = Some(Vec::new());
            world.settle();
            let write = Request::Write { offset: 0, len: 512, fua: false };
            for (request, len) in [(write, 512), (Request::Flush, 0), (Request::Flush, 0)] {
                world.submit(0, request, vec![0x77; len]);
                world.settle();
            }
            let why = format!("{table}, {flags:#x}");
            let punched = world.handed.take().unwrap().into_iter().find(|op| match *op {
                OpKind::Punch { offset, len } => offset <= target && target < offset + len,
                _ => false,
            });
            assert_eq!(punched, None, "{why}");
            let (disk, health) = world.close();
            assert!(
                matches!(health, Health::Failed(failure) if failure.kind == FailureKind::Overlap),
                "{why}: {health:?}"
            );
            let after = disk.bytes();
            let block = usize::try_from(word(&after, word(&after, 48))).unwrap();
            let counted = block + usize::try_from(target / 512 * 2).unwrap();
            assert_ne!(after[counted..counted + 2], [0, 0], "{why}: it is counted");
        }
    }
}

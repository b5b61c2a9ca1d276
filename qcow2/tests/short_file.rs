//! A file that ends within a cluster of data, which the format allows: what lies behind its end
//! reads as zeros, until it is written.

#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::path::Path;
use std::process::Command;

use qcow2::testing::{Disk, World};
use qcow2::{OpKind, Options, Request};

const CLUSTER: u64 = 1 << 16;
const CLUSTERS: u64 = 8;

/// Reads a whole guest cluster: where it lies in the file, and its bytes.
fn read(world: &mut World, cluster: u64) -> (u64, Vec<u8>) {
    let (offset, len) = (cluster * CLUSTER, u32::try_from(CLUSTER).unwrap());
    world.submit(1, Request::Read { offset, len }, vec![0xee; 1 << 16]);
    let mut place = 0;
    while world.replies.is_empty() {
        for op in &world.in_flight {
            if let OpKind::Read { offset, at: 0, .. } = op.kind {
                place = offset;
            }
        }
        world.complete(0);
    }
    assert!(world.replies.drain(..).all(|reply| reply.result.is_ok()));
    (place, world.buffers[1].clone())
}

#[test]
fn what_is_written_behind_the_end_of_the_file_is_read_back() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("short.qcow2");
    let size = (CLUSTERS * CLUSTER).to_string();
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=falloc"]);
    assert!(create.arg(&path).arg(size).status().expect("qemu-img must be installed").success());
    let mut bytes = std::fs::read(&path).unwrap();
    let mut world = World::open(Disk::new(&bytes), &Options::default()).unwrap();
    world.settle();
    let places = (0..CLUSTERS).map(|cluster| (read(&mut world, cluster).0, cluster));
    let (place, last) = places.max().unwrap();
    // Only 4 KiB of the last cluster are in the file.
    bytes.truncate(usize::try_from(place).unwrap() + 4096);
    let mut world = World::open(Disk::new(&bytes), &Options::default()).unwrap();
    world.settle();
    let (_, before) = read(&mut world, last);
    assert!(before[4096..].iter().all(|&byte| byte == 0));

    let offset = last * CLUSTER + (32 << 10);
    world.submit(0, Request::Write { offset, len: 4096, fua: false }, vec![7; 4096]);
    world.settle();
    assert!(world.replies.drain(..).all(|reply| reply.result.is_ok()));
    let (_, mut after) = read(&mut world, last);
    assert!(after[32 << 10..36 << 10].iter().all(|&byte| byte == 7), "what was written is gone");
    after[32 << 10..36 << 10].fill(0);
    assert_eq!(after, before);
}

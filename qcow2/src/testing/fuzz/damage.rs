//! Damages an image, one thing at a time: a word of a table to a value that means something
//! (another table, the end of the file, flags) more often than to noise, since a header of noise
//! never gets further than the parser.

use std::vec::Vec;

use super::choices::Choices;
use crate::testing::format::OFFSET;

fn word(file: &[u8], offset: usize) -> u64 {
    let bytes = file.get(offset..).and_then(|rest| rest.first_chunk::<8>());
    bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

fn put(file: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(place) = file.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len())) {
        place.copy_from_slice(bytes);
    }
}

/// A place in the file; behind its end if there is none.
fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn pointer(word: u64) -> usize {
    at(word & OFFSET)
}

/// Offsets and lengths of the header's fields.
const FIELDS: [(usize, usize); 19] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (104, 8),
];

/// The same of the fields of an entry of the snapshot table, and of the bitmap directory.
const SNAPSHOT: [(usize, usize); 6] = [(0, 8), (8, 4), (12, 2), (14, 2), (36, 4), (48, 8)];
const BITMAP: [(usize, usize); 7] = [(0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4)];

/// Changes one thing.
pub(super) fn damage(file: &mut Vec<u8>, choices: &mut Choices) {
    let (l1, refcounts, snapshots) = (word(file, 40), word(file, 48), word(file, 64));
    match choices.below(16) {
        0 | 1 => field(file, 0, &FIELDS, choices),
        2 => entry(file, at(l1), 16, choices),
        3 => entry(file, at(refcounts), 16, choices),
        4 | 5 => {
            let table = l2_table(file, choices);
            entry(file, table, 64, choices);
        }
        6 | 7 => refcount(file, choices),
        8 => {
            let place = at(choices.number(3)) % file.len().max(1);
            let value = value(file, choices).to_be_bytes();
            put(file, place, &value);
        }
        9 => {
            let len = at(choices.number(3)) % (file.len() + 1);
            file.truncate(len);
        }
        10 => copy_entry(file, choices),
        11 => field(file, at(snapshots), &SNAPSHOT, choices),
        12 => bitmaps(file, choices),
        13 => extension(file, choices),
        14 => copy_cluster(file, choices),
        _ => {
            // Longer by a few sectors and bytes.
            let len = file.len() + choices.below(8) * 512 + choices.below(3);
            file.resize(len, choices.byte());
        }
    }
}

fn field(file: &mut [u8], base: usize, fields: &[(usize, usize)], choices: &mut Choices) {
    let (offset, len) = fields[choices.below(fields.len())];
    let value = value(file, choices).to_be_bytes();
    put(file, base.saturating_add(offset), &value[8 - len..]);
}

/// One of the first `count` words of a table.
fn entry(file: &mut [u8], table: usize, count: usize, choices: &mut Choices) {
    let place = table.saturating_add(choices.below(count) * 8);
    let value = match choices.below(4) {
        // Only flags, or a neighbour.
        0 => word(file, place) ^ 1 << choices.below(64),
        _ => value(file, choices),
    };
    put(file, place, &value.to_be_bytes());
}

/// An L2 table of the active disk, or of the first snapshot.
fn l2_table(file: &[u8], choices: &mut Choices) -> usize {
    let l1 = if choices.one_in(4) { word(file, at(word(file, 64))) } else { word(file, 40) };
    pointer(word(file, at(l1).saturating_add(choices.below(4) * 8)))
}

/// The refcount of one of the first clusters, whatever its width.
fn refcount(file: &mut [u8], choices: &mut Choices) {
    let table = at(word(file, 48));
    let block = pointer(word(file, table.saturating_add(choices.below(2) * 8)));
    let place = block.saturating_add(choices.below(128));
    let bytes = [choices.byte() & 3, choices.byte()];
    put(file, place, &bytes[choices.below(2)..]);
}

/// Two entries of L1 or L2 tables become the same.
fn copy_entry(file: &mut [u8], choices: &mut Choices) {
    let l1 = at(word(file, 40));
    let table = pointer(word(file, l1));
    let from = if choices.one_in(2) { l1 } else { table };
    let value = word(file, from.saturating_add(choices.below(16) * 8));
    let into = if choices.one_in(4) { l1 } else { table };
    put(file, into.saturating_add(choices.below(32) * 8), &value.to_be_bytes());
}

/// Something of the directory of bitmaps, or of the extension that names it.
fn bitmaps(file: &mut [u8], choices: &mut Choices) {
    let head = &file[..file.len().min(1024)];
    let kind = 0x2385_2875_u32.to_be_bytes();
    let Some(found) = head.chunks_exact(8).position(|chunk| chunk[..4] == kind) else { return };
    let extension = found * 8;
    match choices.below(3) {
        0 => field(file, extension, &[(4, 4), (8, 4), (12, 4), (16, 8), (24, 8)], choices),
        1 => {
            let directory = at(word(file, extension + 24));
            field(file, directory, &BITMAP, choices);
        }
        _ => {
            let table = at(word(file, at(word(file, extension + 24))));
            entry(file, table, 4, choices);
        }
    }
}

/// A header extension of any kind, behind the header.
fn extension(file: &mut [u8], choices: &mut Choices) {
    const KINDS: [u32; 6] = [0, 0xe279_2aca, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441];
    let place = 104 + choices.below(12) * 8;
    put(file, place, &KINDS[choices.below(KINDS.len())].to_be_bytes());
    let len = match choices.below(4) {
        0 => u32::MAX - u32::from(choices.byte()),
        1 => u32::from(choices.byte()),
        2 => 5,
        _ => 24,
    };
    put(file, place + 4, &len.to_be_bytes());
}

/// One of the first clusters is also another one.
fn copy_cluster(file: &mut [u8], choices: &mut Choices) {
    let cluster = 1_usize << (word(file, 16) & 31).clamp(9, 16);
    let (from, to) = (choices.below(64) * cluster, choices.below(64) * cluster);
    if from.max(to) + cluster <= file.len() {
        file.copy_within(from..from + cluster, to);
    }
}

/// A value that means something, or noise.
fn value(file: &[u8], choices: &mut Choices) -> u64 {
    let len = file.len() as u64;
    let cluster = 1_u64 << (word(file, 16) & 31);
    let base = match choices.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => len,
        3 => len.saturating_sub(cluster),
        4 => cluster * u64::from(choices.byte()),
        5 => word(file, 40),
        6 => word(file, 48),
        7 => choices.number(8),
        8 => 1 << choices.below(64),
        9 => choices.number(1),
        10 => (len + choices.number(2)) & !(cluster - 1),
        _ => choices.number(4),
    };
    match choices.below(6) {
        0 => base | 1 << 63,
        1 => base | 1 << 62,
        2 => base | 1,
        3 => base | (1 << 63) | 1,
        _ => base,
    }
}

//! Breaking images: one entry, refcount, header field or bit at a time.

use crate::dice::Dice;

pub(crate) fn u32_at(image: &[u8], at: usize) -> usize {
    let bytes = image.get(at..at + 4).unwrap_or(&[0; 4]);
    u32::from_be_bytes(bytes.try_into().unwrap()) as usize
}

pub(crate) fn u64_at(image: &[u8], at: usize) -> u64 {
    let bytes = image.get(at..at.saturating_add(8)).unwrap_or(&[0; 8]);
    u64::from_be_bytes(bytes.try_into().unwrap())
}

pub(crate) fn put(image: &mut [u8], at: usize, word: u64) {
    if let Some(bytes) = image.get_mut(at..at.saturating_add(8)) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
}

pub(crate) fn flip(image: &mut [u8], at: usize, bit: usize) {
    if let Some(byte) = image.get_mut(at) {
        *byte ^= 1 << bit;
    }
}

/// Where the tables of an image are, for breaking it.
pub(crate) struct Map {
    pub(crate) cluster: usize,
    pub(crate) order: usize,
    pub(crate) l1: Vec<usize>,
    pub(crate) l2: Vec<usize>,
    pub(crate) refcount_table: Vec<usize>,
}

impl Map {
    pub(crate) fn of(image: &[u8]) -> Self {
        let cluster = 1 << u32_at(image, 20).clamp(9, 21);
        let order = if u32_at(image, 4) == 2 { 4 } else { u32_at(image, 96).min(6) };
        let words = |start: u64, count: usize| -> Vec<usize> {
            let start = usize::try_from(start).unwrap_or(usize::MAX).min(usize::MAX / 2);
            (0..count.min(4096)).map(|nth| start + nth * 8).filter(|&at| at < image.len()).collect()
        };
        let l1 = words(u64_at(image, 40), u32_at(image, 36));
        let tables = l1.iter().map(|&at| u64_at(image, at) & 0x00ff_ffff_ffff_fe00);
        let l2 = tables.filter(|&at| at != 0).flat_map(|at| words(at, cluster / 8)).collect();
        let count = u32_at(image, 56).saturating_mul(cluster / 8);
        Self { cluster, order, l1, l2, refcount_table: words(u64_at(image, 48), count) }
    }

    /// An entry, rather one that is in use.
    fn entry(dice: &mut Dice, image: &[u8], of: &[usize]) -> usize {
        let used: Vec<_> = of.iter().copied().filter(|&at| u64_at(image, at) != 0).collect();
        if used.is_empty() || dice.below(4) == 0 {
            dice.pick(&[of, &[0]].concat())
        } else {
            dice.pick(&used)
        }
    }

    /// The refcount of a cluster becomes `count`, or changes by it if `relative`.
    pub(crate) fn set_refcount(
        &self,
        image: &mut [u8],
        cluster: usize,
        count: u64,
        relative: bool,
    ) {
        let per_block = (self.cluster * 8) >> self.order;
        let Some(&entry) = self.refcount_table.get(cluster / per_block) else { return };
        let block = usize::try_from(u64_at(image, entry)).unwrap_or(usize::MAX / 2);
        let first = (cluster % per_block) << self.order;
        let at = block + first / 64 * 8;
        let width = 1 << self.order;
        // In a word read from big-endian bytes: whole counts from the top, bits from the bottom.
        let shift = match width {
            1..=4 => 56 - first % 64 / 8 * 8 + first % 8,
            _ => 64 - width - first % 64,
        };
        let mask = if width == 64 { u64::MAX } else { (1 << width) - 1 };
        let word = u64_at(image, at);
        let old = word >> shift & mask;
        let new = if relative { old.wrapping_add(count) } else { count } & mask;
        put(image, at, word & !(mask << shift) | new << shift);
    }
}

/// An entry changes: its place, its alignment, a flag, or all of it.
fn change_entry(dice: &mut Dice, image: &mut [u8], map: &Map, way: usize) -> String {
    let (name, table) = match way {
        2 | 3 => ("L2", &map.l2),
        4 => ("L1", &map.l1),
        _ => ("refcount table", &map.refcount_table),
    };
    let flags = [63, 63, 63, 62, 0, 0, dice.below(64)];
    let at = Map::entry(dice, image, table);
    let old = u64_at(image, at);
    let place = (dice.below(image.len() / map.cluster + 3) * map.cluster) as u64;
    let new = match dice.below(6) {
        0 => 0,
        1 | 2 => old & !0x00ff_ffff_ffff_fe00 | place,
        3 => old ^ (512 << dice.below(12)),
        _ => old ^ (1 << dice.pick(&flags)),
    };
    put(image, at, new);
    format!("{name} entry at {at:#x}: {old:#x} is {new:#x}")
}

/// Breaks an image in one way and says how.
pub(crate) fn damage(dice: &mut Dice, image: &mut Vec<u8>) -> String {
    let map = Map::of(image);
    let clusters = image.len() / map.cluster;
    let way = dice.below(12);
    match way {
        0 | 1 => {
            let (cluster, count) = (dice.below(clusters), dice.pick(&[0, 1, 2, 3, 7, u64::MAX]));
            map.set_refcount(image, cluster, count, false);
            format!("refcount of {cluster} is {count}")
        }
        2..=5 => change_entry(dice, image, &map, way),
        6 => {
            let len = dice.below(image.len() + 1).max(dice.below(image.len()));
            image.truncate(len);
            format!("truncated to {len}")
        }
        7 => {
            // A second reference that the refcount knows of.
            let (from, to) =
                (Map::entry(dice, image, &map.l2), dice.pick(&[&map.l2[..], &[0]].concat()));
            let word = u64_at(image, from) & !(1 << 63);
            let cluster = usize::try_from((word & 0x00ff_ffff_ffff_fe00) / map.cluster as u64);
            put(image, from, word);
            put(image, to, word);
            map.set_refcount(image, cluster.unwrap_or(0), 1, true);
            format!("L2 entry at {from:#x} is at {to:#x}, too: {word:#x}")
        }
        8 => {
            let (at, bit) = (dice.below(112), dice.below(8));
            flip(image, at, bit);
            format!("header byte {at} bit {bit}")
        }
        9 => {
            // A guest cluster lies on a table, and the refcount knows of it.
            let at = Map::entry(dice, image, &map.l2);
            let cluster = dice.below(clusters);
            put(image, at, (cluster * map.cluster) as u64);
            map.set_refcount(image, cluster, 1, true);
            format!("L2 entry at {at:#x} is cluster {cluster}, and its refcount is higher by 1")
        }
        _ => {
            let at = dice.below(image.len()) / 8 * 8;
            let word = u64_at(image, at) ^ 1 << dice.below(64);
            put(image, at, word);
            format!("word at {at:#x} is {word:#x}")
        }
    }
}

//! The rows of the matrix: all combinations, which of them QEMU refuses, and a pairwise cover.

use std::collections::BTreeSet;
use std::fmt;

/// Virtual size of every image.
pub const SIZE: u64 = 16 << 20;

/// How many values each column has.
const LEVELS: [usize; 8] = [2, 4, 4, 2, 4, 5, 2, 3];

/// One combination: for each column the number of its value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row([usize; 8]);

/// What lies beneath an image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    None,
    Qcow2,
    Raw,
    /// A qcow2 image above a raw one that is longer; both are shorter than the image.
    Shorter,
}

/// Where guest data lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Plain,
    Zlib,
    Zstd,
    DataFile,
    DataFileRaw,
}

impl Row {
    pub fn count() -> usize {
        LEVELS.iter().product()
    }

    /// Row number `number` of the whole product.
    pub fn new(mut number: usize) -> Self {
        Self(LEVELS.map(|levels| {
            let value = number % levels;
            number /= levels;
            value
        }))
    }

    pub fn number(self) -> usize {
        let values = self.0.into_iter().zip(LEVELS).rev();
        values.fold(0, |number, (value, levels)| number * levels + value)
    }

    pub fn is_v2(self) -> bool {
        self.0[0] == 0
    }

    pub fn cluster_bits(self) -> u32 {
        [9, 12, 16, 21][self.0[1]]
    }

    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits()
    }

    pub fn refcount_bits(self) -> u32 {
        [1, 8, 16, 64][self.0[2]]
    }

    pub fn extended(self) -> bool {
        self.0[3] == 1
    }

    pub fn backing(self) -> Backing {
        [Backing::None, Backing::Qcow2, Backing::Raw, Backing::Shorter][self.0[4]]
    }

    pub fn storage(self) -> Storage {
        use Storage::{DataFile, DataFileRaw, Plain, Zlib, Zstd};
        [Plain, Zlib, Zstd, DataFile, DataFileRaw][self.0[5]]
    }

    pub fn snapshot(self) -> bool {
        self.0[6] == 1
    }

    pub fn preallocation(self) -> &'static str {
        ["off", "metadata", "full"][self.0[7]]
    }

    pub fn is_compressed(self) -> bool {
        matches!(self.storage(), Storage::Zlib | Storage::Zstd)
    }

    pub fn has_data_file(self) -> bool {
        matches!(self.storage(), Storage::DataFile | Storage::DataFileRaw)
    }

    /// Which of the [rules](RULES) apply.
    pub fn refusals(self) -> Vec<usize> {
        (0..RULES.len()).filter(|&rule| (RULES[rule].1)(self)).collect()
    }

    pub fn is_valid(self) -> bool {
        self.refusals().is_empty()
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes_no = |yes, name| if yes { name } else { "-" };
        let backing = match self.backing() {
            Backing::None => "-",
            Backing::Qcow2 => "qcow2",
            Backing::Raw => "raw",
            Backing::Shorter => "shorter",
        };
        let storage = match self.storage() {
            Storage::Plain => "plain",
            Storage::Zlib => "zlib",
            Storage::Zstd => "zstd",
            Storage::DataFile => "data",
            Storage::DataFileRaw => "data-raw",
        };
        write!(
            f,
            "{:4} {} {:4} r{:<2} {:3} {:7} {:8} {:4} {:8}",
            self.number(),
            if self.is_v2() { "v2" } else { "v3" },
            ["512", "4K", "64K", "2M"][self.0[1]],
            self.refcount_bits(),
            yes_no(self.extended(), "ext"),
            backing,
            storage,
            yes_no(self.snapshot(), "snap"),
            self.preallocation(),
        )
    }
}

/// A name, and whether it applies to a row.
type Rule = (&'static str, fn(Row) -> bool);

/// Why a combination does not exist. These are no opinion of this test: QEMU is asked.
pub const RULES: [Rule; 10] = [
    ("v2 has refcounts of 16 bits", |row| row.is_v2() && row.refcount_bits() != 16),
    ("v2 has no extended L2 entries", |row| row.is_v2() && row.extended()),
    ("v2 has no zstd", |row| row.is_v2() && row.storage() == Storage::Zstd),
    ("v2 has no data file", |row| row.is_v2() && row.has_data_file()),
    ("extended L2 entries need clusters of 16K", |row| row.extended() && row.cluster_bits() < 14),
    ("a raw data file has nothing beneath", |row| {
        row.storage() == Storage::DataFileRaw && row.backing() != Backing::None
    }),
    ("a snapshot needs refcounts above 1", |row| row.snapshot() && row.refcount_bits() == 1),
    ("a data file has no snapshots", |row| row.snapshot() && row.has_data_file()),
    ("preallocation over a backing file needs extended L2 entries", |row| {
        row.preallocation() != "off" && row.backing() != Backing::None && !row.extended()
    }),
    ("what is preallocated is not written compressed", |row| {
        row.preallocation() != "off" && row.is_compressed()
    }),
];

/// How many rows are valid, and to how many others each rule applies first. A row can't vanish
/// without a change here.
pub const VALID: usize = 1016;
pub const REFUSED: [usize; 10] = [2880, 480, 96, 192, 960, 432, 306, 270, 696, 352];

pub fn all() -> impl Iterator<Item = Row> {
    (0..Row::count()).map(Row::new)
}

/// Valid rows so that every pair of values that some valid row has is in one of them.
pub fn pairwise() -> Vec<Row> {
    let rows: Vec<Row> = all().filter(|row| row.is_valid()).collect();
    let pairs = |row: Row| {
        let columns = 0..LEVELS.len();
        let two = columns.flat_map(|one| (0..one).map(move |other| (one, other)));
        two.map(move |(one, other)| (one, row.0[one], other, row.0[other]))
    };
    let mut left: BTreeSet<_> = rows.iter().flat_map(|&row| pairs(row)).collect();
    let mut chosen = Vec::new();
    while !left.is_empty() {
        let gain = |row: &Row| pairs(*row).filter(|pair| left.contains(pair)).count();
        let best = *rows.iter().max_by_key(|row| gain(row)).expect("there are rows");
        for pair in pairs(best) {
            left.remove(&pair);
        }
        chosen.push(best);
    }
    chosen
}

/// For each rule some rows that only this one forbids.
pub fn refused_by_one_rule(each: usize) -> Vec<Row> {
    let only = |rule| all().filter(move |row| row.refusals() == [rule]);
    (0..RULES.len())
        .flat_map(|rule| {
            let rows: Vec<Row> = only(rule).collect();
            let step = (rows.len() / each).max(1);
            rows.into_iter().step_by(step).take(each).collect::<Vec<_>>()
        })
        .collect()
}

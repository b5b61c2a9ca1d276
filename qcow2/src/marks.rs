//! Coverage marks: a line of the engine says its name, and a test sees to it that it was said.
//!
//! `mark!("flush.joined")` costs nothing without the feature `testing`. The list below is complete:
//! a mark that is not in it does not compile, and one that no run hits fails the test of the
//! explorer.

/// All marks.
pub const MARKS: &[&str] = &[
    "adopt.allocated_table",
    "adopt.copied_table",
    "adopt.death",
    "adopt.installed",
    "adopt.was_on_disk",
    "flush.waits_for_next_round",
    "grow.moved",
    "hit.read",
    "hit.write",
    "op.short",
    "quarantine.lowered_durably",
    "quarantine.pinned",
    "quarantine.punched",
    "quarantine.shared",
    "quarantine.still_counted",
    "quarantine.unlinked_durably",
    "record.waits_for_room",
    "reserve.cannot_zero",
    "reserve.file_cannot_grow",
    "reserve.fresh",
    "reserve.new_refcount_block",
    "reserve.put_back",
    "reserve.recycled",
    "reserve.waits_for_quarantine",
    "reserve.written",
    "round.folded",
    "round.makes_room_to_fold",
    "round.nothing_to_fold",
    "round.replaced_before_folded",
    "round.sync_a",
    "round.sync_b",
    "round.sync_grown",
    "table.copy_linked",
    "table.filled_first",
    "table.linked",
    "write.aborted",
    "write.overlay_full",
    "write.replaces",
    "write.to_overlay",
    "write.unordered",
    "write.waits_for_cluster",
    "zero.filled_data_file",
    "zero.punched_data_file",
    "zero.released",
    "zero.released_pending",
    "zero.subclusters",
];

/// The place of a mark in the list.
///
/// # Panics
/// At compile time, where a mark is not in the list.
#[must_use]
pub const fn index_of(name: &str) -> usize {
    let mut index = 0;
    while index < MARKS.len() {
        let (mine, theirs) = (MARKS[index].as_bytes(), name.as_bytes());
        let mut at = 0;
        while at < mine.len() && at < theirs.len() && mine[at] == theirs[at] {
            at += 1;
        }
        if at == mine.len() && at == theirs.len() {
            return index;
        }
        index += 1;
    }
    panic!("this mark is not in the list of marks.rs")
}

#[cfg(feature = "testing")]
mod hits {
    use super::MARKS;
    use core::sync::atomic::{AtomicBool, Ordering};

    static HIT: [AtomicBool; MARKS.len()] = [const { AtomicBool::new(false) }; MARKS.len()];

    /// Notes that mark number `index` was passed.
    pub fn hit(index: usize) {
        if !HIT[index].load(Ordering::Relaxed) {
            HIT[index].store(true, Ordering::Relaxed);
        }
    }

    /// The marks that nobody has passed in this process.
    pub fn missing() -> alloc::vec::Vec<&'static str> {
        let hit = |index: usize| HIT[index].load(Ordering::Relaxed);
        (0..MARKS.len()).filter(|&index| !hit(index)).map(|index| MARKS[index]).collect()
    }
}

#[cfg(feature = "testing")]
pub use hits::{hit, missing};

/// Notes that this line was passed, with the feature `testing`: `crate::mark!("flush.joined")`.
#[doc(hidden)]
#[macro_export]
macro_rules! mark {
    ($name:literal) => {{
        const INDEX: usize = $crate::marks::index_of($name);
        #[cfg(feature = "testing")]
        $crate::marks::hit(INDEX);
        #[cfg(not(feature = "testing"))]
        let _ = INDEX;
    }};
}

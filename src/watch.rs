//! The watch for operations below that do not return: a disk that hangs is told to the operator,
//! who else would only see a device that hangs.
//!
//! Each queue has one. Twice a second the queue looks at what it has in flight, and what has been
//! there for [`LIMIT`] is stuck. Operations of a kind on a file are one episode: it is logged once
//! when it begins and once when it ends. Nothing is given up: the kernel will return each of them.

use std::time::Duration;

use qcow2::{FileId, OpKind};

use crate::files;
use crate::ring::TICK;

/// What takes longer is stuck.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Ticks of [`TICK`], by which the watch counts.
pub type Ticks = u32;

/// Episodes that are told apart; operations of more are counted with none.
const MOST: usize = 32;

/// Operations of a kind on a file that do not return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Episode {
    pub file: FileId,
    pub what: &'static str,
    /// How many do not, and the first of them since when.
    pub count: u32,
    pub since: Ticks,
}

impl Episode {
    /// How long it has lasted.
    pub fn lasts(&self, now: Ticks) -> Duration {
        TICK * now.saturating_sub(self.since)
    }
}

/// The watch of one queue.
#[derive(Debug)]
pub struct Watch {
    now: Ticks,
    episodes: Vec<Episode>,
    /// How many of each were found by the present look.
    found: Vec<Episode>,
}

impl Watch {
    pub fn new() -> Self {
        Self { now: 0, episodes: Vec::with_capacity(MOST), found: Vec::with_capacity(MOST) }
    }

    /// The present tick: when an operation began.
    pub fn now(&self) -> Ticks {
        self.now
    }

    /// The episodes of now.
    pub fn episodes(&self) -> &[Episode] {
        &self.episodes
    }

    /// Another tick has passed, with these operations in flight: file, kind, tick of the beginning.
    pub fn tick(&mut self, in_flight: impl Iterator<Item = (FileId, OpKind, Ticks)>) {
        self.now = self.now.saturating_add(1);
        self.found.clear();
        for (file, kind, since) in in_flight {
            if TICK * self.now.saturating_sub(since) < LIMIT {
                continue;
            }
            let what = name_of(kind);
            let same = |one: &Episode| one.file == file && one.what == what;
            if let Some(at) = self.found.iter().position(same) {
                let one = &mut self.found[at];
                (one.count, one.since) = (one.count + 1, one.since.min(since));
            } else if self.found.len() < MOST {
                self.found.push(Episode { file, what, count: 1, since });
            }
        }
        self.tell();
        std::mem::swap(&mut self.episodes, &mut self.found);
    }

    /// Logs what begins and what ends.
    fn tell(&self) {
        let among = |all: &[Episode], one: &Episode| {
            all.iter().any(|other| other.file == one.file && other.what == one.what)
        };
        for one in self.found.iter().filter(|one| !among(&self.episodes, one)) {
            let (file, seconds) = (files::name(one.file), one.lasts(self.now).as_secs());
            let (count, what) = (one.count, one.what);
            tracing::warn!("stuck: {count} operations ({what}) on {file} for {seconds} s");
        }
        for one in self.episodes.iter().filter(|one| !among(&self.found, one)) {
            let (file, seconds) = (files::name(one.file), one.lasts(self.now).as_secs());
            tracing::warn!("no more stuck: {} on {file}, after {seconds} s", one.what);
        }
    }
}

/// What people call an operation.
fn name_of(kind: OpKind) -> &'static str {
    match kind {
        OpKind::Read { .. } | OpKind::CopyRead { .. } => "read",
        OpKind::MetaRead { .. } => "read of a table",
        OpKind::Write { .. } | OpKind::CopyWrite { .. } | OpKind::WriteZeros { .. } => "write",
        OpKind::MetaWrite { .. } => "write of a table",
        OpKind::Inflate { .. } | OpKind::CopyInflate { .. } => "read of a compressed cluster",
        OpKind::Fill { .. } | OpKind::CopyFill { .. } => "zeros",
        OpKind::ZeroRange { .. } | OpKind::Extend { .. } => "fallocate",
        OpKind::Punch { .. } => "punch",
        OpKind::Sync => "fdatasync",
        OpKind::Truncate { .. } => "truncate",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: OpKind = OpKind::Write { tag: 0, at: 0, offset: 0, len: 512 };

    fn ticks(watch: &mut Watch, count: u32, in_flight: &[(FileId, OpKind, Ticks)]) {
        for _ in 0..count {
            watch.tick(in_flight.iter().copied());
        }
    }

    #[test]
    fn what_does_not_return_is_stuck_after_the_limit_and_until_it_does() {
        let mut watch = Watch::new();
        ticks(&mut watch, 10, &[]);
        let began = watch.now();
        let limit = u32::try_from(LIMIT.as_millis() / TICK.as_millis()).unwrap();
        let three = [
            (FileId::Image, WRITE, began),
            (FileId::Image, OpKind::Sync, began + 2),
            (FileId::Image, WRITE, began + 1),
        ];
        ticks(&mut watch, limit - 1, &three);
        assert!(watch.episodes().is_empty(), "not yet");
        ticks(&mut watch, 1, &three);
        let write = Episode { file: FileId::Image, what: "write", count: 1, since: began };
        assert_eq!(watch.episodes(), [write]);
        ticks(&mut watch, 20, &three);
        let sync = Episode { what: "fdatasync", since: began + 2, ..write };
        assert_eq!(watch.episodes(), [Episode { count: 2, ..write }, sync]);
        assert_eq!(write.lasts(watch.now()), LIMIT + TICK * 20);
        ticks(&mut watch, 1, &three[1..2]);
        assert_eq!(watch.episodes(), [sync]);
        ticks(&mut watch, 1, &[]);
        assert!(watch.episodes().is_empty());
    }

    #[test]
    fn more_than_can_be_told_apart_are_no_harm() {
        let mut watch = Watch::new();
        let many: Vec<_> = (0..100u8).map(|layer| (FileId::Backing(layer), WRITE, 0)).collect();
        ticks(&mut watch, 1000, &many);
        assert_eq!(watch.episodes().len(), MOST);
    }
}

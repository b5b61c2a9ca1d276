//! Pages of tables: reading them into the caches, giving them up, and whether they are dirty.

use crate::cache::{Cache, Lookup, SlotId};
use crate::engine::Engine;
use crate::error::{FailureKind, IoErrorKind};
use crate::op::{FileId, OpId, OpKind};
use crate::optable::Owner;
use crate::read::file_of_page;
use crate::request::{Step, Stop, Wait, Which};
use crate::units::HostCluster;

impl Engine {
    pub(crate) fn cache(&mut self, which: Which) -> &mut Cache {
        match which {
            Which::L2 => &mut self.l2_cache,
            Which::Refcounts => &mut self.refcount_cache,
        }
    }

    /// Begins to read a page that is absent. `Err` says what to wait for: the page itself, or what
    /// is needed to read it.
    pub(crate) fn load(&mut self, which: Which, page: u64) -> Stop {
        // The last buffer is the round's: readers that take turns must not keep it from ending.
        if self.ops.staging_left() <= usize::from(!self.round.is_idle()) {
            return Stop::Wait(Wait::Staging);
        }
        self.load_for_round(which, page)
    }

    /// The same for a round, which may use the last staging buffer.
    pub(crate) fn load_for_round(&mut self, which: Which, page: u64) -> Stop {
        if !self.ops.has_staging() {
            return Stop::Wait(Wait::Staging);
        }
        let Some(slot) = self.cache(which).begin_load(page) else {
            // Every other page is dirty, or on its way: a round makes room.
            self.round.wanted |= self.cache(which).is_unclean();
            return Stop::Wait(Wait::Slot(which));
        };
        match which {
            Which::L2 => self.stats.l2_misses += 1,
            Which::Refcounts => self.stats.refcount_misses += 1,
        }
        self.stats.metadata_reads += 1;
        let len = u32::try_from(self.geometry().page_size()).expect("a page");
        let (file, number) = file_of_page(page);
        let offset = number << self.geometry().page_bits();
        self.emit_to(Owner::Load(which, slot), file, OpKind::MetaRead { offset, len });
        Stop::Wait(Wait::Page(which, page))
    }

    pub(crate) fn finish_page_load(
        &mut self,
        id: OpId,
        which: Which,
        slot: SlotId,
        result: Result<(), IoErrorKind>,
    ) {
        let page = self.cache(which).page_of(slot);
        let (file, number) = file_of_page(page);
        let offset = number << self.geometry().page_bits();
        if result.is_ok() {
            let bytes = self.ops.staging(id);
            let cache = match which {
                Which::L2 => &mut self.l2_cache,
                Which::Refcounts => &mut self.refcount_cache,
            };
            cache.finish_load(slot, bytes);
            self.wake(|wait| wait == Wait::Page(which, page));
        } else {
            self.cache(which).abandon_load(slot);
            self.incident(
                match file {
                    FileId::Backing(layer) => FailureKind::MetadataReadBeneath(layer),
                    _ => FailureKind::MetadataRead,
                },
                offset,
            );
            if which == Which::Refcounts {
                self.allocator.unreadable();
                self.abandon_lowering(page);
            }
            self.wake_failing(IoErrorKind::Io, |wait| wait == Wait::Page(which, page));
            if which == Which::L2 {
                self.fail_copies(page);
            }
            if which == Which::L2 && self.is_folding_into(page) {
                // Acknowledged mappings belong into this page, and can't get there.
                self.fail(FailureKind::MetadataRead, offset);
            }
        }
        self.wake(|wait| wait == Wait::Slot(which));
    }

    /// A cluster becomes an L2 table. Where the refcounts were wrong it may have been one before,
    /// and its pages of then are cached, or on their way. (None of them is dirty: a table is only
    /// ever given up to those who share it, and so was not ours to change.)
    pub(crate) fn forget_pages(&mut self, table: HostCluster) -> Step<()> {
        let geometry = self.geometry();
        let first = geometry.host_start(table).0 >> geometry.page_bits();
        for page in first..first + (1 << (geometry.cluster_bits() - geometry.page_bits())) {
            match self.l2_cache.lookup(page) {
                Lookup::Absent => {}
                Lookup::Loading => return Err(Stop::Wait(Wait::Page(Which::L2, page))),
                Lookup::Hit(slot) => self.l2_cache.forget(slot),
            }
        }
        Ok(())
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.l2_cache.is_unclean()
            || self.refcount_cache.is_unclean()
            || self.l1.is_dirty()
            || self.refcount_table.is_dirty()
            || !self.overlay.is_empty()
    }

    pub(crate) fn note_dirty(&mut self) {
        let now = self.now_ms;
        self.dirty_since_ms.get_or_insert(now);
        let crowded = self.l2_cache.is_crowded() || self.refcount_cache.is_crowded();
        self.round.wanted |= crowded;
    }
}

//! From one life of the image to the next: opening, dying, closing.

use std::format;
use std::string::ToString;

use super::{Run, Stage, Told, kinds};
use crate::report::Health;
use crate::testing::guest::describe;
use crate::testing::kept::Kept;
use crate::testing::world::World;

impl Run {
    /// The first sync has returned: what the disk holds now is durable.
    pub(super) fn opened(&mut self) -> Told<()> {
        self.tell(|_| "open: ready".into());
        let leaks = self.state_of_view()?;
        if leaks > self.most_leaks() {
            return Err(format!("{leaks} leaks, at most {} may be", self.most_leaks()));
        }
        self.leaks_before = leaks;
        // Writes that only the dead process knew of are lost, as in a power cut.
        let content = self.judge.content().to_vec();
        if self.recovers {
            // Those that it had acknowledged are not.
            let pool = self.pool.borrow();
            let told = self.guest.check_content(&content, &pool);
            told.map_err(|what| format!("after recovery: {what}"))?;
            self.recovers = false;
        }
        for (place, &id) in (0..).zip(&content) {
            if !self.guest.is_legal(place, id) {
                let found = describe(&self.pool.borrow(), id);
                return Err(format!("guest sector {place} holds {found} after opening"));
            }
        }
        self.guest.settle(&content);
        self.stage = Stage::Serving;
        Ok(())
    }

    pub(super) fn die(&mut self) -> Told<()> {
        self.tell(|run| format!("the process dies; in flight: {:?}", kinds(&run.world)));
        let in_flight = self.world.in_flight.len();
        if self.world.kept.is_some() && in_flight != 0 && self.prng.one_in(2) {
            let index = self.prng.index(in_flight);
            self.tell(|run| format!("… in what follows {:?}", run.world.in_flight[index].kind));
            self.world.die_at(index, &mut self.prng);
        }
        self.leaks_before = self.most_leaks();
        self.world.disk.death(&mut self.prng);
        if let Some(data) = &mut self.world.data {
            data.death(&mut self.prng);
        }
        self.guest.death();
        self.recovers = self.world.kept.is_some();
        self.reopen()
    }

    pub(super) fn closed(&mut self) -> Told<()> {
        self.tell(|_| "closed".into());
        if self.guest.busy() != 0 {
            return Err("the engine is closed, but requests have no answer".into());
        }
        if !self.world.in_flight.is_empty() {
            return Err(format!("the engine is closed, but has {:?}", kinds(&self.world)));
        }
        if self.faulted {
            // Whatever was reserved stays counted.
            self.leaks_before = u64::MAX / 2;
        } else {
            let leaks = self.check_view()?;
            if leaks > self.leaks_before {
                let before = self.leaks_before;
                return Err(format!("a clean close leaves {leaks} leaks, there were {before}"));
            }
            if !self.world.disk.changes().iter().all(|it| it.completed.is_some()) {
                return Err("the engine is closed, but the disk works on".into());
            }
        }
        self.guest.death();
        // A failed image is left as it is, with its journal; otherwise there is nothing in it.
        let kept = self.world.kept.clone().map(Kept::found).transpose();
        let kept = kept.map_err(|error| format!("the journal after closing: {error}"))?;
        let failed = matches!(self.world.engine.health(), Health::Failed(_));
        if let Some((_, records)) = kept {
            self.recovers = failed;
            if !failed && !records.is_empty() {
                return Err(format!("the engine is closed, but its journal has {records:?}"));
            }
        }
        self.reopen()
    }

    fn reopen(&mut self) -> Told<()> {
        let (mut disk, data) = (self.world.disk.clone(), self.world.data.take());
        disk.watch();
        let (plain, full) = (self.world.plain, self.world.full);
        let beneath = core::mem::take(&mut self.world.beneath);
        let (kept, options) = (self.world.kept.take(), &self.workload.options);
        let world = match kept.filter(|_| self.recovers) {
            Some(kept) => World::recover(disk, beneath, data, options, kept),
            None => World::open_on(disk, beneath, data, options).map_err(|error| error.to_string()),
        };
        self.world = world.map_err(|error| format!("the image does not open again: {error}"))?;
        (self.world.plain, self.world.full) = (plain, full);
        self.stage = Stage::Opening;
        self.faulted &= self.fault.is_some_and(|fault| fault.lasting);
        self.world.pump(Some(&self.guest));
        Ok(())
    }

    pub(super) fn has_failed(&self) -> bool {
        let failed = matches!(self.world.engine.health(), Health::Failed(_));
        self.recovers && failed && self.world.in_flight.is_empty()
    }

    /// Lets the process die, and its successor recover.
    ///
    /// # Errors
    /// What is wrong.
    pub(crate) fn kill(&mut self) -> Told<()> {
        self.die()?;
        for _ in 0..2000 {
            if self.world.engine.is_ready() {
                return self.opened();
            }
            self.complete_one()?;
            self.look()?;
        }
        Err("recovery does not end".into())
    }
}

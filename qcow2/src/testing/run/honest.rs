//! After a fault: who may fail because of it, and that all is well once the disk is.

use std::format;

use super::{Fault, Run, Stage, Told};
use crate::error::IoErrorKind;
use crate::op::{OpKind, Request};
use crate::report::Health;

impl Run {
    /// May this request fail with this error, after a fault that was met once?
    pub(super) fn check_honest(&self, tag: u16, request: Request, found: IoErrorKind) -> Told<()> {
        let (Some(Fault { kind, lasting: false, .. }), Some(hit)) = (self.fault, self.first) else {
            return Ok(());
        };
        if self.workload.errors != 0 || self.workload.deaths != 0 {
            // Other transfers fail, too; or it is another life that meets what one has left.
            return Ok(());
        }
        // These end writing for good, or may: a table that cannot be read while it is folded into.
        let latches =
            matches!(hit.kind, OpKind::MetaWrite { .. } | OpKind::MetaRead { .. } | OpKind::Sync);
        if latches && kind.is_some() {
            return Ok(());
        }
        let wrong = |why| {
            let fault = hit.kind;
            Err(format!("{request:?} was answered with {found}, {why}; the fault was {fault:?}"))
        };
        let owner = match hit.kind {
            OpKind::Read { tag, .. } | OpKind::Write { tag, .. } | OpKind::Inflate { tag, .. } => {
                Some(tag)
            }
            _ => None,
        };
        match kind {
            None => wrong("but a short transfer is no failure"),
            Some(kind) if kind != found => wrong("but that was not the error"),
            _ if self.asked[usize::from(tag)] > hit.step => wrong("but came after the fault"),
            _ if owner.is_some_and(|owner| owner != tag) => wrong("but it was another's operation"),
            _ if matches!(self.world.engine.health(), Health::Failed(_)) => {
                wrong("and writing has ended for good")
            }
            _ => Ok(()),
        }
    }

    /// The disk is well again: closes the image, opens it, and reads all of it.
    ///
    /// # Errors
    /// What is wrong.
    pub fn close_and_reopen(&mut self) -> Told<()> {
        self.fault = None;
        self.workload.errors = 0;
        if self.stage == Stage::Serving {
            self.stage = Stage::Closing;
            self.world.engine.close();
            self.world.pump(Some(&self.guest));
        } else if self.stage == Stage::Opening && self.is_stuck() {
            // It did not open. It does now, or it is as if the process had died.
            self.die()?;
        }
        let mut opened = false;
        for _ in 0..3000 {
            match self.stage {
                Stage::Serving if opened => {
                    self.settle()?;
                    return self.read_all();
                }
                Stage::Closing if self.world.in_flight.is_empty() => {
                    if !self.world.engine.is_closed() {
                        return Err(format!("closing hangs: {}", self.world.engine.waits()));
                    }
                    self.closed()?;
                    opened = true;
                }
                Stage::Opening if self.world.engine.is_ready() => self.opened()?,
                Stage::Serving => opened = true,
                Stage::Opening | Stage::Closing => self.complete_one()?,
            }
            self.look()?;
        }
        Err("closing and opening does not end".into())
    }
}

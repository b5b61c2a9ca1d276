//! What comes before a device: the image is opened, and mended where a crash has left it in need of
//! that; and what the options of `add` mean for the image, the device, and the record of both.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use qcow2::{Discards, Options};

use crate::cli::{AddArgs, Discard};
use crate::control::Control;
use crate::daemon::Reporter;
use crate::device::{self, Device};
use crate::fence::Fence;
use crate::files::Source;
use crate::front::Delivery;
use crate::journal;
use crate::open::{self, Mode, Opened};
use crate::resume;
use crate::server::What;
use crate::state::{self, State};

/// Opens the image, and mends what an earlier crash has left in it; or waits until the last server
/// of the device has gone, and brings in what that had acknowledged.
pub fn prepare(
    args: &AddArgs,
    what: &mut What,
    reporter: &mut Reporter,
) -> Result<(Control, Opened, Option<Arc<Fence>>)> {
    let mut wanted = wanted(args);
    if let What::Old { info, state } = what {
        let mut control = Control::open()?;
        reporter.stage("waiting for the last server's operations to end")?;
        let fence = Fence::take(info.dev_id)?;
        // Another may have served it since we looked.
        (*info, **state, _) = resume::waiting(&mut control, info.dev_id)?;
        resume::refuse_half_taken(state)?;
        if !args.read_only {
            let id = info.dev_id;
            open::mend_unfinished(&wanted, id, &mut |stage| reporter.stage(stage))?;
        }
        // A server that has handed its device over has left nothing in its journal.
        wanted.resume = (!args.read_only && !state.handed_over).then_some(info.dev_id);
        reporter.stage("opening the image")?;
        let opened = open::open(&wanted)?;
        refuse_another(&opened, state)?;
        return Ok((control, opened, Some(Arc::new(fence))));
    }
    reporter.stage("opening the image")?;
    if args.read_only {
        let opened = open::open(&wanted)?;
        return Ok((Control::open()?, opened, None));
    }
    State::refuse_waiting(open::look(&wanted)?)?;
    let control = Control::open()?;
    // It can be served, and there is somebody to serve it: only now is anything written.
    let mended = open::mend(&wanted, &mut |stage| reporter.stage(stage))?;
    let mut opened = open::open(&wanted)?;
    opened.notes.extend(mended);
    Ok((control, opened, None))
}

/// Another image in the place of the one that the device had would be a disk whose content changes
/// beneath what is mounted on it.
fn refuse_another(opened: &Opened, before: &State) -> Result<()> {
    let data = opened.files.data.as_ref().map(Source::identity).transpose()?;
    // Earlier versions did not record that of a data file.
    let same_data = before.data_identity.is_none() || data == before.data_identity;
    let same = opened.files.image.identity()? == before.identity && same_data;
    // It may have grown: the driver was not told any more.
    if same && opened.engine.virtual_size() >= before.virtual_size {
        return Ok(());
    }
    bail!(
        "it is not the image that device {0} has served: {1}; put that back in its place, or give \
         the device up with `ublk-qcow2 del -n {0} --force`",
        before.id,
        if same { "the disk is smaller" } else { "another file has its name, or its data file's" }
    )
}

fn wanted(args: &AddArgs) -> open::Wanted {
    let options = Options {
        read_only: args.read_only,
        queues: args.queues,
        depth: args.depth,
        l2_cache: args.l2_cache,
        refcount_cache: args.refcount_cache,
        stress: args.stress,
        journal: args.recovery.map_or(0, |_| journal::RECORDS),
        discards: match args.discard {
            Discard::Unmap => Discards::Unmap,
            Discard::Keep => Discards::Keep,
            Discard::Ignore => Discards::Ignore,
        },
        ..Options::default()
    };
    open::Wanted {
        mode: Mode::of(args.direct, args.buffered),
        block: args.block_size,
        data_file: args.data_file.clone(),
        allow_backing: args.allow_backing.clone(),
        snapshot: args.snapshot.clone(),
        lock: args.lock,
        ..open::Wanted::new(&args.file, options)
    }
}

/// The device that these options want for the image.
pub fn device(args: &AddArgs, opened: &Opened) -> device::Wanted {
    device::Wanted {
        id: args.number,
        queues: args.queues,
        depth: args.depth,
        path: args.data_path,
        delivery: args.delivery,
        unprivileged: args.unprivileged,
        partscan: args.partscan,
        recovery: args.recovery,
        memory_alignment: opened.files.memory_alignment(),
        size: opened.engine.virtual_size(),
        block: args.block_size,
        cluster_bits: opened.cluster_bits,
        read_only: args.read_only,
        discard: args.discard != Discard::Ignore,
    }
}

/// What the user should know, once all has gone well.
pub fn notes(args: &AddArgs, opened: &Opened, device: &Device) -> Vec<String> {
    let note = |note: &String| format!("{}: {note}", args.file.display());
    let mut notes: Vec<String> = opened.notes.iter().map(note).collect();
    if device.queues() < args.queues {
        let (made, cpus) = (device.queues(), "no more than there are CPUs");
        notes.push(format!("{made} of {} queues were made: {cpus}", args.queues));
    }
    notes
}

/// The record of the device.
pub fn describe(args: &AddArgs, opened: &Opened, device: &Device) -> Result<State> {
    // The name is shown to people only, so a name that is not UTF-8 may lose characters.
    let absolute = std::path::absolute(&args.file).unwrap_or_else(|_| args.file.clone());
    let recipe = match args.recovery {
        Some(_) => Some(args.absolute().context("the path of the image")?),
        None => None,
    };
    Ok(State {
        id: device.id(),
        pid: std::process::id(),
        pid_since: state::process_start(std::process::id()).unwrap_or(0),
        added_by: std::process::id(),
        image: args.file.to_string_lossy().into_owned(),
        image_path: absolute.to_string_lossy().into_owned(),
        version: opened.version,
        virtual_size: opened.engine.virtual_size(),
        cluster_size: 1 << opened.cluster_bits,
        read_only: args.read_only,
        direct: opened.direct,
        block_size: args.block_size,
        trusted: args.trust_content,
        data_path: device.path.name().to_string(),
        delivery: Delivery::of(&device.info).name().to_string(),
        close_error: None,
        failed: None,
        identity: opened.files.image.identity()?,
        data_identity: opened.files.data.as_ref().map(Source::identity).transpose()?,
        recipe,
        taking_over: false,
        handed_over: false,
    })
}

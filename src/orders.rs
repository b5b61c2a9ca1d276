//! What a server is told to do while it serves: over the socket `N.orders`, a line of JSON each
//! way.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::state::{self, State};

/// How long a server may take: to grow a disk it waits for requests to end, and where a table has
/// to move it counts all references of the image.
const LIMIT: Duration = Duration::from_secs(300);

/// How long a server waits for the line of somebody who has connected.
const ORDER_LIMIT: Duration = Duration::from_secs(2);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Grow the disk to so many bytes.
    Resize(u64),
    /// End, and leave the device to another server.
    HandOver,
}

/// What came of it: nothing, or why not.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Outcome {
    error: Option<String>,
}

/// Gives an order to the server of a device, and waits for its answer.
pub fn give(state: &State, order: &Order) -> Result<()> {
    let id = state.id;
    let outcome = send(id, order)
        .with_context(|| format!("device {id}: its server (process {})", state.pid))?;
    match outcome.error {
        Some(error) => bail!("device {id}, image {}: {error}", state.image_path),
        None => Ok(()),
    }
}

fn send(id: u32, order: &Order) -> Result<Outcome> {
    let mut stream =
        UnixStream::connect(state::path(id, "orders")).context("does not take orders")?;
    stream.set_read_timeout(Some(LIMIT))?;
    writeln!(stream, "{}", serde_json::to_string(order)?).context("does not take orders")?;
    let mut line = String::new();
    let read = BufReader::new(stream).read_line(&mut line);
    match read.map_err(|error| error.kind()) {
        Ok(1..) => serde_json::from_str(&line).context("gave no answer that can be read"),
        Ok(0) => bail!("ended before it was done"),
        Err(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => bail!(
            "has not answered within {} s and goes on; `ublk-qcow2 list -n {id}` tells how it is",
            LIMIT.as_secs()
        ),
        Err(_) => bail!("ended before it was done"),
    }
}

/// Takes one order from each who has connected, and answers with what came of it.
pub fn answer(listener: &UnixListener, mut obey: impl FnMut(Order) -> Result<()>) {
    while let Ok((stream, _)) = listener.accept() {
        // Somebody who says nothing, or is gone, is their own concern.
        let Some(order) = receive(&stream) else { continue };
        let error = obey(order).err().map(|error| format!("{error:#}"));
        let text = serde_json::to_string(&Outcome { error }).unwrap_or_default();
        let _ = writeln!(&stream, "{text}");
    }
}

fn receive(stream: &UnixStream) -> Option<Order> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(ORDER_LIMIT)).ok()?;
    stream.set_write_timeout(Some(ORDER_LIMIT)).ok()?;
    let mut line = String::new();
    // As long as any order, and no longer.
    BufReader::new(io::Read::take(stream, 4096)).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

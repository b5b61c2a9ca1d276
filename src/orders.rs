//! What a server is told to do while it serves: over the socket `N.orders`, a line of JSON each
//! way.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::state::{self, State};

/// How long a server may take to hear that it is to end.
const HEAR_LIMIT: Duration = Duration::from_secs(15);

/// How long it may take to grow the disk: it waits for requests to end, and where a table has to
/// move it counts all references of the image.
const GROW_LIMIT: Duration = Duration::from_secs(300);

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

impl Order {
    fn limit(self) -> Duration {
        match self {
            Self::Resize(_) => GROW_LIMIT,
            Self::HandOver => HEAR_LIMIT,
        }
    }
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
    stream.set_read_timeout(Some(order.limit()))?;
    writeln!(stream, "{}", serde_json::to_string(order)?).context("does not take orders")?;
    let mut line = String::new();
    let read = BufReader::new(stream).read_line(&mut line);
    match read.map_err(|error| error.kind()) {
        Ok(1..) => serde_json::from_str(&line).context("gave no answer that can be read"),
        Ok(0) => bail!("ended before it was done"),
        Err(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => bail!(
            "has not answered within {} s; `ublk-qcow2 list -n {id}` tells how it is",
            order.limit().as_secs()
        ),
        Err(_) => bail!("ended before it was done"),
    }
}

/// Takes one order from each who has connected, and answers with what came of it.
pub fn answer(listener: &UnixListener, mut obey: impl FnMut(Order) -> Result<()>) {
    while let Ok((stream, _)) = listener.accept() {
        // Somebody who says nothing, or is gone, is their own concern.
        let Ok(line) = receive(&stream) else { continue };
        if has_left(&stream) {
            continue;
        }
        let done = match serde_json::from_str(&line) {
            Ok(order) => obey(order),
            Err(_) => Err(anyhow!("its server, of another version, does not know this order")),
        };
        let error = done.err().map(|error| format!("{error:#}"));
        let text = serde_json::to_string(&Outcome { error }).unwrap_or_default();
        let _ = writeln!(&stream, "{text}");
    }
}

fn receive(stream: &UnixStream) -> io::Result<String> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(ORDER_LIMIT))?;
    stream.set_write_timeout(Some(ORDER_LIMIT))?;
    let mut line = String::new();
    // As long as any order, and no longer.
    BufReader::new(io::Read::take(stream, 4096)).read_line(&mut line)?;
    Ok(line)
}

/// Has given up waiting, perhaps long ago: this server may have been stopped meanwhile.
fn has_left(stream: &UnixStream) -> bool {
    let mut set = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    poll(&mut set, PollTimeout::ZERO).is_ok()
        && set[0].revents().is_some_and(|events| events.intersects(gone))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use tempfile::TempDir;

    use super::*;

    fn pair() -> (TempDir, UnixListener, UnixStream) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("orders");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let stream = UnixStream::connect(path).unwrap();
        (folder, listener, stream)
    }

    /// What is obeyed of what this stream has sent.
    fn obeyed(listener: &UnixListener) -> Vec<Order> {
        let mut orders = Vec::new();
        answer(listener, |order| {
            orders.push(order);
            Ok(())
        });
        orders
    }

    #[test]
    fn orders_are_obeyed_and_answered() {
        let (_folder, listener, mut stream) = pair();
        writeln!(stream, "{}", serde_json::to_string(&Order::Resize(512)).unwrap()).unwrap();
        assert_eq!(obeyed(&listener), [Order::Resize(512)]);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "{\"error\":null}\n");
    }

    #[test]
    fn who_has_left_is_not_obeyed() {
        let (_folder, listener, mut stream) = pair();
        writeln!(stream, "{}", serde_json::to_string(&Order::HandOver).unwrap()).unwrap();
        drop(stream);
        assert_eq!(obeyed(&listener), []);
    }

    #[test]
    fn an_order_of_another_version_is_answered() {
        let (_folder, listener, mut stream) = pair();
        writeln!(stream, "\"dance\"").unwrap();
        assert_eq!(obeyed(&listener), []);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("does not know this order"), "{answer}");
    }
}

//! Tells a service manager how far a server in the foreground is, by systemd's protocol: datagrams
//! to the socket that `NOTIFY_SOCKET` names. Without that variable nothing is sent.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use sd_notify::NotifyState;

use crate::list::plain;

/// What is being done on the way to a usable device, and how long it may take.
pub fn stage(what: &str, limit: Duration) {
    let limit = u32::try_from(limit.as_micros()).unwrap_or(u32::MAX);
    say(&[NotifyState::Status(&status(what)), NotifyState::ExtendTimeoutUsec(limit)]);
}

/// The device can be used. A manager that is not reached would stop the server at its time limit
/// and in the middle of its work, so this failure is one of the start.
pub fn ready(path: &Path) -> Result<()> {
    let text = status(&format!("serving {}", path.display()));
    sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&text)])
        .context("telling the service manager, at the socket in NOTIFY_SOCKET, that all is ready")
}

/// The device is going away, or gone.
pub fn stopping() {
    say(&[NotifyState::Stopping, NotifyState::Status("closing the image")]);
}

fn say(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("the service manager cannot be told: {error}");
    }
}

/// One line: what follows a line break would be a message of its own.
fn status(text: &str) -> String {
    plain(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_add_a_message() {
        let text = status("serving /dev/x\nMAINPID=1");
        assert_eq!(NotifyState::Status(&text).to_string(), "STATUS=serving /dev/x?MAINPID=1");
    }
}

//! `stiefel nbd`: one file or device for everybody who can reach the address.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::{Export, ExportOptions, Gate, Limits, Listed, Server, Upper, open_base, open_guest};

/// How long the end may take: a large page cache on a slow disk.
const STOP: Duration = Duration::from_secs(60);

/// What is served.
#[derive(Debug, Clone)]
pub struct Target {
    /// A file or block device.
    pub path: PathBuf,
    /// Where writes go instead of there.
    pub overlay: Option<Upper>,
}

/// A server of one export on some addresses.
pub struct Standalone {
    servers: Vec<Server>,
    export: Arc<Export>,
    uris: Vec<String>,
}

/// Everybody may have the one export, by its name or as the default.
struct Open(Arc<Export>);

impl Gate for Open {
    fn admit(&self, _peer: SocketAddr) -> bool {
        true
    }

    fn export(&self, name: &str, _peer: SocketAddr) -> Option<Arc<Export>> {
        (name.is_empty() || name == self.0.name()).then(|| Arc::clone(&self.0))
    }

    fn list(&self, _peer: SocketAddr) -> Vec<Listed> {
        vec![Listed {
            name: self.0.name().to_owned(),
            description: self.0.description().to_owned(),
        }]
    }
}

impl Standalone {
    /// Opens `target` and listens; port 0 takes a free one.
    ///
    /// # Errors
    /// The file cannot be exported, or an address cannot be listened on.
    pub fn start(
        target: &Target,
        listen: &[SocketAddr],
        options: ExportOptions,
        limits: &Limits,
    ) -> anyhow::Result<Self> {
        let export = match &target.overlay {
            None => Export::open(&target.path, options)?,
            Some(upper) => open_guest(&open_base(&target.path)?, &target.path, upper, options)?,
        };
        let mut servers = Vec::new();
        let mut uris = Vec::new();
        for address in listen {
            let listener = TcpListener::bind(address)
                .with_context(|| format!("cannot listen on {address}; choose another with --listen"))?;
            uris.push(uri(listener.local_addr()?, export.name()));
            servers.push(Server::start(
                listener,
                Arc::new(Open(Arc::clone(&export))),
                limits.clone(),
            )?);
        }
        Ok(Self { servers, export, uris })
    }

    /// Where it can be reached, as `nbd://` URIs, in the order of the addresses.
    #[must_use]
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// What is served.
    #[must_use]
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Ends all connections and flushes.
    ///
    /// # Errors
    /// Requests hang or the flush failed.
    pub fn stop(self) -> anyhow::Result<()> {
        // Also after an error the other servers are stopped, and the flush is tried.
        let mut result = Ok(());
        for server in self.servers {
            result = result.and(server.stop(STOP).map_err(anyhow::Error::from));
        }
        let flushed = self
            .export
            .flush()
            .context("the final flush failed; data may be lost, check the disk");
        result.and(flushed)
    }
}

/// Serves `target` until SIGINT or SIGTERM, then flushes. Prints one `nbd://` URI per address once it listens.
///
/// # Errors
/// As [`Standalone::start`] and [`Standalone::stop`].
pub fn run_standalone(target: &Target, listen: &[SocketAddr], options: ExportOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Before anyone is told that it runs, so that a signal never finds it unprepared.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let standalone = Standalone::start(target, listen, options, &Limits::default())?;
        for uri in standalone.uris() {
            println!("{uri}");
        }
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        standalone.stop()
    })
}

/// The export's address as the NBD URI specification writes it.
fn uri(address: SocketAddr, name: &str) -> String {
    let host = match address {
        SocketAddr::V4(v4) => v4.ip().to_string(),
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("[{}%25{}]", v6.ip(), v6.scope_id()),
        SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
    };
    let port = match address.port() {
        stiefel_shared::nbd::PORT => String::new(),
        port => format!(":{port}"),
    };
    let mut uri = format!("nbd://{host}{port}/");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_quoted() {
        let at = |address: &str, name| uri(address.parse().unwrap(), name);
        assert_eq!(at("127.0.0.1:10809", ""), "nbd://127.0.0.1/");
        assert_eq!(at("[::1]:1234", "disk 1/ä"), "nbd://[::1]:1234/disk%201%2F%C3%A4");
        assert_eq!(at("[fe80::1%3]:10809", "x"), "nbd://[fe80::1%253]/x");
    }
}

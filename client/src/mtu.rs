//! Larger packets, where both NICs and the path between them can: fewer of them, so less work for both machines.
//!
//! The laptop is asked to raise its NIC's MTU, the desktop raises its own, and a sign of life as long as the largest packet
//! shows whether the path carries it (a switch may not). If not, all goes back to what it was.

use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_shared::bundle::AttachSession;
use stiefel_shared::session::{SHORTEST, Sign};
use stiefel_sys::console::Console;
use stiefel_sys::link;

use crate::link::{Place, TUNNEL};
use crate::pulse::Heart;

/// Every Ethernet adapter's.
const USUAL: u32 = 1500;
/// The largest that switches and adapters commonly agree on.
const JUMBO: u32 = 9000;
/// What WireGuard adds to a packet over IPv6: headers of IPv6 (40), UDP (8) and its own (16), and a tag (16).
pub(crate) const TUNNEL_OVERHEAD: u32 = 80;
/// Headers of IPv6 and UDP in front of a sign of life.
const HEADERS: u32 = 48;
/// After so long a question is asked again: the tunnel may not be there yet, and some adapters restart their link for a new
/// size.
const ANSWER: Duration = Duration::from_secs(1);
/// How long all may take; the start of the desktop waits for it.
const PATIENCE: Duration = Duration::from_secs(15);
/// How much of that is left for going back.
const BACK: Duration = Duration::from_secs(3);

/// Agrees with the laptop on the NICs' MTU; what it is then, in bytes. Adapters whose driver names no limit are left alone.
pub(crate) fn agree(console: &Console, session: &AttachSession, place: &Place, nic: u32, heart: &mut Heart) -> u32 {
    let own = place.look(nic).ok().flatten().and_then(|link| link.max_mtu);
    let Some(wanted) = own.map(|most| most.min(JUMBO)).filter(|wanted| *wanted > USUAL) else {
        return USUAL;
    };
    let end = Instant::now() + PATIENCE;
    let theirs = ask(heart, wanted, SHORTEST, end - BACK).map_or(0, |sign| u32::from(sign.mtu));
    let common = wanted.min(theirs);
    if common <= USUAL {
        return USUAL;
    }
    let raised = set(session, place, nic, common)
        .and_then(|()| {
            // The laptop's must not be larger than ours: we might not receive it.
            if theirs > common {
                ask(heart, common, SHORTEST, end - BACK);
            }
            let overhead = session.link.tunnel.as_ref().map_or(0, |_| TUNNEL_OVERHEAD);
            let length = usize::try_from(common.saturating_sub(overhead + HEADERS))?;
            Ok(ask(heart, 0, length, end - BACK).is_some())
        })
        .unwrap_or_else(|error: anyhow::Error| {
            console.warn(&format!("the NIC's packet size cannot be raised: {error:#}"));
            false
        });
    if raised {
        console.info(&format!("packets of {common} bytes go to the laptop and back"));
        return common;
    }
    console.info(&format!(
        "packets of {common} bytes do not reach the laptop; they stay at {USUAL}"
    ));
    if let Err(error) = set(session, place, nic, USUAL) {
        console.warn(&format!("the NIC's packet size cannot be set back: {error:#}"));
    }
    ask(heart, USUAL, SHORTEST, end);
    USUAL
}

/// Makes the packets smaller: the laptop's cable is in another adapter now.
pub(crate) fn lower(
    console: &Console,
    session: &AttachSession,
    place: &Place,
    nic: u32,
    mtu: u32,
) -> anyhow::Result<()> {
    console.warn(&format!("the laptop's NIC takes packets of {mtu} bytes now"));
    set(session, place, nic, mtu.max(USUAL)).context("the NIC's packet size cannot be set")
}

fn ask(heart: &mut Heart, mtu: u32, length: usize, end: Instant) -> Option<Sign> {
    let mtu = u16::try_from(mtu).ok()?;
    while Instant::now() < end {
        if let Some(sign) = heart.ask(mtu, length, ANSWER) {
            return Some(sign);
        }
    }
    None
}

fn set(session: &AttachSession, place: &Place, nic: u32, mtu: u32) -> anyhow::Result<()> {
    place.set_mtu(nic, mtu)?;
    if session.link.tunnel.is_none() {
        return Ok(());
    }
    place.at_address(|| {
        if let Some(tunnel) = link::index_of(TUNNEL)? {
            link::set_mtu(tunnel, mtu.saturating_sub(TUNNEL_OVERHEAD))?;
        }
        Ok(())
    })
}
